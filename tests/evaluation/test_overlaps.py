"""Overlaps of pairs: every value is pycocotools' (or that of Boundary IoU's reference), compared with ==."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.cocoeval import COCOeval

from detres.data.masks import run_lengths
from detres.evaluation import boundary_overlaps, mask_overlaps, overlaps
from detres.evaluation.boundary_overlaps import bitmap_boundary_iou_pairs, boundary, rle_boundary_iou_pairs
from detres.evaluation.mask_overlaps import bitmap_iou_pairs, decode_runs, rle_areas, rle_iou_pairs, runs_to_bitmaps
from detres.evaluation.overlaps import box_iou_pairs, oks_pairs


def all_pairs(found: int, truths: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cartesian_prod(torch.arange(found), torch.arange(truths)).long().reshape(-1, 2).unbind(1)


def boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """xywh of many kinds; few distinct numbers, so that boxes touch and coincide."""
    kinds = [lambda: rng.uniform(0, 100, 4), lambda: rng.integers(0, 4, 4) * 8.0, lambda: rng.integers(-2, 3, 4) * 1.0,
             lambda: rng.uniform(0, 1, 4) * 1e12, lambda: rng.uniform(0, 1, 4) * 1e-12, lambda: rng.normal(0, 50, 4)]
    return np.array([rng.choice(kinds)() for _ in range(count)])


@pytest.mark.parametrize("seed", range(20))
def test_boxes(seed, monkeypatch):
    monkeypatch.setattr(overlaps, "PAIRS_AT_ONCE", 100)
    rng = np.random.default_rng(seed)
    found, truths, crowd = boxes(rng, 40), boxes(rng, 30), rng.random(30) < 0.3
    d, g = all_pairs(40, 30)
    ours = box_iou_pairs(*map(torch.from_numpy, (found, truths, crowd)), d, g)
    assert ours.dtype == torch.float64
    expected = rle.iou(found, truths, crowd)
    assert (ours.view(40, 30).numpy() == expected).all() and (expected > 0).sum() > 5


def test_no_pairs():
    none, crowd = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.bool)
    assert box_iou_pairs(torch.zeros(3, 4).double(), torch.zeros(0, 4).double(), crowd, none, none).shape == (0,)
    assert rle_iou_pairs([], [], none, none, crowd, none, none, none, 0.5).shape == (0,)
    assert rle_boundary_iou_pairs([], [], crowd, none, none, torch.zeros(0).double(), 0.5).shape == (0,)
    keypoints = torch.zeros(0, 17, 3).double()
    assert oks_pairs(keypoints, keypoints, torch.zeros(0, 4), none, torch.ones(17), none, none).shape == (0,)
    assert rle_areas([]).shape == (0,) and decode_runs([]).lengths.shape == (0,)
    iou, area = bitmap_iou_pairs(torch.ones(2, 3, 4).bool(), torch.ones(0, 3, 4).bool(), crowd, none, none)
    assert iou.shape == (0,) and area.tolist() == [12, 12]
    iou, area = bitmap_boundary_iou_pairs(torch.ones(0, 3, 4).bool(), torch.ones(1, 3, 4).bool(), crowd, none, none)
    assert iou.shape == (0,) and area.shape == (0,)


def masks(rng: np.random.Generator, count: int, size: tuple[int, int]) -> np.ndarray:
    """Bitmaps (count, h, w): ellipses, boxes up to the border, noise, one pixel, empty, full; some nearly the same."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    made = np.zeros((count, *size), bool)
    for i in range(count):
        kind = rng.integers(9)
        cy, cx, ry, rx = rng.uniform(0.01, 1, 4) * (height, width, height * 0.6, width * 0.6)
        if kind <= 3:
            made[i] = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
        elif kind == 4:
            made[i] = (abs(y - cy) < ry) & (abs(x - cx) < rx)
        elif kind == 5:
            made[i] = rng.random(size) < rng.choice([0.1, 0.9])
        elif kind == 6:
            made[i, int(cy) % height, int(cx) % width] = True
        elif kind == 7:
            made[i] = rng.random() < 0.5
        elif i:
            made[i] = np.roll(made[i - 1], rng.integers(-2, 3, 2), (0, 1))
    return made


def encode(bitmaps: np.ndarray) -> list[dict]:
    return rle.encode(np.asfortranarray(bitmaps.transpose(1, 2, 0).astype(np.uint8))) if len(bitmaps) else []


def with_empty_runs(code: dict, rng: np.random.Generator) -> bytes:
    """The same mask with two of its runs interrupted by a run of no length."""
    runs = run_lengths(code["counts"].decode())
    for _ in range(2):
        i = int(rng.integers(len(runs)))
        part = int(rng.integers(runs[i] + 1))
        runs[i:i + 1] = [part, 0, runs[i] - part]
    return rle.frPyObjects({"size": code["size"], "counts": runs}, *code["size"])["counts"]


