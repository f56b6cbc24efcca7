"""Set up every published data set: python dataset_setup_scripts/all.py [--root data] [--verify | --repair]"""

import sys

from _common import main

from razorlab.data.published import PUBLISHED

if __name__ == "__main__":
    sys.exit(main(list(PUBLISHED)))
