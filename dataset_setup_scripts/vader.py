"""Set up VADER's scored sentences: python dataset_setup_scripts/vader.py [--root data] [--verify | --repair]"""

import sys

from _common import main

if __name__ == "__main__":
    sys.exit(main(["vader"]))
