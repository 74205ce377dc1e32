"""`detres data convert`, `split`, `merge` and `subset`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from detres.cli_parser import Parser, add_source, command, count, positive

if TYPE_CHECKING:
    from detres.data.convert.lost import Losses

EXAMPLES = {
    "data convert": """
  detres data convert datasets/shapes datasets/shapes-yolo --to yolo
  detres data convert datasets/VOCdevkit/VOC2012 datasets/voc-coco --to coco --copy-images
  detres data convert datasets/coco datasets/coco-pets --classes dog,cat --rename cat=kitten --to voc --masks png
  detres data convert panoptic_val2017.json datasets/instances --to coco --masks polygon --strict""",
    "data split": """
  detres data split datasets/shapes datasets/shapes-split --parts train=0.8,val=0.1,test=0.1
  detres data split photos.json datasets/photos --parts val=500,train --seed 1
  detres data split frames datasets/frames --parts train=0.8,val=0.2 --group-by "(.*)_frame"
  detres data split photos datasets/photos --parts train=0.8,val=0.2 --group-lookalikes""",
    "data merge": """
  detres data merge datasets/shapes datasets/photos datasets/all
  detres data merge a.json b datasets/ab --to coco --merge-classes car,truck=vehicle""",
    "data subset": """
  detres data subset datasets/shapes datasets/small --take 100
  detres data subset datasets/coco datasets/dogs --classes dog --with-objects
  detres data subset datasets/coco datasets/chosen --ids ids.txt""",
}


def _add_convert(commands: argparse._SubParsersAction, name: str) -> None:
    parser = command(commands, name, EXAMPLES, _convert, "write a data set in another format",
                     "All splits, by default with the images where they are. What the format cannot hold is counted "
                     "and told, here and in OUT/conversion.json.")
    add_source(parser)
    _add_target(parser)
    parser.add_argument("--semantic", metavar="DATA", help="for --to panoptic: data set with label maps of the same "
                                                           "images, whose classes other than the objects' are stuff")


def _add_split(commands: argparse._SubParsersAction, name: str) -> None:
    parser = command(commands, name, EXAMPLES, _split, "split a data set at random",
                     "Every split gets its share of each class, as well as that is possible. The same for the same "
                     "seed. Splits that there are already are joined first.")
    add_source(parser)
    _add_target(parser)
    parser.add_argument("--parts", type=_parts, default="train=0.8,val=0.2", metavar="NAME=SIZE,...",
                        help="fractions below 1, or numbers of images; a name alone gets the rest (default: train=0.8,"
                             "val=0.2)")
    parser.add_argument("--group-by", type=_pattern, metavar="REGEX",
                        help="keep images together whose file names agree in this, or in its first group: frames of a "
                             "video, crops of a scan")
    parser.add_argument("--group-lookalikes", action="store_true", help="keep pictures together that look the same: "
                                                                        "copies, other sizes, the next frame")
    parser.add_argument("--seed", type=count, default=0, metavar="S", help="(default: 0)")


def _add_merge(commands: argparse._SubParsersAction, name: str) -> None:
    parser = command(commands, name, EXAMPLES, _merge, "make one data set of several",
                     "Splits of the same name, or all for training, are joined; classes are matched by name, and ids "
                     "counted anew where they clash. An image that is listed twice becomes one with the objects of "
                     "both.")
    parser.add_argument("data", metavar="DATA", nargs="+", help="data sets in any format that detres reads")
    _add_target(parser)
    parser.set_defaults(images=None)


def _add_subset(commands: argparse._SubParsersAction, name: str) -> None:
    parser = command(commands, name, EXAMPLES, _subset, "choose images or classes of a data set",
                     "Images by id, by class or at random, the same for the same seed.")
    add_source(parser)
    _add_target(parser)
    parser.add_argument("--take", type=positive, metavar="N", help="images of each split, at random")
    parser.add_argument("--ids", metavar="IDS", help="ids or file names of images: a text file with one a line, or "
                                                     "with commas between")
    parser.add_argument("--with-objects", action="store_true", help="leave out images without objects (of --classes)")
    parser.add_argument("--seed", type=count, default=0, metavar="S", help="(default: 0)")


def _add_target(parser: Parser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="new or empty folder")
    parser.add_argument("--to", choices=("coco", "lvis", "voc", "yolo", "panoptic"),
                        help="format (default: that of the data if it is one of these, else coco)")
    parser.add_argument("--masks", choices=("polygon", "rle", "png", "none"),
                        help="how masks are written: coco and lvis polygon or rle (default: as they are), voc png "
                             "(default: none), yolo polygon, panoptic png")
    placing = parser.add_mutually_exclusive_group()
    placing.add_argument("--copy-images", dest="placing", action="store_const", const="copy",
                         help="copy images into OUT")
    placing.add_argument("--link-images", dest="placing", action="store_const", const="link",
                         help="link images into OUT (default for voc and yolo; coco, lvis and panoptic name the files "
                              "where they are)")
    parser.add_argument("--classes", metavar="A,B", help="only these classes, in this order")
    parser.add_argument("--rename", action="append", default=[], metavar="OLD=NEW", help="rename a class; repeatable")
    parser.add_argument("--merge-classes", action="append", default=[], metavar="A,B=NEW",
                        help="make one class of several; repeatable")
    parser.add_argument("--strict", action="store_true", help="stop, and write nothing, if anything would be lost")
    parser.add_argument("--drop-invalid", action="store_true", help="leave out what is invalid, instead of stopping")


def _parts(text: str) -> dict[str, float | None]:
    pairs = [part.strip().partition("=") for part in text.split(",")]
    try:
        sizes = {name: _size(size) if equals else None for name, equals, size in pairs}
    except ValueError:
        sizes = {}
    if len(sizes) < len(pairs) or not all(re.fullmatch(r"[\w.-]+", name) for name in sizes):
        raise argparse.ArgumentTypeError("must be NAME=SIZE or NAME, with commas between, and a size a fraction "
                                         f"below 1 or a number of images, such as train=0.8,val=0.2, got '{text}'")
    return sizes


def _size(text: str) -> float:
    """Raises ValueError for what may be taken for either, such as 1.0."""
    value = float(text)
    if not (0 < value < 1 or text.strip().isdecimal()):
        raise ValueError(text)
    return value


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression, got '{text}': {error}") from None
    return text


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _renaming(args: argparse.Namespace) -> dict[str, str]:
    pairs = {}
    for option in [*args.rename, *args.merge_classes]:
        old, equals, new = option.rpartition("=")
        if not equals or not new.strip() or option in args.merge_classes and not _names(old):
            raise ValueError(f"--rename and --merge-classes must be OLD=NEW or A,B=NEW, got '{option}'.")
        pairs |= {name: new.strip() for name in (_names(old) if option in args.merge_classes else [old])}
    return pairs


@contextmanager
def drop_option() -> Iterator[None]:
    """Invalid data is told with the option of these commands."""
    from detres.data.problems import InvalidDataError

    try:
        yield
    except InvalidDataError as error:
        error.drop = "give --drop-invalid"
        raise


def _written(args: argparse.Namespace, change: Callable[[list, Losses], list] | None = None) -> None:
    from detres.data.convert.classes import ClassChange
    from detres.data.convert.run import Options, convert

    classes = ClassChange(_renaming(args), _names(args.classes))
    options = Options(args.to, args.masks, args.placing or "reference", classes, args.strict,
                      "drop" if args.drop_invalid else "error")
    paths = args.data if isinstance(args.data, list) else [args.data]
    with drop_option():
        print(convert(paths, args.out, options, images=args.images, semantic=getattr(args, "semantic", None),
                      change=change))


def _convert(args: argparse.Namespace) -> None:
    _written(args)


def _merge(args: argparse.Namespace) -> None:
    _written(args)


def _split(args: argparse.Namespace) -> None:
    from detres.data.convert.sets import joined, split

    _written(args, lambda parts, losses: split(joined(parts), args.parts, args.group_by, args.group_lookalikes,
                                               args.seed, losses))


def _subset(args: argparse.Namespace) -> None:
    from detres.data.convert.sets import subset

    if not (args.take or args.ids or args.classes or args.with_objects):
        args.parser.error("what to choose must be said by --take, --ids, --classes or --with-objects")
    listed = args.ids and Path(args.ids).is_file()
    if args.ids and args.ids.endswith(".txt") and not listed:
        raise FileNotFoundError(f"file of --ids must exist, got {args.ids} (seen from {Path.cwd()}). Check the path.")
    ids = Path(args.ids).read_text(encoding="utf-8").splitlines() if listed else _names(args.ids)
    ids = [name.strip() for name in ids if name.strip()]
    _written(args, lambda parts, _: subset(parts, args.take, ids, args.with_objects, args.seed))


COMMANDS = {"convert": _add_convert, "split": _add_split, "merge": _add_merge, "subset": _add_subset}
