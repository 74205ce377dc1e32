"""`detres train`, `eval`, `predict` and the others in `COMMANDS`: arguments in, the library's functions called, errors
in one message.

Nothing heavy is imported before a command runs, so that help is instant.
"""

from __future__ import annotations

import argparse
import itertools
import linecache
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from detres import __version__, cli_data
from detres.cli_parser import Parser, command, positive, probability

DESCRIPTION = """Object detection and segmentation on ResNet backbones.

A config is a YAML file; any of its fields can be set on the command line as key=value (train.lr=0.01)."""

EXAMPLES = {
    "": """
  detres demo                                      train, evaluate and predict on the built-in data set
  detres train configs/faster_rcnn_r50_fpn_1x.yaml data.train=my/coco data.val=my/coco
  detres train configs/finetune/small.yaml weights=maskrcnn_resnet50_fpn_v2 data.train=my/train.json
  detres eval runs/mine                            AP of the best weights of a run
  detres predict runs/mine photos/                 pictures and JSON of what is found
  detres COMMAND --help                            options and examples of a command""",
    "train": """
  detres train configs/bccd_r18.yaml output=runs/bccd
  detres train configs/bccd_r18.yaml output=runs/bccd --resume
  detres train configs/mask_rcnn_r50_fpn_1x.yaml --num-gpus 8 train.batch_size=64
  detres train configs/faster_rcnn_r50_fpn_1x.yaml data.train=my/yolo/data.yaml data.val=my/yolo/data.yaml

Over several machines, on each: torchrun [its options] -m detres.cli train CONFIG [key=value ...]""",
    "eval": """
  detres eval runs/bccd
  detres eval runs/bccd --split test --metrics voc
  detres eval best.safetensors --data datasets/coco --save results.json
  detres eval runs/voc --data datasets/VOCdevkit --split 2012_test --save results/VOC2012/Main
  detres eval runs/bccd eval.batch_size=4 model.input.min_size=600 model.box_head.score_thresh=0.01
  detres eval runs/a runs/b 'eval.test_scales=[200,400,600,800,1000]'
  detres eval runs/classifier eval.crops=dense 'eval.test_scales=[224,256,384,480,640]'
  detres eval --gt instances_val2017.json --results theirs.json --iou-type bbox segm --json numbers.json""",
    "predict": """
  detres predict runs/bccd cells.jpg
  detres predict runs/bccd photos/ 'more/*.png' --out found --score-thresh 0.7
  detres predict runs/a runs/b photos/ model.box_head.nms_thresh=0.3""",
    "localize": """
  detres localize runs/localizer                   error of the box of the true class
  detres localize runs/localizer --classifier runs/classifier --crops dense
  detres localize runs/a runs/b --classifier runs/c runs/d --regions runs/r runs/s --draw pictures
  detres localize runs/localizer --crops dense 'eval.test_scales=[224,320,448]' --data datasets/ILSVRC""",
    "import": """
  detres import maskrcnn_resnet50_fpn_v2 mask_rcnn.safetensors
  detres import COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x mask_rcnn.safetensors
  detres import model_final.pth mine.safetensors --config config.yaml --classes cat,dog
  detres import maskrcnn_resnet50_fpn_v2 pets.safetensors --new-classes cat,dog,hamster
  detres import --config theirs/faster_rcnn_R_50_FPN_1x.yaml faster_rcnn.yaml""",
    "export": """
  detres export runs/mine mine.pth --format torchvision
  detres export runs/mine mine.pth --format detectron2""",
    "bn-stats": """
  detres bn-stats runs/resnet101 --out resnet101.safetensors
  detres train CONFIG model.backbone.weights=resnet101.safetensors model.backbone.norm=frozen_bn""",
    "config": """
  detres config                                    all fields and their defaults
  detres config configs/bccd_r18.yaml train.lr=0.01
  detres config runs/bccd > copy.yaml              what a run was trained with
  detres config --schema > detres.schema.json      for completion and checks in an editor: begin a YAML file with
                                                   # yaml-language-server: $schema=detres.schema.json""",
    "paper": """
  detres paper                                     every table and figure
  detres paper table6
  detres paper table6/resnet56                     one row: numbers, config, commands
  detres paper run table1
  detres paper run table6/resnet56 --data datasets/cifar10
  detres paper run table6/resnet56 --data datasets/cifar10 --out /tmp/small train.steps=500
  detres paper run table8/resnet101 --data datasets/coco --num-gpus 8
  detres paper run figure6 --data datasets/cifar10 --networks plain20,resnet20 --seeds 3""",
    "demo": """
  detres demo
  detres demo --out /tmp/demo""",
    **cli_data.EXAMPLES,
}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="detres", description=DESCRIPTION, epilog=f"examples:{EXAMPLES['']}")
    parser.add_argument("--version", action="version", version=f"detres {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    for name, add in COMMANDS.items():
        add(commands, name)
    return parser


def _add_train(commands: argparse._SubParsersAction, name: str) -> None:
    parser = command(commands, name, EXAMPLES, _train, "train what a config describes",
                     "Writes the run folder that the config names as output: checkpoints, logs, curves, results. "
                     "Ctrl-C saves first.", rest="overrides")
    parser.add_argument("config", type=Path, help="YAML file, or the folder of a run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value",
                        help="fields of the config, such as train.lr=0.01")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the run folder")
    parser.add_argument("--num-gpus", type=positive, default=1, metavar="N",
                        help="processes on this machine, one a GPU")


def _train(args: argparse.Namespace) -> None:
    from detres.config_file import load_config

    config = load_config(args.config, args.overrides).config
    if args.num_gpus > 1:
        from detres.engine.distributed import launch

        flags = [flag for flag in ("resume", "debug") if getattr(args, flag)]
        launch(args.num_gpus, ["-m", "detres.cli", "train", str(args.config), *args.overrides,
                               *(f"--{flag}" for flag in flags)])
    from detres.engine.train import train

    train(config, resume=args.resume)


def _add_eval(commands: argparse._SubParsersAction, name: str) -> None:
    parser = command(commands, name, EXAMPLES, _eval,
                     "measure weights, or a results file of any program, on a data set",
                     "Of weights: prints COCO's twelve numbers for boxes and masks, VOC's AP, and AP of every class; "
                     "of a classifier top-1 and top-5; of semantic segmentation mean IoU, of panoptic also panoptic "
                     "quality; without --data, on what they were validated on in training. "
                     "Several are an ensemble.\n\nOf a results file (--gt and --results): prints pycocotools' "
                     "numbers, and warns of what makes them wrong.",
                     rest="more")
    _add_weights(parser, nargs="?")
    parser.add_argument("more", nargs="*", default=[], metavar="RUN_OR_WEIGHTS|key=value",
                        help="further weights; fields of the config that they carry, such as "
                             "model.box_head.score_thresh=0.1")
    parser.add_argument("--data", metavar="PATH", help="COCO, VOC, YOLO or ILSVRC data set; for classifiers class "
                                                       "folders or CIFAR; recognised from the path")
    parser.add_argument("--split", metavar="NAME", help="image set of the data set, such as test")
    parser.add_argument("--save", type=Path, metavar="FILE|DIR",
                        help="write the detections: FILE.json as COCO results; DIR, of VOC data, as the text files "
                             "that its evaluation server takes")
    parser.add_argument("--metrics", nargs="+", choices=("coco", "voc", "ilsvrc"),
                        help="protocols (default: of the config)")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="images at once (default: of the config)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the named numbers in full precision")
    parser.add_argument("--errors", type=Path, metavar="DIR",
                        help="analyse the errors: kinds of mistakes, confusions, best thresholds; table and pictures")
    _add_device(parser)
    files = parser.add_argument_group("results files")
    files.add_argument("--gt", type=Path, metavar="FILE", help="annotations, as COCO or LVIS JSON")
    files.add_argument("--results", type=Path, metavar="FILE", help="detections, as COCO results JSON")
    files.add_argument("--iou-type", nargs="+", choices=("bbox", "segm", "keypoints", "boundary"), default=["bbox"],
                       help="what is compared (default: bbox)")
    files.add_argument("--sigmas", type=float, nargs="+", metavar="S",
                       help="of OKS, one for each keypoint (default: those of COCO's 17)")
    files.add_argument("--lenient", action="store_const", const=True,
                       help="leave out what cannot be evaluated, and say so")


