"""What callers are told of errors: no folder of the server, and everything else as it was."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path

import pytest

from deployments.errors import InvalidRequest, LikenessError, MissingWeights, StoreUnavailable
from deployments.store.character_values import Judgement, NewPicture, PictureFacts, Verdict
from deployments.store.characters import CharacterStore
from deployments.store.job_values import NewJob
from tests.job_serving import opened
from training.evaluation.executor import EvaluationExecutor
from training.evaluation.plan import load_plan
from training.orders import EvaluationOrder
from training.pathless import for_callers, pathless, pathless_error
from training.tasks import MINI_FACES

_FILE = "file:" + "//"  # whole, it would itself be taken for a place of one machine


def test_callers_are_told_no_folder_of_the_server(tmp_path: Path) -> None:
    root = tmp_path / "my store" / "trainings"
    error = InvalidRequest(f"{root}/job_1/dataset/a.png is torn.", "See '/srv/models/b.safetensors'.", {"file": f"{root}/x", "n": 3})
    told = pathless_error(error, [root])
    assert type(told) is InvalidRequest and (told.message, told.remedy) == ("…/job_1/dataset/a.png is torn.", "See '…/b.safetensors'.")
    assert told.details == {"file": "…/x", "n": 3}
    assert pathless_error(told, [root]) is told


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (f"{_FILE}/srv/likeness/models/x.bin is torn", "…/x.bin is torn"),
        ("sqlite:////srv/likeness/likeness.db is locked", "…/likeness.db is locked"),
        ("sqlite+pysqlite:////srv/likeness/likeness.db", "…/likeness.db"),
        (f"{_FILE}/srv/my files/one", "…/one"),
        ("OSError:/srv//secret/models/x.bin, /a/b", "OSError:…/x.bin, …/b"),
        (r"it said 'first\n/srv/secret/x.bin'", r"it said 'first\n…/x.bin'"),
        ("at /srv/my files, /srv/my files/one and /srv/my files.", "at …, …/one and …."),
        ("/srv/my-other/one", "…/one"),
        ("https://example.org/a.png was written to /srv/models/a.png", "https://example.org/a.png was written to …/a.png"),
    ],
)
def test_paths_of_every_spelling_are_cut(said: str, told: str) -> None:
    assert pathless(said, [Path("/srv/my files"), Path("/srv/my")]) == told


@pytest.mark.parametrize(
    "plain",
    [
        "Ask GET /v1/jobs at http://host:80/a/b for `/flux-pulid`, an image/png of 3/4 in `images/0`.",
        "https://gitlab.com/g/p/-/tree/main/a.png",
        "https://example.org/?p=/a/b/c is not there",
        "(HTTPS://[::1]/a/b)",
        "https://example.org/(x)/a,b/c/d.png and s3://bucket/folder/file",
        "https://example.org/models/store/a.png",
        "GET /v1/models/flux1-mini. It is a folder of models/store/a.png",
    ],
)
def test_addresses_and_fractions_stay(plain: str) -> None:
    assert pathless(plain, [Path("/models"), Path("/store"), Path("/"), Path(".")]) == plain
    whole = LikenessError(plain, None, {"address": plain, "n": [1, 0.5, None, True]})
    assert pathless_error(whole, [Path("/models")]) is whole


def test_the_values_of_details_are_read_one_by_one() -> None:
    details = {"log": "first\n/srv/secret/x.bin\t/srv/secret/y.bin", "all": [{"/srv/secret/z": Path("/srv/secret/z")}, ("/a/b", 1)]}
    told = pathless_error(LikenessError("It broke.", None, details))
    assert told.details == {"log": "first\n…/x.bin\t…/y.bin", "all": [{"…/z": "…/z"}, ["…/b", 1]]}


class Wrapped(Exception):
    """As Ray wraps what a process raised, once for every process on the way."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def test_what_ray_has_wrapped_is_told_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(MissingWeights, match="^…/x.bin is not there") as raised, for_callers("job_1", ()):
        raise Wrapped(Wrapped(MissingWeights("/srv/models/x.bin is not there.")))
    assert raised.value.retryable is MissingWeights.retryable and "job_1: /srv/models/x.bin" in caplog.text
    with pytest.raises(Wrapped), for_callers("job_1", ()):
        raise Wrapped(MissingWeights("It is not there."))


def test_what_an_evaluation_fails_of_names_no_folder_of_the_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A character of which a picture is lost."""
    files = tmp_path / "my files"
    with closing(opened(tmp_path)) as store, closing(CharacterStore(f"sqlite:///{tmp_path / 'likeness.db'}", files)) as characters:
        facts = PictureFacts(sha256="0" * 64, format="png", width=8, height=8, faces=1)
        seen = Judgement(verdicts=(Verdict(rank=0),), best=0, spread=(1.0, 1.0))
        ada = characters.create("ada", "Ada", [NewPicture(content=b"x", facts=facts)], seen).id
        for path in files.rglob("*.png"):
            path.unlink()
        order = EvaluationOrder(plan=load_plan("mini"), name="ada", character=ada)
        store.submit("ada", NewJob(kind="evaluation", pool="evaluate", input=order.model_dump(mode="json"), pictures={}))
        lease = store.lease("a runner", ["evaluate"], 600)
        assert lease is not None
        evaluation = EvaluationExecutor(store, None, characters, files / "evaluations", MINI_FACES)
        with pytest.raises(StoreUnavailable, match="is not there") as raised:
            asyncio.run(evaluation(lease, lambda event: None))
    assert raised.value.message.startswith(f"The picture …/characters/{ada}/")
    assert str(files) not in str(raised.value) and str(files) in caplog.text
