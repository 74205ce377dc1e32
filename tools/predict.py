"""Detect in images with a weights file or a run folder: `detres predict`.

python tools/predict.py runs/mine photos/ --out found
"""

import sys

from detres.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
