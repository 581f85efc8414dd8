"""Pictures in and out: what is refused and why, what is put right, and that a file tells how it was made."""

from __future__ import annotations

import base64
import random
import subprocess
import sys
from io import BytesIO
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from deployments.contact_sheet import contact_sheet
from deployments.contracts import RGB
from deployments.errors import InvalidImage, InvalidRequest
from deployments.images import Format, Limits, decode, encode, from_text, parameters_of

FORMATS = get_args(Format)
RECIPE = {"prompt": "Ada, „im Regen“ 雨", "seed": 2**53 + 1, "identities": [{"method": "pulid", "weight": 0.8}], "negative": None}


def _picture(width: int = 48, height: int = 64) -> RGB:
    """Smooth, so that lossy formats keep it, and different in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=-1).astype(np.uint8)


def _file(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def _error(a: RGB, b: RGB) -> float:
    return float(np.abs(a.astype(int) - b).mean())


@pytest.mark.parametrize("format", FORMATS)
def test_a_picture_comes_back_with_its_parameters(format: Format) -> None:
    rgb = _picture()
    data = encode(rgb, format, RECIPE)
    assert parameters_of(data) == RECIPE
    back = decode(data)
    assert back.dtype == np.uint8 and back.shape == rgb.shape
    assert _error(back, rgb) <= (0 if format == "png" else 2)


@pytest.mark.parametrize("format", FORMATS)
def test_equal_input_gives_equal_bytes_and_other_parameters_do_not(format: Format) -> None:
    data = encode(_picture(), format, RECIPE)
    assert data == encode(_picture(), format, dict(reversed(RECIPE.items())))
    assert data != encode(_picture(), format, {**RECIPE, "seed": 1})
    assert parameters_of(encode(_picture(), format)) is None


def test_quality_decides_the_size() -> None:
    for format in ("jpeg", "webp"):
        assert len(encode(_picture(), format, quality=20)) < len(encode(_picture(), format, quality=95))


def test_parameters_that_a_jpeg_cannot_hold_are_refused_and_a_png_holds_them() -> None:
    long = {"prompt": "a" * 70_000}
    with pytest.raises(InvalidRequest, match="png"):
        encode(_picture(), "jpeg", long)
    assert parameters_of(encode(_picture(), "png", long)) == long


def test_the_recipe_of_another_program_is_none_of_ours() -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "a portrait\nSteps: 20, Sampler: Euler")
    assert parameters_of(_file(Image.fromarray(_picture()), pnginfo=chunks)) is None


def test_only_eight_bit_colour_is_encoded() -> None:
    with pytest.raises(ValueError, match="uint8"):
        encode(np.zeros((4, 4), np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_cameras_turn_is_applied(orientation: int, format: str) -> None:
    upright = Image.fromarray(_picture())
    # How a camera held so would have stored it: the inverse of the turn that EXIF asks for.
    stored = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = upright if stored is None else upright.transpose(Image.Transpose(stored))
    options: dict[str, dict[str, Any]] = {"PNG": {}, "JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    back = decode(_file(turned, format, exif=exif, **options[format]))
    assert back.shape == (64, 48, 3) and _error(back, _picture()) < 2


def test_damaged_exif_turns_nothing() -> None:
    assert decode(_file(Image.fromarray(_picture()), "JPEG", exif=b"Exif\0\0nonsense")).shape == (64, 48, 3)


def test_what_is_transparent_lies_on_white() -> None:
    rgba = np.dstack([np.zeros((8, 8, 3), np.uint8), np.linspace(0, 255, 64).reshape(8, 8).astype(np.uint8)])
    back = decode(_file(Image.fromarray(rgba)))
    assert np.abs(back[..., 0].astype(int) - (255 - rgba[..., 3])).max() <= 1
    palette = Image.new("P", (4, 4))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert (decode(_file(palette, transparency=0)) == 255).all()


def test_grey_of_sixteen_bits_is_scaled_not_clipped() -> None:
    deep = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    back = decode(_file(Image.fromarray(deep)))
    assert np.abs(back[..., 0].astype(int) - deep // 257).max() == 0


def test_cmyk_and_grey_photographs_become_rgb() -> None:
    for mode in ("CMYK", "L", "1", "LA"):
        image = Image.fromarray(_picture()).convert(mode)
        back = decode(_file(image, "JPEG" if mode == "CMYK" else "PNG"))
        assert back.shape == (64, 48, 3)


def test_colours_of_another_profile_become_srgb_and_srgb_stays() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # A profile whose red is sRGB's blue: two signatures of the table of tags exchanged, and the name that gives it away.
    swapped = srgb.replace(b"rXYZ", b"?XYZ", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"?XYZ", b"bXYZ", 1)
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "ours".encode("utf-16-be"))
    red = np.full((8, 8, 3), (200, 20, 20), np.uint8)
    for profile, shown in ((srgb, (200, 20, 20)), (b"no profile", (200, 20, 20)), (swapped, (20, 20, 200))):
        back = decode(_file(Image.fromarray(red), icc_profile=profile))
        assert np.abs(back.astype(int) - shown).max() <= 2


def _animated(format: str) -> bytes:
    frame = Image.fromarray(_picture())
    return _file(frame, format, save_all=True, append_images=[frame.transpose(Image.Transpose.ROTATE_180)])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"certainly no picture", "not a PNG"),
        (_file(Image.fromarray(_picture()), "GIF"), "not a PNG"),
        (_file(Image.fromarray(_picture()), "TIFF"), "not a PNG"),
        (_animated("PNG"), "animation of 2"),
        (_animated("WEBP"), "animation of 2"),
        (_file(Image.new("RGB", (101, 100))), "101 x 100 = 10100 pixels"),
        (_file(Image.new("1", (30_000, 7_000))), "too many pixels"),
        (encode(_picture()) + bytes(40_000), "bytes; 40000 are allowed"),
    ],
    ids=["empty", "text", "gif", "tiff", "apng", "animated webp", "pixels", "bomb", "bytes"],
)
def test_what_is_no_single_small_picture_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidImage, match=reason):
        decode(data, Limits(bytes=40_000, pixels=10_000))


def test_size_is_judged_before_a_pixel_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked: list[Image.Image] = []
    load = PngImagePlugin.PngImageFile.load

    def watched(image: PngImagePlugin.PngImageFile) -> Any:
        unpacked.append(image)
        return load(image)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", watched)
    with pytest.raises(InvalidImage):
        decode(encode(_picture()), Limits(pixels=48 * 64 - 1))
    assert unpacked == []
    decode(encode(_picture()), Limits(pixels=48 * 64))
    assert unpacked


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_a_picture_that_was_cut_short_is_refused(format: Format, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(noise, format)
    with pytest.raises(InvalidImage):
        decode(data[: int(len(data) * share)])


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow tells of EXIF that it skips
@pytest.mark.parametrize("format", FORMATS)
def test_whatever_is_damaged_raises_invalid_image_and_nothing_else(format: Format) -> None:
    sound, chance, refused = encode(_picture(), format, RECIPE), random.Random(7), 0
    for _ in range(400):
        data = bytearray(sound)
        for _ in range(chance.choice((1, 2, 5))):
            data[chance.randrange(min(len(data), chance.choice((60, 300, len(data)))))] = chance.randrange(256)
        for read in (decode, parameters_of):
            try:
                read(bytes(data), Limits(pixels=200_000))
            except InvalidImage:
                refused += 1
    assert refused > 100


def test_a_photograph_with_a_second_picture_behind_it_is_one_photograph() -> None:
    first, second = Image.fromarray(_picture()), Image.new("RGB", (8, 8))
    assert decode(_file(first, "MPO", save_all=True, append_images=[second])).shape == (64, 48, 3)


def test_text_is_unpacked() -> None:
    data = encode(_picture())
    bare = base64.b64encode(data).decode()
    wrapped = base64.encodebytes(data).decode()
    for text in (bare, wrapped, f" {bare}\n", f"data:image/png;base64,{bare}", f"DATA:image/jpeg;name=a.jpg;base64,{wrapped}"):
        assert from_text(text) == data


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("data:image/png;base64,", "empty"),
        ("data:image/gif;base64,R0lGODlhAQABAAAAACw=", "image/gif"),
        ("data:text/html;base64,PGI+", "text/html"),
        ("data:;base64,AAAA", "no media type"),
        ("data:image/png,%89PNG", "not base64"),
        ("data:image/png;base64", "no comma"),
        ("AAAA*AAA", "not valid base64"),
        ("AAAAA", "not valid base64"),
        ("https://example.org/ada.png", "address"),
        ("HTTP://example.org/ada.png", "address"),
        ("ftp://example.org/ada.png", "address"),
        ("A" * 2000, "2000 characters"),
    ],
)
def test_text_that_is_no_picture_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(InvalidImage, match=reason):
        from_text(text, Limits(bytes=1000))


def test_a_file_of_just_the_allowed_size_fits_as_text() -> None:
    data = bytes(range(256)) * 4
    assert from_text(base64.encodebytes(data).decode(), Limits(bytes=len(data))) == data


def test_a_contact_sheet_shows_every_picture_whole() -> None:
    pictures = [np.full((40, 30 + 10 * n, 3), 40 * n, np.uint8) for n in range(5)]
    sheet = contact_sheet(pictures, [f"number {n}" for n in range(5)])
    for picture in pictures:
        assert (sheet == picture[0, 0]).all(-1).sum() >= picture.shape[0] * picture.shape[1]
    plain = contact_sheet(pictures)
    assert plain.shape[0] < sheet.shape[0] and plain.shape[1] == sheet.shape[1]
    assert contact_sheet(pictures, columns=5).shape[1] > plain.shape[1]


def test_a_long_caption_stays_in_its_cell() -> None:
    picture = np.zeros((20, 60, 3), np.uint8)
    sheet = contact_sheet([picture, picture], ["a very long caption that goes on and on", ""], columns=2)
    right = sheet[30:, sheet.shape[1] // 2 + 4 :]
    assert (right == 255).all() and not (sheet[30:] == 255).all()


def test_a_contact_sheet_refuses_what_it_cannot_lay_out() -> None:
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])
    with pytest.raises(ValueError, match="captions"):
        contact_sheet([_picture()], ["a", "b"])


def test_opening_pictures_brings_no_model_library() -> None:
    source = "import deployments.images, deployments.contact_sheet, sys; print(sorted({'torch', 'cv2', 'onnxruntime'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
