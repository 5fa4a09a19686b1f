"""Decoding: which files are read, how their values become RGB, and that every error is that of one image."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile, ImageOps, JpegImagePlugin

from misc.data import images
from misc.data.images import FORMATS, ImageError, check_header, read_dataset_image, read_image
from misc.errors import printable
from tests.helpers.tiny_dataset import spoil

COLOUR = (200, 30, 120)


def reason(path: Path, **options) -> str:
    """Returns why an image cannot be read."""
    with pytest.raises(ImageError) as raised:
        read_image(path, **options)
    assert printable(str(path)) in str(raised.value)
    return raised.value.reason


def pixels(path: Path, **options) -> np.ndarray:
    image = read_image(path, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# ---- formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FORMATS if name in Image.SAVE])
def test_a_format_is_read_whatever_its_suffix(tmp_path, name):
    for suffix in (*FORMATS[name], ".jpg", ""):
        path = tmp_path / f"person{suffix}"
        Image.new("RGB", (20, 40), COLOUR).save(path, name)
        assert abs(pixels(path)[20, 10] - COLOUR).max() < 10 or name == "GIF"  # a GIF has its own palette
        assert Image.registered_extensions()[suffix or ".jpg"] in (*FORMATS, "MPO", "DIB")


@pytest.mark.parametrize("name", ["EPS", "PDF", "ICO", "TGA", "PCX", "SGI", "DDS", "IM"])
def test_other_formats_are_refused_and_start_no_program(tmp_path, monkeypatch, name):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **_: started.append(arguments))
    Image.new("RGB", (20, 40), COLOUR).save(tmp_path / "person.jpg", name)
    assert reason(tmp_path / "person.jpg").startswith("it is not a JPEG, PNG, ") and started == []


@pytest.mark.parametrize(
    "error", [NotImplementedError("kind"), RuntimeError(), AttributeError("numerator"), MemoryError(), TypeError()]
)
def test_every_error_of_a_decoder_is_that_of_the_image(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    Image.new("RGB", (20, 40)).save(tmp_path / "person.jpg")
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", fail)
    assert type(error).__name__ in reason(tmp_path / "person.jpg")


# ---- values ---------------------------------------------------------------------------------------------------------

RAMP = np.linspace(0, 255, 20 * 40).round().astype(np.uint8).reshape(40, 20)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.pgm"])
def test_grey_of_16_bits_is_scaled(tmp_path, name):
    values = RAMP.astype(np.uint16) * 257
    if name == "grey.pgm":  # old releases of Pillow cannot write it
        (tmp_path / name).write_bytes(b"P5 20 40 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / name)
    assert (pixels(tmp_path / name) == RAMP[..., None]).all()


@pytest.mark.parametrize("values", [np.int32, np.float32])
def test_values_of_an_unknown_range_are_refused(tmp_path, values):
    Image.fromarray(RAMP.astype(values)).save(tmp_path / "grey.tif")
    assert "32 bits" in reason(tmp_path / "grey.tif")
    with pytest.raises(ImageError, match="32 bits"):
        check_header(tmp_path / "grey.tif")


@pytest.mark.parametrize(
    ("mode", "name", "tolerance"),
    [("1", "x.png", 0), ("L", "x.png", 0), ("P", "x.png", 0), ("LA", "x.png", 0), ("RGBA", "x.png", 0)]
    + [("CMYK", "x.tif", 0), ("CMYK", "x.jpg", 4), ("YCbCr", "x.tif", 2), ("RGBA", "x.webp", 4)],
)
def test_every_mode_becomes_the_same_colours(tmp_path, mode, name, tolerance):
    """Expected: an image of two plain colours, which each of these modes can represent."""
    expected = Image.new("RGB", (16, 32), "black")
    expected.paste("white", (0, 0, 16, 16))
    expected.convert(mode).save(tmp_path / name)
    if mode == "YCbCr":
        try:
            Image.open(tmp_path / name).load()
        except OSError:
            pytest.skip("this release of Pillow cannot read such files")
    assert abs(pixels(tmp_path / name) - np.asarray(expected).astype(int)).max() <= tolerance


# ---- damaged files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.bmp", "x.tif"])
@pytest.mark.parametrize("share", [0.6, 0.9])
def test_a_truncated_file_is_decoded_as_by_the_published_code(tmp_path, monkeypatch, name, share):
    """It sets `LOAD_TRUNCATED_IMAGES`. Only images of datasets are read so."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    whole, damaged = read_dataset_image(tmp_path / name)
    assert not damaged and (np.asarray(whole) == pixels(tmp_path / name)).all()
    (tmp_path / name).write_bytes(content[: round(share * len(content))])
    assert reason(tmp_path / name)
    partial, damaged = read_dataset_image(tmp_path / name)
    assert damaged and reason(tmp_path / name)  # the setting is back
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert (np.asarray(partial) == np.asarray(Image.open(tmp_path / name).convert("RGB"))).all()


