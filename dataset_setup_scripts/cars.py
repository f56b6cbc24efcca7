"""Set up Stanford Cars, placed by hand: python dataset_setup_scripts/cars.py [--root data] [--verify | --repair]"""

import sys

from _common import main

if __name__ == "__main__":
    sys.exit(main(["cars"]))
