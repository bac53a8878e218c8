"""Tests of decoding against numpy references: a run trains on what a viewer shows."""

import io
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path

import marked
import numpy as np
import pytest
from PIL import Image, ImageCms

from lorakit.data import decode
from lorakit.data.decode import Unreadable

LOSSLESS = ("png", "bmp", "tif", "tiff")


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    """Return the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("ending", LOSSLESS)
def test_lossless_formats_are_exact(tmp_path: Path, ending: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = marked.save(tmp_path / f"a.{ending}", pixels)
    decoded = decode.decode(path)
    assert np.array_equal(decoded.pixels, pixels)
    assert decoded.size == decode.measure(path) == (30, 20)
    assert (decoded.alpha, decoded.orientation, decoded.notes) == (None, "", ())


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF", "HEIF", "MPO", "GIF"])
def test_lossy_formats_are_decoded_approximately(format: str) -> None:
    if format == "HEIF":
        pytest.importorskip("pillow_heif", reason="the heic extra is not installed").register_heif_opener()
    pixels = marked.picture(27)
    options = {"save_all": True, "append_images": [Image.fromarray(marked.picture(5))]} if format == "MPO" else {}
    decoded = decode.decode(encoded(Image.fromarray(pixels), format, quality=95, **options))
    assert decoded.pixels.shape == pixels.shape
    assert np.abs(decoded.pixels.astype(int) - pixels).mean() < 3
    assert marked.number_of(decoded.pixels) == 27
    assert decoded.notes == ()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
def test_every_exif_orientation_is_decoded_upright(orientation: int, format: str) -> None:
    upright = marked.picture(9, width=96, height=64)
    exif = Image.Exif()
    exif[marked.ORIENTATION] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 95}
    raw_image = Image.fromarray(marked.as_camera_stores(upright, orientation))
    raw = encoded(raw_image, format, exif=exif, **options)
    decoded = decode.decode(raw)
    assert decoded.size == decode.measure(raw) == (96, 64)
    assert marked.marked_corner(decoded.pixels) == "upper left"
    assert np.abs(decoded.pixels.astype(int) - upright).mean() < 3
    assert decoded.orientation == decode.ROTATIONS.get(orientation, "")


def test_a_thumbnail_may_be_decoded_smaller() -> None:
    exif = Image.Exif()
    exif[marked.ORIENTATION] = 6
    raw_image = Image.fromarray(marked.as_camera_stores(marked.picture(9, 1600, 800), 6))
    raw = encoded(raw_image, "JPEG", exif=exif, quality=95)
    assert decode.decode(raw).size == (1600, 800)
    assert decode.decode(raw, at_least=150).size == (400, 200)
    assert decode.decode(raw, at_least=1000).size == (1600, 800)
    small = decode.decode(raw, at_least=150)
    assert marked.marked_corner(small.pixels) == "upper left"
    assert marked.number_of(small.pixels) == 9
    png = encoded(Image.fromarray(marked.picture(9)), "PNG")
    assert decode.decode(png, at_least=1).size == (96, 64)


def test_heic_is_upright() -> None:
    pytest.importorskip("pillow_heif", reason="the heic extra is not installed").register_heif_opener()
    exif = Image.Exif()
    exif[marked.ORIENTATION] = 6
    raw_image = Image.fromarray(marked.as_camera_stores(marked.picture(9), 6))
    raw = encoded(raw_image, "HEIF", exif=exif.tobytes(), quality=95)
    decoded = decode.decode(raw)
    assert decoded.size == decode.measure(raw) == (96, 64)
    assert marked.marked_corner(decoded.pixels) == "upper left"


def test_heic_without_its_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if the package were not installed
    with pytest.raises(
        Unreadable,
        match=r"^IMG_1\.jpg: HEIC needs pillow-heif; install it with: .* -m pip install \"pillow-heif>=1\.1\"$",
    ):
        decode.decode(b"\0\0\0\x1cftypheic" + b"\0" * 40, "IMG_1.jpg")


def test_transparency_is_decoded_on_white() -> None:
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[0, 0], rgba[0, 1], rgba[1, 2] = (0, 255, 0, 0), (10, 20, 30, 255), (0, 0, 0, 128)
    decoded = decode.decode(encoded(Image.fromarray(rgba), "PNG"))
    assert decoded.pixels[0, 0].tolist() == [255, 255, 255]  # the colour under full transparency does not count
    assert decoded.pixels[0, 1].tolist() == [10, 20, 30]
    assert decoded.pixels[1, 2].tolist() == [127, 127, 127]
    assert decoded.alpha is not None
    assert decoded.alpha.tolist() == rgba[..., 3].tolist()


def test_grey_with_alpha_and_transparent_palettes_are_decoded() -> None:
    grey = np.array([[[0, 0], [100, 255]]], np.uint8)
    decoded = decode.decode(encoded(Image.fromarray(grey, "LA"), "PNG"))
    assert decoded.pixels[0].tolist() == [[255] * 3, [100] * 3]
    assert decoded.alpha is not None
    assert decoded.alpha.tolist() == [[0, 255]]

    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    decoded = decode.decode(encoded(palette, "PNG", transparency=0))
    assert decoded.pixels[0].tolist() == [[255, 255, 255], [0, 0, 255]]
    assert decoded.alpha is not None
    assert decoded.alpha.tolist() == [[0, 255]]


def test_an_opaque_alpha_channel_is_not_a_mask() -> None:
    opaque = Image.fromarray(np.full((2, 2, 4), 255, np.uint8))
    assert decode.decode(encoded(opaque, "PNG")).alpha is None


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(format: str) -> None:
    values = np.array([[0, 257, 40000, 65535]], np.uint16)
    decoded = decode.decode(encoded(Image.fromarray(values), format))
    assert decoded.pixels[0, :, 0].tolist() == [0, 1, 156, 255]  # 40000 / 257 = 155.6


def test_sixteen_bit_colour_keeps_its_high_byte() -> None:
    """The PNG with 16-bit RGB is written by hand, because Pillow cannot write one."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    row = b"\0" + struct.pack(">6H", 0, 40000, 65535, 257, 12850, 25700)
    raw = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    assert np.abs(decode.decode(raw).pixels[0].astype(int) - [[0, 156, 255], [1, 50, 100]]).max() <= 1