def _eval(args: argparse.Namespace) -> None:
    if (args.gt is None) != (args.results is None) or (args.gt is None) == (args.weights is None):
        args.parser.error("give either RUN_OR_WEIGHTS, or both --gt and --results")
    others = ("lenient", "sigmas") if args.gt is None else ("data", "split", "save", "metrics", "batch_size")
    if unused := [f"--{name.replace('_', '-')}" for name in others if getattr(args, name) is not None]:
        args.parser.error(f"{', '.join(unused)} cannot go with {'--gt' if args.gt else 'RUN_OR_WEIGHTS'}")
    if args.gt is not None:
        from detres.evaluation.files import evaluate_files

        sigmas = {"sigmas": args.sigmas} if args.sigmas else {}
        evaluate_files(args.gt, args.results, args.iou_type, lenient=bool(args.lenient), numbers=args.json,
                       errors=args.errors, **sigmas)
        return
    from detres.evaluation.run import evaluate_weights

    further, overrides = _without_overrides(args.more)
    evaluate_weights(_one_or_all([args.weights, *further]), data=args.data, split=args.split, save=args.save,
                     metrics=args.metrics, batch_size=args.batch_size, device=args.device, overrides=overrides,
                     numbers=args.json, errors=args.errors)


def _add_predict(commands: argparse._SubParsersAction, name: str) -> None:
    parser = command(commands, name, EXAMPLES, _predict, "detect in images, segment or name them",
                     "Writes an annotated picture of each image, and predictions.json; of segmentation, PNG files of "
                     "labels or segments, too.", rest="images")
    _add_weights(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGES",
                        help="files, folders or globs; before them, further weights, for an ensemble; fields of the "
                             "config that the weights carry as key=value")
    parser.add_argument("--out", type=Path, default=Path("predictions"), metavar="DIR", help="(default: predictions)")
    parser.add_argument("--score-thresh", type=probability, metavar="P",
                        help="show detections with at least this score (default: 0.5)")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="images at once (default: 8)")
    _add_device(parser)


