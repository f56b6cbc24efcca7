"""Set up 102 Flowers: python dataset_setup_scripts/flowers.py [--root data] [--verify | --repair]"""

import sys

from _common import main

if __name__ == "__main__":
    sys.exit(main(["flowers"]))
