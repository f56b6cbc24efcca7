"""Fine-tune a pretrained network with Back Razor: the laboratory's front door.

python train.py model=efficientnet_lite0 data=digits razor.sparsity=0.9
python train.py --help
"""

from __future__ import annotations

import sys

from razorlab.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