def _predict(args: argparse.Namespace) -> None:
    from detres.engine.checkpoint import holds_weights
    from detres.inference.run import predict_files

    inputs, overrides = _without_overrides(args.images)
    further = list(itertools.takewhile(holds_weights, inputs))
    predict_files(_one_or_all([args.weights, *further]), inputs[len(further):], args.out,
                  score_thresh=args.score_thresh, device=args.device, batch_size=args.batch_size, overrides=overrides)


def _add_import(commands: argparse._SubParsersAction, name: str) -> None:
    parser = command(commands, name, EXAMPLES, _import,
                     "take over weights of torchvision, Detectron2, timm or MMDetection",
                     "Recognises them by their content and writes a weights file that carries model, classes and "
                     "preprocessing. Without SOURCE, a YAML config of Detectron2 becomes a config of detres, and what "
                     "of it cannot be translated is named.", rest="items")
    parser.add_argument("items", nargs="*", default=[], metavar="[SOURCE] OUT key=value",
                        help="a file, a URL, or a published name; what to write: .safetensors, or .yaml without "
                             "SOURCE; fields of the model's config")
    parser.add_argument("--config", type=Path, metavar="FILE", help="Detectron2's YAML config of the model")
    parser.add_argument("--classes", metavar="A,B|FILE", help="names of the classes, or a file with one a line "
                                                              "(default: of the published data sets, by their number)")
    parser.add_argument("--new-classes", metavar="A,B|FILE",
                        help="classes that it is to have instead: layers of classes begin anew, but for the classes of "
                             "both lists")


def _import(args: argparse.Namespace) -> None:
    from detres.weights.run import import_config, import_weights

    files, overrides = _without_overrides(args.items)
    classes, new_classes = (None if text is None else _names(text) for text in (args.classes, args.new_classes))
    if len(files) == 1 and args.config and not overrides and classes is new_classes is None:
        import_config(args.config, files[0])
        return
    if len(files) != 2:
        more = ", without --classes, --new-classes and key=value, which are of weights" if args.config else ""
        args.parser.error(f"give SOURCE and OUT, or --config FILE and OUT{more}; names of classes with commas between")
    import_weights(*files, config=args.config, classes=classes, new_classes=new_classes, overrides=overrides)


def _names(text: str) -> list[str]:
    """Of a file, one a line, or separated by commas; without the space around them."""
    names = Path(text).read_text(encoding="utf-8").splitlines() if Path(text).is_file() else text.split(",")
    return [name.strip() for name in names if name.strip()]


