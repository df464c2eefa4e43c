"""ldm.data.pixels: every colour mode, orientation and aspect ratio, compared with values computed by hand."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from ldm.data.pixels import decode, read_pixels, to_rgb
from tests.data.encoded import encode


def centre_pixel(data: bytes) -> tuple[int, ...]:
    return tuple(int(value) for value in decode(data, 8, "crop")[4, 4])


def palette_image() -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 128, 255])
    return image


def small_png(depth: int, colour_type: int, row: list[int], *chunks: tuple[bytes, bytes]) -> bytes:
    """Encode a PNG with 8 identical rows of 8 pixels, at a bit depth or with chunks that Pillow does not write."""
    bits = "".join(format(value, f"0{depth}b") for value in row)
    raw = (b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")) * 8
    header = struct.pack(">IIBBBBB", 8, 8, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


CASES = {
    "rgb": (encode(Image.new("RGB", (8, 8), (10, 20, 30))), (10, 20, 30)),
    "grey": (encode(Image.new("L", (8, 8), 77)), (77, 77, 77)),
    "one bit": (encode(Image.new("1", (8, 8), 1)), (255, 255, 255)),
    "palette": (encode(palette_image()), (0, 128, 255)),
    "palette, transparent entry": (encode(palette_image(), transparency=1), (255, 255, 255)),
    "palette, half-transparent entry": (encode(palette_image(), transparency=bytes([255, 128])), (127, 191, 255)),
    "palette gif, transparent entry": (encode(palette_image(), "GIF", transparency=1), (255, 255, 255)),
    "rgba, transparent black": (encode(Image.new("RGBA", (8, 8), (0, 0, 0, 0))), (255, 255, 255)),
    "rgba, translucent red": (encode(Image.new("RGBA", (8, 8), (255, 0, 0, 51))), (255, 204, 204)),
    "webp rgba": (encode(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "WEBP", lossless=True), (255, 255, 255)),
    "grey with alpha": (encode(Image.new("LA", (8, 8), (0, 102))), (153, 153, 153)),
    "rgb, colour key": (
        encode(Image.new("RGB", (8, 8), (9, 9, 9)), transparency=(9, 9, 9)),
        (255, 255, 255),
    ),
    "2-bit grey, colour key": (
        small_png(2, 0, [1] * 8, (b"tRNS", struct.pack(">H", 1))),
        (255, 255, 255),
    ),
    "4-bit grey, colour key": (small_png(4, 0, [3] * 8, (b"tRNS", struct.pack(">H", 3))), (255, 255, 255)),
    "4-bit grey, colour key that matches no pixel": (
        small_png(4, 0, [3] * 8, (b"tRNS", struct.pack(">H", 4))),
        (51, 51, 51),
    ),
    "16-bit rgb, colour key": (
        small_png(16, 2, [0x1234, 0x5678, 0x9ABC] * 8, (b"tRNS", struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC))),
        (255, 255, 255),
    ),
    "16-bit rgb, colour key that matches no pixel": (
        small_png(16, 2, [0x1234, 0x5678, 0x9ABC] * 8, (b"tRNS", struct.pack(">HHH", 0x1234, 0x5678, 0x9ABD))),
        (0x12, 0x56, 0x9A),
    ),
    "16-bit grey": (encode(Image.fromarray(np.full((8, 8), 257 * 100, np.uint16))), (100, 100, 100)),
    "16-bit white": (encode(Image.fromarray(np.full((8, 8), 65535, np.uint16))), (255, 255, 255)),
    "16-bit tiff": (encode(Image.fromarray(np.full((8, 8), 257 * 7, np.uint16)), "TIFF"), (7, 7, 7)),
    "32-bit container": (encode(Image.new("I", (8, 8), 257 * 42), "TIFF"), (42, 42, 42)),
    "cmyk tiff": (encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF"), (0, 255, 255)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_colour_mode_is_converted_to_rgb(case):
    data, expected = CASES[case]
    assert centre_pixel(data) == pytest.approx(expected, abs=1)


def test_cmyk_jpeg_is_not_inverted():
    data = encode(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG", quality=95)
    assert centre_pixel(data) == pytest.approx((255, 0, 0), abs=4)


def test_16_bit_grey_is_scaled_not_clipped():
    ramp = np.tile(np.arange(0, 65536, 2048, dtype=np.uint16), (32, 1))
    pixels = decode(encode(Image.fromarray(ramp)), 32, "crop")
    np.testing.assert_array_equal(pixels[0, :, 0], np.round(ramp[0] / 257))


def test_16_bit_grey_colour_key_becomes_white():
    image = Image.fromarray(np.full((8, 8), 500, np.uint16))
    image.info["transparency"] = 500
    assert to_rgb(image)[0].getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("image", "message"), [(Image.new("F", (8, 8), 0.5), "floating"), (Image.new("I", (8, 8), -1), "16 bits")]
)
def test_pixels_without_defined_white_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
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
    red_corners = [name for name, corner in corners.items() if pixels[corner][1] < 100]
    assert red_corners == [red_corner]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_one_pixel_checkerboard_shrinks_to_grey(kind):
    board = ((np.indices((512, 512)).sum(0) % 2) * 255).astype(np.uint8)
    pixels = decode(encode(Image.fromarray(board), kind), 32, "crop")
    np.testing.assert_allclose(pixels, 127.5, atol=3)


def test_jpeg_draft_mode_agrees_with_full_decode():
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


# Colour profiles

D50 = (0.9642, 1.0, 0.8249)
COLORANTS = {  # XYZ of red, green and blue, adapted to D50
    "Display P3": ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)),
    "Adobe RGB": ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)),
    "sRGB": ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)),
}
TO_SRGB = np.linalg.inv(np.array(COLORANTS["sRGB"]).T)
"""XYZ at D50 -> linear sRGB."""


def fixed_point(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(65536 * value)) for value in values)


def icc(kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Build a version-2 ICC profile. `kind` is its class, colour space and connection space."""
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + b"\0" * 80
    all_tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed_point(*D50), b"desc": text, **tags}
    table, body, offset = struct.pack(">I", len(all_tags)), b"", 132 + 12 * len(all_tags)
    for name, data in all_tags.items():
        data += b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    head = b"none\2\x40\0\0" + kind + b"\0" * 12 + b"acsp" + b"\0" * 28 + fixed_point(*D50) + b"\0" * 48
    return struct.pack(">I", offset + len(body)) + head + table + body


