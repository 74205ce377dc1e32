"""`detres eval --gt --results`: numbers, printout, warnings."""

from __future__ import annotations

import contextlib
import io
import json
import logging

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detres.cli import main
from detres.data.masks import encode_masks
from detres.evaluation.files import evaluate_files


@pytest.fixture
def files(tmp_path):
    """files(truth changes, results) -> paths; the truth is one image with a small and a large object."""

    def write(results, **changes):
        def annotation(number, x, side):
            return {"id": number, "image_id": 5, "category_id": 3, "bbox": [x, 10, side, side], "iscrowd": 0,
                    "area": side * side, "segmentation": [[x, 10, x + side, 10, x + side, 10 + side, x, 10 + side]]}

        truth = {"images": [{"id": 5, "height": 200, "width": 300}], "categories": [{"id": 3, "name": "cat"}],
                 "annotations": [annotation(1, 10, 20), annotation(2, 50, 120)], **changes}
        paths = tmp_path / "gt.json", tmp_path / "dt.json"
        for path, content in zip(paths, (truth, results)):
            path.write_text(json.dumps(content))
        return paths

    return write


def detection(box, score=0.5, **more):
    return {"image_id": 5, "category_id": 3, "bbox": box, "score": score, **more}


PERFECT = [detection([10, 10, 20, 20]), detection([50, 10, 120, 120], 0.4)]


def pycocotools_prints(gt, dt, iou_type):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        coco = COCO(gt)
        run = COCOeval(coco, coco.loadRes(str(dt)), iou_type)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [line for line in out.getvalue().splitlines() if "@[" in line], run.stats.tolist()


def test_prints_and_writes_pycocotools_numbers(files, tmp_path, capsys):
    gt, dt = files([*PERFECT, detection([12, 10, 20, 20], 0.9), detection([200, 10, 20, 20], 0.45)])
    out = tmp_path / "new" / "numbers.json"
    assert main(["eval", "--gt", str(gt), "--results", str(dt), "--json", str(out)]) == 0
    lines, numbers = pycocotools_prints(str(gt), dt, "bbox")
    assert capsys.readouterr().out.splitlines() == ["bbox", *lines]
    saved = json.loads(out.read_text())
    assert list(saved.values()) == numbers and list(saved)[:2] == ["bbox/AP", "bbox/AP50"]
    assert 0.1 < saved["bbox/AP"] < 0.9


def test_perfect_masks(files):
    gt, dt = files([{**found, "segmentation": box_mask(found["bbox"])} for found in PERFECT])
    metrics = evaluate_files(gt, dt, ("bbox", "segm", "boundary")).metrics
    assert metrics["bbox/AP"] == metrics["segm/AP"] == metrics["boundary/AP"] == pytest.approx(1)
    assert metrics["segm/APm"] == -1


def box_mask(box):
    x, y, w, h = box
    return {"size": [200, 300], "counts": [x * 200 + y, *[h, 200 - h] * (w - 1), h, (300 - x - w) * 200 + 200 - y - h]}


def test_faults_are_refused_or_left_out(files, caplog):
    gt, dt = files([*PERFECT, {**detection([0, 0, 5, 5]), "image_id": 77}])
    with pytest.raises(ValueError, match="--lenient"):
        evaluate_files(gt, dt)
    with caplog.at_level(logging.WARNING):
        metrics = evaluate_files(gt, dt, lenient=True).metrics
    assert metrics["bbox/AP"] == pytest.approx(1) and "77" in caplog.text and "Left out" in caplog.text


def test_areas_that_are_not_the_masks(files, caplog):
    gt, dt = files([{**found, "segmentation": box_mask(found["bbox"])} for found in PERFECT])
    truth = json.loads(gt.read_text())
    truth["annotations"][0]["area"] = 5000  # a small object called medium
    gt.write_text(json.dumps(truth))
    with caplog.at_level(logging.WARNING):
        metrics = evaluate_files(gt, dt, ("segm",)).metrics
    assert metrics["segm/APs"] == -1
    assert "says 5000, its mask has 400" in caplog.text and "segm/APs -1.0000 -> 1.0000" in caplog.text