def _add_export(commands: argparse._SubParsersAction, name: str) -> None:
    parser = command(commands, name, EXAMPLES, _export, "write weights for another toolkit",
                     "Writes a state dict under its names, and says what it computes otherwise.")
    _add_weights(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write")
    parser.add_argument("--format", required=True, choices=("torchvision", "detectron2", "safetensors"))


def _export(args: argparse.Namespace) -> None:
    from detres.weights.run import export_weights

    export_weights(args.weights, args.out, args.format)


def _add_bn_stats(commands: argparse._SubParsersAction, name: str) -> None:
    parser = command(commands, name, EXAMPLES, _bn_stats, "measure batch norms over the training set",
                     "Writes the weights with the mean and variance of each layer over all images, in place of moving "
                     "averages: what a detector with frozen batch norms begins from.")
    _add_weights(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="weights to write (.safetensors)")
    parser.add_argument("--data", metavar="PATH", help="images (default: what the weights were trained on)")
    parser.add_argument("--split", metavar="NAME", help="image set of the data set")
    parser.add_argument("--batch-size", type=positive, metavar="N",
                        help="images that are normalised together (default: those of a training step)")
    parser.add_argument("--sequential", action="store_true",
                        help="exact for all layers, whatever the batch: a pass for each layer")
    _add_device(parser)


def _bn_stats(args: argparse.Namespace) -> None:
    from detres.engine.bn_stats import write_statistics

    write_statistics(args.weights, args.out, data=args.data, split=args.split, batch_size=args.batch_size,
                     sequential=args.sequential, device=args.device)


def _add_localize(commands: argparse._SubParsersAction, name: str) -> None:
    parser = command(commands, name, EXAMPLES, _localize,
                     "measure where a localizer finds objects of known or guessed classes",
                     "Prints the error of the box of the true class, and with classifiers top-1 and top-5 "
                     "localization errors, as the ILSVRC challenge counts them. Several weights of a kind are an "
                     "ensemble.", rest="more")
    _add_weights(parser)
    parser.add_argument("more", nargs="*", default=[], metavar="RUN_OR_WEIGHTS|key=value",
                        help="further localizers; fields of the config that they carry")
    kinds = {"nargs": "+", "type": _run, "default": [], "metavar": "RUN"}
    parser.add_argument("--classifier", **kinds, help="classifiers whose five guesses are localized")
    parser.add_argument("--regions", **kinds, help="region classifiers that judge and move the localizer's boxes")
    parser.add_argument("--data", metavar="PATH", help="data set (default: what the localizer was validated on)")
    parser.add_argument("--split", metavar="NAME", help="image set of the data set")
    parser.add_argument("--crops", choices=("1", "dense"), help="views that localizers see (default: of the config)")
    parser.add_argument("--class-crops", choices=("1", "10", "dense"),
                        help="views that classifiers see (likewise; dense: at eval.test_scales, if given)")
    parser.add_argument("--draw", type=Path, metavar="DIR", help="write pictures of the first 100 images")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="images at once (default: of the config)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers in full precision")
    _add_device(parser)


def _localize(args: argparse.Namespace) -> None:
    from detres.evaluation.localization import localize_weights

    further, overrides = _without_overrides(args.more)
    localize_weights([args.weights, *further], classifiers=args.classifier, regions=args.regions,
                     data=args.data, split=args.split, crops=args.crops, class_crops=args.class_crops,
                     batch_size=args.batch_size, device=args.device, overrides=overrides, draw=args.draw,
                     numbers=args.json)


def _add_config(commands: argparse._SubParsersAction, name: str) -> None:
    parser = command(commands, name, EXAMPLES, _config, "show a resolved config, and where each value comes from",
                     "The output is YAML that can be used as a config.", rest="items")
    parser.add_argument("items", nargs="*", default=[], metavar="[FILE] key=value",
                        help="YAML file or folder of a run (default: no file, the defaults), then fields to set")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of config files instead")


def _config(args: argparse.Namespace) -> None:
    from detres.config_file import format_config, json_schema, load_config

    if args.schema:
        import json

        print(json.dumps(json_schema(), indent=2))
        return
    files = args.items[:1] if "=" not in "".join(args.items[:1]) else []
    text = format_config(load_config(*files or [None], args.items[len(files):]))
    print(_dim_defaults(text) if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text, end="")


def _dim_defaults(text: str) -> str:
    return "".join(f"\x1b[2m{line}\x1b[0m\n" if line.endswith("# default") else f"{line}\n"
                   for line in text.splitlines())


