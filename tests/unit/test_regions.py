"""Where a person acts: names, boxes and painted masks on one grid, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from deployments.contracts import Floats, Mask
from deployments.errors import InvalidImage, InvalidRequest
from deployments.images import DEFAULT_LIMITS, encode
from serve.regions import REGIONS, boxed, named, painted, refuse_overlaps

SIZE = (384, 192)


def _picture(grey: Floats) -> bytes:
    """grey: [H, W], 0..1."""
    return encode(np.repeat(np.rint(grey * 255).astype(np.uint8)[..., None], 3, axis=2))


def test_a_name_is_where_a_viewer_sees_it() -> None:
    left, right = named("left", SIZE, "mask").shares, named("right", SIZE, "mask").shares
    assert left.shape == (24, 48), "cells of 8 x 8 pixels"
    assert (left[:, :24] == 1).all() and not left[:, 24:].any()
    assert np.array_equal(left + right, np.ones_like(left))
    top, bottom = named("top", SIZE, "mask").shares, named("bottom", SIZE, "mask").shares
    assert (top[:12] == 1).all() and not top[12:].any() and np.array_equal(top + bottom, np.ones_like(top))
    assert np.argwhere(named("centre", SIZE, "mask").shares).min(0).tolist() == [6, 12]


def test_thirds_share_the_picture_where_cells_do_not_divide_by_three() -> None:
    thirds = [named(f"{where}_third", (1024, 64), "mask").shares for where in ("left", "middle", "right")]
    assert thirds[0].shape == (8, 128)
    assert np.allclose(sum(thirds), 1, atol=1 / 255)
    assert [float(third.mean()) for third in thirds] == pytest.approx([1 / 3] * 3, abs=1e-3)
    refuse_overlaps(
        [(f"mask {number}", number, named(f"{where}_third", (1024, 64), "m")) for number, where in enumerate(("left", "middle"))]
    )


def test_a_box_counts_by_the_share_of_each_cell() -> None:
    shares = boxed((0.25, 0, 0.75, 0.5), (32, 32), "box").shares
    assert np.array_equal(shares, [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert boxed((0.125, 0, 0.5, 1), (32, 32), "box").shares[0] == pytest.approx([0.5, 1, 0, 0], abs=1 / 255)
    assert boxed((0, 0, 1, 1), (384, 192), "box").shares.min() == 1


@pytest.mark.parametrize("box", [(0, 0, 1), (0.5, 0, 0.5, 1), (0, 0.7, 1, 0.2), (-0.1, 0, 1, 1), (0, 0, 1, 2), (float("nan"), 0, 1, 1)])
def test_what_is_no_box_is_refused(box: Sequence[float]) -> None:
    with pytest.raises(InvalidRequest, match=r"`identities\[1\]\.mask`.*no box") as caught:
        boxed(box, SIZE, "identities[1].mask")
    assert caught.value.details["param"] == "identities[1].mask"


def test_a_region_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InvalidRequest, match="'middle'") as caught:
        named("middle", SIZE, "mask")
    assert caught.value.details["choices"] == list(REGIONS) and all(name in caught.value.remedy for name in REGIONS)


@pytest.mark.parametrize("scale", [0.25, 1, 3])
def test_a_painted_mask_may_be_of_any_size_in_the_pictures_shape(scale: float) -> None:
    width, height = (round(side * scale) for side in SIZE)
    grey = np.zeros((height, width), np.float32)
    grey[:, : width // 2] = 1
    assert painted(_picture(grey), SIZE, "mask") == named("left", SIZE, "mask")


def test_grey_is_a_share_and_cells_are_means() -> None:
    ramp = np.tile(np.linspace(0, 1, 384, dtype=np.float32), (192, 1))
    shares = painted(_picture(ramp), SIZE, "mask").shares
    assert np.allclose(shares, ramp.reshape(24, 8, 48, 8).mean((1, 3)), atol=1 / 255)
    uneven = painted(_picture(np.tile(np.linspace(0, 1, 100, dtype=np.float32), (50, 1))), SIZE, "mask").shares
    assert np.allclose(uneven, shares, atol=0.02), "cells that do not divide the mask's pixels share them"


def test_a_large_picture_has_a_small_mask() -> None:
    mask = painted(_picture(np.ones((512, 512), np.float32)), (4096, 4096), "mask")
    assert (mask.width, mask.height) == (256, 256) == (named("top", (4096, 4096), "m").width, named("top", (4096, 4096), "m").height)


FITTING = [(896, 1152), (224, 288), (199, 256), (200, 256)]
MISSHAPEN = [(896, 896), (1152, 896), (198, 256), (202, 256)]


@pytest.mark.parametrize(("size", "fits"), [*((size, True) for size in FITTING), *((size, False) for size in MISSHAPEN)])
def test_a_mask_has_the_pictures_shape_within_a_pixel(size: tuple[int, int], fits: bool) -> None:
    data = _picture(np.ones(size[::-1], np.float32))
    if fits:
        assert painted(data, (896, 1152), "mask").shares.min() == 1
        return
    with pytest.raises(InvalidRequest, match=rf"`mask` is {size[0]} x {size[1]} pixels, the picture is 896 x 1152") as caught:
        painted(data, (896, 1152), "mask")
    assert caught.value.details["mask"] == list(size) and caught.value.details["picture"] == [896, 1152]


def test_an_empty_mask_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"`mask` is empty"):
        painted(_picture(np.zeros((192, 384), np.float32)), SIZE, "mask")
    with pytest.raises(InvalidRequest, match=r"`mask` is empty"):
        boxed((0.5, 0.5, 0.5001, 0.5001), SIZE, "mask")
    assert painted(_picture(np.full((192, 384), 0.01, np.float32)), SIZE, "mask").shares.max() > 0


def test_what_is_no_picture_or_too_large_a_one_is_refused_by_its_field() -> None:
    with pytest.raises(InvalidImage, match=r"`identity\.mask`: .*not a PNG") as caught:
        painted(b"mask", SIZE, "identity.mask")
    assert caught.value.details["param"] == "identity.mask"
    with pytest.raises(InvalidImage, match="pixels"):
        painted(_picture(np.ones((192, 384), np.float32)), SIZE, "mask", replace(DEFAULT_LIMITS, pixels=1000))


def _strip(low: float, high: float) -> Mask:
    return boxed((low, 0, high, 1), (800, 80), "strip")


def test_people_may_touch_and_not_overlap() -> None:
    refuse_overlaps([("a", "ada", _strip(0, 0.5)), ("b", "bruno", _strip(0.5, 1)), ("c", "chiyo", _strip(0.496, 0.504))])
    with pytest.raises(InvalidRequest, match=r"`a` and `c` overlap on 10\.0% of the picture") as caught:
        refuse_overlaps([("a", "ada", _strip(0, 0.5)), ("b", "bruno", _strip(0.5, 1)), ("c", "chiyo", _strip(0.4, 0.5))])
    assert caught.value.details == {"param": "c", "other": "a", "overlap": 0.1}


def test_one_person_by_two_methods_may_stand_in_one_place() -> None:
    places = _strip(0, 0.5), _strip(0.2, 0.6)
    refuse_overlaps([("a", "ada", places[0]), ("b", "ada", places[1])])
    with pytest.raises(InvalidRequest, match="overlap on 30"):
        refuse_overlaps([("a", "ada", places[0]), ("b", "bruno", places[1])])


def test_thin_grey_is_no_overlap() -> None:
    thin, thick = (painted(_picture(np.full((80, 800), grey, np.float32)), (800, 80), "mask") for grey in (0.4, 0.6))
    refuse_overlaps([("a", "ada", thin), ("b", "bruno", thin)])
    with pytest.raises(InvalidRequest, match="overlap on 100"):
        refuse_overlaps([("a", "ada", thick), ("b", "bruno", thick)])


def test_masks_of_two_drawings_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different sizes"):
        refuse_overlaps([("a", "ada", _strip(0, 1)), ("b", "bruno", named("left", SIZE, "b"))])
