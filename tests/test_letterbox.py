"""Canvases: their size, the way back for boxes, and pixels of awkward images as a viewer shows them."""

from __future__ import annotations

import random
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from surgvqa.letterbox import (
    MAX_PIXELS,
    Canvas,
    Rectangle,
    draw,
    find_picture,
    header,
    open_rgb,
    plan_canvas,
    snap,
)

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
AWKWARD = SHARED / "awkward"


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def letterbox(size: tuple[int, int], side: int = 768, factor: int = 28) -> Canvas:
    return plan_canvas(size, mode="letterbox", size=side, max_tokens=None, factor=factor)


def native(size: tuple[int, int], max_tokens: int, factor: int = 28) -> Canvas:
    return plan_canvas(size, mode="native", size=None, max_tokens=max_tokens, factor=factor)


def sizes(count: int = 300) -> list[tuple[int, int]]:
    """Sources of all shapes, the extremes among them."""
    rng = random.Random(3)
    drawn = [(round(2 ** rng.uniform(0, 12)), round(2 ** rng.uniform(0, 12))) for _ in range(count)]
    return [(1, 1), (1, 10_000), (10_000, 1), (720, 576), (1920, 1072), (28, 28), (200, 1), *drawn]


# ---- planning -----------------------------------------------------------------------------------------


def test_snap() -> None:
    assert [snap(768, 28), snap(768, 32), snap(756, 28), snap(783, 28), snap(28, 32)] == [
        756,
        768,
        756,
        756,
        32,
    ]


