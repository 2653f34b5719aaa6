"""Bytes to RGB: PIL's pixels for all that has 8 bits, a clear range or a refusal for more, and one kind of error."""
import io
import os
import random
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from sklearn.datasets import load_sample_image

import decode
from utils import shown

ROOT = Path(decode.__file__).parent


def photograph(width=40, height=36):
    return Image.fromarray(load_sample_image("china.jpg")[150:150 + height, 300:300 + width])


def data(image, kind, **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def by_pil(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.array(image.convert("RGB"))


def pixels(content):
    return np.array(decode.load_rgb(content, "x"))


def grey(values, dtype, kind="TIFF"):
    return data(Image.fromarray(np.array([values] * 4, dtype=dtype)), kind)


# ---- as PIL and torchvision ----

KINDS = {
    "jpeg": ("JPEG", "RGB", {}), "grey jpeg": ("JPEG", "L", {}), "cmyk jpeg": ("JPEG", "CMYK", {}),
    "progressive": ("JPEG", "RGB", {"progressive": True}), "png": ("PNG", "RGB", {}), "png alpha": ("PNG", "RGBA", {}),
    "png grey alpha": ("PNG", "LA", {}), "png palette": ("PNG", "P", {}), "png bits": ("PNG", "1", {}),
    "png palette transparent": ("PNG", "P", {"transparency": 3}),
    "png palette alpha": ("PNG", "P", {"transparency": bytes(range(256))}),
    "png rgb transparent": ("PNG", "RGB", {"transparency": (0, 0, 0)}), "gif": ("GIF", "P", {}),
    "gif transparent": ("GIF", "P", {"transparency": 5}), "gif grey": ("GIF", "L", {}), "bmp": ("BMP", "RGB", {}),
    "bmp bits": ("BMP", "1", {}), "tiff": ("TIFF", "RGB", {}), "tiff cmyk": ("TIFF", "CMYK", {}), "tiff ycbcr": ("TIFF", "YCbCr", {}),
    "tiff lzw": ("TIFF", "RGB", {"compression": "tiff_lzw"}), "webp": ("WEBP", "RGB", {}),
    "webp alpha": ("WEBP", "RGBA", {"lossless": True}), "ppm": ("PPM", "RGB", {}), "pgm": ("PPM", "L", {}),
    "jpeg2000": ("JPEG2000", "RGB", {})}


@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits_are_pils(kind):
    name, mode, settings = KINDS[kind]
    image = photograph()
    if "alpha" in kind and mode != "P":
        image.putalpha(image.convert("L").point(lambda x: x // 2))
    content = data(image.convert(mode), name, **settings)
    assert np.array_equal(pixels(content), by_pil(content))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_pils():
    content = data(photograph(), "AVIF")
    assert np.array_equal(pixels(content), by_pil(content))


def test_exif_orientation_is_not_applied(tmp_path):
    """As torchvision's loader."""
    exif = Image.Exif()
    exif[274] = 6
    content = data(photograph(40, 30), "JPEG", exif=exif)
    assert pixels(content).shape == (30, 40, 3)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(content)
    from torchvision.datasets import ImageFolder
    assert np.array_equal(pixels(content), np.array(ImageFolder(tmp_path)[0][0]))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first(kind):
    first, second = photograph(), photograph().transpose(Image.Transpose.ROTATE_180)
    content = data(first, kind, save_all=True, append_images=[second], **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(pixels(content), by_pil(content))
    if kind != "GIF":  # its colours are a palette's
        assert np.array_equal(pixels(content), np.array(first))


# ---- more than 8 bits ----

def same(values):
    return np.repeat(np.array([values] * 4, dtype=np.uint8)[:, :, None], 3, axis=2)


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "JPEG2000"])
def test_16_bits_are_the_high_byte(kind):
    values = [0, 255, 256, 4095, 32768, 40000, 65279, 65535]
    assert np.array_equal(pixels(grey(values, np.uint16, kind)), same([value // 256 for value in values]))


def test_16_bit_grey_is_what_16_bit_rgb_is(tmp_path):
    """A PNG written by hand: PIL cannot write one of 16-bit RGB, but reads it."""
    values = np.linspace(0, 65535, 32).astype(">u2")
    rgb = np.repeat(values[:, None], 3, axis=1)

    def chunk(name, content):
        return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")
    head = (32).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" + rgb.tobytes())) + chunk(b"IEND", b"")
    assert np.array_equal(pixels(content), by_pil(content))
    assert np.array_equal(pixels(content)[0], pixels(grey(values.astype(np.uint16), np.uint16))[0])


def test_a_big_endian_tiff_and_a_16_bit_pgm():
    values = np.array([[0, 1000, 65535]] * 2, dtype=">u2")
    expected = np.repeat((values // 256).astype(np.uint8)[:, :, None], 3, axis=2)
    assert np.array_equal(pixels(b"P5 3 2 65535\n" + values.tobytes()), expected)
    tags = {256: 3, 257: 2, 258: 16, 259: 1, 262: 1, 273: 122, 277: 1, 278: 2, 279: 12}  # sizes, bits, where the values stand
    content = struct.pack(">2sHIH", b"MM", 42, 8, len(tags)) + b"".join(struct.pack(">HHII", tag, 4, 1, x) for tag, x in tags.items())
    content += bytes(122 - len(content)) + values.tobytes()
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == "I;16B"
    assert np.array_equal(pixels(content), expected)


@pytest.mark.parametrize("values, dtype, expected", [
    ([0.0, 0.25, 0.5, 1.0], np.float32, [0, 64, 128, 255]), ([0.0, 1.0, 200.7, 255.0], np.float32, [0, 1, 200, 255]),
    ([0.0, 0.0], np.float32, [0, 0]), ([0, 1, 200, 255], np.int32, [0, 1, 200, 255]), ([0, 1, 200, 255], np.uint16, [0, 1, 200, 255])])
def test_other_ranges_that_are_clear(values, dtype, expected):
    content = grey(values, dtype)
    assert np.array_equal(pixels(content), same(expected))
    if max(values) > 1:
        assert np.array_equal(pixels(content), by_pil(content)), "what PIL does not clip stays as it is"


@pytest.mark.parametrize("values, dtype, kind", [
    ([0, 3071], np.uint16, "16-bit values from 0 to 3071"), ([-1000, 3000], np.int32, "32-bit values from -1000 to 3000"),
    ([0, 70000], np.int32, "32-bit values from 0 to 70000"), ([-0.5, 1.0], np.float32, "float values from -0.5 to 1"),
    ([0.0, 1000.0], np.float32, "float values from 0 to 1000"), ([0.0, np.nan], np.float32, "float values from nan to nan"),
    ([0.0, np.inf], np.float32, "float values from 0 to inf")])
def test_a_range_that_cannot_be_told_is_refused(values, dtype, kind):
    with pytest.raises(decode.UnreadableImage, match=f"image x .{kind}, whose range cannot be told: store them with 8 bits.: "):
        pixels(grey(values, dtype))


# ---- what is no image ----

def refusal(source, name=None):
    with pytest.raises(decode.UnreadableImage) as caught:
        decode.load_rgb(source, name)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(": replace it or remove it")
    return str(caught.value)


@pytest.mark.parametrize("content, why", [
    (b"", "no image of a known format"), (b"<html>", "no image of a known format"), (data(photograph(), "PNG")[:300], "truncated"),
    (data(photograph(), "JPEG")[:300], "Truncated"), (data(photograph(), "JPEG")[:800], "truncated"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "no image of a known format")])
def test_damaged_bytes(content, why):
    """EPS among them: PIL would start Ghostscript."""
    assert why in refusal(content, "the name")


def test_a_decompression_bomb():
    """A PNG header that promises 40,000 x 40,000 pixels."""
    content = bytearray(data(Image.new("1", (8, 8)), "PNG"))
    content[16:24] = (40000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    assert "1600000000 pixels" in refusal(bytes(content), "bomb.png")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jpg"))
    (tmp_path / "folder.jpg").mkdir()
    for name in ("fifo.jpg", "socket.jpg", "folder.jpg"):
        assert f"{tmp_path / name} (not a regular file)" in refusal(tmp_path / name)
        assert not decode.is_image(tmp_path / name)
    assert "(not a regular file)" in refusal("/dev/zero")
    assert f"{tmp_path / 'none.jpg'} (No such file or directory)" in refusal(tmp_path / "none.jpg")


def test_a_name_does_not_break_its_line(tmp_path):
    path = str(tmp_path / "a\nerror: b\x1b[31m\r\udcff é 中.jpg")
    Path(path).write_bytes(b"no image")
    assert refusal(path) == (f"cannot read the image {tmp_path}/a\\nerror: b\\x1b[31m\\r\\udcff é 中.jpg (no image of a known format): "
                             "replace it or remove it")
    assert shown("n01440764") == "n01440764"


def test_whether_a_file_is_an_image(tmp_path):
    for name, content, expected in (("a", data(photograph(), "JPEG"), True), ("b", data(photograph(), "WEBP"), True),
                                    ("c", b"P is no PPM", False), ("d", b"", False), ("e.png", b"text", False)):
        (tmp_path / name).write_bytes(content)
        assert decode.is_image(tmp_path / name) is expected


def test_odd_images_are_silent(tmp_path):
    """EXIF that breaks off, a palette with transparency: PIL warns of each of them anew, in each worker."""
    exif = Image.Exif()
    exif[270] = "a description that is long enough to stand apart"
    content = data(photograph(), "JPEG", exif=exif)
    start = content.index(b"Exif")
    broken = content[:start + 22] + b"\xff" * 8 + content[start + 30:]
    (tmp_path / "a.jpg").write_bytes(broken)
    (tmp_path / "b.png").write_bytes(data(photograph().convert("P"), "PNG", transparency=bytes(range(256))))
    lzw = bytearray(data(photograph(), "TIFF", compression="tiff_lzw"))
    lzw[30:60] = b"\xff" * 30  # libtiff itself would say it
    (tmp_path / "c.tif").write_bytes(lzw)
    code = ("import sys, decode\nfor name in sys.argv[1:]:\n try: decode.load_rgb(name)\n except decode.DataError: pass")
    done = subprocess.run([sys.executable, "-c", code, *sorted(map(str, tmp_path.iterdir()))], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.filterwarnings("ignore")
def test_mutated_images_have_pils_pixels_or_one_error():
    """What decodes is PIL's, but for more than 8 bits; the rest is one line. Fuzzed so by hand with 60,000 files."""
    rng, image = random.Random(0), photograph(24, 20)
    whole = [data(image, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")]
    whole += [data(image, "TIFF", compression="tiff_lzw"), data(image.convert("CMYK"), "JPEG")]
    whole += [grey(range(0, 65536, 2048), np.uint16, "PNG")]
    whole += [data(image, "AVIF")] if features.check("avif") else []
    read = 0
    for turn in range(600):
        content = bytearray(whole[turn % len(whole)])
        for _ in range(rng.choice([1, 1, 3, 9])):
            content[int(rng.random() ** 2 * len(content))] = rng.randrange(256)
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)):]
        try:
            found = decode.load_rgb(bytes(content), "x")
        except decode.UnreadableImage as error:
            assert len(str(error).splitlines()) == 1
            continue
        if "narrowed" not in found.info:
            assert np.array_equal(np.array(found), by_pil(bytes(content)))
            read += 1
    assert read > 30
