"""Set up PASCAL VOC 2012 with SBD's masks: python dataset_setup_scripts/voc.py [--root data] [--verify | --repair]"""

import sys

from _common import main

if __name__ == "__main__":
    sys.exit(main(["voc"]))
