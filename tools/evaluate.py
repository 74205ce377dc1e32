"""Evaluate a weights file or a run folder: `detres eval`.

python tools/evaluate.py runs/mine --split test --metrics coco voc
"""

import sys

from detres.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
