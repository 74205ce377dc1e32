"""Train, or with --eval-only evaluate, what a config describes: `detres train` and `detres eval` in Detectron2's words.

    python tools/train_net.py --config-file configs/mask_rcnn_r50_fpn_1x.yaml --num-gpus 8
    python tools/train_net.py --config-file configs/mask_rcnn_r50_fpn_1x.yaml --eval-only output=runs/mine
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from detres import cli


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML file, or the folder of a run")
    parser.add_argument("--num-gpus", default="1", metavar="N", help="processes on this machine, one a GPU")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the run folder")
    parser.add_argument("--eval-only", action="store_true", help="evaluate the weights in the run folder (output=...)")
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the config")
    args = parser.parse_intermixed_args(argv)
    if args.eval_only:
        return cli.run_guarded(lambda: evaluate(args.config_file, args.overrides), args.debug)
    flags = [f"--{flag}" for flag in ("resume", "debug") if getattr(args, flag)]
    return cli.main(["train", args.config_file, *args.overrides, "--num-gpus", args.num_gpus, *flags])


def evaluate(config_file: str, overrides: Sequence[str]) -> None:
    from detres.config_file import load_config
    from detres.evaluation.run import evaluate_weights

    config = load_config(config_file, overrides).config
    evaluate_weights(config.output, data=config.data.val, metrics=config.eval.metrics,
                     batch_size=config.eval.batch_size, device=config.device, overrides=overrides)


if __name__ == "__main__":
    sys.exit(main())
