"""Set up Oxford-IIIT Pets: python dataset_setup_scripts/pets.py [--root data] [--verify | --repair]"""

import sys

from _common import main

if __name__ == "__main__":
    sys.exit(main(["pets"]))