def test_float_pictures_are_scaled() -> None:
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0, np.nan]], np.float32))
    assert decode.decode(encoded(unit, "TIFF")).pixels[0, :, 0].tolist() == [0, 128, 255, 0]
    bytes_ = Image.fromarray(np.array([[0.0, 100.0, 250.0]], np.float32))
    assert decode.decode(encoded(bytes_, "TIFF")).pixels[0, :, 0].tolist() == [0, 100, 250]


def test_cmyk_is_converted_and_reported_as_a_guess() -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow ink together are red
    decoded = decode.decode(encoded(cmyk, "JPEG", quality=100))
    red, green, blue = decoded.pixels[8, 8].tolist()
    assert red > 200
    assert green < 60
    assert blue < 60
    assert decoded.notes == ("CMYK without a colour profile: its colours are a guess",)


def test_lab_becomes_srgb() -> None:
    white = Image.new("LAB", (4, 4), (255, 128, 128))
    assert decode.decode(encoded(white, "TIFF")).pixels.min() >= 253


def wide_gamut() -> ImageCms.ImageCmsProfile:
    """Return a matrix profile with the primaries of sRGB and gamma 1.0."""

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(fixed(value) for value in values)

    description = b"desc\0\0\0\0" + struct.pack(">I", 7) + b"linear\0" + b"\0" * 78
    linear = b"curv\0\0\0\0" + struct.pack(">I", 0) + b"\0\0\0\0"
    tags = {
        b"desc": description,
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.4360, 0.2225, 0.0139),
        b"gXYZ": xyz(0.3851, 0.7169, 0.0971),
        b"bXYZ": xyz(0.1431, 0.0606, 0.7139),
        b"rTRC": linear,
        b"gTRC": linear,
        b"bTRC": linear,
        b"cprt": b"text\0\0\0\0none\0",
    }
    table, body, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        padded = content + b"\0" * (-len(content) % 4)
        table += name + struct.pack(">II", offset + len(body), len(content))
        body += padded
    size = offset + len(body)
    head = struct.pack(">I", size) + b"none" + struct.pack(">I", 0x02400000) + b"mntrRGB XYZ " + b"\0" * 12 + b"acsp"
    head += b"\0" * (68 - len(head)) + fixed(0.9642) + fixed(1.0) + fixed(0.8249)
    head += b"\0" * (128 - len(head))
    return ImageCms.ImageCmsProfile(io.BytesIO(head + struct.pack(">I", len(tags)) + table + body))


def test_an_embedded_profile_is_applied() -> None:
    """A linear value of 0.2140 is 50 % grey in sRGB."""
    profile = wide_gamut().tobytes()
    image = Image.new("RGB", (4, 4), (55, 55, 55))
    decoded = decode.decode(encoded(image, "PNG", icc_profile=profile))
    linear = 55 / 255
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    assert abs(int(decoded.pixels[0, 0, 0]) - expected) <= 1
    assert decoded.notes == ()
    with_alpha = Image.new("RGBA", (4, 4), (55, 55, 55, 255))
    with_alpha.putpixel((0, 0), (55, 55, 55, 0))
    decoded = decode.decode(encoded(with_alpha, "PNG", icc_profile=profile))
    assert decoded.pixels[0, 0].tolist() == [255] * 3
    assert abs(int(decoded.pixels[1, 1, 0]) - expected) <= 1


