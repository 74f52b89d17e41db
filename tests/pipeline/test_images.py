"""Encoded images in, RGB out: as transformers reads them; what cannot be used is refused before it costs anything."""

from __future__ import annotations

import io
import struct
import time
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vision_sources import animation, encoded_as, picture_of_noise, png, rotated

from anabranch.images import MOST_PIXELS, BadImage, image_size, open_image, scaled_down


def grey16() -> bytes:
    return encoded_as(Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160), "PNG")


def palette_with_transparency() -> bytes:
    image = picture_of_noise(12, 10).quantize(16)
    return encoded_as(image, "PNG", transparency=3)


KINDS = {
    "jpeg": lambda: encoded_as(picture_of_noise(33, 21), "JPEG"),
    "png": lambda: encoded_as(picture_of_noise(33, 21), "PNG"),
    "webp": lambda: encoded_as(picture_of_noise(33, 21), "WEBP", lossless=True),
    "bmp": lambda: encoded_as(picture_of_noise(33, 21), "BMP"),
    "gif": lambda: encoded_as(picture_of_noise(33, 21).quantize(32), "GIF"),
    "tiff": lambda: encoded_as(picture_of_noise(33, 21), "TIFF"),
    "ppm": lambda: encoded_as(picture_of_noise(33, 21), "PPM"),
    "pgm": lambda: encoded_as(picture_of_noise(33, 21, "L"), "PPM"),
    "progressive jpeg": lambda: encoded_as(picture_of_noise(33, 21), "JPEG", progressive=True),
    "cmyk jpeg": lambda: encoded_as(picture_of_noise(33, 21, "CMYK"), "JPEG"),
    "cmyk tiff": lambda: encoded_as(picture_of_noise(33, 21, "CMYK"), "TIFF"),
    "grey jpeg": lambda: encoded_as(picture_of_noise(33, 21, "L"), "JPEG"),
    "rgba png": lambda: encoded_as(picture_of_noise(33, 21, "RGBA"), "PNG"),
    "grey alpha png": lambda: encoded_as(picture_of_noise(33, 21, "LA"), "PNG"),
    "one bit": lambda: encoded_as(picture_of_noise(33, 21).convert("1"), "PNG"),
    "16 bit": grey16,
    "palette": palette_with_transparency,
    "one pixel": lambda: encoded_as(picture_of_noise(1, 1), "PNG"),
    **{f"exif {n}": lambda n=n: rotated(n) for n in range(1, 9)},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_pixels_are_those_of_transformers(tmp_path, kind):
    from transformers.image_utils import load_image

    data = KINDS[kind]()
    (tmp_path / "image").write_bytes(data)
    theirs, ours = load_image(str(tmp_path / "image")), open_image(data)
    assert ours.mode == "RGB" and ours.size == image_size(data)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_exif_turns_the_sides():
    assert [image_size(rotated(n)) for n in (1, 3, 6, 8)] == [(30, 20), (30, 20), (20, 30), (20, 30)]


def test_16_bit_grey_is_cut_off_as_transformers_does():
    """What the docstring says of it: values above 255 are white, so this is no place for depth maps."""
    values = np.asarray(open_image(grey16()))[..., 0].ravel()
    assert values.tolist() == [min(255, 160 * i) for i in range(400)]


def rule_of(data: bytes, **options: Any) -> tuple[str, str]:
    with pytest.raises(BadImage) as caught:
        open_image(data, **options)
    return caught.value.rule, caught.value.why


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_several_frames_are_refused_one_is_not(form):
    assert rule_of(animation(form)) == ("animated_image", f"{form} with more than one frame")
    assert open_image(animation(form, 1)).size == (20, 20)


def test_a_camera_s_jpeg_with_a_preview_is_a_still_picture():
    data = encoded_as(picture_of_noise(40, 30), "MPO", save_all=True, append_images=[picture_of_noise(10, 8)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert open_image(data).size == (40, 30)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_an_image_that_is_cut_short_is_broken(form, share):
    image = picture_of_noise(200, 150)
    whole = encoded_as(image.quantize(64) if form == "GIF" else image, form)
    rule, why = rule_of(whole[: int(len(whole) * share)])
    assert rule == "broken_image" and why


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>404</html>",
        b"\0" * 64,
        b"%PDF-1.7 ..",
        b"\x89PNG\r\n\x1a\n",
        b"BM" + b"\xff" * 60,
        b"GIF89a" + b"\0" * 20,
        b"II*\0" + b"\xff" * 40,
        b"RIFF\x10\0\0\0WEBPVP8 " + b"\0" * 9,
        b"P6 99999999999 1 255\n",
        png(0, 10),
        png(10, 0),
    ],
)
def test_what_is_no_image_is_broken(data):
    assert rule_of(data)[0] == "broken_image"


@pytest.mark.parametrize("form", ["ICO", "PCX", "TGA", "SGI", "JPEG2000", "EPS", "PDF"])
def test_other_formats_are_not_read_even_if_pillow_could(form):
    try:
        data = encoded_as(picture_of_noise(16, 16), form)
    except (OSError, KeyError) as error:  # this build of Pillow cannot write it
        pytest.skip(str(error))
    assert rule_of(data)[0] == "broken_image"


@pytest.mark.parametrize("sides", [(60_000, 60_000), (2**31 - 1, 1), (MOST_PIXELS + 1, 1), (9460, 9460)])
def test_a_bomb_is_refused_by_its_header(sides):
    """Of some bytes, and at once; also between Pillow's warning and its error. Filters of warnings are left as they were."""
    before = list(warnings.filters)
    start = time.perf_counter()
    rule, why = rule_of(png(*sides))
    assert rule == "huge_image" and "pixels" in why
    assert time.perf_counter() - start < 1.0 and warnings.filters == before


def test_the_limit_itself_is_not_huge():
    assert rule_of(png(100, 100, data=b"\0" * 301 * 100), max_pixels=9_999)[0] == "huge_image"
    assert open_image(png(100, 100, data=b"\0" * 301 * 100), max_pixels=10_000).size == (100, 100)
    assert rule_of(png(9459, 9459))[0] == "broken_image"  # below the limit, decoded, and found to be empty


def test_a_gif_whose_frame_is_larger_than_its_canvas():
    data = bytearray(encoded_as(picture_of_noise(10, 10).quantize(4), "GIF"))
    at = data.index(b",", 13)
    data[at + 5 : at + 9] = struct.pack("<HH", 65535, 65535)
    assert rule_of(bytes(data))[0] in ("huge_image", "broken_image")


def test_scaling_down_keeps_the_pixels_of_a_bicubic_filter_and_no_profile():
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded_as(picture_of_noise(120, 90), "JPEG", icc_profile=profile, quality=95)
    small = scaled_down(data, 56, 28)
    read = Image.open(io.BytesIO(small))
    wanted = open_image(data).resize((56, 28), Image.Resampling.BICUBIC)
    assert read.format == "PNG" and read.info == {}
    np.testing.assert_array_equal(np.asarray(read), np.asarray(wanted))
    assert scaled_down(data, 56, 28) == small


def test_a_turned_image_is_scaled_as_it_is_seen():
    assert Image.open(io.BytesIO(scaled_down(rotated(6), 10, 15))).getexif().get(0x0112) is None
    assert image_size(scaled_down(rotated(6), 10, 15)) == (10, 15)


def test_random_damage_gives_an_image_or_a_rule():
    """Bytes changed at random: never another exception."""
    draw = np.random.default_rng(1)
    seeds = [KINDS[k]() for k in ("jpeg", "png", "webp", "gif", "tiff", "bmp", "ppm", "exif 6")]
    for trial in range(400):
        data = bytearray(seeds[trial % len(seeds)])
        for place in draw.integers(0, len(data), 1 + trial % 7):
            data[place] = int(draw.integers(256))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert open_image(bytes(data)).mode == "RGB"
            except BadImage as error:
                assert error.rule in ("broken_image", "huge_image", "animated_image") and error.why
