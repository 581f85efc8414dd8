"""`/v1/characters` and the SDK's `client.characters`, over true faces and a true store."""

from __future__ import annotations

import asyncio
import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.routing import APIRoute
from PIL import Image, ImageFilter

from deployments.errors import CharacterNotFound, InvalidImage, InvalidRequest, LoraNotFound, NoFaceDetected
from deployments.face_models import read_face_model
from deployments.face_server import FaceServer
from deployments.store.characters import CharacterStore
from deployments.store.loras import LoraStore
from deployments.store.migrate import migrate
from deployments.store.settings import EVERYBODY
from serve.characters import CharacterDesk
from serve.client_characters import AsyncCharacters, Characters
from tests.character_serving import ADA, LIMIT, SETTINGS, Looked, application, sample
from tests.lora_serving import kept, over_a_socket
from tests.store_places import add as add_lora


@pytest.fixture(scope="module")
def faces() -> FaceServer:
    return FaceServer(SETTINGS)


@pytest.fixture
def looked(faces: FaceServer) -> Looked:
    return Looked(faces)


@pytest.fixture
def desk(looked: Looked, tmp_path: Path) -> Iterator[CharacterDesk]:
    url = f"sqlite:///{tmp_path / 'likeness.db'}"
    migrate(url)
    store = CharacterStore(url, tmp_path)
    yield CharacterDesk(store, looked)
    store.close()


