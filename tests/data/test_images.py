"""Image files of every kind."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from detres.data.images import ImageError, decode_image, open_image, read_image, read_size, to_rgb_array

GREY = np.arange(12 * 20, dtype=np.uint8).reshape(12, 20)
RGB = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)


def save(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_grey_bits_and_alpha(tmp_path):
    alpha = GREY[::-1]
    for image, expected in (
            (Image.fromarray(RGB), RGB), (Image.fromarray(GREY), GREY),
            (Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)]), GREY),
            (Image.fromarray(np.dstack([RGB, alpha])), RGB), (Image.fromarray(GREY > 99), (GREY > 99) * np.uint8(255))):
        found = read_image(save(tmp_path, image))
        assert found.dtype == np.uint8 and found.shape == (12, 20, 3) and found.flags.writeable
        np.testing.assert_array_equal(found, expected if expected.ndim == 3 else np.dstack([expected] * 3))


def test_sixteen_bits_are_scaled(tmp_path):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)  # a picture of one row
    image = Image.fromarray(values)
    for name in ("x.png", "x.tif"):
        assert read_image(save(tmp_path, image, name))[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    with pytest.raises(ImageError, match="16 bits hold 0 to 65535"):
        read_image(save(tmp_path, Image.fromarray(np.array([[70000]], np.int32)), "x.tif"))
    with pytest.raises(ImageError, match="no defined white"):
        read_image(save(tmp_path, Image.fromarray(np.array([[0.5]], np.float32)), "x.tif"))


@pytest.mark.parametrize("transparent", [None, 3])
def test_palette(tmp_path, transparent):
    image = Image.fromarray(GREY % 4).convert("P")
    image.putpalette([10, 20, 30, 200, 100, 0, 0, 0, 0, 255, 255, 255])
    options = {} if transparent is None else {"transparency": transparent}
    colours = np.array([[10, 20, 30], [200, 100, 0], [0, 0, 0], [255, 255, 255]], np.uint8)
    np.testing.assert_array_equal(read_image(save(tmp_path, image, **options)), colours[GREY % 4])


@pytest.mark.parametrize("name", ["x.jpg", "x.tif"])
def test_cmyk(tmp_path, name):
    """Cyan ink takes red away. Pillow writes JPEG as Adobe does, inverted; no colour may come out inverted."""
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:8, :, 0] = inks[8:, :, 3] = 255
    found = read_image(save(tmp_path, Image.fromarray(inks, "CMYK"), name)).astype(int)
    assert abs(found[2, 2] - [0, 255, 255]).max() < 6 and found[13, 2].max() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif"])
def test_exif_orientation(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    path = save(tmp_path, Image.fromarray(RGB), name, exif=exif)
    found = read_image(path)
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    np.testing.assert_array_equal(found, np.asarray(upright))
    assert found.shape[:2] == ((12, 20) if orientation < 5 else (20, 12)) == read_size(path)
    if name == "x.png":  # by definition, not only as Pillow has it: where the stored corner goes
        corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
        assert found[corner[orientation]].tolist() == RGB[0, 0].tolist()


@pytest.mark.parametrize("exif", [b"XXXXgarbage", b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0"])
def test_a_damaged_tag_does_not_stop_a_good_image(tmp_path, exif):
    path = save(tmp_path, Image.fromarray(RGB), "x.jpg", exif=b"Exif\0\0" + exif)
    assert read_image(path).shape == (12, 20, 3) and read_size(path) == (12, 20)


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (1, 1)])
def test_thin_images(tmp_path, size):
    assert read_image(save(tmp_path, Image.new("RGB", size[::-1], (1, 2, 3)))).shape == (*size, 3)


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif", "x.gif", "x.bmp"])
def test_truncated_files_are_named_in_one_line(tmp_path, name):
    path = save(tmp_path, Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), name)
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__suppress_context__  # no stack of Pillow's frames


def test_what_is_no_image(tmp_path):
    for name, data, message in (("empty.jpg", b"", "0 bytes"), ("text.jpg", b"hello", "5 bytes"),
                                ("png.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "readable|format")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=f"{name}.*({message})|({message}).*{name}"):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match="must exist, got .*gone.jpg"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(ImageError, match="readable"):
        read_image(tmp_path)


def test_to_rgb_array(tmp_path):
    path = save(tmp_path, Image.fromarray(RGB))
    for image in (path, str(path), Image.open(path), Image.fromarray(RGB), RGB, np.dstack([RGB, GREY]),
                  np.asfortranarray(RGB)):
        found = to_rgb_array(image)
        np.testing.assert_array_equal(found, RGB)
        assert found.flags.c_contiguous
    for grey in (GREY, GREY[..., None], Image.fromarray(GREY)):
        np.testing.assert_array_equal(to_rgb_array(grey), np.dstack([GREY] * 3))
    for bad, message in ((RGB / 255, "uint8 of 0-255, got float64"), (RGB.transpose(2, 0, 1), r"got \(3, 12, 20\)"),
                         (RGB[None], r"list"), (RGB[:0], r"\(0, 20, 3\)"), (RGB[..., :2], r"\(12, 20, 2\)")):
        with pytest.raises(ValueError, match=message):
            to_rgb_array(bad)
    with pytest.raises(TypeError, match="got list"):
        to_rgb_array([RGB])


@pytest.mark.data
def test_real_images_have_their_stated_sizes(shared_data):
    for path in sorted((shared_data / "coco_mini" / "val2017").iterdir())[:10]:
        assert read_image(path).shape[:2] == read_size(path)


# JPEG


SCENE = np.array(Image.fromarray(RGB).resize((101, 67), Image.Resampling.BICUBIC))  # odd sides, edges


def jpeg(image=SCENE, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg", **options)
    return file.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


@pytest.mark.parametrize("options", [
    {"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}, {"quality": 100}, {"quality": 5},
    {"restart_marker_blocks": 3}, {"keep_rgb": True}, {"image": SCENE[..., 0]}, {"image": SCENE[:1]},
    {"image": SCENE[:, :1]}, {"image": SCENE[:17, :16], "subsampling": 2}], ids=str)
def test_jpeg_has_the_bits_of_pillow(options):
    data = jpeg(**options)
    assert open_image(data, "x").plain
    found = decode_image(data, "x")
    np.testing.assert_array_equal(found, by_pillow(data))
    assert found.flags.writeable and found.flags.c_contiguous
    np.testing.assert_array_equal(decode_image(data + b"more", "x"), found)  # by Pillow, for what follows the end


@pytest.mark.data
def test_real_jpeg_has_the_bits_of_pillow(shared_data):
    for path in sorted((shared_data / "coco_mini" / "val2017").iterdir())[:12]:
        np.testing.assert_array_equal(read_image(path), by_pillow(path.read_bytes()))


@pytest.mark.parametrize("cut", [2, 3, 20, 0.5, 0.9])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg_is_refused_wherever_it_ends(cut, progressive):
    data = jpeg(progressive=progressive)
    with pytest.raises(ImageError, match="shard.tar: 7.jpg must be readable"):
        decode_image(data[:-cut] if isinstance(cut, int) else data[:int(cut * len(data))], "shard.tar: 7.jpg")


def test_which_files_are_plain():
    cmyk = io.BytesIO()
    Image.new("CMYK", (8, 8)).save(cmyk, "jpeg")
    png = io.BytesIO()
    Image.fromarray(SCENE).save(png, "png")
    assert [open_image(data, "x").plain for data in (jpeg(), cmyk.getvalue(), png.getvalue())] == [True, False, False]


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_reduced_decoding(orientation):
    """The decoder's own scaling, never below what is needed."""
    exif = Image.Exif()
    exif[274] = orientation
    data = jpeg(np.kron(SCENE, np.ones((4, 4, 1), np.uint8)), exif=exif)  # 268 x 404
    image = open_image(data, "x")
    height, width = image.shape[:2]
    assert (height, width) == ((268, 404) if orientation < 5 else (404, 268))
    for needed, factor in (((height, width), 1), ((height // 2 + 1, 10), 1), ((height // 2, width // 2), 2),
                           ((height // 4, width // 4), 4), ((3, width // 4 + 1), 2), ((3, 3), 8)):
        found = image.pixels(needed)
        assert found.shape == (-(-height // factor), -(-width // factor), 3)
        with Image.open(io.BytesIO(data)) as reference:
            reference.draft("RGB", (404 // factor, 268 // factor))
            np.testing.assert_array_equal(found, np.asarray(ImageOps.exif_transpose(reference)))
    np.testing.assert_array_equal(np.asarray(image), image.pixels())


def test_other_files_are_not_reduced():
    file = io.BytesIO()
    Image.fromarray(SCENE).save(file, "png")
    assert open_image(file.getvalue(), "x").pixels((2, 2)).shape == SCENE.shape