def _add_paper(commands: argparse._SubParsersAction, name: str) -> None:
    parser = command(commands, name, EXAMPLES, _paper, "reproduce tables and figures of Deep Residual Learning",
                     "Lists what arXiv 1512.03385 published beside what detres measured; `run` runs exactly the "
                     "commands of a row. Trainings go on where they stopped. docs/paper.md tells more.", rest="items")
    parser.add_argument("items", nargs="*", default=[], metavar="[run] [ROW] key=value",
                        help="a row such as table6/resnet56, a table or a figure (default: all); after run, fields to "
                             "set in its configs")
    parser.add_argument("--markdown", action="store_true", help="print the tables of docs/paper.md")
    runs = parser.add_argument_group("run")
    runs.add_argument("--data", metavar="PATH", help="data set (default: of the config, in datasets/)")
    runs.add_argument("--out", metavar="DIR", help="takes the place of runs/paper")
    runs.add_argument("--num-gpus", type=positive, metavar="N", help="processes that train, one a GPU")
    runs.add_argument("--networks", metavar="NAMES", type=lambda text: text.split(","),
                      help="of figure1, figure6 or figure7, such as plain20,resnet20 (default: the paper's)")
    runs.add_argument("--seeds", type=positive, metavar="N", help="trainings of each network (default: 1)")


def _paper(args: argparse.Namespace) -> None:
    from detres import paper

    options = {name: value for name in ("data", "out", "num_gpus", "networks", "seeds")
               if (value := getattr(args, name)) is not None}
    if args.items[:1] == ["run"]:
        if len(args.items) < 2 or args.markdown:
            args.parser.error("run must be followed by a row, such as table6/resnet56")
        paper.run(args.items[1], overrides=args.items[2:], **options)
        return
    if options or len(args.items) > (0 if args.markdown else 1):
        args.parser.error("options and key=value go behind run ROW; --markdown goes alone")
    print(paper.markdown() if args.markdown else paper.listing(*args.items))


def _add_demo(commands: argparse._SubParsersAction, name: str) -> None:
    parser = command(commands, name, EXAMPLES, _demo, "train, evaluate and predict on the built-in data set",
                     "From scratch, without any download, in minutes on a CPU. A second run goes on with the first.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="(default: runs/demo)")


def _demo(args: argparse.Namespace) -> None:
    from detres.demo import run_demo

    run_demo(args.out)


COMMANDS = {"train": _add_train, "eval": _add_eval, "predict": _add_predict, "localize": _add_localize,
            "import": _add_import, "export": _add_export,
            "bn-stats": _add_bn_stats, "config": _add_config, "data": cli_data.add_data, "paper": _add_paper,
            "demo": _add_demo}


def _add_weights(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("weights", metavar="RUN_OR_WEIGHTS", nargs=nargs,  # no Path: it may be a URL
                        help="weights file of any toolkit, run folder (its best weights), URL, or published name")


def _without_overrides(items: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths, and fields to set: key=value, unless that is a file."""
    is_override = [bool(re.match(r"\w+(\.\w+)*=", item)) and not Path(item).exists() for item in items]
    return tuple([item for item, flag in zip(items, is_override) if flag == kind] for kind in (False, True))


def _one_or_all(weights: list[str]) -> str | list[str]:
    return weights if len(weights) > 1 else weights[0]


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")


def _run(text: str) -> Path:
    """One of several runs: fields of a config behind them would be taken for more."""
    if "=" in text and not Path(text).exists():
        raise argparse.ArgumentTypeError(f"must be a run or weights, got '{text}'; key=value goes before this option")
    return Path(text)


# ---- running and telling errors ------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    parser = getattr(args, "parser", parser)
    parser.check_rest(rest)
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    if rest and not args.rest:
        parser.error(f"unexpected arguments: {' '.join(rest)}")
    if rest:
        setattr(args, args.rest, [*getattr(args, args.rest), *rest])
    return run_guarded(lambda: args.run(args), debug=args.debug)


def run_guarded(run: Callable[[], object], debug: bool = False) -> int:
    """Runs a command and returns its exit status, 0 unless the command returns another. Errors that detres raises on
    purpose become one message."""
    import logging

    logging.basicConfig(format="%(message)s")
    logging.getLogger("detres").setLevel(logging.INFO)
    try:
        status = run()
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug or not _is_told(error):
            raise
        print(f"detres: error: {error}", file=sys.stderr)
        return 1


def _is_told(error: Exception) -> bool:
    """Whether the message is meant for the user: the system's errors, and those that our own code raises."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    is_ours = Path(frame.filename).is_relative_to(Path(__file__).parent)
    is_raised = linecache.getline(frame.filename, frame.lineno).lstrip().startswith("raise ")
    return isinstance(error, OSError) or type(error).__module__.startswith("detres.") or (is_ours and is_raised)


if __name__ == "__main__":
    sys.exit(main())
