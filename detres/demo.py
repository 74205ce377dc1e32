"""The whole job on the built-in data set, from nothing to pictures: `detres demo`."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from PIL import Image

IMAGES, VAL_IMAGES = 1200, 150
SHOWN = 12  # held-out images that are drawn


def run_demo(out: Path) -> Path:
    """Draw a data set, train Mask R-CNN on it, evaluate on held-out scenes, draw what it finds: all under `out`, but
    the data set, which goes to its neighbour `out`_data.

    Repeated after an interruption it goes on where it stopped. Returns the path of the overview picture.
    """
    from detres.config_file import load_config, shipped_configs
    from detres.data.shapes import ShapesOptions, write_shapes
    from detres.engine.train import train
    from detres.inference.run import predict_files

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start = time.monotonic()
    _say("1/3  Data: scenes with discs, triangles and crosses, drawn with exact boxes and masks")
    data = write_shapes(out.with_name(f"{out.name}_data"), IMAGES, options=ShapesOptions(preset="easy"),
                        val_images=VAL_IMAGES, formats=("coco",))
    _say("2/3  Training Mask R-CNN from scratch, and evaluation on held-out scenes")
    overrides = [f"output={out}", f"data.train.path={data}", f"data.val.path={data}", *_for_this_machine()]
    train(load_config(shipped_configs() / "demo.yaml", overrides).config, resume=True)
    _say("3/3  Prediction on held-out scenes")
    images = sorted((data / "val").glob("*.jpg"))[:SHOWN]
    predict_files(out, images, out / "predictions")
    overview = _contact_sheet(sorted((out / "predictions").glob("*.jpg")), out / "overview.png")
    rows = {"pictures": overview, "one by one": out / "predictions", "curves": out / "curves.png",
            "results": out / "results.json", "weights": out / "checkpoints" / "best.safetensors"}
    print(f"\nDone in {time.monotonic() - start:.0f} s.")
    print("\n".join(f"  {name:<11}{path}" for name, path in rows.items()))
    print(f"Next: detres predict {out} YOUR_IMAGE.jpg, or your own data with the configs in configs/.")
    return overview


def _for_this_machine() -> list[str]:
    """Settings for processors that emulate bf16: fp32 is many times faster there, if not as fast as real bf16."""
    from detres.engine.distributed import pick_device, runs_bf16

    return [] if runs_bf16(pick_device("auto")) else ["train.precision=fp32", "train.steps=700"]


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def _contact_sheet(pictures: list[Path], path: Path, columns: int = 4, gap: int = 12) -> Path:
    """Pictures of one size in a grid on white."""
    images = [Image.open(picture) for picture in pictures]
    width, height = images[0].width + gap, images[0].height + gap
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (gap + i % columns * width, gap + i // columns * height))
    sheet.save(path)
    return path