def test_corners_given_as_sizes_are_named(files, caplog):
    boxes = [[100 + 9 * i, 60 + 5 * i, 20 + 2 * i, 30 + 3 * i] for i in range(12)]
    truths = [{"id": i, "image_id": 5, "category_id": 3, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
              for i, box in enumerate(boxes, 1)]
    gt, dt = files([detection([x, y, x + w, y + h]) for x, y, w, h in boxes], annotations=truths)
    with caplog.at_level(logging.WARNING):
        assert evaluate_files(gt, dt).metrics["bbox/AP"] < 0.01
    assert "near zero" in caplog.text and "Boxes are [x1, y1, x2, y2]" in caplog.text


def test_errors_are_analysed(files, tmp_path, capsys):
    gt, dt = files([{**found, "segmentation": box_mask(found["bbox"])} for found in PERFECT[:1]])
    evaluate_files(gt, dt, ("segm", "bbox"), errors=tmp_path / "errors")
    analysis = json.loads((tmp_path / "errors" / "errors.json").read_text())
    assert analysis["tide"]["counts"]["missed"] == 1
    assert (tmp_path / "errors" / "errors.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("kind of mistake") == 1


def test_errors_that_cannot_be_analysed(files, tmp_path):
    gt, dt = files(PERFECT, categories=[{"id": 3, "name": "cat", "frequency": "f"}],
                   images=[{"id": 5, "height": 200, "width": 300, "neg_category_ids": [],
                            "not_exhaustive_category_ids": []}])
    with pytest.raises(ValueError, match="got LVIS"):
        evaluate_files(gt, dt, errors=tmp_path)
    with pytest.raises(ValueError, match="got keypoints"):
        evaluate_files(gt, dt, ("keypoints",), errors=tmp_path)
    assert evaluate_files(gt, dt).metrics["bbox/APf"] == pytest.approx(1)


def test_what_belongs_together(capsys):
    for arguments in ([], ["runs/a", "--gt", "a.json"], ["--gt", "a.json"], ["--results", "a.json"],
                      ["runs/a", "--gt", "a.json", "--results", "b.json"]):
        with pytest.raises(SystemExit):
            main(["eval", *arguments])
        assert "give either RUN_OR_WEIGHTS, or both --gt and --results" in capsys.readouterr().err


@pytest.mark.data
def test_published_keypoint_numbers(shared_data):
    folder = shared_data / "detection_results" / "keypoints_one_image"
    metrics = evaluate_files(folder / "gt.json", folder / "dt.json", ("keypoints",)).metrics
    assert list(metrics.values()) == pytest.approx(
        [.50488, .72277, .63366, .46634, .75050, .51818, .72727, .63636, .46667, .75], abs=5e-6)
    assert list(metrics.values()) == pycocotools_prints(str(folder / "gt.json"), folder / "dt.json", "keypoints")[1]


@pytest.mark.parametrize("change", [lambda code: code["counts"][:-2], lambda code: code["counts"] + "o",
                                    lambda code: [4, 5]], ids=["cut", "unfinished", "list"])
def test_damaged_run_lengths_beside_boxes_are_found(files, change):
    code = encode_masks(torch.ones(1, 200, 300, dtype=torch.bool).tril())[0]
    damaged = {**code, "counts": change(code)}
    gt, dt = files([{**found, "segmentation": mask} for found, mask in zip(PERFECT, (code, damaged))])
    with pytest.raises(ValueError, match="1 of 2 detections have run lengths that do not add up .*entry 1"):
        evaluate_files(gt, dt, ("segm",))
    assert evaluate_files(gt, dt, ("segm",), lenient=True).metrics["segm/AP"] >= 0


@pytest.mark.parametrize("polygon", [[10, 10, 50, float("nan"), 20, 60], [10, 10, 1e9, 50, 20, 60], [10, 10, 50, 50], []],
                         ids=["NaN", "far", "two points", "empty"])
def test_polygons_that_pycocotools_cannot_draw_are_found(files, polygon):
    gt, dt = files([{**found, "segmentation": box_mask(found["bbox"])} for found in PERFECT])
    truth = json.loads(gt.read_text())
    truth["annotations"][1]["segmentation"] = [polygon]
    gt.write_text(json.dumps(truth))
    with pytest.raises(ValueError, match="1 of 2 annotations have polygons that are not .*entry 1"):
        evaluate_files(gt, dt, ("segm",))
    assert evaluate_files(gt, dt, ("bbox", "segm"), lenient=True).metrics["segm/APs"] == pytest.approx(1)


def test_classes_of_equal_name_keep_their_numbers(files):
    gt, dt = files(PERFECT, categories=[{"id": 3, "name": "cat"}, {"id": 9, "name": "cat"}])
    assert list(evaluate_files(gt, dt).per_class) == ["cat (3)", "cat (9)"]


def test_no_categories_at_all(files):
    gt, dt = files([], categories=[], annotations=[])
    assert set(evaluate_files(gt, dt, lenient=True).metrics.values()) == {-1.0}


def test_options_of_the_other_mode_are_refused(capsys):
    for arguments, named in ((["--gt", "a", "--results", "b", "--save", "c", "--batch-size", "2"], "--save, --batch-size"),
                             (["runs/a", "--lenient"], "--lenient"), (["runs/a", "--sigmas", "1"], "--sigmas")):
        with pytest.raises(SystemExit):
            main(["eval", *arguments])
        assert f"{named} cannot go with" in capsys.readouterr().err
