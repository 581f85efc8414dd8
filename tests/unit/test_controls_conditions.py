"""What a union ControlNet is shown: each condition keeps what its name says and takes the rest away."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest

from deployments.catalog import CATALOG_PATH
from deployments.contracts import RGB, Floats
from deployments.controls.canny import canny
from deployments.controls.conditions import CONDITIONS, blur, condition, depth, gray, tile
from deployments.errors import InvalidRequest, MissingWeights
from deployments.images import decode

ADA = decode((CATALOG_PATH.parents[1] / "samples" / "characters" / "ada-1.png").read_bytes())
DRAWN = sorted(CONDITIONS.keys() - {"depth", "soft_edge"})


def _detail(picture: RGB) -> float:
    """Mean difference of neighbours."""
    levels = picture.astype(np.float32)
    return float(np.abs(np.diff(levels, axis=0)).mean() + np.abs(np.diff(levels, axis=1)).mean())


def _square() -> RGB:
    picture = np.full((64, 96, 3), (40, 90, 200), np.uint8)
    picture[16:48, 24:72] = (220, 30, 60)
    return picture


@pytest.mark.parametrize("mode", DRAWN)
@pytest.mark.parametrize("shape", [(192, 192), (65, 101), (101, 64)])
def test_a_condition_has_the_pictures_shape_and_leaves_it_alone(mode: str, shape: tuple[int, int]) -> None:
    picture = np.ascontiguousarray(np.resize(ADA, (*shape, 3)))
    before = picture.copy()
    shown = condition(mode, picture)
    assert shown.shape == picture.shape and shown.dtype == np.uint8 and not np.shares_memory(shown, picture)
    assert np.array_equal(picture, before) and np.array_equal(condition(mode, picture), shown)


def test_canny_draws_the_border_and_nothing_else() -> None:
    edges = canny(_square())
    assert set(np.unique(edges)) == {0, 255} and (edges == edges[..., :1]).all()
    rows, columns = np.nonzero(edges[..., 0])
    beside = np.minimum.reduce([abs(rows - 15.5), abs(rows - 47.5), abs(columns - 23.5), abs(columns - 71.5)])
    assert beside.max() <= 1 and len(rows) >= 2 * (32 + 48) - 8
    assert not canny(np.full((32, 32, 3), 128, np.uint8)).any()
    assert canny(ADA, 20, 60).sum() > canny(ADA).sum() > canny(ADA, 400, 800).sum()


def test_gray_keeps_the_lightness_and_no_colour() -> None:
    shown = gray(_square())
    assert (shown == shown[..., :1]).all()
    assert shown[0, 0, 0] == round(0.299 * 40 + 0.587 * 90 + 0.114 * 200) and shown[32, 48, 0] == round(
        0.299 * 220 + 0.587 * 30 + 0.114 * 60
    )


def test_blur_and_tile_keep_the_colours_and_take_the_detail() -> None:
    for shown in (blur(ADA), tile(ADA)):
        assert _detail(shown) < 0.8 * _detail(ADA)
        assert np.abs(shown.mean((0, 1)) - ADA.mean((0, 1))).max() < 3
    assert _detail(blur(ADA, 0.05)) < _detail(blur(ADA, 0.01))
    assert [_detail(tile(ADA, steps)) for steps in (1, 3, 5)] == sorted((_detail(tile(ADA, steps)) for steps in (1, 3, 5)), reverse=True)
    assert np.array_equal(tile(ADA, 0), ADA)


def test_low_quality_is_the_picture_itself() -> None:
    assert np.array_equal(condition("low_quality", ADA), ADA)


class _Slope:
    """A depth model for which the lower part of every picture is nearer."""

    def nearness(self, picture: RGB) -> Floats:
        return np.repeat(np.linspace(3, 7, picture.shape[0], dtype=np.float32)[:, None], picture.shape[1], axis=1)


def test_depth_is_the_models_word_stretched_to_the_whole_range() -> None:
    shown = depth(ADA, _Slope())
    assert shown[0].max() == 0 and shown[-1].min() == 255 and (np.diff(shown[:, 0, 0].astype(int)) >= 0).all()


@pytest.mark.parametrize(("mode", "missing"), [("depth", "depth model"), ("soft_edge", "AnyLine")])
def test_what_needs_a_model_names_it(mode: str, missing: str) -> None:
    with pytest.raises(MissingWeights, match=missing):
        condition(mode, ADA)


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="'openpose'") as refused:
        condition("openpose", ADA)
    assert "canny" in refused.value.remedy and "pose" in refused.value.remedy
    for low, high in ((200, 100), (-1, 100)):
        with pytest.raises(InvalidRequest, match="thresholds"):
            canny(ADA, low, high)
    for share in (0.0, 0.5):
        with pytest.raises(InvalidRequest, match="blur"):
            blur(ADA, share)
    for picture, steps in ((ADA, 7), (cast(RGB, np.zeros((4, 40, 3), np.uint8)), 3)):
        with pytest.raises(InvalidRequest, match="halved"):
            tile(picture, steps)
