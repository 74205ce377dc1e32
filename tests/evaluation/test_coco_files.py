"""Files to columns: json.load's numbers, pycocotools' boxes and areas of results, and an error for every fault."""

from __future__ import annotations

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle
from pycocotools.coco import COCO

from detres.evaluation import coco_files
from detres.evaluation.coco_files import read_results, read_truth, results_columns, truth_columns

IMAGES = [{"id": 7, "height": 20, "width": 30}, {"id": 3, "height": 40, "width": 50, "file_name": "a }, { b.jpg"}]
CATEGORIES = [{"id": 2, "name": "cat"}, {"id": 1, "name": "dog", "supercategory": "animal"}]
ANNOTATION = {"id": 5, "image_id": 7, "category_id": 2, "bbox": [1, 2, 3.5, 4], "area": 12.25, "iscrowd": 0}
DETECTION = {"image_id": 7, "category_id": 2, "bbox": [1, 2, 3.5, 4], "score": 0.5}
KEYPOINTS = [3.0, 4.0, 2, 9.5, 1.25, 1, 0, 0, 0]


def mask(height: int = 6, width: int = 5) -> dict:
    bitmap = np.zeros((height, width), np.uint8, order="F")
    bitmap[1:4, 2:4] = 1
    encoded = rle.encode(bitmap)
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def truth(*annotations: dict, **fields) -> dict:
    return {"images": IMAGES, "categories": CATEGORIES, "annotations": list(annotations), **fields}


@pytest.fixture
def written(tmp_path):
    """written(data) -> path of a file that holds it; a string or bytes are written as they are."""

    def write(data):
        path = tmp_path / "file.json"
        if not isinstance(data, bytes):
            data = (data if isinstance(data, str) else json.dumps(data)).encode()
        path.write_bytes(data)
        return path

    return write


def test_truth_as_columns_in_file_order(written):
    data = truth(ANNOTATION, {**ANNOTATION, "id": 9, "image_id": 3.0, "category_id": 1, "iscrowd": True},
                 {"id": 4, "image_id": 3, "category_id": 1, "ignore": 1, "num_keypoints": 3,
                  "segmentation": [[0, 0, 1, 0, 1, 1]]})
    columns = read_truth(written(data))
    assert columns.ids.tolist() == [5, 9, 4] and columns.ids.dtype == np.int64
    assert columns.image_ids.tolist() == [7, 3, 3] and columns.image_ids.dtype == np.int64
    assert columns.category_ids.tolist() == [2, 1, 1]
    assert columns.boxes_xywh[0].tolist() == [1.0, 2.0, 3.5, 4.0] and np.isnan(columns.boxes_xywh[2]).all()
    assert columns.area[:2].tolist() == [12.25, 12.25] and np.isnan(columns.area[2])
    assert columns.crowd.tolist() == [False, True, False] and columns.ignore.tolist() == [False, False, True]
    assert columns.num_keypoints.tolist() == [-1, -1, 3]
    assert columns.segmentation is None and columns.keypoints is None
    assert columns.images.ids.tolist() == [7, 3] and columns.images.width.tolist() == [30, 50]
    assert columns.categories.ids.tolist() == [2, 1] and columns.categories.names == ["cat", "dog"]
    assert columns.images.neg_category_ids is None and columns.categories.frequency is None
    assert columns.path.endswith("file.json")


def test_masks_and_keypoints_where_asked_for(written):
    polygons = [[0, 0, 5, 0, 5, 5.5]]
    runs = {"size": [20, 30], "counts": [100, 500]}
    data = truth({**ANNOTATION, "segmentation": polygons, "keypoints": KEYPOINTS},
                 {**ANNOTATION, "segmentation": runs}, {**ANNOTATION, "segmentation": mask()})
    columns = read_truth(written(data), masks=True, keypoints=True)
    assert columns.segmentation == [polygons, {**runs, "size": (20, 30)}, {**mask(), "size": (6, 5)}]
    assert columns.keypoints[0].tolist() == KEYPOINTS and np.isnan(columns.keypoints[1:]).all()
    assert columns.num_keypoints.tolist() == [2, 0, 0]  # counted where the file does not say


def test_lvis_fields(written):
    images = [{**IMAGES[0], "neg_category_ids": [1], "not_exhaustive_category_ids": [2, 1]}, IMAGES[1]]
    data = truth(ANNOTATION, images=images, categories=[{**CATEGORIES[0], "frequency": "r"}])
    columns = read_truth(written(data))
    assert columns.images.neg_category_ids == [[1], []]
    assert columns.images.not_exhaustive_category_ids == [[2, 1], []]
    assert columns.categories.frequency == ["r"]


