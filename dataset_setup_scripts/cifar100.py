"""Set up CIFAR-100: python dataset_setup_scripts/cifar100.py [--root data] [--verify | --repair]"""

import sys

from _common import main

if __name__ == "__main__":
    sys.exit(main(["cifar100"]))