def profile(space: str, gamma: float, colorants=()) -> bytes:
    """Build a profile with a gamma curve per channel and, for RGB, the colorants of a display."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * gamma)) + b"\0\0"
    tags = {b"rXYZ": 0, b"gXYZ": 1, b"bXYZ": 2} if colorants else {}
    xyz = {name: b"XYZ \0\0\0\0" + fixed_point(*colorants[i]) for name, i in tags.items()}
    curves = dict.fromkeys([b"rTRC", b"gTRC", b"bTRC"] if colorants else [b"kTRC"], curve)
    return icc(b"mntr" + space.encode().ljust(4) + b"XYZ ", xyz | curves)


def encode_srgb(linear: np.ndarray) -> np.ndarray:
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def expected_srgb(colour, gamma: float, colorants) -> np.ndarray:
    """Apply a matrix profile without LittleCMS."""
    return encode_srgb(TO_SRGB @ np.array(colorants).T @ (np.array(colour) / 255) ** gamma)


COLOUR = (180, 90, 60)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(("name", "gamma"), [("Display P3", 2.2), ("Adobe RGB", 2.2), ("sRGB", 1.0), ("sRGB", 1.8)])
def test_colour_profile_is_applied(name, gamma, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(Image.new("RGB", (8, 8), COLOUR), kind, icc_profile=profile("RGB", gamma, COLORANTS[name]), **options)
    assert centre_pixel(data) == pytest.approx(expected_srgb(COLOUR, gamma, COLORANTS[name]), abs=1.5)
    assert read_pixels(data, 8, "crop").profile == "converted"


def test_profile_applies_before_transparency_and_to_palettes():
    p3 = profile("RGB", 2.2, COLORANTS["Display P3"])
    opaque = expected_srgb(COLOUR, 2.2, COLORANTS["Display P3"])
    translucent = encode(Image.new("RGBA", (8, 8), (*COLOUR, 51)), icc_profile=p3)
    assert centre_pixel(translucent) == pytest.approx(255 + 0.2 * (opaque - 255), abs=1.5)
    assert centre_pixel(encode(Image.new("RGBA", (8, 8), (*COLOUR, 0)), icc_profile=p3)) == (255, 255, 255)
    assert centre_pixel(encode(Image.new("RGB", (8, 8), COLOUR).quantize(4), icc_profile=p3)) == pytest.approx(
        opaque, abs=1.5
    )
    keyed = encode(Image.new("RGB", (8, 8), COLOUR), transparency=COLOUR, icc_profile=p3)
    assert centre_pixel(keyed) == (255, 255, 255), "the colour key refers to colours before conversion"


@pytest.mark.parametrize("mode", ["L", "LA", "16 bits"])
def test_grey_and_rgb_profiles_apply_to_grey_images(mode):
    grey = encode_srgb(np.array(100 / 255))
    image = {
        "L": Image.new("L", (8, 8), 100),
        "LA": Image.new("LA", (8, 8), (100, 255)),
        "16 bits": Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)),
    }[mode]
    for linear in (profile("GRAY", 1.0), profile("RGB", 1.0, COLORANTS["sRGB"])):
        assert centre_pixel(encode(image, icc_profile=linear)) == pytest.approx((grey,) * 3, abs=1.5)


def test_cmyk_profile_is_applied():
    """The lightness in `cmyk_profile` depends only on K."""
    data = encode(Image.new("CMYK", (16, 16), (0, 0, 0, 128)), "TIFF", icc_profile=cmyk_profile())
    decoded = read_pixels(data, 16, "crop")
    pixels, kind = decoded.pixels, decoded.profile
    assert kind == "converted" and pixels[8, 8] == pytest.approx((119, 119, 119), abs=2), "L* = 50"
    assert centre_pixel(encode(Image.new("CMYK", (16, 16), (0, 0, 0, 128)), "TIFF")) == pytest.approx((127,) * 3, abs=1)


def cmyk_profile() -> bytes:
    """Build an output profile with an 8-bit lookup table: Lab = (100 (1 - k), 0, 0) for every c, m, y."""
    identity = bytes(range(256))
    table = b"".join(bytes([0 if i & 1 else 255, 128, 128]) for i in range(16))
    matrix = fixed_point(*np.eye(3).flatten())
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + identity * 4 + table + identity * 3
    return icc(b"prtrCMYKLab ", {b"A2B0": lut, b"A2B1": lut})


P3 = profile("RGB", 2.2, COLORANTS["Display P3"])


@pytest.mark.parametrize(
    "damaged", [b"no profile" * 20, P3[:300], P3[:16] + b"CMYK" + P3[20:], P3[:16] + b"XYZ " + P3[20:]]
)
def test_unreadable_profile_is_treated_as_srgb(damaged):
    decoded = read_pixels(encode(Image.new("RGB", (8, 8), COLOUR), icc_profile=damaged), 8, "crop")
    pixels, kind = decoded.pixels, decoded.profile
    assert tuple(pixels[4, 4]) == COLOUR and kind == "unreadable"


def test_profile_that_cannot_be_decompressed_is_unreadable():
    """Pillow opens such a file, with None as its profile."""
    data = encode(Image.new("RGB", (8, 8), COLOUR), icc_profile=P3)
    start = data.index(b"iCCP")
    length = struct.unpack(">I", data[start - 4 : start])[0]
    body = b"iCCPname\0\0" + b"not zlib"
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    decoded = read_pixels(data[: start - 4] + chunk + data[start + 8 + length :], 8, "crop")
    pixels, kind = decoded.pixels, decoded.profile
    assert tuple(pixels[4, 4]) == COLOUR and kind == "unreadable"


@pytest.mark.parametrize(
    "options", [{}, {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}]
)
def test_pixels_without_profile_or_with_srgb_profile_are_unchanged(options):
    noise = Image.effect_noise((32, 32), 90).convert("RGB")
    decoded = read_pixels(encode(noise, **options), 32, "crop")
    pixels, kind = decoded.pixels, decoded.profile
    np.testing.assert_array_equal(pixels, np.asarray(noise))
    assert kind == ("sRGB" if options else "none")