def test_string_ids(written):
    columns = read_truth(written(truth({**ANNOTATION, "image_id": "2007_000033"})))
    assert columns.image_ids.tolist() == ["2007_000033"]
    assert read_results(written([{**DETECTION, "image_id": "7"}])).image_ids.tolist() == ["7"]


def test_no_entries(written):
    results = read_results(written([]))
    assert results.boxes_xywh.shape == (0, 4) and results.scores.dtype == np.float64
    assert results.image_ids.dtype == np.int64 and results.path.endswith("file.json")
    assert read_truth(written(truth())).boxes_xywh.shape == (0, 4)


def loaded(results: list[dict]) -> list[dict]:
    """Entries as pycocotools' loadRes leaves them."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth()
        coco.createIndex()
        return coco.loadRes(copy.deepcopy(results)).dataset["annotations"]


SOURCES = {
    "boxes": [DETECTION, {**DETECTION, "bbox": [0.1, 0.2, 0.3, 0.7]}],
    "boxes and masks": [{**DETECTION, "segmentation": mask()}] * 2,
    "masks": [{**DETECTION, "bbox": None, "segmentation": mask()}, {**DETECTION, "segmentation": mask(9, 9)}],
    "keypoints": [{**DETECTION, "bbox": None, "keypoints": KEYPOINTS}] * 2,
}


@pytest.mark.parametrize("source", SOURCES)
def test_boxes_and_areas_are_those_of_load_res(written, source):
    results = [{key: value for key, value in entry.items() if value is not None} for entry in SOURCES[source]]
    columns, expected = read_results(written(results), masks=True, keypoints=True), loaded(results)
    assert columns.boxes_xywh.tolist() == [list(entry["bbox"]) for entry in expected]
    assert columns.area.tolist() == [entry["area"] for entry in expected]
    assert (columns.keypoints is not None) == (source == "keypoints")
    given = [entry.get("segmentation") and {**entry["segmentation"], "size": tuple(entry["segmentation"]["size"])}
             for entry in results]
    assert columns.segmentation == given
    assert read_results(written(results)).boxes_xywh.tolist() == columns.boxes_xywh.tolist()


@pytest.mark.data
@pytest.mark.parametrize("name", ["cocoapi_fake100/instances_val2014_fakesegm100_results.json",
                                  "cocoapi_fake100/person_keypoints_val2014_fakekeypoints100_results.json",
                                  "keypoints_one_image/dt.json", "coco_bboxarea100/dt_results.json"])
def test_published_results_as_load_res_reads_them(shared_data, name):
    path = shared_data / "detection_results" / name
    results = json.loads(path.read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"images": [{"id": entry["image_id"]} for entry in results], "categories": []}
        coco.createIndex()
        expected = coco.loadRes(str(path)).dataset["annotations"]
    columns = read_results(path)
    assert columns.boxes_xywh.tolist() == [list(entry["bbox"]) for entry in expected]
    assert columns.area.tolist() == [entry["area"] for entry in expected]
    assert columns.scores.tolist() == [entry["score"] for entry in expected]


@pytest.mark.data
def test_published_truths(shared_data):
    for name in ("cocoapi_fake100/instances_val2014_100.json", "lvis_gt_only/lvis_val_100.json", "crowdpose/gt.json"):
        path = shared_data / "detection_results" / name
        annotations = json.loads(path.read_text())["annotations"]
        columns = read_truth(path, masks=True, keypoints=True)
        assert columns.ids.tolist() == [entry["id"] for entry in annotations]
        assert columns.boxes_xywh.tolist() == [entry["bbox"] for entry in annotations]
        area = np.array([entry.get("area", np.nan) for entry in annotations])
        np.testing.assert_array_equal(columns.area, area)


# A number as a file may spell it; json.load's value is the definition.
NUMBERS = st.one_of(st.floats().map(json.dumps), st.integers(-2**70, 2**70).map(str),
                    st.from_regex(r"-?(0|[1-9][0-9]{0,5})\.[0-9]{1,40}(e[+-]?[0-9]{1,3})?", fullmatch=True))


@settings(max_examples=200, deadline=None)
@given(st.lists(NUMBERS, min_size=5, max_size=5))
def test_numbers_are_those_of_json_load(tmp_path_factory, numbers):
    *box, score = numbers
    text = f'[{{"image_id": 1, "category_id": 1, "bbox": [{", ".join(box)}], "score": {score}}}]'
    path = tmp_path_factory.getbasetemp() / "numbers.json"
    path.write_text(text)
    entry = json.loads(text)[0]
    expected = np.array([float(value) for value in (*entry["bbox"], entry["score"])])
    columns = read_results(path)
    read = np.concatenate([columns.boxes_xywh[0], columns.scores])
    assert read.tobytes() == expected.tobytes()


TEXT = st.text(st.sampled_from('a}],{["\\: \n'), max_size=8)
ENTRIES = st.lists(st.fixed_dictionaries(
    {"image_id": st.integers(-9, 9), "category_id": st.integers(0, 9), "score": st.floats(0, 1),
     "bbox": st.lists(st.floats(-99, 99), min_size=4, max_size=4)},
    optional={"name": TEXT, "parts": st.lists(st.dictionaries(TEXT, st.none() | TEXT), max_size=3)}), max_size=12)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ENTRIES, st.integers(1, 200), st.sampled_from([None, 0, 2]))
def test_a_file_cut_anywhere_gives_the_same(tmp_path_factory, monkeypatch, entries, piece, indent):
    path = tmp_path_factory.getbasetemp() / "cut.json"
    path.write_text(json.dumps(entries, indent=indent))
    monkeypatch.setattr(coco_files, "PIECE", piece)
    columns, expected = read_results(path), results_columns(entries)
    for name in ("image_ids", "category_ids", "scores", "boxes_xywh", "area"):
        np.testing.assert_array_equal(getattr(columns, name), getattr(expected, name))
    assert columns.image_ids.tolist() == [entry["image_id"] for entry in entries]


def test_a_large_file_is_read_in_pieces(written, monkeypatch):
    path = written([{**DETECTION, "score": i} for i in range(50)])
    monkeypatch.setattr(coco_files, "PIECE", 300)
    monkeypatch.setattr(coco_files, "_whole", None)
    assert len(list(coco_files._pieces(path))) > 10
    assert read_results(path).scores.tolist() == list(range(50))


def test_what_is_in_memory_gives_the_same_columns(written):
    data = truth(ANNOTATION, {**ANNOTATION, "image_id": 3})
    assert truth_columns(data).image_ids.tolist() == read_truth(written(data)).image_ids.tolist()
    with pytest.raises(ValueError, match="^`score` must be a number, got null \\(the results, entry 0\\)"):
        results_columns([{**DETECTION, "score": None}])


def test_select_takes_indices_and_flags(written):
    columns = read_truth(written(truth(*({**ANNOTATION, "id": i, "segmentation": [[i] * 6]} for i in range(4)))), True)
    chosen = columns.select(np.array([False, True, False, True]))
    assert chosen.ids.tolist() == [1, 3] and chosen.segmentation == [[[1] * 6], [[3] * 6]]
    assert columns.select(np.array([3, 0])).ids.tolist() == [3, 0] and chosen.images is columns.images


def without(entry: dict, name: str) -> dict:
    return {key: value for key, value in entry.items() if key != name}


TRUTH_FAULTS = {
    "empty": (
        "",
        "a COCO file must be JSON, got its end (FILE, line 1, column 1: Expecting value). Was it written to the end?"),
    "cut off": ('{"images":\n [', "a COCO file must be JSON, got its end (FILE, line 2, column 3: Expecting value)"),
    "not JSON": ('{"images":\n [x]}', "got 'x]}' (FILE, line 2, column 3"),
    "compressed": (b"\x1f\x8b\x08", "must be JSON in UTF-8, got byte 0x8b (FILE, byte 1). Is it compressed?"),
    "results": ([DETECTION], '`file` must be an object, got [{"image_id": 7'),
    "no annotations": (
        without(truth(), "annotations"),
        "the file must have `annotations`, got only images, categories (FILE). Test sets come without"),
    "no image": (
        truth(ANNOTATION, without(ANNOTATION, "image_id")),
        "every entry must have `image_id`, got only id, category_id, bbox, area, iscrowd (FILE, entry 1 of "
        "annotations). Add it."),
    "short box": (
        truth({**ANNOTATION, "bbox": [1, 2, 3]}),
        "`bbox` must be a list of length 4, got [1, 2, 3] (FILE, entry 0 of annotations). A box is [x, y, width, "
        "height]"),
    "box of strings": (truth({**ANNOTATION, "bbox": [1, 2, 3, "4"]}), '`bbox` must be a number, got "4"'),
    "null": (truth({**ANNOTATION, "id": None}), "`id` must be a number or a string, got null"),
    "half an id": (
        truth({**ANNOTATION, "id": 1.5}),
        "`id` must be a whole number of 64 bits, got 1.5 (FILE, entry 0 of annotations)"),
    "NaN as id": (truth({**ANNOTATION, "id": float("nan")}), "`id` must be a whole number of 64 bits, got NaN"),
    "large id": (truth({**ANNOTATION, "category_id": 2**64}), "`category_id` must be a whole number of 64 bits"),
    "mixed ids": (
        truth(ANNOTATION, {**ANNOTATION, "image_id": "7"}),
        '`image_id` must be numbers in all entries or strings in all, got "7" (FILE, entry 1 of annotations). '
        'Numbers are written without quotes.'),
    "image's id": (truth(images=[{"id": [1]}]), "`id` must be a number or a string, got [1] (FILE, entry 0 of images)"),
    "polygon": (
        truth({**ANNOTATION, "segmentation": "x"}),
        '`segmentation` must be an object or a list or null, got "x" (FILE, entry 0 of annotations). It is a list of '
        'polygons'),
    "size of RLE": (
        truth({**ANNOTATION, "segmentation": {"size": [1], "counts": "x"}}),
        "`size` must be a list of length 2, got [1]"),
    "keypoints": (
        truth({**ANNOTATION, "keypoints": KEYPOINTS}, {**ANNOTATION, "keypoints": [1, 2, 3]}),
        "`keypoints` must be triples x, y, v or score, here 3 of them, got [1.0, 2.0, 3.0] (FILE, entry 1 of "
        "annotations)"),
}
RESULTS_FAULTS = {
    "empty": ("", "a COCO file must be JSON, got its end (FILE, line 1, column 1"),
    "cut off": (json.dumps([DETECTION] * 50)[:-20], "a COCO file must be JSON, got"),
    "truth": (truth(ANNOTATION), '`file` must be a list, got {"images": [{"id": 7'),
    "list of lists": ([[7, 2, 0.5]], "`entry` must be an object, got [7, 2, 0.5] (FILE, entry 0)"),
    "no score": (
        [ANNOTATION],
        "every entry must have `score`, got only id, image_id, category_id, bbox, area, iscrowd (FILE, entry 0). Is "
        "this the ground truth instead of results?"),
    "late": (
        [DETECTION] * 99 + [{**DETECTION, "score": "0.5"}],
        '`score` must be a number, got "0.5" (FILE, entry 99)'),
    "late kind": ([DETECTION] * 99 + [{**DETECTION, "image_id": "7"}], 'got "7" (FILE, entry 99)'),
    "box of one": (
        [DETECTION, without(DETECTION, "bbox")],
        "`bbox` must be in every entry if it is in the first, or if none has segmentation or keypoints, got null "
        "(FILE, entry 1). Add it."),
    "polygons": (
        [{**without(DETECTION, "bbox"), "segmentation": [[1, 2, 3, 4, 5, 6]]}],
        "`segmentation` must be a compressed RLE, got [[1.0, 2.0"),
    "damaged RLE": (
        [{**without(DETECTION, "bbox"), "segmentation": {"size": [9, 9], "counts": "1o"}}],
        "run lengths must add up to the 9 x 9 pixels of the mask, got '1o' (FILE, entry 0)"),
    "keypoints of one": (
        [{**without(DETECTION, "bbox"), "keypoints": KEYPOINTS}, without(DETECTION, "bbox")],
        "`keypoints` must be in every entry if it is in the first"),
}


@pytest.mark.parametrize("fault", TRUTH_FAULTS)
def test_faults_in_truth(written, fault):
    data, message = TRUTH_FAULTS[fault]
    path = written(data)
    with pytest.raises(ValueError) as error:
        read_truth(path, masks=True, keypoints=True)
    assert message.replace("FILE", str(path)) in str(error.value)


@pytest.mark.parametrize("piece", [100, 1 << 17], ids=["pieces", "whole"])
@pytest.mark.parametrize("fault", RESULTS_FAULTS)
def test_faults_in_results(written, monkeypatch, fault, piece):
    data, message = RESULTS_FAULTS[fault]
    path = written(data)
    monkeypatch.setattr(coco_files, "PIECE", piece)
    with pytest.raises(ValueError) as error:
        read_results(path)
    assert message.replace("FILE", str(path)) in str(error.value)
