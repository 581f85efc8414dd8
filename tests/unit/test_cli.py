"""The command line against a true server over a socket: what it sends, leaves behind, prints, and how it ends when something is wrong."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from deployments.errors import LikenessError, MultipleFaces
from deployments.images import decode, encode
from serve.answers import (
    AnalyzeResponse,
    CompareResponse,
    FaceInfo,
    GenerateResponse,
    ImageItem,
    LicenceInfo,
    Score,
    WorkflowInfo,
    WorkflowsResponse,
)
from serve.cli import app
from serve.normalise import parse
from serve.presets import Preset, load_presets
from serve.problem import MEDIA_TYPE, problem_of

ROOT = Path(__file__).resolve().parents[2]
ADA, BRUNO = (str(ROOT / "samples" / "characters" / f"{name}-1.png") for name in ("ada", "bruno"))
FACE = FaceInfo(index=0, box=(1, 2, 30, 40), score=0.99, landmarks=[(1, 2)] * 5, age=31, sex="F")


class Server(ThreadingHTTPServer):
    """Checks every body as the real one does, and draws one flat colour a seed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[dict[str, Any]] = []
        self.presets = load_presets()

    def answer(self, path: str, body: dict[str, Any]) -> str:
        self.bodies.append(body)
        if path == "/v1/faces/analyze":
            return AnalyzeResponse(width=192, height=192, faces=[FACE]).model_dump_json()
        if path == "/v1/faces/compare":
            same = body["first"] == body["second"]
            verdict: Any = "same" if same else "different"
            return CompareResponse(
                cosine=1.0 if same else 0.01, threshold=body["threshold"], verdict=verdict, model="judge"
            ).model_dump_json()
        if path == "/v1/workflows":
            infos = [self.info(preset) for preset in self.presets.values()]
            return WorkflowsResponse(workflows=infos, methods={}).model_dump_json()
        request = parse(None, body, self.presets)
        if request.prompt == "a crowd":
            raise MultipleFaces("Picture 0 of person 0 shows 2 faces.", details={"boxes": [[0, 0, 9, 9], [9, 9, 20, 20]]})
        return self.drawn(request.seed or 0, request.n, request.output_format).model_dump_json()

    def info(self, preset: Preset) -> WorkflowInfo:
        return WorkflowInfo(
            name=preset.name, description=preset.description, endpoint=preset.endpoint, family=preset.family, method=preset.method,
            bases=["flux1-dev"], defaults={}, request_schema={},
        )  # fmt: skip

    def drawn(self, seed: int, n: int, kind: Any) -> GenerateResponse:
        items = [
            ImageItem(
                b64_json=base64.b64encode(encode(np.full((64, 64, 3), 40 * k, np.uint8), kind)).decode(),
                seed=seed + k, width=64, height=64, format=kind,
                scores=[Score(person=0, reference=0, cosine=0.5 if k else None, verdict="same" if k else "no_face")],
            )
            for k in range(n)
        ]  # fmt: skip
        licence = LicenceInfo(model="flux1-dev", name="NC", commercial=False)
        return GenerateResponse(
            created=1, model="flux1-dev", data=items, timings={"denoise": 1.5}, licences=[licence], warnings=["The prompt was cut."]
        )


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def _answer(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
        try:
            status, media, content = 200, "application/json", self.server.answer(self.path, body)
        except LikenessError as error:
            status, media, content = error.status, MEDIA_TYPE, problem_of(error).model_dump_json()
        self.send_response(status)
        self.send_header("content-type", media)
        self.send_header("content-length", str(len(content.encode())))
        self.end_headers()
        self.wfile.write(content.encode())

    do_GET = do_POST = _answer

    def log_message(self, format: str, *arguments: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


def run(server: Server, *arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments, "--server", f"http://127.0.0.1:{server.server_port}"], env={"COLUMNS": "200"})


def test_pictures_sheet_and_scores_are_written(server: Server, tmp_path: Path) -> None:
    done = run(
        server,
        "flux-pulid",
        "-p",
        "a park",
        "-r",
        ADA,
        "-r",
        BRUNO,
        "-n",
        "3",
        "--seed",
        "5",
        "--steps",
        "8",
        "--style",
        "stylized",
        "-o",
        str(tmp_path),
    )
    assert done.exit_code == 0, done.output
    (body,) = server.bodies
    assert {key: value for key, value in body.items() if key != "reference_images"} == {
        "workflow": "flux-pulid", "prompt": "a park", "n": 3, "seed": 5, "num_inference_steps": 8, "style": "stylized",
    }  # fmt: skip
    assert base64.b64decode(body["reference_images"][1].partition(",")[2]) == Path(BRUNO).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {
        f"flux-pulid-{name}" for name in ("5.png", "6.png", "7.png", "5-sheet.png", "5.json")
    }
    assert decode((tmp_path / "flux-pulid-6.png").read_bytes())[0, 0].tolist() == [40, 40, 40]
    facts = json.loads((tmp_path / "flux-pulid-5.json").read_text())
    assert [item["path"] for item in facts["data"]] == ["flux-pulid-5.png", "flux-pulid-6.png", "flux-pulid-7.png"]
    assert facts["data"][0]["b64_json"] is None and facts["data"][1]["scores"][0]["cosine"] == 0.5
    for said in ("no face", "0.500 same", str(tmp_path / "flux-pulid-7.png")):
        assert said in done.stdout
    assert "The prompt was cut" in done.stderr and "Not for commercial use" in done.stderr and "denoise 1.50 s" in done.stderr


def test_generate_takes_pulid_where_there_is_a_face_and_the_base_alone_where_not(server: Server, tmp_path: Path) -> None:
    assert run(server, "generate", "-p", "x", "-r", ADA, "-o", str(tmp_path)).exit_code == 0
    assert run(server, "generate", "-p", "x", "-o", str(tmp_path)).exit_code == 0
    assert (
        run(
            server, "generate", "-p", "x", "-r", ADA, "-w", "flux-ipadapter-faceid", "--weight-type", "sigmoid", "-o", str(tmp_path)
        ).exit_code
        == 0
    )
    assert [body.get("workflow") for body in server.bodies] == ["flux-pulid", None, "flux-ipadapter-faceid"]


def test_a_body_from_a_file_and_options_over_it(server: Server, tmp_path: Path) -> None:
    body = tmp_path / "body.yaml"
    people = f"identities:\n- {{method: pulid, images: [{ADA}]}}\n- {{method: pulid, images: [{BRUNO}], weight: 0.5}}\n"
    body.write_text(f"prompt: two people\nseed: 1\n{people}")
    done = run(server, "generate", "--body", str(body), "--seed", "9", "--json", "--output-format", "webp", "-o", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    (sent,) = server.bodies
    assert sent["seed"] == 9 and sent["identities"][1]["images"][0].startswith("data:image/png;base64,")
    printed = json.loads(done.stdout)
    assert printed["files"][0].endswith("flux1-dev-9.webp") and "b64_json" not in printed["data"][0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("flux-pulid", "-p", "a crowd", "-r", ADA), ("multiple_faces", "shows 2 faces", "face_index")),
        (("flux-pulid", "-p", "x", "-r", "nowhere.png"), ("nowhere.png cannot be read", "Check the path")),
        (("flux-pulid", "-r", ADA), ("`prompt`: this field is needed",)),
        (("flux-pulid", "-p", "x", "-r", ADA, "--steps", "1000"), ("`num_inference_steps`", "100")),
        (("generate", "-p", "x", "-w", "flux-pulld"), ("no workflow", "Did you mean flux-pulid")),
        (("generate", "-p", "x", "--body", "nowhere.yaml"), ("nowhere.yaml cannot be read",)),
        (("analyze", "nowhere.png"), ("nowhere.png cannot be read",)),
    ],
)
def test_errors_are_told_with_a_way_out_and_status_1(
    server: Server, tmp_path: Path, arguments: tuple[str, ...], said: tuple[str, ...]
) -> None:
    out = ("-o", str(tmp_path)) if arguments[0] != "analyze" else ()
    done = run(server, *arguments, *out)
    assert done.exit_code == 1 and "Traceback" not in done.output
    for text in said:
        assert text in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_nobody_at_the_address(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serve.cli", "flux-pulid", "-p", "x", "-r", ADA, "--server", "http://127.0.0.1:1", "-o", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "does not answer" in done.stderr and "likeness serve" in done.stderr and "Traceback" not in done.stderr


def test_faces_and_comparisons(server: Server) -> None:
    analysed = run(server, "analyze", ADA)
    assert analysed.exit_code == 0 and "1 2 30 40" in analysed.stdout and "31" in analysed.stdout
    assert json.loads(run(server, "analyze", ADA, "--json").stdout)["faces"][0]["score"] == 0.99
    assert run(server, "compare", ADA, ADA).stdout.startswith("same: cosine 1.000, threshold 0.3")
    assert run(server, "compare", ADA, BRUNO, "--threshold", "0.5").stdout.startswith("different: cosine 0.010, threshold 0.5")
    listed = run(server, "workflows").stdout
    assert all(name in listed for name in load_presets())


def test_every_workflow_is_a_command_whose_help_teaches() -> None:
    top = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout
    for preset in load_presets().values():
        assert preset.name in top
        text = CliRunner().invoke(app, [preset.name, "--help"], env={"COLUMNS": "200"}).stdout
        spelt = {"reference_images", "num_inference_steps", "response_format", "loras", "controls"}
        assert "--lora" in text and "--control" in text
        for name in preset.request_type.model_fields.keys() - spelt:
            assert f"--{name.replace('_', '-')}" in text, name
    pulid = " ".join(CliRunner().invoke(app, ["flux-pulid", "--help"], env={"COLUMNS": "200"}).stdout.split())
    for advice in ("The likeness is too weak: lower --start-step", "stylized", "It takes twice the time", "lower --guidance-scale to 2.5"):
        assert advice in pulid


def test_help_starts_without_any_model_library() -> None:
    heavy = {"torch", "ray", "diffusers", "transformers", "onnxruntime", "insightface", "huggingface_hub"}
    source = f"import serve.cli, sys; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
