"""Localization error of boxes that know nothing of the image: what a localizer has to be better than.

    python benchmarks/trivial_boxes.py datasets/tiny_imagenet_loc20

Mean boxes are of the training images, in fractions of width and height; the error is that given the class, as
`detres localize` counts it.
"""

from __future__ import annotations

import sys

import torch

from detres.config import SourceConfig
from detres.data.dataset import Dataset, load_dataset
from detres.evaluation.ilsvrc import localized
from detres.evaluation.localization import LocTruths

WHOLE = torch.tensor([0.0, 0.0, 1.0, 1.0])


def sizes(dataset: Dataset) -> torch.Tensor:
    return torch.tensor([[record.width, record.height] * 2 for record in dataset.records])


def main(path: str) -> None:
    train, val = (load_dataset(SourceConfig(path=path), role, "drop") for role in ("train", "val"))
    objects, truths = LocTruths.of(train, torch.device("cpu")), LocTruths.of(val, torch.device("cpu"))
    fractions = (objects.boxes / sizes(train)[:, None])[objects.valid]
    labels = objects.labels[:, None].expand_as(objects.valid)[objects.valid]
    of_class = torch.stack([fractions[labels == label].mean(0) for label in range(len(train.classes))])
    for name, boxes in (("the whole image", WHOLE.expand(len(val.records), 4)),
                        ("the mean box", fractions.mean(0).expand(len(val.records), 4)),
                        ("the mean box of the class", of_class[truths.labels])):
        right = localized((boxes * sizes(val))[:, None], truths.boxes, truths.valid)[truths.counted]
        print(f"{name:26} {100 * (1 - right.float().mean()):.1f} % of {len(right)} images")


if __name__ == "__main__":
    main(*sys.argv[1:])