def test_an_srgb_profile_changes_nothing() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(decode.decode(encoded(Image.fromarray(pixels), "PNG", icc_profile=srgb)).pixels, pixels)


@pytest.mark.parametrize(
    "profile", [b"not a profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()]
)
def test_a_useless_profile_is_left_out_and_reported(profile: bytes) -> None:
    pixels = marked.picture(3)
    decoded = decode.decode(encoded(Image.fromarray(pixels), "PNG", icc_profile=profile))
    assert np.array_equal(decoded.pixels, pixels)
    assert len(decoded.notes) == 1
    assert decoded.notes[0].endswith("left out")


def test_the_first_picture_of_several_is_used_and_reported() -> None:
    frames = [Image.fromarray(marked.picture(number)) for number in (7, 8, 9)]
    animated = decode.decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert marked.number_of(animated.pixels) == 7
    assert animated.notes == ("holds 3 pictures: the first is used",)
    pages = decode.decode(encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]))
    assert pages.notes == ("holds 3 pages: the first is used",)
    webp = decode.decode(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
    assert marked.number_of(webp.pixels) == 7
    assert webp.notes == ("holds 3 pictures: the first is used",)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"]
)
def test_damaged_exif_does_not_stop_a_photo(exif: bytes) -> None:
    decoded = decode.decode(encoded(Image.fromarray(marked.picture(1)), "JPEG", exif=exif))
    assert decoded.size == (96, 64)
    assert decoded.orientation == ""


def test_an_rgb_profile_is_applied_to_grey_pictures() -> None:
    profile = wide_gamut().tobytes()
    grey = Image.new("L", (4, 4), 55)
    assert abs(int(decode.decode(encoded(grey, "PNG", icc_profile=profile)).pixels[0, 0, 0]) - 128) <= 1
    for mode in ("RGBA", "LA"):
        image = grey.convert(mode)
        assert abs(int(decode.decode(encoded(image, "PNG", icc_profile=profile)).pixels[0, 0, 0]) - 128) <= 1


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", r"empty, 0 bytes; copy it again from its source"),
        (b"a holiday photo\n", r"text, not a picture, whatever its name says; remove it or save the picture again"),
        (b"\0\1\2\3" * 30, r"not a picture that can be read; save it as jpg or png"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript, whatever its name says; save it as jpg or png"),
        (b"%PDF-1.7\n", "PDF, whatever its name says; save it as jpg or png"),
        (b"8BPS\0\1", "Photoshop, whatever its name says; save it as jpg or png"),
    ],
)
def test_other_files_than_pictures_are_named(tmp_path: Path, raw: bytes, reason: str) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(raw)
    for read in (decode.decode, decode.measure):
        with pytest.raises(Unreadable, match=rf"^x\.jpg: {reason}$"):
            read(path)


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 64 64
%%EndComments
0 0 moveto 64 64 lineto stroke showpage
%%EOF
"""


@pytest.mark.parametrize("format", ["EPS", "PPM", "ICO", "DDS", "TGA", "PCX", "JPEG2000", "SGI", "IM", "ICNS", "XBM"])
def test_only_listed_decoders_are_tried(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    if format == "EPS":
        log = tmp_path / "log"
        for program in ("gs", "gswin64c", "gswin32c"):  # Pillow would run one of these
            path = tmp_path / program
            path.write_text(f"#!/bin/sh\ntouch {log}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        raw = EPS
    else:
        raw = encoded(Image.new("1" if format == "XBM" else "RGB", (32, 32)), format)
        assert Image.open(io.BytesIO(raw)).format == format
    for read in (decode.decode, decode.measure):
        with pytest.raises(Unreadable, match=r"^photo\.jpg: "):
            read(raw, "photo.jpg")
    assert not (tmp_path / "log").exists()
    assert set(decode.CODECS) <= {*Image.OPEN, "MPO", "HEIF", "AVIF"}


@pytest.mark.parametrize(
    "error", [NotImplementedError("pixel format"), KeyError(7), RecursionError(), Image.DecompressionBombError("big")]
)
def test_any_error_of_a_decoder_names_the_file(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: object) -> None:
        raise error

    raw = encoded(Image.new("RGB", (8, 8)), "PNG")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(Unreadable, match=r"^odd\.png: (damaged or cut off \(\S.*\); copy|more than 178 megapixels)"):
        decode.decode(raw, "odd.png")


def test_too_little_memory_and_too_many_bytes_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    monkeypatch.setattr(decode, "MAX_BYTES", 10)
    with pytest.raises(Unreadable, match=r"^a\.png: larger than 0 MiB; save it smaller, as jpg or png$"):
        decode.decode(path)
    monkeypatch.setattr(decode, "MAX_BYTES", 2**30)

    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(decode, "_to_srgb", no_memory)
    with pytest.raises(Unreadable, match=r"^a\.png: needs more memory than there is; save it smaller$"):
        decode.decode(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_conversion_in_strips_gives_the_same_pixels(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large picture is converted in strips. The pixels equal those of one conversion."""
    rng = np.random.default_rng(3)
    if mode in ("I;16", "I", "F"):
        image = Image.fromarray(rng.integers(0, 60_000, (50, 40)).astype({"I;16": "u2", "I": "i4", "F": "f4"}[mode]))
    else:
        image = Image.fromarray(rng.integers(0, 256, (50, 40, 4), dtype=np.uint8), "RGBA").convert(mode)
    raw = encoded(image, "PNG" if mode not in ("CMYK", "F", "I") else "TIFF")
    full = decode.decode(raw)
    monkeypatch.setattr(decode, "STRIP_PIXELS", 7 * 40)
    strips = decode.decode(raw)
    assert np.array_equal(full.pixels, strips.pixels) and full.notes == strips.notes
    assert full.alpha is strips.alpha or np.array_equal(full.alpha, strips.alpha)


