"""`detres data ...`: make, check, look at and convert data sets.

Nothing heavy is imported before a command runs, so that help is instant.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from detres.cli_parser import Parser, command, count, positive

EXAMPLES = {
    "data": """
  detres data shapes datasets/shapes --images 1000
  detres data shapes --help""",
    "data shapes": """
  detres data shapes datasets/shapes --images 1000 --seed 0
  detres data shapes /tmp/easy --images 400 --val 100 --preset easy --size 128 128 --no-voc
  detres train configs/demo.yaml data.train=datasets/shapes data.val=datasets/shapes output=runs/shapes""",
}


def add_data(commands: argparse._SubParsersAction, name: str) -> None:
    summary = "make data sets"
    parser = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.",
                                 epilog=f"examples:{EXAMPLES[name]}")
    parser.set_defaults(parser=parser)
    subcommands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    for subcommand, add in COMMANDS.items():
        add(subcommands, f"{name} {subcommand}")


def _add_shapes(commands: argparse._SubParsersAction, name: str) -> None:
    parser = command(commands, name, EXAMPLES, _shapes, "draw the built-in data set",
                     "Scenes with exact boxes, masks and keypoints, crowds, empty images; the same for the same seed.")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder, or one that this command was interrupted in")
    parser.add_argument("--images", type=positive, required=True, metavar="N", help="training images")
    parser.add_argument("--val", type=count, metavar="M", help="held-out images (default: a fifth of N)")
    parser.add_argument("--seed", type=count, default=0, metavar="S", help="(default: 0)")
    parser.add_argument("--preset", choices=("full", "easy"), default="full",
                        help="full: hard and varied (default); easy: what a small network learns in minutes on a CPU")
    parser.add_argument("--size", type=positive, nargs=2, metavar=("H", "W"), help="pixels (default: of the preset)")
    parser.add_argument("--no-voc", action="store_true", help="COCO JSON only, no VOC XML beside it")


def _shapes(args: argparse.Namespace) -> None:
    from detres.data.shapes import ShapesOptions, write_shapes

    options = ShapesOptions(preset=args.preset, size=tuple(args.size) if args.size else None)
    write_shapes(args.out, args.images, args.seed, options=options, val_images=args.val,
                 formats=("coco",) if args.no_voc else ("coco", "voc"))


COMMANDS = {"shapes": _add_shapes}
