"""Mutated annotation files: each ends in a report or a clean read, never in a traceback; and its copy is clean."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path

import pytest
import yaml

from detres.config import SourceConfig
from detres.data.check.fix import write_clean_copy
from detres.data.check.report import print_report, to_json
from detres.data.check.run import check_data
from detres.data.dataset import load_dataset
from detres.data.shapes import ShapesOptions, write_shapes

LIKELY = [float("nan"), float("inf"), -1, 0, 1, 2, 0.5, 10**6, 1e308, -1e9, 2**63, 10**400, "", "1", "x", None, True,
          [], {}, [[]], [1], [[1, 2], "3"], {"a": [{}]}, "\u0000", "../..", "é" * 300, [[[[]]]], 1e-320]
NONSENSE = {"deep": 0}
for _ in range(60):
    NONSENSE = {"deep": [NONSENSE]}
VALUES = [*LIKELY, NONSENSE, "\ud800"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "shapes"
    write_shapes(folder, 6, options=ShapesOptions("easy", size=(64, 96)), val_images=2, progress=False)
    return folder


def nodes(value, path=()):
    """All places in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from nodes(child, (*path, key))


def mutate(content, rng: random.Random):
    """One to five changes: deleted, retyped, doubled, swapped, scaled, renumbered."""
    places = list(nodes(content))
    for _ in range(rng.randint(1, 5)):
        *above, key = rng.choice(places)
        parent = content
        try:
            for step in above:
                parent = parent[step]
            old = parent[key]
        except (KeyError, IndexError, TypeError):
            continue  # another change took it away
        if not isinstance(parent, (dict, list)):
            continue
        change = rng.randrange(6)
        if change == 0:
            del parent[key]
        elif change == 1 and isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(old))
        elif change == 2 and isinstance(old, (int, float)) and not abs(old) > 1e300:
            parent[key] = old * rng.choice([-1, 0, 0.01, 100, 1e12])
        elif change == 3 and isinstance(old, list):
            rng.shuffle(old)
        elif change == 4 and isinstance(parent, list) and len(parent) > 1:
            parent[key] = copy.deepcopy(parent[rng.randrange(len(parent))])
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    return content


def damage(data: bytes, rng: random.Random) -> bytes:
    """Of the bytes: cut off, taken out, overwritten."""
    if rng.random() < 0.7 or not data:
        return data
    place, length = rng.randrange(len(data)), rng.choice([1, 2, 20])
    return rng.choice([data[:place], data[:place] + data[place + length:],
                       data[:place] + bytes(rng.randrange(256) for _ in range(length)) + data[place + length:]])


def mutated_coco(root: Path, rng: random.Random) -> None:
    file = root / "annotations" / "instances_train.json"
    content = mutate(json.loads(file.read_text()), rng)
    file.write_bytes(damage(json.dumps(content).encode("utf-8", "surrogatepass"), rng))


def mutated_lines(text: str, rng: random.Random) -> str:
    """Words and lines of a text, whatever it means."""
    words = text.replace(">", "> ").replace("<", " <").split(" ") if "<" in text else text.split(" ")
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(words))
        words[i] = rng.choice(["", words[i] * 2, words[rng.randrange(len(words))], *map(str, LIKELY), "-" + words[i],
                               "\n", "nan", ": [", "- "])
    return " ".join(words)


def mutated_text(file: Path, rng: random.Random) -> None:
    text = mutated_lines(file.read_text(encoding="utf-8"), rng)
    file.write_bytes(damage(text.encode("utf-8", "surrogatepass"), rng))


def check_once(root: Path, out: Path, role: str = "train") -> int:
    report = check_data(root, read_images=False, workers=1)
    print_report(report)
    json.dumps(to_json(report), allow_nan=False)
    for on_invalid in ("error", "drop"):
        try:
            load_dataset(SourceConfig(path=str(root)), role, on_invalid)
        except (ValueError, OSError) as error:
            assert str(error)
    if report.exit_status < 2:
        after, changes = write_clean_copy(report, None, out, read_images=False, workers=1)
        left = [problem for problem in after.problems if problem.kind not in ("no_annotations",)]
        assert after.exit_status == 0, (left[:3], changes.made[-5:])
        assert report.exit_status == 0 or changes.made
    return report.exit_status


def make_coco(shapes: Path, root: Path, rng: random.Random) -> None:
    (root / "annotations").mkdir(parents=True)
    shutil.copy(shapes / "annotations" / "instances_train.json", root / "annotations")
    (root / "train").symlink_to(shapes / "train")
    mutated_coco(root, rng)


def make_voc(shapes: Path, root: Path, rng: random.Random) -> None:
    voc = next(shapes.rglob("ImageSets")).parent
    for name in ("Annotations", "ImageSets"):
        shutil.copytree(voc / name, root / name)
    (root / "JPEGImages").symlink_to((voc / "JPEGImages").resolve())
    files = sorted((root / "Annotations").glob("*.xml"))
    for file in rng.sample(files, 2) + [root / "ImageSets/Main/train.txt"] * (rng.random() < 0.3):
        mutated_text(file, rng)


def make_yolo(shapes: Path, root: Path, rng: random.Random) -> None:
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    for image in (shapes / "train").iterdir():
        (root / "images" / image.name).symlink_to(image.resolve())
        rows = ["0 0.5 0.5 0.25 0.5", "1 0.1 0.1 0.3 0.1 0.3 0.4 0.1 0.4", "1 0.3 0.3 0.1 0.1"]
        (root / "labels" / image.name).with_suffix(".txt").write_text("\n".join(rows))
    content = {"path": ".", "train": "images", "names": ["cat", "dog"], "nc": 2}
    (root / "data.yaml").write_text(yaml.dump(mutate(content, rng) if rng.random() < 0.2 else content), "utf-8",
                                    "surrogatepass")
    for file in rng.sample(sorted((root / "labels").iterdir()), 2) + [root / "data.yaml"] * (rng.random() < 0.1):
        mutated_text(file, rng)


MAKE = {"coco": make_coco, "voc": make_voc, "yolo": make_yolo}


def fuzz(kind: str, shapes: Path, tmp: Path, seeds: range) -> set[int]:
    """Exit statuses."""
    found = set()
    for seed in seeds:
        root, out = tmp / str(seed), tmp / f"{seed}_fixed"
        MAKE[kind](shapes, root, random.Random(seed))
        try:
            found.add(check_once(root, out))
        except Exception as error:
            raise AssertionError(f"{kind}, seed {seed}: {error}") from error
        shutil.rmtree(root)
        shutil.rmtree(out, ignore_errors=True)
    return found


@pytest.mark.parametrize(("kind", "count"), [("coco", 110), ("voc", 50), ("yolo", 50)])
def test_mutated_files_end_in_a_report(shapes, tmp_path, kind, count):
    assert fuzz(kind, shapes, tmp_path, range(count)) & {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(MAKE))
def test_thousands_of_mutated_files(shapes, tmp_path, kind):
    assert {0, 1} <= fuzz(kind, shapes, tmp_path, range(10_000, 12_000)) <= {0, 1, 2}
