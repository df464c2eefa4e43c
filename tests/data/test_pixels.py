"""ldm.data.pixels: every colour mode, orientation and aspect ratio, against values worked out by hand."""

import io

import numpy as np
import pytest
from PIL import Image

from ldm.data.pixels import decode, to_rgb


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def centre(data: bytes) -> tuple[int, ...]:
    return tuple(int(value) for value in decode(data, 8, "crop")[4, 4])


def palette_image() -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 128, 255])
    return image


CASES = {
    "rgb": (encode(Image.new("RGB", (8, 8), (10, 20, 30))), (10, 20, 30)),
    "grey": (encode(Image.new("L", (8, 8), 77)), (77, 77, 77)),
    "one bit": (encode(Image.new("1", (8, 8), 1)), (255, 255, 255)),
    "palette": (encode(palette_image()), (0, 128, 255)),
    "palette, clear entry": (encode(palette_image(), transparency=1), (255, 255, 255)),
    "palette, half clear entry": (encode(palette_image(), transparency=bytes([255, 128])), (127, 191, 255)),
    "palette gif, clear entry": (encode(palette_image(), "GIF", transparency=1), (255, 255, 255)),
    "rgba, clear over black": (encode(Image.new("RGBA", (8, 8), (0, 0, 0, 0))), (255, 255, 255)),
    "rgba, half": (encode(Image.new("RGBA", (8, 8), (255, 0, 0, 51))), (255, 204, 204)),
    "webp rgba": (encode(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "WEBP", lossless=True), (255, 255, 255)),
    "grey with alpha": (encode(Image.new("LA", (8, 8), (0, 102))), (153, 153, 153)),
    "rgb, colour key": (
        encode(Image.new("RGB", (8, 8), (9, 9, 9)), transparency=(9, 9, 9)),
        (255, 255, 255),
    ),
    "16-bit grey": (encode(Image.fromarray(np.full((8, 8), 257 * 100, np.uint16))), (100, 100, 100)),
    "16-bit white": (encode(Image.fromarray(np.full((8, 8), 65535, np.uint16))), (255, 255, 255)),
    "16-bit tiff": (encode(Image.fromarray(np.full((8, 8), 257 * 7, np.uint16)), "TIFF"), (7, 7, 7)),
    "32-bit container": (encode(Image.new("I", (8, 8), 257 * 42), "TIFF"), (42, 42, 42)),
    "cmyk tiff": (encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF"), (0, 255, 255)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_colour_mode_becomes_the_right_rgb(case):
    data, expected = CASES[case]
    assert centre(data) == pytest.approx(expected, abs=1)


def test_cmyk_jpeg_is_not_inverted():
    data = encode(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG", quality=95)
    assert centre(data) == pytest.approx((255, 0, 0), abs=4)


def test_16_bit_grey_keeps_its_shades_instead_of_clipping():
    ramp = np.tile(np.arange(0, 65536, 2048, dtype=np.uint16), (32, 1))
    pixels = decode(encode(Image.fromarray(ramp)), 32, "crop")
    np.testing.assert_array_equal(pixels[0, :, 0], np.round(ramp[0] / 257))


def test_16_bit_grey_colour_key_is_white():
    image = Image.fromarray(np.full((8, 8), 500, np.uint16))
    image.info["transparency"] = 500
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("image", "words"), [(Image.new("F", (8, 8), 0.5), "floating"), (Image.new("I", (8, 8), -1), "16 bits")]
)
def test_pixels_without_a_known_white_are_refused(image, words):
    with pytest.raises(ValueError, match=words):
        decode(image, 8, "crop")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "red_corner"),
    [(1, "top left"), (3, "bottom right"), (6, "top right"), (8, "bottom left"), (2, "top right")],
)
def test_exif_orientation_turns_the_image_upright(orientation, red_corner, kind):
    image = Image.new("RGB", (64, 64), "white")
    image.paste((255, 0, 0), (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(encode(image, kind, exif=exif, quality=95), 8, "crop")
    corners = {"top left": (1, 1), "top right": (1, 6), "bottom left": (6, 1), "bottom right": (6, 6)}
    found = [name for name, corner in corners.items() if pixels[corner][1] < 100]
    assert found == [red_corner]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_one_pixel_checkerboard_shrinks_to_grey(kind):
    board = ((np.indices((512, 512)).sum(0) % 2) * 255).astype(np.uint8)
    pixels = decode(encode(Image.fromarray(board), kind), 32, "crop")
    np.testing.assert_allclose(pixels, 127.5, atol=3)


def test_jpeg_drafting_agrees_with_the_full_decode():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).resize((1024, 1024))
    data = encode(smooth, "JPEG", quality=95)
    full = Image.open(io.BytesIO(data)).convert("RGB").resize((32, 32), Image.Resampling.LANCZOS)
    np.testing.assert_allclose(decode(data, 32, "crop").astype(int), np.asarray(full).astype(int), atol=4)


def test_crop_pad_and_squash():
    image = Image.new("RGB", (96, 32), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 32, 32))
    image.paste((0, 255, 0), (64, 0, 96, 32))
    data = encode(image)
    assert (decode(data, 32, "crop") == (0, 0, 255)).all()
    padded = decode(data, 48, "pad")
    assert (padded[0] == 255).all() and (padded[-1] == 255).all()
    assert tuple(padded[24, 4]) == (255, 0, 0) and tuple(padded[24, 44]) == (0, 255, 0)
    squashed = decode(data, 48, "squash")
    assert [tuple(squashed[24, x]) for x in (4, 24, 44)] == [(255, 0, 0), (0, 0, 255), (0, 255, 0)]


def test_the_right_size_is_left_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(pixels)), 16, "crop"), pixels)
