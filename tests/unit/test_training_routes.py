"""`/v1/training/jobs` and `/v1/evaluations` over a true store: what becomes a job, what is refused at once, and whose it is."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI, Request
from pydantic import ValidationError

from deployments.errors import InvalidImage, InvalidRequest, TooLarge
from deployments.job_runner import JobSettings
from deployments.store.characters import CharacterStore
from deployments.store.jobs import JobStore
from deployments.store.loras import LoraStore
from deployments.store.settings import StoreSettings
from deployments.urls import UrlGuard, UrlPolicy
from serve.attachments import data_uri
from serve.callers import Caller
from serve.client import Client
from serve.ingress import Calls, api
from serve.job_desk import JobDesk
from serve.normalise import parse
from serve.picture_urls import fetched
from serve.settings import AppSettings, TrainingSection, load_settings
from serve.training_bodies import MOST_PICTURES
from serve.training_desk import TrainingDesk
from tests.hostile.listener import Listener
from tests.job_asking import PICTURE
from tests.job_serving import PUBLIC, opened
from tests.store_places import add
from tests.unit.test_character_store import make
from training.orders import EvaluationOrder, TrainingOrder

TRAININGS, EVALUATIONS = "/v1/training/jobs", "/v1/evaluations"
SET_BYTES = 4 * 2**20
ADA = Path(__file__).resolve().parents[2] / "samples" / "characters" / "ada-1.png"
ASKED: dict[str, Any] = {"trigger_word": "ohwx", "images": [PICTURE]}


@dataclass(frozen=True)
class House:
    """The routes over stores of their own. ask: posts as an owner."""

    jobs: JobStore
    characters: CharacterStore
    loras: LoraStore
    settings: AppSettings
    client: Client
    app: FastAPI

    def post(self, path: str, owner: str = "ada", headers: Mapping[str, str] | None = None, **body: Any) -> httpx.Response:
        return self.client._http.post(path, json=body, headers={"x-owner": owner, **(headers or {})})

    def get(self, path: str, owner: str = "ada") -> httpx.Response:
        return self.client._http.get(path, headers={"x-owner": owner})

    def order(self, answer: httpx.Response) -> TrainingOrder:
        assert answer.status_code == 202, answer.text
        return TrainingOrder.model_validate(self.jobs.get(answer.json()["id"], "ada").input)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with standing(tmp_path) as found:
        yield found


@contextmanager
def standing(tmp_path: Path, urls: UrlPolicy | None = None) -> Iterator[House]:
    """urls: which addresses pictures are fetched from, none by default."""
    jobs = opened(tmp_path)
    url, files = f"sqlite:///{tmp_path / 'likeness.db'}", tmp_path / "files"
    store = StoreSettings(url=url, folder=files)
    base = load_settings("local")
    training = base.training.model_copy(update={"datasets": tmp_path / "datasets", "quota": 3, "evaluation_quota": 4})
    settings = base.model_copy(update={"store": store, "training": training})
    characters, loras = CharacterStore(url, files), LoraStore(url, files)
    desk = _desk(jobs, settings, urls)
    app = api(cast(Calls, None), 2**20, jobs=desk, training=_training(settings, desk, characters, loras), max_set_bytes=SET_BYTES)

    @app.middleware("http")
    async def by_header(request: Request, call_next: Any) -> Any:
        request.state.caller = Caller(owner=request.headers.get("x-owner", "ada"))
        return await call_next(request)

    with Client("http://likeness.local", transport=httpx.ASGITransport(app), headers={"x-owner": "ada"}) as client:
        yield House(jobs, characters, loras, settings, client, app)
    for opened_store in (jobs, characters, loras):
        opened_store.close()


def _desk(jobs: JobStore, settings: AppSettings, urls: UrlPolicy | None = None) -> JobDesk:
    fetch = partial(fetched, guard=UrlGuard(urls or UrlPolicy(), "pictures_by_url"))
    return JobDesk(jobs, settings.jobs, check=_check, wake=lambda: None, guard=PUBLIC, fetch=fetch)


def _training(settings: AppSettings, desk: JobDesk, characters: CharacterStore, loras: LoraStore) -> TrainingDesk:
    return TrainingDesk(settings, desk, characters, lambda ids, owner: asyncio.to_thread(loras.find, ids, owner), _check)


async def _check(workflow: str | None, body: Mapping[str, Any], owner: str) -> None:
    parse(workflow, body)


def test_the_seeds_call_is_a_job_that_holds_everything_that_was_decided(house: House) -> None:
    answer = house.post(TRAININGS, **ASKED, job_id="42", character_id="Ada", settings={"steps": 100}, class_word="woman", upscale=1024)
    order = house.order(answer)
    job = house.jobs.get(answer.json()["id"], "ada")
    assert (job.kind, job.pool, job.status, job.max_attempts) == ("training", "train-local", "queued", 20)
    assert answer.headers["location"] == f"{TRAININGS}/{job.id}" and house.get(answer.headers["location"]).json()["id"] == job.id
    assert (order.settings.base, order.settings.steps, order.settings.rank) == ("flux1-mini", 100, 32), "the server's own preset"
    assert (order.character, order.character_name, order.pictures_of) == (None, "Ada", None)
    assert order.curate.upscale_px == 1024 and order.class_word == "woman" and order.select
    assert list(house.jobs.pictures(job)) == ["images/0"] and PICTURE not in json.dumps(job.input)


def test_the_same_request_is_the_same_job_by_either_spelling_of_its_key(house: House) -> None:
    first = house.post(TRAININGS, **ASKED, job_id="42")
    again = house.post(TRAININGS, **ASKED, job_id="42", headers={"idempotency-key": "42"})
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
    other = house.post(TRAININGS, **(ASKED | {"trigger_word": "zxcv"}), job_id="42")
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")
    both = house.post(TRAININGS, **ASKED, job_id="42", headers={"idempotency-key": "43"})
    assert (both.status_code, both.json()["param"]) == (422, "job_id")


REFUSED: list[tuple[dict[str, Any], int, str, str]] = [
    ({"images": [PICTURE]}, 422, "invalid_request", "trigger_word"),
    ({"trigger_word": ""} | {"images": [PICTURE]}, 422, "invalid_request", "trigger_word"),
    ({"trigger_word": "ohwx"}, 422, "invalid_request", "no pictures"),
    ({"trigger_word": "ohwx", "images": []}, 422, "invalid_request", "images"),
    (ASKED | {"image_urls": ["https://example.com/a.png"]}, 422, "invalid_request", "one of them"),
    (ASKED | {"dataset": "ada"}, 422, "invalid_request", "one of them"),
    ({"trigger_word": "ohwx", "image_urls": ["https://example.com/a.png"]}, 422, "url_not_allowed", "image_urls[0]"),
    ({"trigger_word": "ohwx", "images": ["QUJD"]}, 422, "invalid_image", "images"),
    (ASKED | {"preset": "minni"}, 422, "invalid_request", "Did you mean mini?"),
    (ASKED | {"preset": "qwen-a100"}, 422, "unsupported_combination", "for qwen-image cannot be used here: this server draws"),
    (ASKED | {"settings": {"base": "flux1-dev"}}, 422, "unsupported_combination", "flux1-mini"),
    (ASKED | {"settings": {"base": "sd15"}}, 404, "unknown_model", "sd15"),
    (ASKED | {"settings": {"rank": 7}}, 422, "invalid_request", "rank"),
    (ASKED | {"settings": {"stepps": 7}}, 422, "invalid_request", "stepps"),
    (ASKED | {"settings": {"targets": "(a+)+$"}}, 422, "invalid_request", "presets only"),
    (ASKED | {"settings": {"keep_states": 1000}}, 422, "invalid_request", "presets only"),
    (ASKED | {"settings": {"steps": 1000, "batch": 64, "checkpoint_every": 100}}, 422, "invalid_request", "at most 40000"),
    (ASKED | {"settings": {"steps": 500, "checkpoint_every": 1}}, 422, "invalid_request", "500 checkpoints"),
    (ASKED | {"settings": {"resolutions": list(range(64, 2048, 16))}}, 422, "invalid_request", "resolutions"),
    (ASKED | {"webhook_url": "http://169.254.169.254/"}, 422, "url_not_allowed", "may not be"),
    (ASKED | {"dataset": "ada", "images": None, "reference_image": PICTURE}, 422, "invalid_request", "reference_image"),
    (ASKED | {"steps": 5}, 422, "invalid_request", "steps"),
    ({"trigger_word": "ohwx", "character_id": "Nobody"}, 404, "character_not_found", "Nobody"),
    ({"trigger_word": "ohwx", "character_id": "character_" + "0" * 24}, 404, "character_not_found", "character_"),
    (ASKED | {"character_id": "character_" + "0" * 24}, 404, "character_not_found", "character_"),
    ({"trigger_word": "ohwx", "dataset": "nothing"}, 422, "invalid_request", "nothing"),
    *(
        ({"trigger_word": "ohwx", "dataset": name}, 422, "invalid_request", "dataset")
        for name in ("../ada", "/etc", "..", ".x", "a/b", "a\x00")
    ),
]


def test_what_can_be_told_at_once_is_refused_at_once(house: House) -> None:
    for body, status, code, says in REFUSED:
        answer = house.post(TRAININGS, **{name: value for name, value in body.items() if value is not None})
        assert (answer.status_code, answer.json()["code"]) == (status, code), (body, answer.text)
        assert says in answer.text, (body, answer.text)
    assert house.jobs.list("ada") == () and house.characters.list("ada") == ()


def test_a_character_and_a_dataset_are_trained_on_by_name(house: House) -> None:
    ada = make(house.characters, 1, 2)
    for named in (ada.id, "Ada"):
        order = house.order(house.post(TRAININGS, trigger_word="ohwx", character_id=named))
        assert (order.pictures_of, order.character, order.images) == (ada.id, ada.id, ())
    other = house.order(house.post(TRAININGS, **ASKED, character_id="Ada"))
    assert (other.pictures_of, other.character, other.character_name) == (None, ada.id, None)
    full = house.post(TRAININGS, **ASKED)
    assert (full.status_code, full.json()["code"]) == (429, "quota_exceeded")
    folder = house.settings.training.datasets
    assert folder is not None
    (folder / "bea").mkdir(parents=True)
    (folder / "bea" / "dataset.json").write_text('{"trigger": "ohwx"}')
    assert house.post(TRAININGS, "bea", trigger_word="ohwx", dataset="bea").status_code == 202
    wrong = house.post(TRAININGS, "bea", trigger_word="zxcv", dataset="bea")
    assert (wrong.status_code, wrong.json()["param"]) == (422, "trigger_word") and "'ohwx'" in wrong.json()["remedy"]


def test_what_is_somebody_elses_is_not_there(house: House) -> None:
    """By every field that names a thing; a name is one's own to give."""
    theirs, lora = make(house.characters, 1, 2, owner="bea"), add(house.loras, b"hers", "bea")
    for body in ({"trigger_word": "ohwx"}, ASKED):
        answer = house.post(TRAININGS, **body, character_id=theirs.id)
        assert (answer.status_code, answer.json()["code"]) == (404, "character_not_found")
    assert house.order(house.post(TRAININGS, **ASKED, character_id="Ada")).character is None
    assert house.post(EVALUATIONS, character_id=theirs.id).json()["code"] == "character_not_found"
    assert house.post(EVALUATIONS, images=[PICTURE], lora=lora).json()["code"] == "lora_not_found"
    made = house.post(TRAININGS, "bea", **ASKED, job_id="1").json()["id"]
    assert house.get(f"{TRAININGS}/{made}").status_code == 404 == house.get(f"{EVALUATIONS}/{made}", "bea").status_code
    assert house.get(f"{TRAININGS}/{made}", "bea").status_code == 200
    assert [job["id"] for job in house.get(TRAININGS, "bea").json()["data"]] == [made]
    assert made not in house.get(TRAININGS).text and house.get(EVALUATIONS, "bea").json()["data"] == []


