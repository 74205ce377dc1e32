"""Semantic segmentation numbers: hand-solved cases, a naive oracle, distribution, labels out of range."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from detres.data.images import read_image
from detres.data.shapes import STUFF_IDS, THING_IDS, write_shapes
from detres.evaluation.semantic import SemanticEvaluator


def labels(*rows: list[int]) -> Tensor:
    return torch.tensor([rows])  # (1, H, W)


def evaluated(prediction: Tensor, target: Tensor, classes=("road", "sky", "tree")) -> SemanticEvaluator:
    evaluator = SemanticEvaluator(classes)
    evaluator.update(prediction, target)
    return evaluator


def test_hand_solved():
    evaluator = evaluated(labels([0, 0, 1, 1], [0, 1, 1, 2]), labels([0, 0, 0, 1], [0, 1, 255, 255]))
    assert evaluator.matrix().tolist() == [[3, 0, 0], [1, 2, 0], [0, 0, 0]]  # row predicted, column true
    result = evaluator.compute()
    road, sky = 3 / 4, 2 / 3
    assert result.metrics == pytest.approx({
        "sem_seg/mIoU": (road + sky) / 2, "sem_seg/fwIoU": (4 * road + 2 * sky) / 6,
        "sem_seg/mACC": (3 / 4 + 1) / 2, "sem_seg/pACC": 5 / 6}, rel=1e-15)
    assert result.per_class == {"road": {"sem_seg/IoU": road, "sem_seg/ACC": 0.75},
                                "sky": {"sem_seg/IoU": sky, "sem_seg/ACC": 1.0},
                                "tree": {"sem_seg/IoU": -1.0, "sem_seg/ACC": -1.0}}
    assert tuple(result.metrics) == SemanticEvaluator.metric_names


def test_a_class_only_predicted_counts_for_iou_and_not_for_accuracy():
    result = evaluated(labels([0, 2]), labels([0, 0])).compute()
    assert result.per_class["tree"] == {"sem_seg/IoU": 0.0, "sem_seg/ACC": -1.0}
    assert result.metrics == {"sem_seg/mIoU": 0.25, "sem_seg/fwIoU": 0.5, "sem_seg/mACC": 0.5, "sem_seg/pACC": 0.5}


def test_nothing_and_all_ignored():
    for evaluator in (SemanticEvaluator(["road"]), evaluated(labels([0, 9]), labels([255, 255]))):
        assert set(evaluator.compute().metrics.values()) == {-1.0}


def naive(prediction: Tensor, target: Tensor, k: int, ignore: int) -> dict[str, float]:
    pairs = [(p, t) for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist()) if t != ignore]
    hits = [pairs.count((c, c)) for c in range(k)]
    true = [sum(t == c for _, t in pairs) for c in range(k)]
    union = [sum(c in pair for pair in pairs) for c in range(k)]
    iou = {c: hits[c] / union[c] for c in range(k) if union[c]}
    accuracy = [hits[c] / true[c] for c in range(k) if true[c]]
    return {"sem_seg/mIoU": math.fsum(iou.values()) / len(iou),
            "sem_seg/fwIoU": math.fsum(iou[c] * true[c] for c in iou) / len(pairs),
            "sem_seg/mACC": math.fsum(accuracy) / len(accuracy), "sem_seg/pACC": sum(hits) / len(pairs)}


@pytest.mark.parametrize("ignore", [255, -1, 0])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_equals_the_naive_count(ignore, dtype):
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        k = int(torch.randint(1, 7, (), generator=draw))
        shape = (2, 5, 7)
        target = torch.randint(0, k, shape, generator=draw).to(dtype)
        prediction = torch.where(torch.rand(shape, generator=draw) < 0.6, target,
                                 torch.randint(0, k, shape, generator=draw).to(dtype))
        target[torch.rand(shape, generator=draw) < 0.2] = ignore
        target[0, 0, 0] = k - 1  # with one class and ignore 0 nothing would be left
        if k == 1 and ignore == 0:
            continue
        evaluator = SemanticEvaluator([f"class {c}" for c in range(k)], ignore)
        for image in range(2):
            evaluator.update(prediction[image:image + 1], target[image:image + 1])
        expected = naive(prediction, target, k, ignore)
        assert evaluator.compute().metrics == pytest.approx(expected, rel=1e-14)


def test_any_world_size_gives_the_same():
    target = torch.randint(0, 3, (6, 9, 8))
    prediction = torch.where(torch.rand(6, 9, 8) < 0.7, target, torch.randint(0, 3, (6, 9, 8)))
    whole = evaluated(prediction, target)
    ranks = [evaluated(prediction[part], target[part]) for part in (slice(4, 6), slice(0, 1), slice(1, 4))]
    states = [rank.state() for rank in ranks]
    for rank in ranks:
        rank.merge(states)
        assert torch.equal(rank.matrix(), whole.matrix()) and rank.compute() == whole.compute()
    whole.reset()
    assert not whole.matrix().any()


def test_state_does_not_change_with_later_updates():
    evaluator = evaluated(labels([0]), labels([0]))
    state = evaluator.state()
    evaluator.update(labels([0]), labels([0]))
    assert state.sum() == 1


def test_labels_out_of_range_are_refused_in_compute():
    evaluator = evaluated(labels([0, 3, -1, 2, 2, 2, 7]), labels([0, 1, 2, 3, -1, 4, 255]))
    with pytest.raises(ValueError, match=r"0 to 2, and in the target also 255 .* 2 pixels of predictions and 3 of "):
        evaluator.compute()


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"integer labels, got torch.float32 of shape \(1, 3, 2, 2\).*argmax"):
        evaluated(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shape of the target, got \(1, 1, 2\) and \(1, 1, 3\)"):
        evaluated(labels([0, 0]), labels([0, 0, 0]))
    with pytest.raises(ValueError, match="distinct names"):
        SemanticEvaluator(["road", "road"])


class _Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_update_reads_nothing_back_from_the_device():
    evaluator = SemanticEvaluator(["road", "sky"])
    with _Calls() as calls:
        evaluator.update(labels([0, 1]), labels([0, 255]))
    assert "index_add_" in calls.names
    assert not calls.names & {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "index", "_unique2"}


@pytest.mark.gpu
def test_the_device_gives_the_same_without_a_sync():
    target, prediction = torch.randint(0, 19, (4, 64, 96)), torch.randint(0, 19, (4, 64, 96))
    names = [f"class {c}" for c in range(19)]
    host = evaluated(torch.cat([prediction, prediction]), torch.cat([target, target]), names)
    prediction, target = prediction.cuda(), target.cuda()
    device = evaluated(prediction, target, names)  # moves the counts to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        device.update(prediction, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(device.matrix(), host.matrix())


def test_truth_of_the_shapes_data_set_is_perfect(tmp_path):
    folder = write_shapes(tmp_path / "shapes", 2, val_images=1, progress=False) / "annotations" / "semantic_train"
    ids = sorted([*THING_IDS.values(), *STUFF_IDS.values()])
    label = torch.full((256,), 255)
    label[torch.tensor(ids)] = torch.arange(len(ids))
    evaluator = SemanticEvaluator([str(category) for category in ids])
    for file in sorted(folder.iterdir()):
        truth = label[torch.from_numpy(read_image(file)[..., 0]).long()][None]
        evaluator.update(truth, truth)
    assert set(evaluator.compute().metrics.values()) == {1.0}
