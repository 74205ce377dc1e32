"""Semantic and panoptic evaluation of a model's answers, against plain loops, and through `evaluate`."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from detres.config import DataConfig, InputConfig, SourceConfig
from detres.data.loader import build_loader
from detres.data.panoptic import load_panoptic
from detres.data.semantic import load_semantic
from detres.evaluation.coco import CocoEvaluator
from detres.evaluation.panoptic import evaluate_panoptic
from detres.evaluation.run import evaluate
from detres.evaluation.segmentation import PanopticTest, SemanticTest
from detres.inference import segment
from detres.inference.run import segment_image
from detres.inference.segment import original_labels
from detres.models.panoptic import merge_panoptic
from detres.structures import Detections, ImageBatch

SIZES = {1: (30, 40), 2: (45, 30), 3: (30, 30)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three images of different sizes, each with rectangles of things, of a crowd, of stuff and of nothing."""
    root, rng = tmp_path_factory.mktemp("panoptic"), np.random.default_rng(0)
    (root / "annotations/panoptic_val").mkdir(parents=True)
    (root / "val").mkdir()
    images, annotations = [], []
    for image_id, (height, width) in SIZES.items():
        ids = np.where(np.arange(width) < width // 2, 900, 77)[None].repeat(height, 0)  # two kinds of stuff
        ids[-2:] = 0
        segments = {900: (3, 0), 77: (5, 0)}
        for place, (number, category, crowd) in enumerate([(70000, 1, 0), (4, 2, 0), (5, 1, 0), (6, 2, 1)]):
            y, x = rng.integers(0, 6, 2) + 15 * np.array([place // 2, place % 2])
            ids[y:y + 8, x:x + 8] = number
            segments[number] = (category, crowd)
        infos = []
        for number, (category, crowd) in segments.items():
            ys, xs = np.nonzero(ids == number)
            if len(ys):
                box = [xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()]
                infos.append({"id": number, "category_id": category, "iscrowd": crowd, "area": len(ys),
                              "bbox": list(map(int, box))})
        segment_image(torch.from_numpy(ids)).save(root / f"annotations/panoptic_val/{image_id}.png")
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(root / f"val/{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": height, "width": width})
        annotations.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": infos})
    categories = [{"id": i, "name": name, "isthing": int(i < 3)} for i, name in enumerate("abcde", 1)]
    (root / "annotations/panoptic_val.json").write_text(json.dumps(
        {"images": images, "annotations": annotations, "categories": categories}))
    return root


class Answers(nn.Module):
    """Says what a function of the ids of images says; of the loader's batch, which it is shown."""

    def __init__(self, answer):
        super().__init__()
        self.weight, self.answer, self.ids = nn.Parameter(torch.zeros(1)), answer, iter(())

    def forward(self, images: ImageBatch, targets=None):
        if targets is not None:
            return {"loss_semantic": images.pixels.float().mean()}
        return self.answer([next(self.ids) for _ in images.pixels], images)


def run(dataset, answer, evaluators, with_boxes: bool, min_size: int = 30, batch_size: int = 2, losses: bool = False):
    loader = build_loader(dataset, InputConfig(min_size=min_size, max_size=90), DataConfig(workers=0),
                          batch_size=batch_size, training=False, with_masks=False, with_boxes=with_boxes,
                          with_semantic=True)
    model = Answers(answer)
    model.ids = iter(record.id for record in dataset.records)
    return evaluate(model, loader, evaluators, "cpu", losses=losses, progress=False)


def perfect_logits(dataset, channels: int):
    """At the size of the canvas, of the true map resized to it."""
    records = {record.id: record for record in dataset.records}

    def answer(image_ids, images):
        logits = torch.zeros(len(image_ids), channels, *images.pixels.shape[-2:])
        for own, image_id, (height, width) in zip(logits, image_ids, images.sizes.tolist()):
            labels = torch.from_numpy(records[image_id].label_map.read(records[image_id])).long()
            hot = F.one_hot(labels.clamp(max=channels - 1), channels).permute(2, 0, 1).float()
            own[:, :height, :width] = F.interpolate(hot[None], (height, width), mode="nearest-exact")[0]
        return logits

    return answer


def test_logits_are_cropped_resized_and_compared_as_detectron2_does(monkeypatch):
    torch.manual_seed(0)
    logits = torch.randn(7, 64, 96)
    for values in (2**26, 3 * 30 * 50, 1):  # all at once, three classes at once, one
        monkeypatch.setattr(segment, "VALUES_AT_ONCE", values)
        labels = original_labels(logits, (50, 81), (30, 50))
        expected = F.interpolate(logits[None, :, :50, :81], (30, 50), mode="bilinear", align_corners=False)[0].argmax(0)
        assert labels.dtype == torch.uint8 and torch.equal(labels.long(), expected)
    tie = torch.zeros(3, 4, 4)
    assert original_labels(tie, (4, 4), (8, 8)).unique().tolist() == [0]


def test_perfect_maps_are_perfect(folder):
    dataset = load_semantic(SourceConfig(path=str(folder)), "val")
    result = run(dataset, perfect_logits(dataset, 5), [SemanticTest(dataset)], False, losses=True)
    assert result.metrics["sem_seg/mIoU"] == 1 and result.metrics["sem_seg/pACC"] == 1
    assert result.metrics["val/loss_semantic"] > 0


def test_semantic_numbers_are_those_of_a_loop(folder):
    """Random logits at twice the size, in padded batches."""
    dataset = load_semantic(SourceConfig(path=str(folder)), "val")
    kept, matrix = {}, np.zeros((5, 5))

    def answer(image_ids, images):
        logits = torch.randn(len(image_ids), 5, *images.pixels.shape[-2:])
        kept.update({image_id: (own, size) for image_id, own, size in zip(image_ids, logits, images.sizes.tolist())})
        return logits

    result = run(dataset, answer, [SemanticTest(dataset)], False, min_size=60)
    for record in dataset.records:
        logits, (height, width) = kept[record.id]
        found = F.interpolate(logits[None, :, :height, :width], (record.height, record.width), mode="bilinear",
                              align_corners=False)[0].argmax(0)
        truth = record.label_map.read(record)
        for p, t in zip(found.flatten().tolist(), truth.ravel().tolist()):
            if t != 255:
                matrix[p, t] += 1
    iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    assert result.metrics["sem_seg/mIoU"] == pytest.approx(iou.mean(), abs=1e-12)
    assert result.per_class["a"]["sem_seg/IoU"] == pytest.approx(iou[0], abs=1e-12)


def panoptic_answer(dataset, miss: tuple = ()):
    """The true instances, with masks that fill their boxes, and the true semantic maps."""
    logits, records = perfect_logits(dataset, 4), {record.id: record for record in dataset.records}

    def answer(image_ids, images):
        n = len(image_ids)
        boxes, labels = torch.zeros(n, 5, 4), torch.zeros(n, 5, dtype=torch.int64)
        valid, masks = torch.zeros(n, 5, dtype=torch.bool), torch.ones(n, 5, 28, 28)
        for i, image_id in enumerate(image_ids):
            record = records[image_id]
            scale = images.sizes[i].flip(0).repeat(2) / torch.tensor([record.width, record.height] * 2)
            items = [item for item in record.annotations if not item.crowd and (image_id, item.label) not in miss]
            for d, item in enumerate(items):
                boxes[i, d], labels[i, d] = torch.tensor(item.box) * scale, item.label
                valid[i, d] = True
        return Detections(boxes, torch.full((n, 5), 0.9), labels, valid, masks, semantic=logits(image_ids, images))

    return answer


def panoptic_test(dataset, **options):
    return PanopticTest(dataset, partial(merge_panoptic, **{"stuff_area": 1, **options}))


def test_panoptic_numbers(folder):
    dataset = load_panoptic(SourceConfig(path=str(folder)), "val")
    tests = [CocoEvaluator(dataset, ("bbox", "segm")), panoptic_test(dataset)]
    names = [name for test in tests for name in test.metric_names]
    result = run(dataset, panoptic_answer(dataset), tests, True, min_size=60)
    assert set(names) == set(result.metrics)
    assert result.metrics["sem_seg/mIoU"] == 1 and result.metrics["panoptic/PQ_st"] == 1
    assert result.metrics["panoptic/PQ_th"] == 1
    assert result.per_class["c"]["panoptic/PQ"] == 1 and result.per_class["things"]["sem_seg/IoU"] == 1
    assert result.metrics["bbox/AP"] == result.metrics["segm/AP"] == 1
    worse = run(dataset, panoptic_answer(dataset, miss=((1, 0), (2, 0), (3, 0))), [panoptic_test(dataset)], True)
    assert worse.per_class["a"]["panoptic/PQ"] == 0 < worse.per_class["b"]["panoptic/PQ"]


def test_panoptic_numbers_are_those_of_the_files(folder, tmp_path):
    """What is written as COCO's files and measured from these gives the same numbers."""
    dataset = load_panoptic(SourceConfig(path=str(folder)), "val")
    test, written = panoptic_test(dataset, stuff_area=60), []
    ids = [*dataset.category_ids, *dataset.semantic_ids[1:]]

    def merge(*parts):
        panoptic, found = merge_panoptic(*parts, stuff_area=60)
        record = dataset.records[len(written)]
        segment_image(panoptic).save(tmp_path / f"{record.id}.png")
        infos = [{"id": number, "category_id": ids[label if is_thing else len(dataset.classes) + label - 1]}
                 for number, label, is_thing in zip(found.ids.tolist(), found.labels.tolist(), found.is_thing.tolist())]
        written.append({"image_id": record.id, "file_name": f"{record.id}.png", "segments_info": infos})
        return panoptic, found

    test._merge = merge
    result = run(dataset, panoptic_answer(dataset, miss=((1, 0), (3, 1))), [test], True, batch_size=1)
    (tmp_path / "found.json").write_text(json.dumps({"annotations": written}))
    files = evaluate_panoptic(folder / "annotations/panoptic_val.json", None, tmp_path / "found.json", tmp_path)
    assert {name: result.metrics[name] for name in files.metrics} == files.metrics
    assert 0 < files.metrics["panoptic/PQ"] < 1


def test_ranks_together_are_one(folder):
    dataset = load_panoptic(SourceConfig(path=str(folder)), "val")
    whole, parts = panoptic_test(dataset), [panoptic_test(dataset), panoptic_test(dataset)]
    answer = panoptic_answer(dataset, miss=((2, 0),))  # what the first rank alone does not know
    expected = run(dataset, answer, [whole], True)
    for rank, part in enumerate(parts):
        own = [record for record in dataset.records if record.id % 2 == rank]
        run(type(dataset)(**{**vars(dataset), "records": tuple(own)}), answer, [part], True)
    parts[1].merge([part.state() for part in parts])
    assert parts[1].compute() == expected != parts[0].compute()
    parts[0].reset()
    assert parts[0].compute().metrics["panoptic/PQ"] == -1