EVALUATED: list[tuple[dict[str, Any], Callable[[EvaluationOrder], bool]]] = [
    ({}, lambda order: len(order.plan.configurations) == 5 and len(order.plan.prompts) == 9),
    ({"configurations": ["pulid"], "seeds": [5]}, lambda order: [item.name for item in order.plan.configurations] == ["pulid"]),
    (
        {"configurations": ["base", {"name": "mine", "label": "mine", "uses": ["references"], "fields": {"workflow": "flux-pulid"}}]},
        lambda order: order.plan.configurations[1].label == "mine",
    ),
    ({"prompts": [{"name": "sea", "framing": "portrait", "text": "{who} by the sea"}]}, lambda order: order.plan.prompts[0].name == "sea"),
]


def test_an_evaluation_is_a_plan_with_some_of_it_replaced(house: House) -> None:
    lora = add(house.loras, b"a lora")
    for body, holds in EVALUATED:
        answer = house.post(EVALUATIONS, images=[PICTURE], lora=lora, **body)
        assert answer.status_code == 202, answer.text
        job = house.jobs.get(answer.json()["id"], "ada")
        assert (job.kind, job.pool) == ("evaluation", "evaluate") and holds(EvaluationOrder.model_validate(job.input)), body


def test_an_evaluation_that_cannot_be_drawn_is_refused_at_once(house: House) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"images": None}, "character_id"),
        ({"plan": "nothing"}, "mini"),
        ({"plan": "../../etc/passwd"}, "plan"),
        ({"configurations": ["nothing"]}, "pulid"),
        ({"configurations": ["base", "base"]}, "more than once"),
        ({"configurations": [{"name": "mine", "label": "mine", "fields": {"workflow": "nothing"}}]}, "nothing"),
        (
            {"configurations": [{"name": "mine", "label": "mine", "by_framing": {"portrait": {"response_format": "file"}}}]},
            "response_format",
        ),
        ({"seeds": list(range(100))}, "at most"),
    ]
    lora = add(house.loras, b"a lora")
    for body, says in refused:
        fields = {"images": [PICTURE], "lora": lora, **body}
        answer = house.post(EVALUATIONS, **{name: value for name, value in fields.items() if value is not None})
        assert answer.status_code in (404, 422) and says in answer.text, (body, answer.text)
    assert house.jobs.list("ada") == ()


