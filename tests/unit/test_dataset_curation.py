"""A folder as people send them, curated whole by the embedded face models: what is kept, what is not and why, and what lies there then."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from benchmarks.curation import measured
from deployments.contracts import RGB, Face
from deployments.errors import InvalidRequest, LikenessError, MultipleFaces, NoFaceDetected
from deployments.face_server import FaceSettings
from serve.cli_dataset import dataset as command
from tests.planted_folder import PEOPLE, drawn, group, planted, png, saved
from training.dataset.curate import Curation, curate
from training.dataset.dataset import read_dataset
from training.dataset.report import read_report, rewrite_report
from training.dataset.search import FaceFinder
from training.dataset.settings import CurationSettings
from training.dataset.sources import from_bytes
from training.dataset.values import Reason
from training.mini.world.scene import CLOSE_UP, PORTRAIT

_EXPECTED: Mapping[str, set[Reason | None]] = {
    "good": {None},
    "other1": {"not_the_subject"},
    "other2": {"not_the_subject"},
    "strangers": {"not_the_subject"},
    "cheek": {"several_faces"},
    "blurred": {"blurred"},
    "twin": {"near_duplicate"},
    # So far away that the detector may not see it at all.
    "distant": {"too_distant", "no_face"},
    "broken": {"corrupt"},
}


@dataclass(frozen=True)
class Counting(FaceFinder):
    """Remembers the size of each picture that was looked at."""

    looked: list[tuple[int, ...]] = field(default_factory=list)

    def find(self, picture: RGB) -> tuple[Face, ...]:
        self.looked.append(picture.shape)
        return super().find(picture)


@pytest.fixture(scope="module")
def finder() -> FaceFinder:
    return FaceFinder.of(FaceSettings(faces="faces-mini", judge="face-judge-mini", parser="face-parser-mini"))


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    files = planted()
    assert len(files) == 60
    return files | {"broken.jpg": files["twin-0.jpg"][:600]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("curation") / "farid"


@pytest.fixture(scope="module")
def curation(pictures: dict[str, bytes], place: Path, finder: FaceFinder) -> Curation:
    told: list[tuple[str, int, int]] = []
    done = curate(from_bytes(list(pictures.items())), place, finder, progress=lambda *at: told.append(at))
    assert [at for at in told if at[0] == "looking"] == [("looking", n, 61) for n in range(1, 62)]
    accepted = done.report.accepted
    assert [at for at in told if at[0] == "writing"] == [("writing", n, accepted) for n in range(1, accepted + 1)]
    return done


def verdicts(curation: Curation) -> dict[str, Reason | None]:
    return {picture.name: picture.verdict.reason for picture in curation.report.pictures}


def some(pictures: dict[str, bytes], *names: str) -> list[tuple[str, bytes]]:
    return [(name, pictures[name]) for name in names]


def test_precision_and_recall_of_the_planted_folder(curation: Curation) -> None:
    accepted = {name for name, reason in verdicts(curation).items() if reason is None}
    good = {name for name in verdicts(curation) if name.startswith("good")}
    assert len(good) == 20
    assert len(accepted & good) / len(accepted) >= 0.95 and len(accepted & good) / len(good) >= 0.95


def test_every_picture_is_rejected_for_what_is_wrong_with_it(curation: Curation) -> None:
    wrong = {name: reason for name, reason in verdicts(curation).items() if reason not in _EXPECTED[name.split("-")[0].split(".")[0]]}
    assert wrong == {}
    for picture in curation.report.pictures:
        if picture.verdict.reason is not None:
            assert picture.verdict.says and picture.verdict.crop is None and picture.file is None, picture.name
    twins = {picture.name: picture.verdict.duplicate_of for picture in curation.report.pictures if picture.name.startswith("twin")}
    assert twins == {f"twin-{n}.jpg": f"good-{number:02}.png" for n, number in enumerate((0, 3, 4, 7, 11, 14))}


def test_the_judge_tells_the_subject_from_others(curation: Curation) -> None:
    cosines = {picture.name: picture.verdict.cosine for picture in curation.report.pictures}
    assert min(cosine for name, cosine in cosines.items() if name.startswith("good") and cosine is not None) > 0.8
    assert max(cosine for name, cosine in cosines.items() if name.startswith("other") and cosine is not None) < 0.3


def test_no_written_picture_shows_anybody_else(curation: Curation, place: Path, finder: FaceFinder) -> None:
    groups = [picture for picture in curation.dataset.pictures if picture.source in ("good-18.png", "good-19.png")]
    assert len(groups) == 2
    for picture in groups:
        pixels = np.array(Image.open(place / picture.file))
        assert pixels.shape[1] < 256 and 0.5 <= picture.width / picture.height <= 2
        (face,) = finder.find(pixels)
        assert np.abs(face.box - np.array(picture.face)).max() < 6


def test_captions_say_the_framing_and_what_the_classifier_sees(curation: Curation, place: Path) -> None:
    captions = {picture.source: picture.caption for picture in curation.dataset.pictures}
    framings = ("a close-up portrait of ohwx person", "a portrait of ohwx person", "a full body photo of ohwx person")
    right = [captions[f"good-{n:02}.png"].startswith(framings[n % 3]) for n in range(18)]
    assert sum(right) >= 17 and all(" wearing a" in caption for caption in captions.values())
    assert captions["good-02.png"] == "a full body photo of ohwx person wearing a purple hoodie in a park, laughing"
    for picture in curation.dataset.pictures:
        assert (place / picture.file).with_suffix(".txt").read_text() == f"{picture.caption}\n"


def test_the_report_shows_every_picture_and_needs_nothing_else(curation: Curation, place: Path) -> None:
    page = (place / "report.html").read_text()
    assert page.count('<div class="card">') == 61 and page.count('src="data:image/jpeg;base64,') == 61
    assert "<script" not in page and "http" not in page and "20 of 61 pictures accepted" in page
    assert read_report(place) == curation.report
    before = (place / "contact_sheet.png").read_bytes()
    (place / "contact_sheet.png").unlink()
    rewrite_report(place)
    assert (place / "contact_sheet.png").read_bytes() == before


def test_a_second_run_looks_at_nothing_and_changes_nothing(
    curation: Curation, pictures: dict[str, bytes], place: Path, finder: FaceFinder, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(place, copy)
    stamps = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    (copy / curation.dataset.pictures[0].file).write_bytes(b"damaged")
    with pytest.raises(InvalidRequest, match="good-00"):
        read_dataset(copy)
    counting = Counting(finder.analyser, finder.faces, finder.judge, finder.detector_px, finder.smallest_px)
    again = curate(from_bytes(list(pictures.items())), copy, counting)
    assert counting.looked == [] and again.dataset == curation.dataset == read_dataset(copy)
    assert _contents(copy) == _contents(place)
    changed = {path.relative_to(copy).as_posix() for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {curation.dataset.pictures[0].file}
    curate(from_bytes([*pictures.items(), ("new.png", png(drawn(PEOPLE[0], 964_000, PORTRAIT)))]), copy, counting)
    assert counting.looked == [(192, 192, 3)]


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_dataset_is_the_same_elsewhere_with_one_thread_and_other_names(
    pictures: dict[str, bytes], finder: FaceFinder, tmp_path: Path
) -> None:
    files = some(pictures, "good-00.png", "good-03.png", "good-18.png", "twin-0.jpg", "other1-0.png", "blurred-0.png")
    first = curate(from_bytes(files), tmp_path / "first", finder, CurationSettings(workers=3))
    renamed = [(f"{number}.png", data) for number, (_, data) in enumerate(files)]
    other = curate(from_bytes(renamed), tmp_path / "other", finder, CurationSettings(workers=1))
    assert other.dataset.content_sha256 == first.dataset.content_sha256 and len(first.dataset.pictures) == 3


def test_a_reference_chooses_who_is_meant(pictures: dict[str, bytes], finder: FaceFinder, tmp_path: Path) -> None:
    sources = from_bytes([item for item in pictures.items() if item[0].startswith(("other1", "other2", "good-0"))])
    with pytest.raises(MultipleFaces, match="2 faces"):
        curate(sources, tmp_path, finder, reference=pictures["strangers-0.png"])
    with pytest.raises(NoFaceDetected):
        curate(sources, tmp_path, finder, reference=png(Image.new("RGB", (128, 128), "teal")))
    portrait = png(drawn(PEOPLE[1], 960_000, PORTRAIT))
    done = curate(sources, tmp_path, finder, reference=portrait)
    assert {picture.source for picture in done.dataset.pictures} == {f"other1-{n}.png" for n in range(8)}
    assert "few_pictures" in {notice.code for notice in done.report.notices}


def test_without_a_subject_it_is_said_what_to_do(pictures: dict[str, bytes], finder: FaceFinder, tmp_path: Path) -> None:
    blank = png(Image.new("RGB", (192, 192), "teal"))
    with pytest.raises(NoFaceDetected, match="No picture shows a face"):
        curate(from_bytes([("blank.png", blank)]), tmp_path, finder)
    with pytest.raises(InvalidRequest, match="Nobody is recognised in two of the 2 pictures.*--reference"):
        curate(from_bytes(some(pictures, "other1-0.png", "other2-0.png")), tmp_path, finder)
    with pytest.raises(InvalidRequest, match="Two people are in 2 pictures each"):
        curate(from_bytes(some(pictures, "other1-0.png", "other1-1.png", "other2-0.png", "other2-1.png")), tmp_path, finder)


def test_one_picture_is_enough_and_warned_about(pictures: dict[str, bytes], finder: FaceFinder, tmp_path: Path) -> None:
    done = curate(from_bytes(some(pictures, "good-00.png")), tmp_path, finder)
    assert len(done.dataset.pictures) == 1 and done.dataset.pictures[0].cosine is None
    (few,) = [notice for notice in done.report.notices if notice.code == "few_pictures"]
    assert "Only 1 picture is accepted" in few.message


def test_where_nothing_is_accepted_the_report_is_there_and_the_dataset_is_not(
    pictures: dict[str, bytes], finder: FaceFinder, tmp_path: Path
) -> None:
    curate(from_bytes(some(pictures, "good-00.png")), tmp_path, finder)
    couple = from_bytes(some(pictures, "cheek-0.png", "cheek-1.png", "cheek-2.png"))
    with pytest.raises(InvalidRequest, match="Two people are in 3 pictures each"):
        curate(couple, tmp_path, finder)
    with pytest.raises(InvalidRequest, match="None of the 3 pictures can be used: 3 several_faces") as refused:
        curate(couple, tmp_path, finder, reference=pictures["good-01.png"])
    assert refused.value.details == {"several_faces": 3}
    assert read_report(tmp_path).accepted == 0 and not (tmp_path / "dataset.json").exists()


def test_a_photograph_of_other_people_is_rejected(pictures: dict[str, bytes], finder: FaceFinder, tmp_path: Path) -> None:
    """insightface's own sample: a group photograph. Mini's detector knows drawn people only, so what it finds in it is nobody drawn."""
    package = find_spec("insightface")
    assert package is not None and package.submodule_search_locations is not None
    photograph = Path(package.submodule_search_locations[0]) / "data" / "images" / "t1.jpg"
    files = [*some(pictures, "good-00.png", "good-01.png", "good-02.png"), ("t1.jpg", photograph.read_bytes())]
    last = curate(from_bytes(files), tmp_path, finder).report.pictures[-1]
    assert last.verdict.reason == "not_the_subject" and "none of them the subject" in last.verdict.says
    assert last.verdict.cosine is not None and last.verdict.cosine < 0.3


def test_a_turned_file_is_seen_upright(finder: FaceFinder, tmp_path: Path) -> None:
    upright = drawn(PEOPLE[0], 961_000, CLOSE_UP, 256)
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    done = curate(from_bytes([("lying.jpg", saved(lying, "JPEG", quality=95, exif=exif))]), tmp_path, finder)
    pixels = np.array(Image.open(tmp_path / done.dataset.pictures[0].file)).astype(int)
    assert np.abs(pixels - np.array(upright).astype(int)).mean() < 3


def test_a_small_face_in_a_large_picture_is_found_where_it_is(finder: FaceFinder) -> None:
    near = np.array(drawn(PEOPLE[0], 962_000, PORTRAIT))
    large = np.full((1400, 1400, 3), 127, np.uint8)
    large[300:492, 900:1092] = near
    (alone,), (found,) = finder.find(near), finder.find(large)
    assert np.abs(found.landmarks - alone.landmarks - (900, 300)).max() < 4


def test_a_head_that_reaches_in_is_written_as_a_mask(finder: FaceFinder, tmp_path: Path) -> None:
    close = png(group([PEOPLE[2], PEOPLE[0]], 965_000, 256, 0.66))
    portrait = png(drawn(PEOPLE[0], 965_001, PORTRAIT))
    done = curate(from_bytes([("alone.png", portrait), ("close.png", close)]), tmp_path, finder)
    alone, masked = done.dataset.pictures
    assert alone.mask is None and masked.mask is not None and alone.mask_sha256 is None
    weights = np.array(Image.open(tmp_path / masked.mask))
    assert weights.shape == (masked.height, masked.width) and set(np.unique(weights)) == {26, 255}
    x0, y0, x1, y1 = (round(side) for side in masked.face)
    assert (weights[y0:y1, x0:x1] == 255).all() and (weights[:, 0] == 26).any() and 0.02 < (weights == 26).mean() < 0.2
    blurred = curate(
        from_bytes([("alone.png", portrait), ("close.png", close)]), tmp_path, finder, CurationSettings(blur_others=True)
    ).dataset.pictures[1]
    assert blurred.mask is None and blurred.sha256 != masked.sha256 and not (tmp_path / masked.mask).exists()


def test_upscaling_and_blurring_are_done_when_asked_and_warned_about(
    pictures: dict[str, bytes], finder: FaceFinder, tmp_path: Path
) -> None:
    settings = CurationSettings(upscale_px=300, blur_others=True, trigger="zxq", class_word="man", captions="photographs")
    done = curate(from_bytes(some(pictures, "good-00.png", "good-01.png")), tmp_path, finder, settings)
    assert {min(picture.width, picture.height) for picture in done.dataset.pictures} == {300}
    assert {"upscaled", "blurred_others"} <= {notice.code for notice in done.report.notices}
    assert done.dataset.pictures[0].caption == "a close-up photo of zxq man"


def test_the_command_writes_a_dataset_and_tells_why(pictures: dict[str, bytes], tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "more").mkdir(parents=True)
    for name in ("good-00.png", "good-01.png", "good-02.png", "blurred-0.png", "broken.jpg"):
        (folder / name).write_bytes(pictures[name])
    (folder / "more" / "phone.heic").write_bytes(b"not a picture that can be read")
    (folder / "good-05.png").write_bytes(png(group([PEOPLE[0], PEOPLE[2]], 963_000, 256)))
    shown = CliRunner().invoke(command, ["curate", str(folder), "--out", str(out), "--class-word", "man"])
    assert shown.exit_code == 0, shown.output
    assert "4 of 7 pictures accepted" in shown.output and "corrupt" in shown.output and "few_pictures" in shown.output
    again = CliRunner().invoke(command, ["report", str(out), "--json"])
    names = {picture["name"]: picture["verdict"]["reason"] for picture in json.loads(again.stdout)["pictures"]}
    assert names["more/phone.heic"] == names["broken.jpg"] == "corrupt" and names["blurred-0.png"] == "blurred"
    for arguments, said in (
        (["curate", str(folder), "--out", str(folder / "out")], "lies in"),
        (["curate", str(tmp_path / "none"), "--out", str(out)], "is not there"),
        (["curate", str(folder), "--out", str(out), "--trigger", " "], "trigger"),
        (["report", str(tmp_path)], "no report"),
    ):
        refused = CliRunner().invoke(command, arguments)
        assert isinstance(refused.exception, LikenessError) and said in str(refused.exception)


def test_the_benchmark_measures_the_whole_way() -> None:
    figures = measured(8, 192, 1)
    assert figures["pictures"] == 8
    for part in ("looked_at", "curate", "again"):
        timed = figures[part]
        assert isinstance(timed, dict) and timed["pictures_a_minute"] > 0 and timed["cpu_seconds_a_picture"] < 0.6