@pytest.mark.parametrize(("factor", "side", "tokens", "patch"), [(28, 756, 729, 14), (32, 768, 576, 16)])
def test_letterbox_at_768(factor: int, side: int, tokens: int, patch: int) -> None:
    canvas = letterbox((1280, 1024), factor=factor)
    assert (canvas.width, canvas.height, canvas.tokens(factor)) == (side, side, tokens)
    assert canvas.grid(patch) == (side // patch, side // patch)
    assert canvas.drawn_size == (side, round(side * 0.8))
    assert (canvas.offset_x, canvas.offset_y) == (0, (side - round(side * 0.8)) // 2)


@pytest.mark.parametrize("size", sizes(60))
def test_letterbox_fits_and_keeps_the_aspect(size: tuple[int, int]) -> None:
    canvas = letterbox(size, 256, 32)
    width, height = canvas.drawn_size
    assert (canvas.width, canvas.height) == (256, 256)
    assert max(width, height) == 256
    assert min(width, height) >= 1
    assert abs(width - 256 * size[0] / max(size)) <= 1
    assert abs(height - 256 * size[1] / max(size)) <= 1
    assert 0 <= 256 - width - 2 * canvas.offset_x <= 1
    assert 0 <= 256 - height - 2 * canvas.offset_y <= 1


@pytest.mark.parametrize("factor", [28, 32])
def test_native_is_smart_resize_within_its_bounds(factor: int) -> None:
    pytest.importorskip("transformers")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    compared = 0
    for width, height in sizes(2000):
        for max_tokens in (16, 256, 2900):
            if max(width, height) > 200 * min(width, height):
                continue
            canvas = native((width, height), max_tokens, factor)
            expected = smart_resize(height, width, factor, min_pixels=1, max_pixels=max_tokens * factor**2)
            rounded = round(height / factor) * factor, round(width / factor) * factor
            if min(expected) > factor and expected[0] <= rounded[0] and expected[1] <= rounded[1]:
                assert (canvas.height, canvas.width) == expected
                compared += 1
    assert compared > 1000


@pytest.mark.parametrize("factor", [28, 32])
def test_native_never_exceeds_its_tokens_nor_scales_up(factor: int) -> None:
    for width, height in sizes(2000):
        for max_tokens in (1, 2, 7, 100):
            if max(width, height) > 200 * min(width, height):
                continue
            canvas = native((width, height), max_tokens, factor)
            assert canvas.width % factor == canvas.height % factor == 0
            assert 1 <= canvas.tokens(factor) <= max_tokens
            assert canvas.width <= max(factor, width + factor / 2)
            assert canvas.height <= max(factor, height + factor / 2)
            assert canvas.drawn_size == (canvas.width, canvas.height)


def test_native_refuses_what_qwen_refuses() -> None:
    assert native((200, 1), 100).grid(14) == (2, 14)
    with pytest.raises(ValueError, match="10000×1 is too long"):
        native((10_000, 1), 100)


def test_boxes_return_to_where_they_were() -> None:
    rng = random.Random(5)
    for size in sizes(200):
        canvases = [letterbox(size)]
        if max(size) <= 200 * min(size):
            canvases.append(native(size, 500))
        x1, x2 = sorted(rng.uniform(0, size[0]) for _ in range(2))
        y1, y2 = sorted(rng.uniform(0, size[1]) for _ in range(2))
        for canvas in canvases:
            on_canvas = canvas.to_canvas((x1, y1, x2, y2))
            assert canvas.to_source(on_canvas) == pytest.approx((x1, y1, x2, y2), abs=1e-6)
            assert canvas.to_canvas((0, 0, *size)) == pytest.approx(
                (
                    canvas.offset_x,
                    canvas.offset_y,
                    canvas.offset_x + canvas.drawn_size[0],
                    canvas.offset_y + canvas.drawn_size[1],
                )
            )


def test_boxes_rounded_to_canvas_pixels_return_within_half_a_source_pixel() -> None:
    canvas = letterbox((640, 480))
    box = (101.0, 50.0, 300.0, 222.0)
    rounded = tuple(float(round(edge)) for edge in canvas.to_canvas(box))
    assert canvas.to_source(rounded) == pytest.approx(box, abs=0.5)  # type: ignore[arg-type]


def test_a_box_lands_on_what_it_surrounds() -> None:
    source = Image.new("RGB", (300, 200), "black")
    source.paste("white", (60, 40, 180, 130))
    canvas = letterbox(source.size, 256, 32)
    pixels = np.asarray(draw(source, canvas, "black"))[:, :, 0] > 127
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert canvas.to_canvas((60, 40, 180, 130)) == pytest.approx(found, abs=1)
    assert canvas.to_source(found) == pytest.approx((60, 40, 180, 130), abs=1)


# ---- the black border ---------------------------------------------------------------------------------


def scope(size: tuple[int, int], field: Rectangle, *, round_: bool = True, black: int = 0) -> Image.Image:
    """A picture with a dark lumen in the round (or square) field of an endoscope, as JPEG gives it."""
    image = Image.new("RGB", size, (black, black, black))
    pen = ImageDraw.Draw(image)
    inside = field[0], field[1], field[2] - 1, field[3] - 1
    (pen.ellipse if round_ else pen.rectangle)(inside, fill=(150, 80, 60))
    middle = (field[0] + field[2]) // 2, (field[1] + field[3]) // 2
    third = (field[2] - field[0]) // 3
    pen.ellipse((middle[0] - third, middle[1] - third, middle[0] + third, middle[1] + third), fill=(8, 5, 4))
    return Image.open(BytesIO(encode(image, "JPEG", quality=70))).convert("RGB")


def assert_close(found: Rectangle, expected: Rectangle, size: tuple[int, int]) -> None:
    for edge, (one, other) in enumerate(zip(found, expected, strict=True)):
        # JPEG's colours reach some pixels over an edge, which is much of a small image.
        assert abs(one - other) <= max(5, 0.015 * size[edge % 2]), (found, expected)


@pytest.mark.parametrize("round_", [True, False], ids=["round", "square"])
@pytest.mark.parametrize("black", [0, 16])
@pytest.mark.parametrize(
    ("size", "field"),
    [
        ((1920, 1080), (460, 70, 1470, 1080)),
        ((640, 480), (90, 0, 570, 480)),
        ((300, 200), (40, 30, 180, 170)),
        ((96, 64), (10, 2, 70, 62)),
    ],
)
def test_the_border_is_found(size: tuple[int, int], field: Rectangle, round_: bool, black: int) -> None:
    assert_close(find_picture(scope(size, field, round_=round_, black=black)), field, size)


def test_noise_text_and_a_box_beside_the_picture_do_not_move_the_border() -> None:
    size, field = (720, 576), (200, 20, 700, 520)
    image = scope(size, field)
    pen = ImageDraw.Draw(image)
    for line in range(6):
        pen.text((10, 30 + 40 * line), "Sex: F  12/03/2016", fill="white")
    pen.rectangle((10, 420, 150, 560), fill=(20, 160, 120))
    noisy = np.asarray(image).astype(int)
    rng = np.random.default_rng(0)
    noisy += rng.normal(0, 4, noisy.shape).astype(int)
    noisy[rng.random(size[::-1]) < 0.003] = 255  # hot pixels
    found = find_picture(Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)))
    assert_close(found, field, size)