def test_trainings_have_their_slots_whatever_is_said_of_others() -> None:
    usual = load_settings("local")
    own = usual.runners.jobs.model_copy(update={"slots": {"draw": 7}})
    said = usual.model_copy(update={"runners": usual.runners.model_copy(update={"jobs": JobSettings.model_validate(own.model_dump())})})
    assert said.jobs.slots == {**usual.jobs.slots, "draw": 7} and {"train-local", "evaluate"} <= set(said.jobs.slots)


def test_a_job_that_no_runner_here_does_says_what_it_waits_for(house: House, tmp_path: Path) -> None:
    """The settings were changed since, or another server shares the store: this one cannot tell, and says what it knows."""
    id = house.post(TRAININGS, **ASKED).json()["id"]
    moved = house.settings.model_copy(update={"training": house.settings.training.model_copy(update={"placement": "a6000"})})

    async def shown(settings: AppSettings) -> str | None:
        desk = _desk(house.jobs, settings)
        return (await desk.get(id, "ada")).waiting_for

    assert asyncio.run(shown(house.settings)) is None and asyncio.run(shown(moved)) == "train-local"
    house.jobs.cancel(id, "ada")
    assert asyncio.run(shown(moved)) is None


def test_a_class_that_there_is_not_is_the_operators_mistake() -> None:
    with pytest.raises(ValidationError, match="a6000"):
        TrainingSection(placement="a600")