def test_a_file_of_which_nothing_can_be_decoded(tmp_path):
    for how in ("empty", "no image", "undecodable"):
        path = tmp_path / f"{how}.jpg"
        path.touch()
        spoil(path, how)
        with pytest.raises(ImageError):
            read_dataset_image(path)
        assert not ImageFile.LOAD_TRUNCATED_IMAGES
        if how == "undecodable":
            check_header(path)  # decodes nothing
        else:
            with pytest.raises(ImageError):
                check_header(path)
    assert reason(tmp_path / "empty.jpg") == "the file is empty"


# ---- size -----------------------------------------------------------------------------------------------------------


def header(path: Path, width: int, height: int) -> Path:
    """Writes the beginning of a PNG file: its size, and no pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + size + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize(
    ("width", "height", "words"),
    [(13_000, 13_000, "13,000 × 13,000"), (1, 65_536, "1 × 65,536"), (20_000, 20_000, "more than 178,956,970 pixels")],
)
def test_an_image_that_is_too_large_is_refused_before_it_is_decoded(tmp_path, width, height, words):
    found = reason(header(tmp_path / "large.png", width, height))
    assert words in found and "at most 50,000,000" in found
    with pytest.raises(ImageError, match=words):
        check_header(tmp_path / "large.png")


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 128)
    for name, factor, options in (("1.jpg", 1, {}), ("2.jpg", 2, {}), ("8.jpg", 8, {})):
        large = Image.new("RGB", (64 * factor, 128 * factor), "black")
        large.paste(COLOUR, (0, 0, 64 * factor, 64 * factor))  # the upper half
        large.save(tmp_path / name, **options)
        found = pixels(tmp_path / name)
        assert found.shape == (128, 64, 3)
        assert abs(found[10, 32] - COLOUR).max() < 10 and found[110, 32].max() < 10
    Image.new("RGB", (64 * 8 + 1, 128 * 8)).save(tmp_path / "9.jpg")
    Image.new("RGB", (128, 256)).save(tmp_path / "progressive.jpg", progressive=True)  # is held as a whole
    assert "513 × 1,024 pixels" in reason(tmp_path / "9.jpg")
    assert "128 × 256 pixels" in reason(tmp_path / "progressive.jpg")


# ---- orientation ----------------------------------------------------------------------------------------------------


def exif(orientation: int, description: tuple[int, int]) -> bytes:
    """EXIF with an orientation, and with a description that is a fraction instead of a text."""
    entries = struct.pack("<HHII", 0x010E, 5, 1, 38) + struct.pack("<HHII", 0x0112, 3, 1, orientation)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I2I", 0, *description)


def test_exif_of_odd_types_does_not_matter(tmp_path):
    sideways = Image.new("RGB", (40, 20), "white")
    sideways.paste("red", (0, 0, 20, 20))  # the left side, which becomes the top
    sideways.save(tmp_path / "turned.jpg", exif=exif(6, (72, 1)), quality=95)
    found = pixels(tmp_path / "turned.jpg", upright=True)
    assert found.shape == (40, 20, 3)
    assert abs(found[5, 10] - (255, 0, 0)).max() < 10 and abs(found[35, 10] - 255).max() < 10


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_undone_as_by_pillow(tmp_path, orientation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))
    tags = Image.Exif()
    tags[images.EXIF_ORIENTATION] = orientation
    image.save(tmp_path / "turned.png", exif=tags)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))
    assert (pixels(tmp_path / "turned.png", upright=True) == np.asarray(expected)).all()


# ---- files ----------------------------------------------------------------------------------------------------------


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "round.jpg").symlink_to("round.jpg")
    (tmp_path / "locked.jpg").write_bytes(b"")
    assert reason(tmp_path / "pipe.jpg") == reason(tmp_path) == reason(Path(os.devnull)) == "it is not a regular file"
    assert reason(tmp_path / "lost.jpg") == reason(tmp_path / "nul\0l.jpg") == "No such file or directory"
    assert reason(tmp_path / ("x" * 300)) == "File name too long"
    assert "symbolic links" in reason(tmp_path / "round.jpg")
