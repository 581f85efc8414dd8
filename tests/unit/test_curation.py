"""What is told of a set of pictures: who is set aside and why, which is best, and what the measures say. Over a true FaceServer."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from PIL import Image, ImageFilter
from PIL.Image import Resampling

from deployments.catalog import CATALOG_PATH
from deployments.contracts import PictureFaces
from deployments.curation import Curated, blockiness, jpeg_quality, judged, measured, vector
from deployments.errors import InvalidImage
from deployments.face_server import FaceServer, FaceSettings
from deployments.faces.comparison import cosines
from deployments.images import decode
from deployments.picture_metadata import without_metadata
from deployments.store.character_values import PictureFacts

SAMPLES = CATALOG_PATH.parents[1] / "samples"
PEOPLE = sorted({path.stem[:-2] for path in (SAMPLES / "characters").glob("*.png")})


def picture(name: str) -> bytes:
    folder = "characters" if name[-1].isdigit() else "groups"
    return (SAMPLES / folder / f"{name}.png").read_bytes()


def all_of(person: str) -> list[bytes]:
    return [picture(f"{person}-{number}") for number in (1, 2, 3, 4)]


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


BLURRED = saved(opened(picture("ada-1")).filter(ImageFilter.GaussianBlur(3)))
TINY = saved(opened(picture("ada-2")).resize((24, 24), Resampling.LANCZOS))
EMPTY = saved(Image.new("RGB", (192, 192), (120, 140, 160)))


@pytest.fixture(scope="module")
def faces() -> FaceServer:
    return FaceServer(FaceSettings(faces="faces-mini", judge="face-judge-mini", parser="face-parser-mini"))


def reasons(curated: Curated) -> list[str | None]:
    return [verdict.reason for verdict in curated.judgement.verdicts]


def codes(curated: Curated) -> list[str]:
    return [notice.code for notice in curated.judgement.notices]


def test_every_sample_of_one_person_is_kept_and_nobody_else_is_seen(faces: FaceServer) -> None:
    for person in PEOPLE:
        curated = faces.curate(all_of(person))
        assert reasons(curated) == [None] * 4 and not {"two_people", "low_quality", "too_few"} & set(codes(curated)), person
        spread = curated.judgement.spread
        assert spread is not None and 0.8 < spread[1] <= spread[0] <= 1


@pytest.mark.parametrize("place", [0, 2, 4])
def test_one_stranger_is_set_aside_and_named_wherever_they_stand(faces: FaceServer, place: int) -> None:
    pictures = all_of("greta")
    pictures.insert(place, picture("hugo-1"))
    curated = faces.curate(pictures)
    assert [number for number, reason in enumerate(reasons(curated)) if reason == "other_person"] == [place]
    (notice,) = [notice for notice in curated.judgement.notices if notice.code == "two_people"]
    assert notice.groups == (tuple(number for number in range(5) if number != place), (place,))
    assert "2 people" in notice.message and "most of them is kept" in notice.message
    stranger = curated.judgement.verdicts[place]
    assert stranger.rank is None and stranger.cosine is not None and stranger.cosine < 0.4


def test_of_two_people_in_as_many_pictures_nobody_is_sure_and_a_hand_decides(faces: FaceServer) -> None:
    pictures = [picture(name) for name in ("ada-1", "ada-2", "bruno-1", "bruno-2")]
    curated = faces.curate(pictures)
    (notice,) = [notice for notice in curated.judgement.notices if notice.code == "two_people"]
    assert set(notice.groups) == {(0, 1), (2, 3)} and "nobody is in most" in notice.message
    for best, others in ((0, (2, 3)), (3, (0, 1))):
        chosen = faces.curate((), curated.facts, best)
        assert chosen.facts == () and chosen.judgement.best == best
        assert tuple(n for n, reason in enumerate(reasons(chosen)) if reason == "other_person") == others


def test_each_fault_has_its_reason_and_the_best_has_none(faces: FaceServer) -> None:
    pictures = [BLURRED, picture("ada-1"), TINY, EMPTY, picture("ada-bruno"), picture("ada-1"), picture("ada-3"), picture("ada-2")]
    curated = faces.curate(pictures)
    assert reasons(curated) == ["blurred", None, "too_small", "no_face", "several_faces", "duplicate", None, None]
    assert curated.judgement.best in (1, 7)
    ranks = [verdict.rank for verdict in curated.judgement.verdicts]
    assert sorted(rank for rank in ranks if rank is not None) == [0, 1, 2] and ranks[curated.judgement.best or 0] == 0
    group = curated.facts[4]
    assert group.faces == 2 and group.embedding is None and group.judge_embedding is None and group.box is not None
    assert curated.facts[3].box is None and curated.facts[3].quality == 0


def test_a_set_of_which_nothing_is_of_use_has_no_best(faces: FaceServer) -> None:
    judgement = faces.curate([EMPTY, picture("ada-bruno")]).judgement
    assert judgement.best is None and judgement.embedding is None and judgement.centroid is None and judgement.spread is None
    assert judgement.notices == ()
    assert judged((), 16).verdicts == ()


def test_the_best_is_the_sharp_frontal_close_up_that_lost_least(faces: FaceServer) -> None:
    sharp = picture("chiyo-1")
    worse = [
        saved(opened(sharp).filter(ImageFilter.GaussianBlur(0.9))),
        saved(opened(sharp), "JPEG", quality=25),
        saved(opened(saved(opened(sharp), "JPEG", quality=8))),
        saved(opened(sharp).resize((120, 120), Resampling.LANCZOS)),
    ]
    for place in range(len(worse) + 1):
        pictures = [*worse[:place], sharp, *worse[place:]]
        assert faces.curate(pictures).judgement.best == place
    whole, soft, lossy, blocky, small = faces.curate([sharp, *worse]).facts
    assert whole.compression < 0.05 and lossy.compression == pytest.approx(0.75, abs=0.02) and blocky.compression > 0.2
    assert whole.sharpness and soft.sharpness and soft.sharpness < whole.sharpness / 2
    assert whole.size and small.size and small.size < 0.75 * whole.size


def test_the_centroid_the_spread_and_the_order_are_the_judges(faces: FaceServer) -> None:
    curated = faces.curate(all_of("esi"))
    found = [faces.analyze([data], ("judge",))[0].faces[0] for data in all_of("esi")]
    judge = np.stack([face.judge_embedding for face in found if face.judge_embedding is not None])
    mean = judge.mean(0) / np.linalg.norm(judge.mean(0))
    assert np.allclose(vector(curated.judgement.centroid or b""), mean, atol=1e-5)
    assert [verdict.cosine for verdict in curated.judgement.verdicts] == pytest.approx((judge @ mean).tolist(), abs=1e-5)
    assert curated.judgement.spread == pytest.approx((float((judge @ mean).mean()), float((judge @ mean).min())), abs=1e-5)
    order = sorted(range(4), key=lambda place: curated.judgement.verdicts[place].rank or 0)
    gains = {place: curated.facts[place].quality * (1 - float(cosines([found[place]], [found[order[0]]]).max())) for place in order[1:]}
    assert order[1] == max(gains, key=lambda place: gains[place])


def test_what_is_known_is_not_looked_at_again_and_changes_nothing(faces: FaceServer) -> None:
    together = faces.curate(all_of("dario"))
    first = faces.curate(all_of("dario")[:3])
    later = faces.curate(all_of("dario")[3:], first.facts)
    assert len(later.facts) == 1 and later.judgement == together.judgement
    assert "too_few" in codes(faces.curate(all_of("dario")[:2]))


def test_low_quality_and_one_angle_are_told() -> None:
    rng = np.random.default_rng(0)
    axis = rng.normal(size=512)

    def facts(quality: float, yaw: float) -> PictureFacts:
        embedding = (axis + 0.3 * rng.normal(size=512)).astype("<f4")
        unit = (embedding / np.linalg.norm(embedding)).astype("<f4").tobytes()
        return PictureFacts(
            sha256=f"{next(numbers):064x}", format="png", width=9, height=9, faces=1, size=100, sharpness=200, quality=quality, yaw=yaw,
            embedding=embedding.tobytes(), judge_embedding=unit,
        )  # fmt: skip

    numbers = count()
    notices = judged([facts(0.5, 1), facts(0.1, -3), facts(0.5, 4)], 16).notices
    assert [(notice.code, notice.groups) for notice in notices] == [("low_quality", ((1,),)), ("one_angle", ((0, 1, 2),))]
    assert judged([facts(0.5, -30), facts(0.6, 0), facts(0.5, 40)], 16).notices == ()


@pytest.mark.parametrize(("share", "yaw"), [(0.0, -55.0), (0.25, -35.5), (0.5, 0.0), (0.75, 35.5), (1.0, 55.0)])
def test_the_yaw_is_where_the_nose_stands_between_the_eyes(faces: FaceServer, share: float, yaw: float) -> None:
    data = picture("farid-1")
    (found,) = faces.analyze([data], ("embedding", "judge", "aligned"))
    turned = found.faces[0].landmarks.copy()
    turned[2] = turned[0] + share * (turned[1] - turned[0]) + np.array([0, 12])
    turned[:2, 1] = turned[:2, 1].mean()  # upright, or the drop of the nose would count
    turned[2, 0] = turned[0, 0] + share * (turned[1, 0] - turned[0, 0])
    facts = measured(data, decode(data), PictureFaces(found.size, (replace(found.faces[0], landmarks=turned),)))
    assert facts.yaw == pytest.approx(yaw, abs=0.2) and facts.frontality == pytest.approx(1 - abs(2 * share - 1), abs=1e-3)


@pytest.mark.parametrize("quality", [5, 10, 25, 49, 50, 75, 90, 95, 100])
def test_the_quality_of_a_jpeg_is_read_from_its_tables(quality: int) -> None:
    image = Image.open(io.BytesIO(saved(opened(picture("ada-1")), "JPEG", quality=quality)))
    assert abs(jpeg_quality(image.quantization[0]) - quality) <= 1  # type: ignore[attr-defined]


def test_blocks_are_seen_in_a_crop_of_a_saved_jpeg_and_not_in_noise() -> None:
    for name in ("ada-1", "bruno-3", "greta-1", "chiyo-dario-esi"):
        clean = np.asarray(opened(picture(name)))
        harsh = np.asarray(opened(saved(opened(picture(name)), "JPEG", quality=10)))[3:, 5:]
        assert blockiness(clean) < 0.6 < 2 < blockiness(harsh)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert blockiness(noise) < 0.5
    assert blockiness(np.zeros((64, 64, 3), np.uint8)) == blockiness(np.zeros((4, 9, 3), np.uint8)) == 0


def test_a_picture_that_cannot_be_opened_is_named(faces: FaceServer) -> None:
    with pytest.raises(InvalidImage, match="Picture 1") as caught:
        faces.curate([picture("ada-1"), picture("ada-1")[:5000]])
    assert caught.value.details == {"picture": 1}


def _with_metadata(format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "SECRET camera"
    exif.get_ifd(0x8825)[2] = (48.0, 51.0, 29.6)
    exif.get_ifd(0x8825)[1] = "N"
    image = opened(picture("ada-1"))
    options: dict[str, object] = {"exif": exif.tobytes(), "icc_profile": _srgb()}
    if format == "JPEG":
        options |= {"comment": b"SECRET comment", "progressive": True, "xmp": b"<x:xmpmeta>SECRET</x:xmpmeta>"}
    return saved(image, format, **options) + b"SECRET behind the end"


def _srgb() -> bytes:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_metadata_goes_and_the_picture_stays_as_it_is_seen(format: str, orientation: int) -> None:
    data = _with_metadata(format, orientation)
    assert b"SECRET" in data
    kept = without_metadata(data)
    assert b"SECRET" not in kept and len(kept) < len(data)
    assert np.array_equal(decode(kept), decode(data))
    with Image.open(io.BytesIO(kept)) as image:
        assert image.getexif().get_ifd(0x8825) == {} and set(image.getexif()) <= {0x0112}
        assert image.info.get("icc_profile") == _srgb()
    assert without_metadata(kept) == kept


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_damaged_files_are_refused_and_never_crash(format: str) -> None:
    data = _with_metadata(format, 6)
    rng = np.random.default_rng(1)
    for length in range(0, len(data) - 30, 997):
        with pytest.raises(InvalidImage):
            without_metadata(data[:length])
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(0, min(len(data), 4000), 6):
            damaged[place] = rng.integers(256)
        try:
            without_metadata(bytes(damaged))
        except InvalidImage as error:
            assert error.remedy


def test_files_of_millions_of_parts_are_refused_soon() -> None:
    jpeg, png = saved(opened(picture("ada-1")), "JPEG"), picture("ada-1")
    chunk = b"\0\0\0\0teSt\0\0\0\0"
    for data in (
        jpeg[:2] + b"\xff\xfe\0\2" * 2_000_000 + jpeg[2:],
        jpeg[:2] + b"\xff" * 8_000_000 + jpeg[2:],
        png[:33] + chunk * 700_000 + png[33:],
        _with_metadata("WEBP", 1)[:30] + b"teSt\0\0\0\0" * 1_000_000,
    ):
        if data[:4] == b"RIFF":
            data = b"RIFF" + (len(data) - 8).to_bytes(4, "little") + data[8:]
        started = time.perf_counter()
        with pytest.raises(InvalidImage, match="more parts"):
            without_metadata(data)
        assert time.perf_counter() - started < 2
    stuffed = jpeg[:-2] + b"\xff\0" * 4_000_000 + b"\xff\xd9"
    started = time.perf_counter()
    assert len(without_metadata(stuffed)) > 8_000_000 and time.perf_counter() - started < 2