def test_a_form_and_the_sdk_say_the_same(house: House) -> None:
    path = ADA
    files = [("images", ("1.png", path.read_bytes(), "image/png"))]
    form = house.client._http.post(TRAININGS, files=files, data={"trigger_word": "ohwx", "settings": '{"steps": 7}', "select": "false"})
    assert house.order(form).settings.steps == 7
    job = house.client.training.function.remote(trigger_word="ohwx", images=[path], settings={"steps": 7}, select=False, job_id="7")
    assert house.jobs.pictures(house.jobs.get(job.id, "ada")) == house.jobs.pictures(house.jobs.get(form.json()["id"], "ada"))
    assert house.jobs.get(job.id, "ada").input == house.jobs.get(form.json()["id"], "ada").input
    assert [item.id for item in house.client.training.list().data] == [job.id, form.json()["id"]]
    assert house.client.training.get(job.id).item.kind == "training" and job.cancel() and job.refresh().status == "canceled"
    evaluation = house.client.evaluations.submit(images=[path], configurations=["base"], seeds=[1])
    assert house.client.evaluations.get(evaluation.id).item.kind == "evaluation"


def test_evaluations_have_a_quota_of_their_own(house: House) -> None:
    asked: dict[str, Any] = {"images": [PICTURE], "configurations": ["base"]}
    assert [house.post(EVALUATIONS, **asked, seeds=[seed]).status_code for seed in range(4)] == [202] * 4
    full = house.post(EVALUATIONS, **asked)
    assert (full.status_code, full.json()["code"]) == (429, "quota_exceeded") and len(house.jobs.list("ada")) == 4
    assert house.post(EVALUATIONS, "bea", **asked).status_code == 202 == house.post(TRAININGS, **ASKED).status_code