def test_what_touches_the_picture_stays() -> None:
    image = scope((720, 576), (200, 20, 700, 520))
    ImageDraw.Draw(image).rectangle((60, 300, 380, 560), fill=(20, 160, 120))
    assert_close(find_picture(image), (60, 20, 700, 561), image.size)


def test_no_crop_where_there_is_no_telling() -> None:
    pictures = {
        "dark": Image.new("RGB", (320, 240), (9, 9, 9)),
        "bright": Image.new("RGB", (320, 240), (90, 40, 40)),
        "one bright spot": scope((640, 480), (300, 200, 340, 240)),
        "two halves": Image.new("RGB", (640, 480)),
        "one pixel": Image.new("RGB", (1, 1)),
        "a line": Image.new("RGB", (10_000, 1), "white"),
    }
    pictures["two halves"].paste((150, 80, 60), (20, 20, 300, 460))
    pictures["two halves"].paste((150, 80, 60), (340, 20, 620, 460))
    for name, image in pictures.items():
        assert find_picture(image) == (0, 0, *image.size), name


def test_a_cropped_canvas_is_that_of_the_picture_alone() -> None:
    rng = random.Random(7)
    image = Image.effect_noise((301, 207), 90).convert("RGB")
    for mode, size, most in (("letterbox", 224, None), ("native", None, 40)):
        for _ in range(20):
            x1, y1 = rng.randrange(150), rng.randrange(100)
            picture = x1, y1, rng.randrange(x1 + 20, 302), rng.randrange(y1 + 20, 208)
            options = {"mode": mode, "size": size, "max_tokens": most, "factor": 28}
            canvas = plan_canvas(image.size, picture=picture, **options)  # type: ignore[arg-type]
            alone = image.crop(picture)
            plain = plan_canvas(alone.size, **options)  # type: ignore[arg-type]
            assert canvas.tokens(28) == plain.tokens(28)
            assert np.array_equal(draw(image, canvas, "#305070"), draw(alone, plain, "#305070"))
            box = (x1 + 2.5, y1 + 3.0, picture[2] - 4.0, picture[3] - 1.5)
            moved = canvas.to_canvas(box)
            assert moved == pytest.approx(
                plain.to_canvas((box[0] - x1, box[1] - y1, box[2] - x1, box[3] - y1))
            )
            assert canvas.to_source(moved) == pytest.approx(box)
            if mode == "native":  # what the crop took of a box is gone, the rest comes back
                whole = canvas.to_source(canvas.to_canvas((0, 0, *image.size)))
                assert whole == pytest.approx(picture)
                left, _, right, _ = canvas.to_canvas((0, 0, x1 / 2, y1 / 2))
                assert left == right == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("images/sinus_endoscopy/00004584.jpg", (460, 70, 1528, 1045)),  # wide surround
        ("images/simula/kvasir-instrument.jpg", (48, 24, 676, 558)),
        ("images/simula/hyperkvasir.jpg", (0, 0, 1220, 1011)),  # black corners alone
        ("images/simula/polyp.jpg", (0, 0, 474, 400)),  # text and a green box in the picture
        ("images/kvasir_seg/images/cju14pxbaoksp0835qzorx6g6.jpg", (0, 0, 622, 530)),  # text, a black box
        ("cholect50-challenge-val/videos/VID70/000030.png", (94, 0, 528, 344)),
        ("cholect50-challenge-val/videos/VID74/000580.png", (36, 0, 620, 396)),  # black is 12
        ("surgvu25/data/testdata/SURGVU25/case122/frame_000009.jpg", (190, 5, 1090, 720)),
    ],
)
def test_the_border_of_a_real_image(name: str, expected: Rectangle) -> None:
    file = SHARED / name
    if not file.exists():
        pytest.skip(f"{name} is not here; the tests above cover generated images of its kind")
    image = open_rgb(file.read_bytes())
    assert_close(find_picture(image), expected, image.size)


