"""Every kind of problem of image files, with files made for it."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image

from detres.data.check import images
from detres.data.check.images import UNUSABLE, check_images
from detres.data.dataset import Annotation, Dataset, ImageRecord
from detres.data.images import ImageError, read_image
from detres.data.kinds import KINDS
from detres.data.splits import find_splits

HEIGHT, WIDTH = 48, 64


def picture(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Smooth colours, as photographs have."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def dataset(*paths, size=(HEIGHT, WIDTH), form="coco", boxes=None) -> Dataset:
    items = tuple(Annotation(n, 0, box) for n, box in enumerate(boxes or ()))
    records = tuple(ImageRecord(number, path, *size, items) for number, path in enumerate(paths))
    return Dataset("set", form, ("thing",), (1,), records)


def found(path, size=(HEIGHT, WIDTH), form="coco") -> list[str]:
    problems = check_images([("train", dataset(path, size=size, form=form))], workers=1)
    for problem in problems:
        assert problem.file == str(path) and problem.image == 0 and problem.split == "train"
        assert problem.reason.startswith("must ") and problem.kind in KINDS and problem.field
    refused = not readable(path, size)
    assert refused == any(KINDS[problem.kind].severity == "error" for problem in problems), "judged as the loader does"
    return [problem.kind for problem in problems]


def readable(path, size) -> bool:
    try:
        return read_image(path).shape[:2] == size
    except ImageError:
        return False


def test_sound_files(tmp_path):
    for name in ("x.jpg", "x.png", "x.webp", "x.tif", "x.bmp", "x.ppm"):
        picture().save(tmp_path / name)
        assert found(tmp_path / name) == []


def test_what_is_no_image(tmp_path):
    path = tmp_path / "x.jpg"
    assert found(path) == ["image_missing"]
    for content, kind in ((b"", "image_zero_bytes"), (b"<!DOCTYPE html><html>404", "image_not"),
                          (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "image_not"),
                          (b"\0" * 5000, "image_not"), (b"\0\0\0\x18ftypheic\0\0\0\0", "image_not"),
                          (b"\xff\xd8\xff", "image_truncated")):
        path.write_bytes(content)
        assert found(path) == [kind]
    path.write_bytes(b"  <html>")
    problem, = check_images([("train", dataset(path))])
    assert "page" in problem.value
    (tmp_path / "folder.jpg").mkdir()
    assert found(tmp_path / "folder.jpg") == ["image_damaged"]


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "x.bmp", "x.gif"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
def test_truncated(tmp_path, name, share):
    buffer = io.BytesIO()
    picture().save(buffer, Image.registered_extensions()[name[1:]])
    (tmp_path / name).write_bytes(buffer.getvalue()[:int(len(buffer.getvalue()) * share)])
    assert found(tmp_path / name) == ["image_truncated"]


def test_a_file_is_judged_as_the_loader_judges_it(tmp_path):
    """Decoding at an eighth of the size finds what decoding in full does: bytes changed, lost, or added."""
    rng = random.Random(0)
    sources = []
    for number, (mode, options) in enumerate([("RGB", {}), ("L", {}), ("CMYK", {}), ("RGB", {"progressive": True})]):
        buffer = io.BytesIO()
        picture(number, 150, 200).convert(mode).save(buffer, "JPEG", **options)
        sources.append(buffer.getvalue())
    paths = []
    for number in range(120):
        data = bytearray(rng.choice(sources))
        if number % 3:
            for _ in range(rng.choice([1, 5])):
                data[rng.randrange(len(data) if number % 3 == 1 else 600)] = rng.randrange(256)
        else:
            del data[rng.randrange(2, len(data)):]
            data += b"\xff\xd9" * (number % 2)
        paths.append(tmp_path / f"{number}.jpg")
        paths[-1].write_bytes(data)
    problems = check_images([("train", dataset(*paths, size=(150, 200)))])
    refused = {problem.file for problem in problems if KINDS[problem.kind].severity == "error"}
    assert refused == {str(path) for path in paths if not readable(path, (150, 200))} and 30 < len(refused) < 100


def test_size_and_orientation(tmp_path):
    exif, path = Image.Exif(), tmp_path / "x.jpg"
    exif[274] = 6
    picture().save(path)
    assert found(path, (HEIGHT, WIDTH + 1)) == found(path, (WIDTH, HEIGHT)) == ["image_differs"]
    picture().save(path, exif=exif)
    assert found(path, (HEIGHT, WIDTH)) == ["image_turned"]
    assert found(path, (WIDTH, HEIGHT)) == ["image_exif"]
    assert found(path, (WIDTH, HEIGHT), "yolo") == ["image_turn_unclear"], "the reader took the size from the file"
    assert found(path, (7, 9)) == ["image_differs"]
    picture(0, 50, 50).save(path, exif=exif)
    assert found(path, (50, 50)) == ["image_turn_unclear"]
    exif[274] = 3
    picture().save(path, exif=exif)
    assert found(path) == ["image_turn_unclear"]
    exif[274] = 1
    picture().save(path, exif=exif)
    assert found(path) == []
    exif[274] = 6
    picture().save(tmp_path / "x.tif", exif=exif)
    assert found(tmp_path / "x.tif", (HEIGHT, WIDTH)) == ["image_turned"]


def test_colours_and_depth(tmp_path):
    grey = picture().convert("L")
    ramp = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    for name, image, kinds in (
            ("x.jpg", picture().convert("CMYK"), ["image_cmyk"]), ("x.jpg", grey, ["image_grey"]),
            ("x.png", Image.fromarray(ramp), ["image_deep", "image_grey"]),
            ("x.tif", Image.fromarray(ramp // 16), ["image_dark", "image_grey"]),
            ("x.png", picture().convert("P"), []), ("x.png", picture().convert("RGBA"), []),
            ("x.png", Image.fromarray(np.dstack([picture(), grey])), ["image_alpha"]),
            ("x.gif", picture().convert("P"), []),
            ("x.tif", Image.fromarray(np.full((HEIGHT, WIDTH), 0.5, np.float32)), ["image_damaged"]),
            ("x.jpg", Image.new("RGB", (WIDTH, HEIGHT), (9, 9, 9)), ["image_blank"])):
        image.save(tmp_path / name)
        assert found(tmp_path / name) == kinds, (name, image.mode)
    picture().convert("P").save(tmp_path / "clear.png", transparency=picture().convert("P").getpixel((3, 3)))
    assert found(tmp_path / "clear.png") == ["image_alpha"]


def test_sixteen_bits_in_three_channels(tmp_path):
    cv2 = pytest.importorskip("cv2")
    cv2.imwrite(str(tmp_path / "x.png"), np.asarray(picture()).astype(np.uint16) * 257)
    assert found(tmp_path / "x.png") == ["image_deep"], "which Pillow shows as 8"


def test_frames_suffix_and_zeros(tmp_path):
    picture().save(tmp_path / "x.gif", save_all=True, append_images=[picture(1)])
    assert found(tmp_path / "x.gif") == ["image_frames"]
    picture().save(tmp_path / "x.jpg", "PNG")
    assert found(tmp_path / "x.jpg") == ["image_suffix"]
    picture(0, 300, 400).save(tmp_path / "y.jpg", quality=95)
    data = (tmp_path / "y.jpg").read_bytes()
    (tmp_path / "y.jpg").write_bytes(data + b"\0" * 500)
    assert found(tmp_path / "y.jpg", (300, 400)) == [], "padding after the end does no harm"
    (tmp_path / "y.jpg").write_bytes(data[:len(data) // 2] + b"\0" * (len(data) // 2))
    assert found(tmp_path / "y.jpg", (300, 400)) == ["image_truncated"]


def test_huge_images(tmp_path, monkeypatch):
    picture().save(tmp_path / "x.png")
    monkeypatch.setattr(images, "HUGE", 3000)
    assert found(tmp_path / "x.png") == ["image_huge"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert found(tmp_path / "x.png") == ["image_too_large"]


def copies(tmp_path, train, val=(), boxes=([None, None])):
    splits = [("train", dataset(*(tmp_path / name for name in train), boxes=boxes[0])),
              ("val", dataset(*(tmp_path / name for name in val), boxes=boxes[1]))]
    return [(problem.split, problem.image, problem.kind) for problem in check_images(splits)]


def test_copies(tmp_path):
    for name, seed in (("a.png", 0), ("b.png", 1), ("c.png", 2)):
        picture(seed).save(tmp_path / name)
    (tmp_path / "d.png").write_bytes((tmp_path / "a.png").read_bytes())
    assert copies(tmp_path, ["a.png", "b.png"], ["c.png"]) == []
    assert copies(tmp_path, ["a.png", "a.png"]) == [("train", 1, "image_listed_twice")]
    assert copies(tmp_path, ["a.png", "d.png"]) == [("train", 1, "image_copy")]
    assert copies(tmp_path, ["a.png", "b.png"], ["c.png", "d.png"]) == [("val", 1, "image_leak")]
    assert copies(tmp_path, ["a.png"], ["a.png", "d.png"]) == [("val", 0, "image_leak"), ("val", 1, "image_copy")]
    other = [[(1, 2, 30, 40)], [(1, 2, 30, 46)]]
    assert copies(tmp_path, ["a.png"], ["d.png"], other) == [("val", 0, "image_leak"), ("val", 0, "copy_labels_differ")]
    other[1] = [(1.2, 2, 30.1, 40)]
    assert copies(tmp_path, ["a.png"], ["d.png"], other) == [("val", 0, "image_leak")], "formats round"


def test_near_copies(tmp_path):
    for number in range(6):
        picture(number, 240, 320).save(tmp_path / f"{number}.png")
    picture(0, 240, 320).save(tmp_path / "again.jpg", quality=50)
    picture(1, 240, 320).resize((160, 120)).save(tmp_path / "small.png")
    picture(2, 240, 320).point(lambda value: min(255, int(value * 1.2))).save(tmp_path / "bright.png")
    names = [f"{number}.png" for number in range(6)]
    kinds = {(problem.image, problem.kind) for problem in check_images([
        ("train", dataset(*(tmp_path / name for name in [*names, "again.jpg"]), size=(240, 320))),
        ("val", dataset(tmp_path / "small.png", tmp_path / "bright.png", size=(240, 320)))])}
    assert kinds == {(6, "image_near_copy"), (0, "image_near_leak"), (1, "image_near_leak"), (0, "image_differs")}


def test_the_same_for_any_number_of_workers(tmp_path):
    for number in range(100):
        picture(number % 60).save(tmp_path / f"{number}.png")
    (tmp_path / "7.png").write_bytes(b"")
    splits = [("train", dataset(*(tmp_path / f"{number}.png" for number in range(100))))]
    one, *others = (check_images(splits, workers) for workers in (1, 2, 5))
    assert len(one) == 40 and all(other == one for other in others)


def test_nothing_to_read():
    assert check_images([]) == check_images([("train", dataset())]) == []


def test_real_data(shared_data):
    for folder in ("coco_mini", "voc_mini/VOCdevkit/VOC2012", "nuts", "balloon"):
        assert check_images([(split.name, split.load("drop")) for split in find_splits(shared_data / folder)]) == []
    problem, = check_images([(split.name, split.load("drop")) for split in find_splits(shared_data / "bccd" / "BCCD")])
    assert (problem.kind, problem.split, problem.image) == ("image_near_leak", "val", "BloodImage_00037")
    assert problem.value == "as image 'BloodImage_00038' of train", "the same smear in another focus"
    assert "BloodImage_00038.jpg" in problem.reason


def test_errors_of_files_are_those_that_a_clean_copy_leaves_out():
    assert UNUSABLE == {kind for kind, about in KINDS.items() if kind.startswith("image_") and about.severity == "error"
                        } - {"image_size"}