def test_nothing_is_fetched_for_a_job_that_is_there_or_would_be_one_too_many(tmp_path: Path) -> None:
    async def run() -> tuple[list[httpx.Response], list[int]]:
        async with Listener().open() as listener:
            with standing(tmp_path, UrlPolicy(fetch="allow", allow=(f"127.0.0.1:{listener.port}",))) as house:
                answers, connections = [], []
                for key in ("1", "1", "2", "3", "4", "1"):
                    body: dict[str, Any] = {
                        "trigger_word": "ohwx",
                        "image_urls": [f"http://127.0.0.1:{listener.port}/{key}.png"],
                        "job_id": key,
                    }
                    answers.append(await asyncio.to_thread(house.post, TRAININGS, **body))
                    connections.append(listener.connections)
                return answers, connections

    answers, connections = asyncio.run(run())
    assert [answer.status_code for answer in answers] == [202, 200, 202, 202, 429, 200]
    assert answers[4].json()["code"] == "quota_exceeded" and connections == [1, 1, 2, 3, 3, 3]
    assert answers[0].json()["id"] == answers[1].json()["id"] == answers[5].json()["id"], "also where no other job may be made"


def test_a_form_may_be_larger_than_json_and_says_so(house: House) -> None:
    """A request of JSON has 1 MiB here, a form with a set of pictures 4."""
    padded = ADA.read_bytes() + bytes(300_000)  # what stands behind a PNG's end is not looked at
    job = house.client.training.submit(trigger_word="ohwx", images=[padded] * 10, reference_image=ADA)
    kept = house.jobs.pictures(house.jobs.get(job.id, "ada"))
    assert kept == {f"images/{place}": padded for place in range(10)} | {"reference_image": ADA.read_bytes()}
    with pytest.raises(TooLarge, match=str(SET_BYTES)) as caught:
        house.client.training.submit(trigger_word="ohwx", images=[padded] * 14)
    assert caught.value.status == 413 and "fewer" in caught.value.remedy
    refused = house.post(TRAININGS, trigger_word="ohwx", images=[base64.b64encode(padded).decode()] * 3)
    assert (refused.status_code, refused.json()["code"]) == (413, "too_large")
    assert f"form (multipart/form-data), which may have {SET_BYTES}" in refused.json()["remedy"]
    everywhere = house.client._http.post("/v1/jobs", files=[("images", ("a.png", padded))] * 4)
    assert everywhere.status_code == 413, "no other route has it"