@pytest.fixture
def http(desk: CharacterDesk) -> Iterator[httpx.Client]:
    with over_a_socket(application(desk)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture
def mine(http: httpx.Client) -> Characters:
    return Characters(http)


def test_a_character_is_made_looked_at_changed_and_deleted(mine: Characters, looked: Looked, tmp_path: Path) -> None:
    made = mine.create("Ada", [*ADA[:3], sample("bruno-1"), sample("ada-bruno")])
    assert re.fullmatch(r"character_[0-9a-f]{24}", made.id) and made.name == "Ada"
    assert [picture.reason for picture in made.pictures] == [None, None, None, "other_person", "several_faces"]
    assert all(picture.says for picture in made.pictures[3:]) and not any(picture.kept for picture in made.pictures[3:])
    ids = [picture.id for picture in made.pictures]
    people = next(warning for warning in made.warnings if warning.code == "two_people")
    assert people.pictures == [ids[:3], [ids[3]]]
    assert made.best in ids[:2] and made.spread is not None and 0.8 < made.spread.least <= made.spread.mean <= 1
    first = made.pictures[0]
    assert first.quality is not None and first.box is not None and first.quality.size > 60 and (first.width, first.format) == (192, "png")
    assert mine.picture(made.id, ids[1]) == ADA[1].read_bytes()
    assert [entry.id for entry in mine.list().data] == [made.id] and mine.list().data[0].kept == 3
    assert mine.get(made.id) == made and made.centroid is None
    centroid = mine.get(made.id, centroid=True).centroid
    assert centroid is not None and np.linalg.norm(centroid) == pytest.approx(1, abs=1e-5)

    more = mine.add(made.id, [ADA[3]])
    assert len(more.pictures) == 6 and more.pictures[5].kept and looked.pictures == 6
    fewer = mine.remove_picture(made.id, ids[3])
    assert [picture.id for picture in fewer.pictures] == [*ids[:3], ids[4], more.pictures[5].id] and looked.pictures == 6
    assert "two_people" not in [warning.code for warning in fewer.warnings]
    assert mine.rename(made.id, "Ada L.").name == "Ada L."

    assert mine.delete(made.id).id == made.id
    assert mine.list().data == [] and kept(tmp_path / "characters") == []
    with pytest.raises(CharacterNotFound, match=made.id):
        mine.get(made.id)


def test_the_best_is_set_by_hand_and_given_back(mine: Characters) -> None:
    made = mine.create("Ada", [*ADA[:3], sample("bruno-1"), sample("ada-bruno")])
    ids = [picture.id for picture in made.pictures]
    chosen = mine.set_best(made.id, ids[2])
    assert (chosen.best, chosen.best_by_hand, chosen.pictures[2].rank) == (ids[2], True, 0) and made.best != ids[2]
    assert mine.add(made.id, [ADA[3]]).best == ids[2]
    with pytest.raises(InvalidRequest, match="cannot be the best. It shows several people"):
        mine.set_best(made.id, ids[4])
    with pytest.raises(CharacterNotFound, match="no picture 'picture_x'"):
        mine.set_best(made.id, "picture_x")
    other = mine.set_best(made.id, ids[3])
    assert other.best == ids[3] and [picture.kept for picture in other.pictures] == [False, False, False, True, False, False]
    again = mine.set_best(made.id, None)
    assert again.best == made.best and not again.best_by_hand
    assert not mine.remove_picture(made.id, str(made.best)).best_by_hand


def test_json_a_form_and_one_picture_alone_do_the_same(http: httpx.Client) -> None:
    encoded = base64.b64encode(ADA[0].read_bytes()).decode()
    for sent in (
        {"json": {"name": "Ada", "pictures": [encoded]}},
        {"json": {"name": "Ada", "pictures": f"data:image/png;base64,{encoded}"}},
        {"data": {"name": "Ada"}, "files": [("pictures", ("a.png", ADA[0].read_bytes(), "image/png"))]},
    ):
        answer = http.post("/v1/characters", **sent)
        assert answer.status_code == 201 and answer.headers["location"] == f"/v1/characters/{answer.json()['id']}"
        body = answer.json()
        assert len(body["pictures"]) == 1 and body["best"] == body["pictures"][0]["id"] and body["warnings"][0]["code"] == "too_few"
        file = http.get(f"{answer.headers['location']}/pictures/{body['best']}")
        assert file.content == ADA[0].read_bytes() and file.headers["content-type"] == "image/png"
        assert "no-store" in file.headers["cache-control"] and file.headers["x-content-type-options"] == "nosniff"
    files = [("pictures", (path.name, path.read_bytes(), "image/png")) for path in ADA]
    answer = http.post("/v1/characters", data={"name": "Ada"}, files=files)
    assert len(answer.json()["pictures"]) == 4


def test_another_owner_gets_404_of_every_route(http: httpx.Client, mine: Characters, desk: CharacterDesk) -> None:
    made = mine.create("Ada", ADA[:2])
    app = application(desk)
    routes = [
        (method, route.path)
        for route in app.routes
        if isinstance(route, APIRoute) and "{id}" in route.path
        for method in sorted(route.methods or ())
    ]
    assert len(routes) == 8
    bodies = {"PATCH": {"name": "x"}, "POST": {"pictures": [base64.b64encode(ADA[0].read_bytes()).decode()]}}
    for method, path in routes:
        body = {"lora_id": f"lora_{'0' * 24}"} if path.endswith("loras") else bodies.get(method)
        answers = [
            http.request(method, path.format(id=id, picture=made.pictures[0].id), json=body, headers={"x-owner": owner})
            for id, owner in ((made.id, "bruno"), (f"character_{'0' * 24}", EVERYBODY), ("%00", EVERYBODY), ("..%2f..", EVERYBODY))
        ]
        assert {answer.status_code for answer in answers} == {404}, (method, path)
        assert answers[0].json()["code"] == "character_not_found" == answers[1].json()["code"]
    assert http.get("/v1/characters", headers={"x-owner": "bruno"}).json() == {"data": []} and mine.get(made.id) == made


FORM = "multipart/form-data; boundary=zz"
ENCODED = base64.b64encode(ADA[0].read_bytes()).decode()


@pytest.mark.parametrize(
    ("sent", "status", "says"),
    [
        ({"json": {"name": "x"}}, 422, "`pictures`: this field is needed"),
        ({"json": {"name": "x", "pictures": []}}, 422, "`pictures`"),
        ({"json": {"pictures": [ENCODED]}}, 422, "`name`: this field is needed"),
        ({"json": {"name": " ", "pictures": [ENCODED]}}, 422, "`name` is empty"),
        ({"json": {"name": "x", "pictures": [ENCODED] * 51}}, 422, "51 pictures"),
        ({"data": {"name": "x"}, "files": [("pictures", ("a", b"x"))] * 51}, 422, "51 pictures"),
        ({"data": {"name": "x"}, "files": [("pictures", ("a", b"x"))] * 52}, 422, "Too many files"),
        ({"json": {"name": "x", "pictures": ["?" * 99]}}, 422, "not valid base64"),
        ({"json": {"name": "x", "pictures": ["http://10.0.0.1/a.png"]}}, 422, "addresses are not followed"),
        ({"json": {"name": "x", "pictures": [base64.b64encode(b"GIF89a").decode()]}}, 422, "not a PNG, JPEG or WebP"),
        ({"json": {"name": "x", "pictures": [ENCODED[:4000]]}}, 422, "damaged or cut short"),
        ({"json": {"name": "x", "pictures": [7]}}, 422, "`pictures[0]`"),
        ({"json": {"name": "x", "pictures": [ENCODED], "owner": "y"}}, 422, "`owner`: there is no such field"),
        ({"json": [1]}, 422, "not a JSON object"),
        ({"content": b"[" * 100_000}, 422, "no JSON"),
        ({"content": b'{"name": "a", "name": "b"}'}, 422, "'name' is given twice"),
        ({"files": [("name", ("a", b"x"))]}, 422, "'name' came as a file"),
        ({"data": {"name": "x", "pictures": "text"}, "files": [("pictures", ("a", b"x"))]}, 422, "'pictures' came as a text"),
        ({"json": {"name": "x", "pictures": [ENCODED]}, "params": {"owner": "ada"}}, 422, "behind the `?`"),
        ({"content": b"abc", "headers": {"content-type": FORM}}, 422, "cannot be read"),
        ({"json": {"name": "x", "pictures": ["A" * LIMIT]}}, 413, "larger than"),
        ({"files": [("pictures", ("a", bytes(LIMIT)))]}, 413, "larger than"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_nothing_is_kept(
    http: httpx.Client, looked: Looked, tmp_path: Path, sent: dict[str, Any], status: int, says: str
) -> None:
    answer = http.post("/v1/characters", **sent)
    assert answer.status_code == status and says in answer.json()["detail"], answer.text
    assert answer.json()["remedy"] and len(answer.text) < 5000
    assert kept(tmp_path / "characters") == [] and http.get("/v1/characters").json() == {"data": []} and looked.pictures <= 1


def test_pictures_of_no_use_make_no_character(mine: Characters, tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (192, 192), (120, 140, 160)).save(stream, "PNG")
    with pytest.raises(NoFaceDetected, match="Picture 0: It shows no face.*Picture 1: It shows several people") as caught:
        mine.create("x", [stream.getvalue(), sample("ada-bruno")])
    assert caught.value.details["reasons"] == ["no_face", "several_faces"] and kept(tmp_path / "characters") == []
    with pytest.raises(InvalidImage, match="Picture 1"):
        mine.create("x", [ADA[0], ADA[1].read_bytes()[:9000] + ADA[1].read_bytes()[9500:]])


def test_where_and_when_a_picture_was_taken_is_not_kept(mine: Characters, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "SECRET camera", 6
    exif.get_ifd(0x8825)[1] = "N"
    stream = io.BytesIO()
    Image.open(ADA[0]).convert("RGB").transpose(Image.Transpose.ROTATE_90).save(stream, "JPEG", quality=95, exif=exif.tobytes())
    made = mine.create("Ada", [stream.getvalue()])
    file = mine.picture(made.id, made.pictures[0].id)
    with Image.open(io.BytesIO(file)) as image:
        assert dict(image.getexif()) == {0x0112: 6}
    assert made.pictures[0].kept and b"SECRET" not in b"".join(path.read_bytes() for path in kept(tmp_path))


def test_a_blurred_picture_is_never_the_best(mine: Characters) -> None:
    stream = io.BytesIO()
    Image.open(ADA[0]).filter(ImageFilter.GaussianBlur(3)).save(stream, "PNG")
    made = mine.create("Ada", [stream.getvalue(), ADA[2]])
    assert made.pictures[0].reason == "blurred" and made.best == made.pictures[1].id


def test_deleted_faces_are_in_no_file(mine: Characters, tmp_path: Path) -> None:
    made = mine.create("Unforgettable name", ADA)
    centroid = np.asarray(mine.get(made.id, centroid=True).centroid, "<f4").tobytes()
    pictures = [path.read_bytes()[2000:2064] for path in ADA]
    traces = [b"Unforgettable name", made.id.encode(), *pictures, *(centroid[n : n + 64] for n in range(0, 2048, 64))]
    before = b"".join(path.read_bytes() for path in kept(tmp_path))
    assert sum(trace in before for trace in traces) >= len(traces) - 1  # one may lie across two pages
    mine.delete(made.id)
    after = b"".join(path.read_bytes() for path in kept(tmp_path))
    assert [trace for trace in traces if trace in after] == []


def test_face_models_go_out_and_come_in(mine: Characters, faces: FaceServer, tmp_path: Path) -> None:
    made = mine.create("Ada", ADA)
    file = mine.export(made.id)
    model = read_face_model(file)
    raw = [faces.analyze([path.read_bytes()], ("embedding",))[0].faces[0].embedding for path in ADA]
    assert np.allclose(model.embedding, np.mean([one for one in raw if one is not None], axis=0), atol=1e-4)
    best = next(picture for picture in made.pictures if picture.id == made.best)
    assert model.bbox.tolist() == pytest.approx(best.box) and model.recogniser == "faces-mini" and model.male is not None and model.age
    path = tmp_path / "Ada of ReActor.safetensors"
    path.write_bytes(file)
    imported = mine.import_face_model(path)
    assert (imported.name, imported.from_face_model, imported.pictures, imported.best) == ("Ada of ReActor", True, [], None)
    assert imported.recogniser == "faces-mini" and mine.export(imported.id) == file
    with pytest.raises(InvalidRequest, match="face model"):
        mine.add(imported.id, [ADA[0]])
    with pytest.raises(InvalidRequest, match="face model"):
        mine.set_best(imported.id, "picture_x")
    with pytest.raises(InvalidRequest, match="no whole safetensors"):
        mine.import_face_model(b"\x80\x04K\x01.", "x")
    with pytest.raises(InvalidRequest, match="absent"):
        mine.import_face_model(tmp_path / "absent")
    assert len(mine.list().data) == 2


def test_a_lora_is_said_to_be_of_a_character(mine: Characters, tmp_path: Path) -> None:
    loras = LoraStore(f"sqlite:///{tmp_path / 'likeness.db'}", tmp_path)
    lora, theirs = add_lora(loras, b"hers", EVERYBODY), add_lora(loras, b"his", "bruno")
    loras.close()
    made = mine.create("Ada", ADA[:1])
    attached = mine.attach_lora(made.id, lora)
    assert attached.lora is not None and attached.lora.id == lora and made.lora is None
    with pytest.raises(LoraNotFound):
        mine.attach_lora(made.id, theirs)


def test_what_is_added_and_removed_at_once_is_all_there(desk: CharacterDesk, looked: Looked) -> None:
    async def run() -> None:
        made = await desk.create(EVERYBODY, "Ada", [ADA[0].read_bytes(), sample("ada-bruno").read_bytes(), sample("hugo-1").read_bytes()])
        before = looked.pictures
        await asyncio.gather(
            *(desk.add(made.id, EVERYBODY, [path.read_bytes()]) for path in (*ADA[1:], sample("greta-1"))),
            *(desk.remove(made.id, picture.id, EVERYBODY) for picture in made.pictures[1:]),
            desk.update(made.id, EVERYBODY, "Ada L.", made.pictures[0].id, False),
        )
        found = await desk.get(made.id, EVERYBODY)
        assert looked.pictures - before == 4 and len(found.pictures) == 5 and found.name == "Ada L."
        assert found.best == made.pictures[0].id and found.best_by_hand
        assert sorted(p.verdict.reason or "" for p in found.pictures) == ["", "", "", "", "other_person"]
        deleted, *added = await asyncio.gather(
            desk.delete(made.id, EVERYBODY),
            *(desk.add(made.id, EVERYBODY, [path.read_bytes()]) for path in ADA[:2]),
            return_exceptions=True,
        )
        assert isinstance(deleted, tuple) and len(deleted) >= 5
        assert all(not isinstance(error, BaseException) or isinstance(error, CharacterNotFound) for error in added)
        assert await desk.list(EVERYBODY) == ()

    asyncio.run(run())


def test_the_asynchronous_client_does_the_same(desk: CharacterDesk) -> None:
    async def run() -> None:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(application(desk)), base_url="http://likeness.local", timeout=60
        ) as http:
            mine = AsyncCharacters(http)
            made = await mine.create("Ada", ADA[:2])
            more = await mine.add(made.id, [ADA[2]])
            first = more.pictures[0].id
            assert (await mine.list()).data[0].pictures == 3 and await mine.get(made.id) == more
            assert (await mine.set_best(made.id, first)).best == first and (await mine.rename(made.id, "A")).name == "A"
            assert await mine.picture(made.id, first) == ADA[0].read_bytes()
            assert len((await mine.remove_picture(made.id, first)).pictures) == 2
            imported = await mine.import_face_model(await mine.export(made.id), "model")
            assert imported.from_face_model and (await mine.delete(imported.id)).deleted
            with pytest.raises(LoraNotFound):
                await mine.attach_lora(made.id, "lora_x")
            with pytest.raises(CharacterNotFound):
                await mine.export(imported.id)

    asyncio.run(run())


def test_the_documentation_says_what_goes_up(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    content = paths["/v1/characters"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data"}
    assert content["application/json"]["schema"]["properties"]["pictures"]["maxItems"] == 50
    assert "404" in paths["/v1/characters/{id}/pictures/{picture}"]["get"]["responses"]


@pytest.mark.parametrize("path", ["", "/{id}", "/{id}/pictures/{picture}", "/{id}/face-model"])
def test_what_stands_behind_the_address_and_is_not_read_is_refused(mine: Characters, http: httpx.Client, path: str) -> None:
    made = mine.create("Ada", ADA[:2])
    address = "/v1/characters" + path.format(id=made.id, picture=made.pictures[0].id)
    assert http.get(address).status_code == 200
    for method in ("GET", "DELETE") if path in ("/{id}", "/{id}/pictures/{picture}") else ("GET",):
        answer = http.request(method, address, params={"limit": "5"})
        assert (answer.status_code, answer.json()["param"]) == (422, "limit"), answer.text
    assert mine.get(made.id) == made, "nothing was deleted"
    assert http.get(f"/v1/characters/{made.id}", params={"centroid": "perhaps"}).json()["param"] == "centroid"