class Scene:
    """Masks of several images of different sizes, flat, and all pairs of each image."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.found, self.truths, image, pairs = [], [], [], []
        for i in range(4):
            size = tuple(rng.integers(1, 60, 2))
            counts = rng.integers(0, 9, 2)
            bitmaps = masks(rng, sum(counts), size)[rng.permutation(sum(counts))]
            d, g = all_pairs(*counts)
            pairs.append(torch.stack([d + len(self.found), g + len(self.truths)]))
            self.found += list(bitmaps[:counts[0]])
            self.truths += list(bitmaps[counts[0]:])
            image += [i] * counts[1]
        self.d, self.g = torch.cat(pairs, 1)
        self.crowd, self.image = torch.from_numpy(rng.random(len(image)) < 0.2), torch.tensor(image, dtype=torch.long)
        self.dt_rles, self.gt_rles = ([encode(m[None])[0] for m in part] for part in (self.found, self.truths))
        for code in self.dt_rles[::3]:
            code["counts"] = with_empty_runs(code, rng)
        for code in self.dt_rles[::2]:
            code["counts"] = code["counts"].decode()  # as from JSON
        self.dt_area, self.gt_area = (torch.from_numpy(rle_areas(part)) for part in (self.dt_rles, self.gt_rles))

    def reference(self, dt: list[dict], gt: list[dict], crowd: np.ndarray) -> np.ndarray:
        return np.array([rle.iou([dt[d]], [gt[g]], [int(crowd[g])])[0, 0] for d, g in zip(self.d, self.g)])

    def iou(self, lowest: float) -> torch.Tensor:
        return rle_iou_pairs(self.dt_rles, self.gt_rles, self.dt_area, self.gt_area, self.crowd, self.image,
                             self.d, self.g, lowest)


@pytest.mark.parametrize("seed", range(25))
def test_masks_from_run_lengths(seed):
    scene = Scene(seed)
    expected = scene.reference(scene.dt_rles, scene.gt_rles, scene.crowd)
    assert (scene.dt_area.numpy() == [m.sum() for m in scene.found]).all()
    assert (scene.iou(0.0).numpy() == expected).all() and (scene.iou(-1.0).numpy() == expected).all()
    for lowest in (1e-9, 0.1, 0.5, 0.75, 1 - 1e-10, *expected[expected > 0][:5]):
        ours = scene.iou(lowest).numpy()
        assert (ours == np.where(ours < lowest, ours, expected)).all()
        assert (ours[expected >= lowest] == expected[expected >= lowest]).all()


def test_pairs_that_cannot_reach_the_lowest_threshold_are_left_out(monkeypatch):
    big, small = encode(np.stack([np.ones((40, 40), bool), np.eye(40, dtype=bool)]))
    asked = []
    monkeypatch.setattr(rle, "iou", lambda d, g, c: asked.append((len(d), len(g))) or np.ones((len(d), len(g))))
    area = torch.from_numpy(rle_areas([big, small]))
    none, d = torch.zeros(2, dtype=torch.bool), torch.tensor([0, 0])
    rle_iou_pairs([big], [big, small], area[:1], area, none, torch.tensor([0, 0]), d, torch.tensor([0, 1]), 0.5)
    assert asked == [(1, 1)]


def test_masks_of_different_sizes_are_minus_one_as_in_pycocotools():
    (found,), (truth,) = encode(np.ones((1, 8, 9), bool)), encode(np.ones((1, 9, 8), bool))
    zero, area = torch.zeros(1, dtype=torch.long), torch.tensor([72])
    iou = rle_iou_pairs([found], [truth], area, area, zero.bool(), zero, zero, zero, 0.5)
    assert iou.tolist() == rle.iou([found], [truth], [0])[0].tolist() == [-1]
    assert rle_boundary_iou_pairs([found], [truth], zero.bool(), zero, zero, iou, -2.0).tolist() == [-1]


def test_more_masks_than_pycocotools_takes_the_area_of():
    assert rle_areas(encode(np.ones((600, 2, 3), bool))).tolist() == [6] * 600


@pytest.mark.parametrize("seed", range(25))
def test_masks_from_bitmaps(seed, monkeypatch):
    monkeypatch.setattr(mask_overlaps, "WIDTH_AT_ONCE", 7)
    monkeypatch.setattr(mask_overlaps, "PIXELS_AT_ONCE", 5000)
    scene = Scene(seed)
    expected = scene.iou(0.0)
    for i in range(4):
        pairs = (scene.image[scene.g] == i).nonzero()[:, 0]
        if not len(pairs):
            continue
        d, rows = scene.d[pairs].unique(return_inverse=True)
        g, columns = scene.g[pairs].unique(return_inverse=True)
        found, truths = (torch.from_numpy(np.stack([bitmaps[j] for j in index]))
                         for bitmaps, index in ((scene.found, d), (scene.truths, g)))
        with torch.autocast("cpu", torch.bfloat16):
            iou, area = bitmap_iou_pairs(found, truths, scene.crowd[g], rows, columns)
        assert (iou == expected[pairs]).all() and (area == scene.dt_area[d]).all() and iou.dtype == torch.float64
        runs = decode_runs([scene.gt_rles[j] for j in g])
        drawn = runs_to_bitmaps(torch.from_numpy(runs.lengths), torch.from_numpy(runs.number), truths.shape[1:])
        assert drawn.dtype == torch.bool and (drawn == truths).all() and drawn.is_contiguous()
        least, area = bitmap_boundary_iou_pairs(found, truths, scene.crowd[g], rows, columns)
        of_rles = rle_boundary_iou_pairs(scene.dt_rles, scene.gt_rles, scene.crowd, scene.d[pairs], scene.g[pairs],
                                         expected[pairs], 0.0)
        assert (least == of_rles).all() and (area == scene.dt_area[d]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(5))
def test_bitmaps_on_a_gpu_give_the_same(seed, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", True)
    rng = np.random.default_rng(seed)
    found, truths = (torch.from_numpy(masks(rng, n, (480, 641))) for n in (30, 9))
    crowd, (d, g) = torch.from_numpy(rng.random(9) < 0.3), all_pairs(30, 9)
    on_cpu = (*bitmap_iou_pairs(found, truths, crowd, d, g), *bitmap_boundary_iou_pairs(found, truths, crowd, d, g))
    inputs = [x.cuda() for x in (found, truths, crowd, d, g)]
    with torch.autocast("cuda", torch.bfloat16):
        on_gpu = (*bitmap_iou_pairs(*inputs), *bitmap_boundary_iou_pairs(*inputs))
    assert all((a == b.cpu()).all() for a, b in zip(on_cpu, on_gpu))
    runs = decode_runs(encode(truths.numpy()))
    drawn = runs_to_bitmaps(torch.from_numpy(runs.lengths).cuda(), torch.from_numpy(runs.number).cuda(), (480, 641))
    assert (drawn.cpu() == truths).all()


def test_bitmaps_wider_than_float16_counts():
    bitmaps = torch.ones(2, 3, 70001, dtype=torch.bool)
    bitmaps[1, :, -1] = False
    iou, area = bitmap_iou_pairs(bitmaps, bitmaps, torch.zeros(2).bool(), torch.tensor([0, 1]), torch.tensor([1, 1]))
    assert area.tolist() == [210003, 210000] and iou.tolist() == [210000 / 210003, 1.0]


@pytest.mark.parametrize("seed", range(20))
def test_decoder_gives_the_runs(seed):
    scene = Scene(seed)
    large = encode(np.random.default_rng(seed).random((3, 700, 500)) < [[[0.5]], [[1e-5]], [[1 - 1e-5]]])
    codes = scene.dt_rles + scene.gt_rles + large
    runs = decode_runs(codes)
    strings = [c if isinstance(c, str) else c.decode() for c in (code["counts"] for code in codes)]
    expected = [run_lengths(string) for string in strings]
    assert runs.lengths.tolist() == sum(expected, []) and runs.number.tolist() == list(map(len, expected))
    assert runs.sizes.tolist() == [list(code["size"]) for code in codes]


@pytest.mark.parametrize("counts", ["", "Z", "523", "5220", "522Z", "52 2", "52\x7f2", "52é", "0L=", "52\x120"])
def test_decoder_refuses_damaged_strings(counts):
    sound = {"size": [3, 3], "counts": "522"}
    decode_runs([sound, sound])
    for after in ([], [sound]):
        with pytest.raises(ValueError, match=r"add up to the 3 x 3 pixels.*got .*truth 1.*encode it again"):
            decode_runs([sound, {"size": [3, 3], "counts": counts}, *after], "truth")


# Boundaries


def reference_boundary(bitmap: np.ndarray, dilation_ratio: float) -> np.ndarray:
    """The published definition: what 3 x 3 erosions take away from the mask, with zeros around the image."""
    height, width = bitmap.shape
    times = max(1, int(round(dilation_ratio * np.sqrt(height**2 + width**2))))
    framed = np.pad(bitmap.astype(np.uint8), 1)
    eroded = cv2.erode(framed, np.ones((3, 3), np.uint8), iterations=times)[1:-1, 1:-1]
    return bitmap.astype(np.uint8) - eroded


@pytest.mark.parametrize("dilation_ratio", [0.001, 0.02, 0.07, 0.9])
def test_boundary(dilation_ratio):
    rng = np.random.default_rng(0)
    for size in [(40, 60), (61, 33), (1, 9), (7, 1), (3, 3), (120, 90)]:
        bitmaps = masks(rng, 20, size)
        bitmaps[0] = True
        ours = boundary(torch.from_numpy(bitmaps), dilation_ratio)
        assert ours.dtype == torch.bool
        assert (ours.numpy() == [reference_boundary(bitmap, dilation_ratio) for bitmap in bitmaps]).all()


@pytest.mark.parametrize("seed", range(25))
def test_boundary_overlaps(seed, monkeypatch):
    monkeypatch.setattr(boundary_overlaps, "PAIRS_AT_ONCE", 30)
    monkeypatch.setattr(boundary_overlaps, "CANVAS_PIXELS", 3000)
    scene, ratio = Scene(seed), (0.02, 0.1)[seed % 2]
    dt, gt = (encode_each([reference_boundary(m, ratio) for m in part]) for part in (scene.found, scene.truths))
    of_masks = scene.reference(scene.dt_rles, scene.gt_rles, scene.crowd)
    least = np.minimum(of_masks, scene.reference(dt, gt, scene.crowd))
    expected = np.where(scene.crowd.numpy()[scene.g], of_masks, least)
    for lowest in (0.0, 0.3, 0.5):
        mask_iou = scene.iou(lowest)
        ours = rle_boundary_iou_pairs(scene.dt_rles, scene.gt_rles, scene.crowd, scene.d, scene.g, mask_iou, lowest,
                                      ratio).numpy()
        assert (ours == mask_iou.numpy())[mask_iou < lowest].all()  # not computed
        assert (ours[expected >= lowest] == expected[expected >= lowest]).all()
        assert (ours[expected < lowest] < lowest).all()
    assert ((0 < expected) & (expected < of_masks)).any() or not len(expected)


def encode_each(bitmaps: list[np.ndarray]) -> list[dict]:
    return [encode(bitmap[None])[0] for bitmap in bitmaps]


# Keypoints


def reference_oks(found: np.ndarray, truths: np.ndarray, gt_boxes: np.ndarray, gt_area: np.ndarray,
                  sigmas: np.ndarray) -> np.ndarray:
    """pycocotools' own method, on one image."""
    run = COCOeval(iouType="keypoints")
    run.params.kpt_oks_sigmas = sigmas
    run.params.maxDets = [len(found)]
    run._dts[1, 1] = [{"score": 1.0, "keypoints": k.ravel().tolist()} for k in found]
    run._gts[1, 1] = [{"keypoints": k.ravel().tolist(), "bbox": b.tolist(), "area": float(a)}
                      for k, b, a in zip(truths, gt_boxes, gt_area)]
    return run.computeOks(1, 1)


