"""The server of identities: whose references disagree is told by number, and whose picture was not used is in the answer."""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import replace

import pytest
import torch

from deployments.catalog import CATALOG_PATH
from deployments.contracts import IdentityRequest, People, PersonPictures
from deployments.errors import InvalidRequest, UnsupportedCombination
from deployments.faces.analysis import FaceAnalyser
from deployments.hardware import TorchSettings
from deployments.identity_server import IdentityServer
from tests.mini_drawing import PACK
from training.mini.faces.verification import DETECTOR_SIZE

SAMPLES = CATALOG_PATH.parents[1] / "samples" / "characters"
PULID = IdentityRequest(method="pulid")


@pytest.fixture(scope="module")
def server() -> IdentityServer:
    return IdentityServer(["pulid-mini", "xlabs-ip-adapter-mini"], TorchSettings())


@pytest.fixture(scope="module")
def faces() -> FaceAnalyser:
    judge, parser = PACK / "judge" / "arcface_judge.onnx", PACK / "parser" / "face_parser.onnx"
    return FaceAnalyser(PACK / "insightface", judge, parser, det_size=DETECTOR_SIZE, smallest_px=12)


def _people(faces: FaceAnalyser, *people: tuple[str, ...]) -> People:
    asked = [PersonPictures(tuple((SAMPLES / f"{name}.png").read_bytes() for name in names)) for names in people]
    return People(faces.people(asked, ("embedding", "aligned")), {"faces": 0.5})


def test_each_request_has_its_own_persons_tokens_and_its_own_blend(server: IdentityServer, faces: FaceAnalyser) -> None:
    people = _people(faces, ("ada-1", "ada-2"), ("bruno-1", "ada-3", "bruno-2"))
    requests = [replace(PULID, blend="concat"), IdentityRequest(method="xlabs-ip-adapter-v2")]
    answer = server.encode(people, requests)
    assert [tokens.model for tokens in answer.tokens] == ["pulid-mini", "xlabs-ip-adapter-mini"]
    assert [tokens.left_out for tokens in answer.tokens] == [(), (1,)]
    assert set(answer.seconds) == {"faces", "identity"}
    each = [server.encode(_people(faces, (name,)), [PULID]).tokens[0].tokens for name in ("ada-1", "ada-2")]
    assert torch.allclose(answer.tokens[0].tokens, torch.cat(each, dim=1), atol=1e-5)


def test_a_person_whose_references_disagree_is_named_and_the_next_request_is_unharmed(server: IdentityServer, faces: FaceAnalyser) -> None:
    with pytest.raises(InvalidRequest, match=r"^Person 1: The reference pictures 0 and 1 show different people") as caught:
        server.encode(_people(faces, ("ada-1",), ("bruno-1", "chiyo-1")), [PULID, PULID])
    assert caught.value.details["person"] == 1 and caught.value.details["pictures"] == [0, 1]
    with pytest.raises(InvalidRequest, match=r"^The reference pictures 0 and 1") as caught:
        server.encode(_people(faces, ("bruno-1", "chiyo-1")), [PULID])
    assert caught.value.details["person"] == 0
    assert server.encode(_people(faces, ("ada-1",)), [PULID]).tokens[0].left_out == ()


def test_a_method_that_is_not_deployed_is_refused_with_those_that_are(server: IdentityServer, faces: FaceAnalyser) -> None:
    with pytest.raises(UnsupportedCombination, match="pulid, xlabs-ip-adapter-v2"):
        server.encode(_people(faces, ("ada-1",)), [IdentityRequest(method="instantid")])
    with pytest.raises(ValueError, match="1 people came for 2 requests"):
        server.encode(_people(faces, ("ada-1",)), [PULID, PULID])


def test_what_was_made_of_a_face_is_forgotten_when_it_is_said_and_after_its_time(server: IdentityServer, faces: FaceAnalyser) -> None:
    def tokens() -> list[weakref.ref[torch.Tensor]]:
        caches = [encoder._cache for encoder in server._encoders.values()]  # type: ignore[attr-defined]
        return [weakref.ref(tensor) for cache in caches for tensor, _ in cache._kept.values()]

    server.encode(_people(faces, ("ada-1",), ("ada-1",)), [PULID, IdentityRequest(method="xlabs-ip-adapter-v2")])
    assert len(alive := tokens()) >= 2
    server.check_health()
    assert len(tokens()) == len(alive)
    time.sleep(0.02)
    server.forget(older_than=0.01)
    gc.collect()
    assert tokens() == [] and [reference() for reference in alive] == [None] * len(alive)
