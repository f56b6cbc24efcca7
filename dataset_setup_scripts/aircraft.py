"""Set up FGVC-Aircraft: python dataset_setup_scripts/aircraft.py [--root data] [--verify | --repair]"""

import sys

from _common import main

if __name__ == "__main__":
    sys.exit(main(["aircraft"]))
