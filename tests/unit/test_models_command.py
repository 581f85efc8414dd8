"""`likeness models` on true files: fetched over the hub's own protocol from a server here, cut and resumed; converted; checked."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from deployments.catalog import load_catalog
from deployments.checking import check_entry, check_pipeline
from deployments.conversion.table import load_conversions
from deployments.errors import CheckpointMismatch, MissingWeights
from deployments.fetching import needed_by, wanted
from deployments.weights import WeightFile, safetensors_header
from serve.cli import app

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "a" * 40
BIG = np.random.default_rng(5).bytes(24_000_000)
SMALL = b'{"_class_name": "Toy"}'


class Hub(ThreadingHTTPServer):
    """What of the hub's file protocol a download needs. cut: bytes after which a connection is dropped, once for each item."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.files = dict(files)
        self.cuts: list[int] = []
        self.down = False
        self.gated = False
        self.asked: list[tuple[str, str, str | None, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def log_message(self, format: str, *arguments: object) -> None:
        return

    def _serve(self, body: bool) -> None:
        hub, wanted_range = self.server, self.headers.get("range")
        hub.asked.append((self.command, self.path, wanted_range, self.headers.get("authorization")))
        content = hub.files.get(self.path.partition(f"/resolve/{COMMIT}/")[2])
        if hub.down or hub.gated or content is None:
            code = {True: "GatedRepo", False: "EntryNotFound"}[hub.gated]
            self.send_response(500 if hub.down else 403 if hub.gated else 404)
            self.send_header("x-error-code", code)
            self.send_header("content-length", "0")
            self.end_headers()
            return
        start = int(wanted_range.removeprefix("bytes=").rstrip("-")) if wanted_range else 0
        self.send_response(206 if wanted_range else 200)
        self.send_header("x-repo-commit", COMMIT)
        self.send_header("etag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("accept-ranges", "bytes")
        self.send_header("content-length", str(len(content) - start))
        if wanted_range:
            self.send_header("content-range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body:
            rest = content[start:]
            cut = hub.cuts.pop(0) if hub.cuts and len(rest) > hub.cuts[0] else len(rest)
            self.wfile.write(rest[:cut])
            if cut < len(rest):
                hub.down = not hub.cuts  # and nobody answers from then on
                self.close_connection = True


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub({"model.safetensors": BIG, "config.json": SMALL})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A catalogue of one published model."""
    files = [
        {"repo": "toy/model", "revision": COMMIT, "file": "config.json"},
        {
            "repo": "toy/model",
            "revision": COMMIT,
            "file": "model.safetensors",
            "sha256": hashlib.sha256(BIG).hexdigest(),
            "bytes": len(BIG),
        },
    ]
    entry = {
        "role": "base", "family": "toy", "implementation": "collections:OrderedDict",
        "weights": {"pipeline": {"repo": "toy/model", "revision": COMMIT, "folder": ".", "files": files}},
        "licence": {"name": "Toy-Licence", "commercial": False},
    }  # fmt: skip
    path = tmp_path / "catalog.yaml"
    path.write_text(yaml.safe_dump({"models": {"toy-base": entry}}))
    return path


def pull(hub: Hub, catalog: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's address and its being offline are read when huggingface_hub is imported."""
    hidden = {"HF_HUB_OFFLINE", "HF_TOKEN", "HUGGINGFACE_TOKEN", "HUGGING_FACE_HUB_TOKEN"}
    settings = {name: value for name, value in os.environ.items() if name not in hidden}
    settings |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(catalog.parent / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
        "COLUMNS": "200",
    }
    command = [sys.executable, "-m", "serve.cli", "models", "pull", "toy-base", "--catalog", str(catalog), *arguments]
    return subprocess.run(command, cwd=ROOT, env=settings | environment, capture_output=True, text=True, timeout=120)


def test_a_model_is_fetched_verified_and_then_found(hub: Hub, toy: Path) -> None:
    run = pull(hub, toy, HUGGINGFACE_TOKEN="hf_secret")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 files are here and verified" in run.stdout and "Toy-Licence (not commercial)" in run.stdout
    assert {ask[3] for ask in hub.asked if "/resolve/" in ask[1]} == {"Bearer hf_secret"} and "hf_secret" not in run.stdout + run.stderr
    (stored,) = (toy.parent / "home").rglob("model.safetensors")
    assert stored.read_bytes() == BIG
    asked = len(hub.asked)
    again = pull(hub, toy)
    assert again.returncode == 0 and not [ask for ask in hub.asked[asked:] if ask[0] == "GET" and "/resolve/" in ask[1]]


def test_a_cut_download_goes_on_where_it_stopped(hub: Hub, toy: Path) -> None:
    hub.cuts = [15_000_000]
    first = pull(hub, toy)
    assert first.returncode == 1 and "fetch_failed" in first.stderr and "Traceback" not in first.stderr
    hub.down, asked = False, len(hub.asked)
    assert pull(hub, toy).returncode == 0
    resumed = [ask[2] for ask in hub.asked[asked:] if ask[0] == "GET" and ask[1].endswith("model.safetensors")]
    # Of the 15 MB that had arrived, huggingface_hub had written down its first chunk.
    assert resumed == [f"bytes={constants.DOWNLOAD_CHUNK_SIZE}-"]
    (stored,) = (toy.parent / "home").rglob("model.safetensors")
    assert stored.read_bytes() == BIG


def test_a_file_of_other_bytes_is_refused_and_deleted(hub: Hub, toy: Path) -> None:
    hub.files["model.safetensors"] = BIG[:-1] + b"!"
    run = pull(hub, toy)
    assert run.returncode == 1 and "damaged_weights" in run.stderr and "it was deleted" in run.stderr
    assert not list((toy.parent / "home").rglob("model.safetensors"))
    hub.files["model.safetensors"] = BIG
    assert pull(hub, toy).returncode == 0


def test_a_dry_run_fetches_nothing(hub: Hub, toy: Path) -> None:
    run = pull(hub, toy, "--dry-run")
    assert run.returncode == 0 and "22.9 MiB" in run.stdout and "To fetch: 22.9 MiB." in run.stdout
    assert not [ask for ask in hub.asked if ask[0] == "GET" and "/resolve/" in ask[1]]


def test_what_the_hub_refuses_is_explained(hub: Hub, toy: Path) -> None:
    hub.gated = True
    run = pull(hub, toy)
    assert run.returncode == 1 and "accepted its licence" in run.stderr and "https://huggingface.co/toy/model" in run.stderr
    hub.gated = False
    del hub.files["config.json"]
    assert "is not in revision" in pull(hub, toy).stderr


def test_flux_dev_needs_its_adapters_encoders_controls_faces_and_parser() -> None:
    catalog = load_catalog()
    repos = {item.file.repo for item in wanted(needed_by(catalog, catalog.entry("flux1-dev")), load_conversions())}
    assert repos == {
        "black-forest-labs/FLUX.1-dev", "guozinan/PuLID", "QuanSun/EVA-CLIP", "XLabs-AI/flux-ip-adapter-v2",
        "openai/clip-vit-large-patch14", "DIAMONIK7777/antelopev2", "public-data/insightface", "ManyOtherFunctions/face-parse-bisent",
        "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro", "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0", "yzd-v/DWPose",
        "InstantX/FLUX.1-dev-IP-Adapter", "google/siglip-so400m-patch14-384", "black-forest-labs/FLUX.1-Redux-dev",
    }  # fmt: skip
    assert wanted(needed_by(catalog, catalog.entry("flux1-mini")), load_conversions()) == []


@pytest.mark.parametrize(
    ("name", "there", "not_there"),
    [
        ("flux-pulid", ("pulid_flux_v0.9.1", "EVA02_CLIP", "glintr100", "79999_iter.pth"), ("ip_adapter", "v0.9.0")),
        ("flux-ipadapter-faceid", ("ip_adapter.safetensors", "clip-vit-large"), ("pulid_flux", "EVA02")),
        ("pulid-v0.9.0", ("pulid_flux_v0.9.0", "EVA02_CLIP"), ("FLUX.1-dev", "glintr100")),
        ("eva02-clip-l-336", ("EVA02_CLIP",), ("pulid",)),
    ],
)
def test_a_workflow_needs_what_it_is_made_of(name: str, there: tuple[str, ...], not_there: tuple[str, ...]) -> None:
    run = CliRunner().invoke(app, ["models", "pull", name, "--dry-run"], env={"HF_HUB_OFFLINE": "1", "COLUMNS": "400"})
    assert run.exit_code == 0, run.output
    files = " ".join(line.partition("FLUX.1-dev-Non")[0] for line in run.stdout.splitlines())
    assert all(file in files for file in there) and not any(file in files for file in not_there)


def test_mini_needs_no_network() -> None:
    run = CliRunner().invoke(app, ["models", "pull", "flux1-mini"])
    assert run.exit_code == 0 and "needs nothing from the network" in run.stdout


def test_every_converted_file_of_the_catalogue_has_its_conversion() -> None:
    made = {(item.target.repo, item.target.file) for item in load_conversions().values()}
    local = {
        (weight.repo, weight.file)
        for entry in load_catalog().models.values()
        for weight in entry.weights.values()
        if isinstance(weight, WeightFile) and weight.local and weight.repo != "mini"
    }
    assert local and local <= made


def test_the_embedded_pack_is_what_its_modules_expect() -> None:
    catalog = load_catalog()
    for name in ("flux1-mini", "pulid-mini", "xlabs-ip-adapter-mini", "faces-mini", "face-parser-mini", "face-judge-mini"):
        checked = check_entry(catalog.entry(name))
        assert checked and all(part.error is None for part in checked), [part.error for part in checked]
    assert {part.part for part in check_entry(catalog.entry("flux1-mini"))} == {"transformer", "vae", "text_encoder", "text_encoder_2"}


def test_a_pipeline_with_a_wrong_tensor_is_named(tmp_path: Path) -> None:
    source = ROOT / "models" / "mini" / "flux1"
    for file in ("model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "transformer/config.json"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes((source / file).read_bytes())
    state = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    first = sorted(state)[0]
    save_file(
        {**{name: t for name, t in state.items() if name != first}, "stranger": torch.zeros(1)},
        tmp_path / "vae" / "diffusion_pytorch_model.safetensors",
    )
    found = {part.part: part.error for part in check_pipeline(tmp_path)}
    assert isinstance(found["vae"], CheckpointMismatch) and found["vae"].details["missing"] == [first]
    assert found["vae"].details["left_over"] == ["stranger"]
    assert isinstance(found["transformer"], MissingWeights) and isinstance(found["text_encoder"], MissingWeights)
    run = CliRunner().invoke(app, ["models", "check", str(tmp_path)])
    assert run.exit_code == 1 and "WRONG  vae" in run.stdout and "stranger" in run.stdout


def published(shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """A sparse file with the header of a published one: as long as it, holding nothing."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)


def test_a_file_of_the_published_size_is_checked_without_being_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deployments.identity.pulid import PuLID, PuLIDConfig

    monkeypatch.setenv("LIKENESS_MODELS", str(tmp_path / "models"))
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in PuLID(PuLIDConfig()).state_dict().items()}
    entry = load_catalog().entry("pulid-mini")
    path = tmp_path / "models" / "mini" / "pulid.safetensors"
    path.parent.mkdir(parents=True)
    published(shapes, path)
    assert len(safetensors_header(path).shapes) == 312 and path.stat().st_size > 1_142_000_000
    # The checksum of 1.1 GB of zeros would take seconds and say nothing here.
    from deployments.checking import _MODULES, check_tensors

    assert check_tensors(path, _MODULES[(entry.family, "adapter")]) == 312
    published({**shapes, "pulid_ca.20.to_q.weight": (2048, 3072)}, path)
    with pytest.raises(CheckpointMismatch, match="1 left over: pulid_ca.20.to_q.weight"):
        check_tensors(path, _MODULES[(entry.family, "adapter")])


def test_check_tells_what_is_not_there() -> None:
    run = CliRunner().invoke(app, ["models", "check", "pulid-v0.9.1"])
    assert run.exit_code == 1 and "WRONG  adapter" in run.stdout and "guozinan/PuLID" in run.stdout


def test_the_list_says_what_may_be_sold() -> None:
    run = CliRunner().invoke(app, ["models", "list"], env={"COLUMNS": "200"})
    lines = {line.split()[0]: line.split()[-1] for line in run.stdout.splitlines()}
    assert lines["flux1-mini"] == "yes" and lines["flux1-dev"] == "no"
