"""Set up Food-101: python dataset_setup_scripts/food101.py [--root data] [--verify | --repair]"""

import sys

from _common import main

if __name__ == "__main__":
    sys.exit(main(["food101"]))