# ---- drawing ------------------------------------------------------------------------------------------


def test_draw_centres_on_the_fill() -> None:
    drawn = np.asarray(draw(Image.new("RGB", (200, 100), "#00ff00"), letterbox((200, 100), 56), "#102030"))
    assert drawn.shape == (56, 56, 3)
    assert (drawn[:14] == (16, 32, 48)).all()
    assert (drawn[14:42] == (0, 255, 0)).all()
    assert (drawn[42:] == (16, 32, 48)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (29, 27)])
def test_draw_of_any_shape_has_the_canvas_size(size: tuple[int, int]) -> None:
    drawn = draw(Image.new("RGB", size, "white"), letterbox(size, 56), "black")
    assert drawn.size == (56, 56)
    assert drawn.getextrema()[0][1] == 255


def test_draw_averages_when_it_scales_down() -> None:
    """Without antialiasing a fine pattern would turn into bands of black and white."""
    stripes = np.zeros((1120, 1120, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels = np.asarray(draw(Image.fromarray(stripes), letterbox((1120, 1120), 56), "black")).astype(int)
    assert abs(pixels - 127).max() <= 2


def test_draw_refuses_another_image_than_was_planned() -> None:
    with pytest.raises(ValueError, match="planned for 20×10 pixels, but the image has 10×20"):
        draw(Image.new("RGB", (10, 20)), letterbox((20, 10), 56), "black")


@pytest.mark.parametrize(("patch", "mean"), [(14, None), (16, [0.5, 0.5, 0.5])], ids=["qwen2-vl", "qwen3-vl"])
@pytest.mark.parametrize("mode", ["letterbox", "native"])
def test_patches_are_those_of_the_processor(patch: int, mean: list[float] | None, mode: str) -> None:
    """The processor with resizing on leaves the drawn canvas as it is."""
    pytest.importorskip("transformers")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    options = {"image_mean": mean, "image_std": mean} if mean else {}
    processor = Qwen2VLImageProcessorPil(patch_size=patch, min_pixels=1, max_pixels=10**7, **options)
    noise = np.random.default_rng(0).integers(0, 256, (333, 501, 3), np.uint8)
    canvas = plan_canvas(
        (501, 333),
        mode=mode,
        size=300 if mode == "letterbox" else None,
        max_tokens=90 if mode == "native" else None,
        factor=2 * patch,
    )
    drawn = draw(Image.fromarray(noise), canvas, "black")
    plain = processor(drawn, do_resize=False, return_tensors="np")
    resized = processor(drawn, return_tensors="np")
    assert plain["image_grid_thw"].tolist() == [[1, *canvas.grid(patch)]]
    assert len(plain["pixel_values"]) == 4 * canvas.tokens(2 * patch)
    np.testing.assert_array_equal(plain["image_grid_thw"], resized["image_grid_thw"])
    np.testing.assert_array_equal(plain["pixel_values"], resized["pixel_values"])


# ---- awkward images, generated ------------------------------------------------------------------------


def pixels(data: bytes) -> np.ndarray:
    image = open_rgb(data)
    assert image.mode == "RGB"
    assert header(data).size == image.size
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_gradient(format: str) -> None:
    gradient = np.linspace(0, 65535, 256).astype(np.uint16)
    shown = pixels(encode(Image.fromarray(np.tile(gradient, (4, 1))), format))
    assert (shown[0, :, 0] == np.arange(256)).all()
    assert (shown == shown[:1, :, :1]).all()


def test_32_bit_values_are_refused_when_nothing_says_how_to_show_them() -> None:
    with pytest.raises(ValueError, match="floating point"):
        open_rgb(encode(Image.new("F", (2, 2), 0.5), "TIFF"))
    with pytest.raises(ValueError, match="do not fit 16 bits"):
        open_rgb(encode(Image.new("I", (2, 2), 70_000), "TIFF"))


def test_grey_and_black_and_white() -> None:
    assert (pixels(encode(Image.new("L", (3, 2), 90), "PNG")) == 90).all()
    assert (pixels(encode(Image.new("1", (3, 2), 1), "PNG")) == 255).all()
    assert (pixels(encode(Image.new("LA", (3, 2), (200, 128)), "PNG")) == 100).all()


def test_cmyk_jpeg() -> None:
    for colour, expected in {(0, 0, 0, 0): 255, (0, 0, 0, 255): 0}.items():
        assert (
            abs(pixels(encode(Image.new("CMYK", (16, 16), colour), "JPEG", quality=95)) - expected).max() <= 3
        )
    red = pixels(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert abs(red - (255, 0, 0)).max() <= 8


def test_transparent_pixels_become_black() -> None:
    colours = Image.new("RGBA", (2, 1), (200, 100, 50, 255))
    colours.putpixel((1, 0), (200, 100, 50, 0))
    assert pixels(encode(colours, "PNG")).tolist() == [[[200, 100, 50], [0, 0, 0]]]
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([255, 255, 255, 10, 20, 30])
    palette.putpixel((1, 0), 0)
    assert pixels(encode(palette, "PNG")).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert pixels(encode(palette, "PNG", transparency=0)).tolist() == [[[10, 20, 30], [0, 0, 0]]]
    keyed = Image.new("RGB", (1, 1), (9, 9, 9))
    assert pixels(encode(keyed, "PNG", transparency=(9, 9, 9))).tolist() == [[[0, 0, 0]]]


CORNERS = np.array(
    [[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[90, 90, 90], [250, 250, 0], [0, 250, 250]]], np.uint8
)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation(orientation: int, format: str) -> None:
    """Stored so that turning as EXIF says gives CORNERS back, in all eight ways."""
    stored = {
        1: CORNERS,
        2: CORNERS[:, ::-1],
        3: CORNERS[::-1, ::-1],
        4: CORNERS[::-1],
        5: CORNERS.transpose(1, 0, 2),
        6: np.rot90(CORNERS, 1),
        7: np.rot90(CORNERS, 2).transpose(1, 0, 2),
        8: np.rot90(CORNERS, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, **options)
    np.testing.assert_array_equal(pixels(data), CORNERS)


@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_orientation_of_a_jpeg(orientation: int) -> None:
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (0, 0, 32, 32))  # white on the left
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = pixels(encode(image, "JPEG", exif=exif))
    if orientation == 3:
        assert shown.shape[:2] == (32, 64)
        assert shown[16, 8, 0] < 50 < 200 < shown[16, 56, 0]  # now on the right
    else:
        assert shown.shape[:2] == (64, 32)
        assert shown[56, 16, 0] < 50 < 200 < shown[8, 16, 0]  # now at the top


def test_a_broken_exif_block_does_not_make_the_image_bad() -> None:
    assert pixels(encode(Image.new("RGB", (8, 4)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).shape == (
        4,
        8,
        3,
    )


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    assert (pixels(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (255, 0, 0)).all()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int) -> bytes:
    """A black-and-white PNG that is small whatever its size."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(20_000, 10_000), (10_000, 9_500), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_before_they_are_decoded(width: int, height: int) -> None:
    for function in (open_rgb, header):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with pytest.raises(ValueError, match=f"more than .*{MAX_PIXELS // 10**6} million"):
                function(png(width, height))


def test_bytes_that_are_no_image() -> None:
    jpeg = encode(Image.effect_noise((64, 64), 80), "JPEG")
    whole = encode(Image.effect_noise((64, 64), 80), "PNG")
    corrupt = bytearray(whole)
    corrupt[len(corrupt) // 2] ^= 0xFF
    for data, what in {
        b"": r"is empty \(0 bytes\)",
        b"just text, named .jpg": "is not an image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "is not an image",  # not ghostscript
        jpeg[: len(jpeg) // 2]: "cannot be decoded",
        jpeg[:-100]: "cannot be decoded",
        whole[: len(whole) // 2]: "cannot be decoded",
        bytes(corrupt): "cannot be decoded",
        jpeg[:20]: "is not an image|broken header",
    }.items():
        with pytest.raises(ValueError, match=what):
            open_rgb(data)


def test_size_is_read_from_the_header_alone() -> None:
    jpeg = encode(Image.effect_noise((640, 480), 80), "JPEG")
    assert header(jpeg[: len(jpeg) // 4]).size == (640, 480)


def test_the_name_does_not_matter(tmp_path: Path) -> None:
    file = tmp_path / "really_webp.png"
    file.write_bytes(encode(Image.new("RGB", (8, 8), (0, 128, 0)), "WEBP", lossless=True))
    assert (pixels(file.read_bytes()) == (0, 128, 0)).all()


# ---- awkward images, real -----------------------------------------------------------------------------


def real(name: str) -> bytes:
    file = AWKWARD / name
    if not file.exists():
        pytest.skip(f"{name} is not here; the tests above cover generated images of its kind")
    return file.read_bytes()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("ROCOv2_2023_train_031574.jpg", (706, 2479)),
        ("ROCOv2_2023_valid_002073.jpg", (650, 168)),
        ("ROCOv2_2023_train_018808.jpg", (3799, 5842)),
        ("00000001_000.png", (512, 512)),
        ("00000347_000.png", (1024, 1024)),
        ("scopesense.png", (1024, 1024)),
        ("GAN3-1.png", (1485, 1233)),
        ("pil_sample_cmyk.jpg", (100, 100)),
        ("Landscape_6.jpg", (1800, 1200)),
        ("Portrait_3.jpg", (1200, 1800)),
        ("01785OutRGB.bmp", (256, 256)),
    ],
)
def test_real_awkward_image(name: str, size: tuple[int, int]) -> None:
    image = open_rgb(real(name))
    assert image.size == header(real(name)).size == size
    assert np.asarray(image).std() > 5  # not blank, not clipped to one value
    assert draw(image, letterbox(size, 256, 32), "black").size == (256, 256)


def test_real_truncated_jpeg() -> None:
    with pytest.raises(ValueError, match="truncated"):
        open_rgb(real("truncated_jpeg.jpg"))


def test_real_orientations_show_the_same_scene_upright() -> None:
    """The sky of these landscapes is above and bright, the ground below and darker."""
    for name in ("Landscape_6.jpg", "Portrait_3.jpg"):
        shown = np.asarray(open_rgb(real(name))).astype(float)[:, :, 2]
        third = len(shown) // 3
        assert shown[:third].mean() > shown[-third:].mean()
