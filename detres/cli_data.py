"""`detres data ...`: make, check, look at and convert data sets.

Nothing heavy is imported before a command runs, so that help is instant.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from detres import cli_convert
from detres.cli_parser import Parser, add_source, command, count, positive, size

EXAMPLES = {
    "data": """
  detres data shapes datasets/shapes --images 1000
  detres data check datasets/shapes
  detres data stats datasets/shapes
  detres data view datasets/shapes
  detres data convert datasets/shapes datasets/shapes-yolo --to yolo
  detres data shapes --help""",
    "data shapes": """
  detres data shapes datasets/shapes --images 1000 --seed 0
  detres data shapes /tmp/easy --images 400 --val 100 --preset easy --size 128 128 --no-voc
  detres train configs/demo.yaml data.train=datasets/shapes data.val=datasets/shapes output=runs/shapes""",
    "data check": """
  detres data check datasets/coco
  detres data check train.json --images photos --fix clean
  detres data check datasets/yolo/data.yaml --no-images --json > problems.json""",
    "data shard": """
  detres data shard datasets/coco /mnt/coco_shards --shard-size 500MB
  detres data shard datasets/shapes shards --shard-size 2MB --seed 1
  detres train configs/demo.yaml data.train=shards data.val=shards output=runs/sharded""",
    "data stats": """
  detres data stats datasets/coco
  detres data stats train.json --images photos --out stats.png
  detres data stats datasets/VOCdevkit --all --out stats.html stats.pdf
  detres data stats datasets/coco --json > stats.json""",
    "data view": """
  detres data view datasets/coco
  detres data view datasets/coco --split val --class dog 'hot dog' --sort smallest --num 48 --out dogs.png
  detres data view datasets/coco --problem any --html look.html
  detres data view datasets/coco --html look.html --num 2000
  detres data view datasets/coco --augment configs/bccd_r18.yaml data.augment.flip=0.5 --out seen.png""",
    **cli_convert.EXAMPLES,
}


def add_data(commands: argparse._SubParsersAction, name: str) -> None:
    summary = "make, check, look at and convert data sets"
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


def _add_check(commands: argparse._SubParsersAction, name: str) -> None:
    parser = command(commands, name, EXAMPLES, _check, "find all that is wrong with a data set",
                     "Nothing of it is changed. Exit status: 0 if training would be safe, 1 if not, 2 if nothing could "
                     "be read; with --fix, of the copy.")
    add_source(parser)
    parser.add_argument("--no-images", action="store_true", help="look at annotations only: no image needs to be there")
    parser.add_argument("--detections", type=Path, metavar="FILE", help="look for wrong and missing labels with what a "
                        "model found: COCO results, as detres eval --save FILE writes them, on images that it was not "
                        "trained on")
    parser.add_argument("--all", action="store_true", help="tell every problem, not some of each kind")
    parser.add_argument("--json", action="store_true", help="everything as JSON, to stdout")
    parser.add_argument("--fix", type=Path, metavar="OUT", help="write a clean copy of the annotations into this new "
                        "folder, with a list of all changes")
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (default: one for each core)")


def _check(args: argparse.Namespace) -> int:
    from detres.data.check.fix import check_out, write_clean_copy
    from detres.data.check.report import print_fix, print_json, print_report, to_json
    from detres.data.check.run import check_data

    if args.fix is not None:  # before hours of reading, not after them
        check_out(Path(args.data).expanduser().resolve(), args.fix.expanduser().resolve())
    if args.detections and not args.detections.is_file():
        raise FileNotFoundError(f"--detections must be a file, got {args.detections} (seen from {Path.cwd()}). Check "
                                "the path.")
    options = {"read_images": not args.no_images, "workers": args.workers}
    report = check_data(args.data, args.images, detections=args.detections, **options)
    if not args.json:
        print_report(report, every=args.all, fix=args.fix is not None)
    if args.fix is None or report.exit_status == 2:
        if args.json:
            print_json(to_json(report))
        return report.exit_status
    after, changes = write_clean_copy(report, args.images, args.fix, **options)
    if args.json:
        print_json(to_json(report) | {"fix": to_json(after) | {"changes": len(changes.made)}})
    else:
        print_fix(after, changes)
    return after.exit_status


def _add_shard(commands: argparse._SubParsersAction, name: str) -> None:
    parser = command(commands, name, EXAMPLES, _shard, "write a data set as tar shards",
                     "Images and annotations of each split in shuffled order, as WebDataset has them, with an index. "
                     "Train on them by data.train=OUT, from wherever OUT is copied to.")
    add_source(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the shards")
    parser.add_argument("--shard-size", type=size, default="500MB", metavar="BYTES",
                        help="at most, such as 500MB or 2GB (default: 500MB)")
    parser.add_argument("--seed", type=count, default=0, metavar="S", help="of the order of images (default: 0)")
    parser.add_argument("--drop-invalid", action="store_true", help="leave out what is invalid, instead of stopping")


def _shard(args: argparse.Namespace) -> None:
    from detres.data.shard_writer import write_splits

    on_invalid = "drop" if args.drop_invalid else "error"
    with cli_convert.drop_option():
        for name, images, shards in write_splits(args.data, args.out, args.images, args.shard_size, args.seed,
                                                 on_invalid):
            print(f"{name}: {images} images in {len(shards)} shard{'s'[:len(shards) != 1]}, "
                  f"{sum(shard.stat().st_size for shard in shards) / 1e6:.1f} MB ({args.out})")


def _add_stats(commands: argparse._SubParsersAction, name: str) -> None:
    parser = command(commands, name, EXAMPLES, _stats, "count what is in a data set",
                     "Images, annotations and classes of each split; sizes and shapes of boxes; objects an image; and "
                     "what they say of anchors and input size. Reads annotations only, no image.")
    add_source(parser)
    parser.add_argument("--out", type=Path, nargs="+", action="extend", default=[], metavar="FILE",
                        help="write a page of plots: .png, .pdf, .svg, or .html with the tables")
    parser.add_argument("--all", action="store_true", help="list all classes, not only the largest and smallest")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _add_view(commands: argparse._SubParsersAction, name: str) -> None:
    parser = command(commands, name, EXAMPLES, _view, "draw images with their annotations",
                     "Contact sheets as PNG, or a page for a browser (--html), or what training makes of the images "
                     "(--augment). Crowds are hatched, difficult objects dashed.", rest="overrides")
    add_source(parser)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value",
                        help="fields of the config of --augment, such as data.augment.flip=0")
    which = parser.add_argument_group("which images")
    which.add_argument("--split", nargs="+", action="extend", default=[], metavar="NAME",
                       help="such as train or instances_val2017")
    which.add_argument("--class", nargs="+", action="extend", default=[], dest="classes", metavar="NAME",
                       help="with objects of these classes; no others are drawn")
    which.add_argument("--problem", nargs="+", action="extend", default=[], metavar="KIND",
                       help="with problems of these kinds, as `detres data check --json` calls them; or any")
    which.add_argument("--image", nargs="+", action="extend", default=[], metavar="ID", help="by id or file name")
    which.add_argument("--num", type=positive, metavar="N",
                       help="at most (default: 12; with --html 500, with --augment 4)")
    which.add_argument("--sort", choices=("random", "most", "smallest", "file"), default="random",
                       help="first those with most objects, or with the smallest; as in the file (default: random)")
    which.add_argument("--seed", type=count, default=0, metavar="S", help="of the random order (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("view.png"), metavar="FILE",
                        help="sheet; several have numbers (default: view.png)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page, with a folder of images beside it")
    parser.add_argument("--augment", type=Path, metavar="CONFIG",
                        help="several draws of each image as this config, or the run in this folder, trains on it")
    parser.add_argument("--draws", type=positive, default=4, metavar="D", help="of --augment (default: 4)")


def _view(args: argparse.Namespace) -> None:
    if args.html and args.augment:
        args.parser.error("--html cannot go with --augment, which draws a sheet")
    if args.overrides and not args.augment:
        args.parser.error(f"key=value goes with --augment, got {args.overrides[0]}")
    if args.problem and args.augment:
        args.parser.error("--problem cannot go with --augment: what has errors does not train")
    from detres.data.view import Choice, check_suffix, select

    check_suffix("--out", args.out, ".png")
    if args.html:
        check_suffix("--html", args.html, ".html")
    num = args.num or (500 if args.html else 4 if args.augment else 12)
    choice = Choice(args.split, args.classes, args.problem, args.image, num, args.seed, args.sort)
    if args.augment:
        from detres.config_file import load_config
        from detres.data.view_augment import write_augmented

        config = load_config(args.augment, args.overrides).config
        files = [write_augmented(args.data, args.images, choice, config, args.draws, args.out)]
    elif not (selection := select(args.data, args.images, choice, with_problems=bool(args.html))).entries:
        print("No image fits these options: nothing written.")
        return
    elif args.html:
        from detres.data.view_html import write_page

        files = [write_page(selection, args.html, args.data)]
    else:
        from detres.data.view_sheet import write_sheets

        files = write_sheets(selection, args.out)
    print("\n".join(f"Wrote {file}" for file in files))


def _stats(args: argparse.Namespace) -> None:
    from detres.data.stats_report import show_stats

    show_stats(args.data, args.images, args.out, as_json=args.json, all_classes=args.all)


COMMANDS = {"check": _add_check, "stats": _add_stats, "view": _add_view, **cli_convert.COMMANDS, "shard": _add_shard,
            "shapes": _add_shapes}
