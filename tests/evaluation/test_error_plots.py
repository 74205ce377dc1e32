"""Pictures of error analyses: written whole, without warnings, and with no text on another."""

from __future__ import annotations

import itertools
import json
import warnings

import matplotlib.image
import pytest
import torch
from matplotlib.text import Text

from detres.evaluation import error_plots
from detres.evaluation.coco_engine import Found, Truths
from detres.evaluation.errors import ErrorAnalysis, analyse_errors
from detres.evaluation.tide import KINDS

FILES = {"errors.png", "tide.png", "confusion.png", "precision_recall.png", "f1.png", "objects.png"}


def scene(classes: int, truths: int, found: int) -> ErrorAnalysis:
    """Objects in 8 images; detections are some of them, moved, and now and then of another class."""
    box = torch.rand(truths, 4, dtype=torch.float64) * 100 + torch.tensor([0, 0, 5, 5])
    image, label, crowd = torch.randint(8, (truths,)), torch.randint(classes, (truths,)), torch.rand(truths) < 0.05
    rows = torch.randint(max(truths, 1), (found,))
    moved = box[rows] + torch.randn(found, 4, dtype=torch.float64) * 4 if truths else torch.rand(found, 4).double()
    moved[:, 2:] = moved[:, 2:].clamp(min=2)
    guess = torch.randint(classes, (found,))
    of_found = torch.where(torch.rand(found) < 0.8, label[rows], guess) if truths else guess
    images = image[rows] if truths else torch.randint(8, (found,))
    return analyse_errors(
        Truths(image, label, box, box[:, 2:].prod(1), crowd, crowd),
        Found(images, of_found, moved, torch.rand(found, dtype=torch.float64), moved[:, 2:].prod(1)),
        tuple(f"class {'with a long name ' * (i % 3)}{i}" for i in range(classes)))


SCENES = {"one class": (1, 60, 90), "five classes": (5, 150, 250), "many classes": (80, 900, 2000),
          "nothing found": (5, 30, 0), "no objects": (20, 0, 50)}


@pytest.mark.parametrize("name", SCENES)
def test_all_pictures_are_written_and_legible(name, tmp_path, monkeypatch):
    figures, drawn = {}, {}
    save, draw = error_plots._save, Text.draw
    monkeypatch.setattr(error_plots, "_save", lambda path, figure: (figures.update({path.name: figure}),
                                                                    save(path, figure)))
    # Ticks beyond the axes exist and are not drawn.
    monkeypatch.setattr(Text, "draw", lambda text, renderer: (drawn.update({text: None}), draw(text, renderer)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scene(*SCENES[name]).save(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert {path.name for path in folder.iterdir()} == FILES | {"errors.json"} and set(figures) == FILES
    assert json.loads((folder / "errors.json").read_text())["overall"]["truths"] >= 0
    for file, figure in figures.items():
        assert matplotlib.image.imread(folder / file).std() > 0.02
        texts = [text for text in drawn if text.get_figure(root=True) is figure and text.get_text().strip()]
        assert len(texts) >= 4
        assert_apart({text: text.get_window_extent() for text in texts}, *figure.canvas.get_width_height())
        smallest = min(text.get_fontsize() for text in texts) * 1200 / 72 / figure.get_figwidth()
        assert smallest >= 8, f"letters of {smallest:.1f} pixels in {file} at a width of 1200"


def assert_apart(boxes: dict, width: int, height: int) -> None:
    for text, box in boxes.items():
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text
    for (first, a), (second, b) in itertools.combinations(boxes.items(), 2):
        overlap = min(min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0))
        assert overlap <= 1, (first, second, overlap)


def test_every_kind_has_its_own_colour():
    assert list(error_plots.COLORS) == [*KINDS, "false_positives", "false_negatives"]
    assert len(set(error_plots.COLORS.values())) == len(error_plots.COLORS)


def test_of_very_many_classes_the_matrix_shows_those_that_are_confused(monkeypatch):
    monkeypatch.setattr(error_plots, "MATRIX", 2)
    matrix = torch.zeros(6, 6, dtype=torch.int64).fill_diagonal_(9)
    matrix[1, 4] = 3  # two classes confused
    matrix[2, 5] = 8  # missed is no confusion
    assert error_plots._most_confused(matrix.numpy()).tolist() == [1, 4, 5]