@pytest.mark.parametrize("joints", [1, 3, 7, 8, 9, 14, 17, 133])
@pytest.mark.parametrize("seed", range(3))
def test_keypoints(joints, seed, monkeypatch):
    monkeypatch.setattr(overlaps, "PAIRS_AT_ONCE", 70)
    rng = np.random.default_rng(seed)
    truths = np.concatenate([rng.uniform(0, 200, (25, joints, 2)), rng.integers(0, 3, (25, joints, 1))], 2)
    truths[:5, :, 2], truths[5:8, 1:, 2], truths[8:10, :, 2] = 0, 0, 2
    truths[::2] = truths[::2].round()
    found = np.concatenate([truths, rng.uniform(0, 200, (5, joints, 3))])
    found[:25] += rng.normal(0, 5, (25, joints, 3))
    gt_boxes, gt_area = rng.uniform(0, 100, (25, 4)), rng.uniform(0, 9000, 25)
    gt_area[-1], found[24] = 0, truths[24]
    sigmas = rng.uniform(0.02, 0.12, joints)
    d, g = all_pairs(30, 25)
    ours = oks_pairs(*map(torch.from_numpy, (found, truths, gt_boxes, gt_area, sigmas)), d, g)
    expected = reference_oks(found, truths, gt_boxes, gt_area, sigmas)
    assert (ours.view(30, 25).numpy() == expected).all() and (expected > 0.01).mean() > 0.02


@pytest.mark.gpu
def test_keypoints_on_a_gpu_are_the_same_but_for_last_bits():
    rng = np.random.default_rng(0)
    truths = torch.from_numpy(np.concatenate([rng.uniform(0, 200, (25, 17, 2)), rng.integers(0, 3, (25, 17, 1))], 2))
    truths[:5, :, 2] = 0
    inputs = (truths + 3, truths, torch.rand(25, 4).double(), torch.rand(25).double() * 9000, torch.full((17,), 0.07))
    pairs = all_pairs(25, 25)
    on_gpu = oks_pairs(*(x.cuda() for x in (*inputs, *pairs)))
    assert torch.allclose(on_gpu.cpu(), oks_pairs(*inputs, *pairs), rtol=1e-14, atol=0)