@pytest.mark.slow
def test_decoding_16_bits_takes_at_most_four_times_the_pixels() -> None:
    """For 16-bit grey, numpy's peak is below four times the 75 MB of the pixels."""
    raw = encoded(Image.new("I;16", (5000, 5000), 40_000), "PNG")
    tracemalloc.start()
    try:
        pixels = decode.decode(raw).pixels
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert int(pixels[0, 0, 0]) == round(40_000 / 257) and peak < 4 * pixels.nbytes


def test_the_transparent_value_of_deep_grey_is_transparent() -> None:
    deep = Image.fromarray(np.array([[0, 1000], [65535, 1000]], np.uint16))
    decoded = decode.decode(encoded(deep, "PNG", transparency=1000))
    assert decoded.alpha is not None and decoded.alpha.tolist() == [[255, 0], [255, 0]]
    assert decoded.pixels[..., 0].tolist() == [[0, 255], [255, 255]]


def test_a_tiff_with_very_many_pages_is_decoded_quickly() -> None:
    pages = [Image.new("L", (1, 1))] * 150
    raw = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert decode.decode(raw).notes == (f"holds {decode.MAX_PAGES} pages: the first is used",)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "GIF"])
def test_a_truncated_file_is_named(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    raw = encoded(Image.fromarray(noise), format)
    with pytest.raises(
        Unreadable, match=r"^half\.x: (damaged or cut off \(.+\); copy it again|not a picture that can)"
    ):
        decode.decode(raw[: len(raw) // 2], "half.x")


@pytest.mark.parametrize("pillows_own", [Image.MAX_IMAGE_PIXELS, None])
@pytest.mark.parametrize(
    ("size", "why"),
    [
        ((20_000, 20_000), "178 megapixels"),
        ((1, 80_000_000), "65535 pixels on a side"),
        ((65_536, 4), "65535 pixels on a side"),
    ],
)
def test_huge_dimensions_are_refused_before_they_take_memory(
    pillows_own: int | None, size: tuple[int, int], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_own)
    raw = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
    raw[16:24] = struct.pack(">II", *size)
    raw[29:33] = struct.pack(">I", zlib.crc32(bytes(raw[12:29])))
    with pytest.raises(Unreadable, match=rf"^big\.png: more than {why}; save it smaller$"):
        decode.decode(bytes(raw), "big.png")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match=r"^gone\.jpg: cannot be read \(No such file or directory\)$"):
        decode.decode(tmp_path / "gone.jpg")


def test_a_mask_must_have_the_size_of_its_photo(tmp_path: Path) -> None:
    mask = np.zeros((64, 96), np.uint8)
    mask[:, 48:] = 255
    path = tmp_path / "a.mask.png"
    Image.fromarray(mask).save(path)
    assert np.array_equal(decode.decode_mask(path, (96, 64)), mask)
    with pytest.raises(Unreadable, match=r"^a\.mask\.png: mask is 96 x 64, its photo 64 x 96: make them equal$"):
        decode.decode_mask(path, (64, 96))