def test_as_many_pictures_as_may_be_fit_into_a_form(house: House) -> None:
    small = (ADA.parent / "ada-2.png").read_bytes()
    sets: dict[str, Any] = {"images": [small] * MOST_PICTURES, "held_out": [small] * MOST_PICTURES}
    evaluation = house.client.evaluations.submit(**sets, configurations=["base"], seeds=[1])
    assert len(house.jobs.pictures(house.jobs.get(evaluation.id, "ada"))) == 2 * MOST_PICTURES
    training = house.client.training.submit(trigger_word="ohwx", images=sets["images"], reference_image=small)
    assert len(house.jobs.pictures(house.jobs.get(training.id, "ada"))) == MOST_PICTURES + 1
    with pytest.raises(InvalidRequest, match="images"):
        house.client.training.submit(trigger_word="ohwx", images=[small] * (MOST_PICTURES + 1))


def test_a_form_and_json_under_one_key_are_one_job(house: House) -> None:
    said: dict[str, Any] = {"trigger_word": "ohwx", "settings": {"steps": 7}, "select": False, "upscale": 128, "job_id": "7"}
    form = house.client.training.submit(**said, images=[ADA])
    again = house.post(TRAININGS, **said, images=[PICTURE])
    assert (again.status_code, again.json()["id"]) == (200, form.id)
    others: list[dict[str, Any]] = [
        {"name": None, "settings": {"steps": 7}},  # the SDK leaves null out
        {"class_word": "person", "blur_others": False, "image_urls": None},  # defaults, said aloud
        {"job_id": None, "headers": {"idempotency-key": "7"}},
        {"images": [data_uri(ADA)]},
    ]
    for other in others:
        again = house.post(TRAININGS, **(said | {"images": [PICTURE]} | other))
        assert (again.status_code, again.json().get("id")) == (200, form.id), (other, again.text)
    for other in ({"images": [PICTURE, PICTURE]}, {"select": True}, {"settings": {}}, {"webhook_url": "https://example.com/"}):
        again = house.post(TRAININGS, **(said | {"images": [PICTURE]} | other))
        assert (again.status_code, again.json()["code"]) == (409, "idempotency_conflict"), other


def test_an_evaluation_says_the_same_with_and_without_its_defaults(house: House) -> None:
    mine: dict[str, Any] = {"name": "mine", "label": "mine", "fields": {"workflow": "flux-pulid"}}
    asked: dict[str, Any] = {"images": [PICTURE], "job_id": "7"}
    first = house.post(EVALUATIONS, **asked, configurations=[mine])
    again = house.post(EVALUATIONS, **asked, configurations=[mine | {"lora_scale": 1, "uses": []}], plan=None, noun="person", held_out=None)
    assert (first.status_code, again.status_code) == (202, 200), (first.text, again.text)
    other = house.post(EVALUATIONS, **asked, configurations=[mine | {"lora_scale": 0.5}])
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")


def test_pictures_keep_their_order_whatever_they_are_given_as(house: House) -> None:
    paths = sorted(ADA.parent.glob("ada-*.png"))[:4]
    contents = [path.read_bytes() for path in paths]
    given = [data_uri(paths[0]), paths[1], contents[2], str(paths[3])]
    job = house.client.training.submit(trigger_word="ohwx", images=given)
    assert house.jobs.pictures(house.jobs.get(job.id, "ada")) == {f"images/{place}": content for place, content in enumerate(contents)}


@pytest.mark.parametrize(
    ("images", "says"),
    [
        ([Path("/nowhere/ada.png")], "cannot be read"),
        ([b"GIF89a"], "not a PNG, JPEG or WebP"),
        ([7], "is no picture"),
        (["QUJD"], "not a PNG"),
    ],
)
def test_what_is_no_picture_is_told_before_or_after_it_goes_up(house: House, images: list[Any], says: str) -> None:
    with pytest.raises(InvalidImage, match=says):
        house.client.training.submit(trigger_word="ohwx", images=images)
    assert house.jobs.list("ada") == ()
