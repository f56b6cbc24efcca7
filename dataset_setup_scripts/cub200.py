"""Set up CUB-200-2011: python dataset_setup_scripts/cub200.py [--root data] [--verify | --repair]"""

import sys

from _common import main

if __name__ == "__main__":
    sys.exit(main(["cub200"]))
