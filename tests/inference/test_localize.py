"""Views of localizers and what is made of their boxes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from detres.config import EvalConfig, ModelConfig, RPNConfig, TrainConfig
from detres.inference import localize
from detres.inference.localize import (LocalizerEnsemble, build_locate, candidates, centre_crop, elected, locate,
                                       views_of, with_proposals)
from detres.models.localizer import best_boxes
from detres.structures import Batch, ImageBatch, Proposals, Targets

TRUTH = torch.tensor([[[12, 20, 40, 36]], [[8, 4, 28, 24]]])


class Finder(nn.Module):
    """Finds the white rectangle, with the label as its score in tenths, times `trust`."""

    def __init__(self, offset: float = 0.0, trust: float = 1.0):
        super().__init__()
        self.offset, self.trust, self.seen = offset, trust, []

    def forward(self, images: ImageBatch, labels: Tensor) -> Proposals:
        self.seen.append(tuple(images.pixels.shape[-2:]))
        boxes = []
        for pixels, (height, width) in zip(images.pixels, images.sizes.tolist()):
            y, x = (pixels[0, :height, :width] == 255).nonzero().unbind(1)
            boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
        boxes = torch.tensor(boxes).float()[:, None, None].expand(-1, labels.shape[1], 1, 4) + self.offset
        scores = self.trust * labels[..., None] / 10
        return Proposals(boxes, scores, torch.ones_like(scores, dtype=torch.bool))


def draw(scale: int = 1) -> ImageBatch:
    """Two images of 48 x 64 and 40 x 50 px on one canvas, grey, with a white rectangle at `TRUTH`."""
    pixels = torch.zeros(2, 3, 48 * scale, 64 * scale, dtype=torch.uint8)
    sizes = torch.tensor([[48, 64], [40, 50]]) * scale
    for image, (height, width), (x1, y1, x2, y2) in zip(pixels, sizes.tolist(), (TRUTH[:, 0] * scale).tolist()):
        image[:, :height, :width] = 90
        image[:, y1:y2, x1:x2] = 255
    return ImageBatch(pixels, sizes)


LABELS = torch.tensor([[1, 3], [2, 4]])


@pytest.mark.parametrize("views", ["dense", "pyramid", "crop"])
def test_every_view_finds_the_same_place(views):
    images = draw()
    if views == "pyramid":
        images = ImageBatch(images.pixels, images.sizes, pyramid=(draw(), draw(3)))
    made = [centre_crop(images, 44)] if views == "crop" else list(views_of(images))
    assert len(made) == {"dense": 2, "pyramid": 4, "crop": 1}[views]
    for view in made:
        found = view.restore(Finder()(view.images, LABELS).boxes)
        assert torch.equal(found, TRUTH[:, None].expand(-1, 2, 1, 4).float()), "both images, both classes"


def test_centre_crop_is_cut_from_the_middle_of_each_image():
    images = draw()
    view = centre_crop(images, 44)
    assert view.images.pixels.shape[-2:] == (44, 44) and view.images.sizes.tolist() == [[44, 44], [40, 44]]
    assert torch.equal(view.images.pixels[0], images.pixels[0, :, 2:46, 10:54])
    assert torch.equal(view.images.pixels[1, :, :40], images.pixels[1, :, :40, 3:47])
    whole = centre_crop(images, None)
    assert torch.equal(whole.images.pixels, images.pixels) and torch.equal(whole.images.sizes, images.sizes)


def test_candidates_of_views_and_models_are_joined():
    model = LocalizerEnsemble([Finder(), Finder(offset=20.0)])
    found = candidates(model, views_of(draw()), LABELS)
    truth, moved = TRUTH[0, 0].float(), torch.tensor([20.0, 20, 20, 20])
    assert torch.equal(found.boxes[0, 1], torch.stack([truth, truth + moved, truth,
                                                       truth + moved * torch.tensor([-1, 1, -1, 1])]))
    assert torch.allclose(found.scores, (LABELS / 10)[..., None].expand(-1, -1, 4)) and found.valid.all()


def test_the_box_is_the_best_or_the_one_that_most_agree_with():
    """Of five candidates one is not valid, the best of the others stands alone, and three overlap each other."""
    boxes = torch.tensor([[50.0, 50, 60, 60], [0, 0, 10, 10], [2, 0, 12, 10], [3, 0, 13, 10], [50, 50, 99, 99]])
    scores, valid = torch.tensor([0.9, 0.4, 0.3, 0.4, 0.99]), torch.tensor([True, True, True, True, False])
    found = Proposals(boxes[None, None], scores[None, None], valid[None, None])
    best, voted = best_boxes(found, 0.5, 1), elected(found, 0.5)
    assert best.boxes[0, 0].tolist() == [[50, 50, 60, 60]] and best.scores.item() == pytest.approx(0.9)
    left = (0 * 0.4 + 2 * 0.3 + 3 * 0.4) / 1.1
    assert voted.boxes[0, 0, 0].tolist() == pytest.approx([left, 0, left + 10, 10], abs=1e-4)
    assert voted.valid.all() and not elected(replace(found, valid=found.valid & False), 0.5).valid.any()


def test_locate_takes_the_vote():
    ask = partial(locate, LocalizerEnsemble([Finder(), Finder(offset=2.0)]), draw(), LABELS, crops=1, crop=None,
                  nms_thresh=0.5, count=5)
    assert torch.equal(ask().boxes, TRUTH[:, None].expand(-1, 2, 1, 4).float())
    assert torch.allclose(ask(vote_thresh=0.5).boxes, TRUTH[:, None].expand(-1, 2, 1, 4) + 1.0)


class Mover(nn.Module):
    """Judges boxes by their left edge, and moves them by a pixel."""

    def forward(self, images: ImageBatch, proposals: Proposals, labels: Tensor) -> Proposals:
        return Proposals(proposals.boxes + 1, proposals.boxes[..., 0] / 100, proposals.valid)


def test_regions_are_judged_in_parts(monkeypatch):
    options = {"crops": "dense", "crop": None, "nms_thresh": 0.5, "count": 5}
    model = LocalizerEnsemble([Finder(), Finder(offset=20.0)])
    box = locate(model, draw(), LABELS, regions=Mover(), **options).boxes
    assert box[0, 0].tolist() == [[33, 41, 61, 57]], "the one farthest right, moved"
    unsure = LocalizerEnsemble([Finder(), Finder(offset=20.0, trust=0.5)])
    box = locate(unsure, draw(), LABELS, regions=Mover(), **{**options, "count": 1}).boxes
    assert box[0, 0].tolist() == [[13, 21, 41, 37]], "the one that the localizers trust most, moved"
    proposals = candidates(model, views_of(draw()), LABELS)
    whole = localize.judged(Mover(), draw(), proposals, LABELS)
    monkeypatch.setattr(localize, "REGIONS_AT_ONCE", 5)
    parts = localize.judged(Mover(), draw(), proposals, LABELS)
    assert torch.equal(whole.boxes, proposals.boxes + 1) and torch.equal(parts.boxes, whole.boxes)
    assert torch.equal(parts.scores, whole.scores) and torch.equal(parts.valid, whole.valid)


def test_test_is_that_of_the_config():
    config = ModelConfig.model_validate({"name": "localizer", "input": {"crop": 32}, "anchors": {"sizes": [[32]]},
                                         "backbone": {"layout": "c5"}})
    for crops, sizes in ((1, [(32, 32)]), ("dense", [(48, 64)] * 2)):
        model = Finder()
        build_locate(config, EvalConfig(crops=crops), model)(draw(), LABELS)
        assert model.seen == sizes
    with pytest.raises(ValueError, match="must be 1 or dense for localizers, got 10"):
        build_locate(config, EvalConfig(crops=10), Finder())


def test_training_images_get_proposals_for_their_class():
    targets = Targets(TRUTH.float(), torch.tensor([[3], [5]]), torch.ones(2, 1, dtype=torch.bool), torch.arange(2))
    batch = Batch(draw(), targets, (0, 1), ("a", "b"), torch.tensor([[48, 64], [40, 50]]))
    (out,) = with_proposals([batch], Finder(), RPNConfig(), torch.device("cpu"), TrainConfig(precision="fp32"))
    assert torch.equal(out.targets.proposals.boxes, TRUTH.float()) and out.targets.proposals.valid.all()
    assert torch.allclose(out.targets.proposals.scores, torch.tensor([[0.3], [0.5]]))


def test_proposals_of_training_are_the_best_that_nms_leaves():
    targets = Targets(TRUTH.float(), torch.tensor([[3], [5]]), torch.ones(2, 1, dtype=torch.bool), torch.arange(2))
    batch = Batch(draw(), targets, (0, 1), ("a", "b"), torch.tensor([[48, 64], [40, 50]]))
    model = LocalizerEnsemble([Finder(20.0, 0.8), Finder(1.0, 0.9), Finder(), Finder(-5.0, 0.5)])  # one overlaps by 0.8
    for rpn, moved in ((RPNConfig(), (0, 20, -5)), (RPNConfig(nms_thresh=0.95), (0, 1, 20, -5)),
                       (RPNConfig(post_nms_topk_test=2), (0, 20))):
        (out,) = with_proposals([batch], model, rpn, torch.device("cpu"), TrainConfig(precision="fp32"))
        found = out.targets.proposals
        boxes = found.boxes[0, found.valid[0]]
        assert torch.equal(boxes, torch.cat([TRUTH[0] + offset for offset in moved]).float())
