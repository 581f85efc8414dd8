"""The face and body models of mini: their layouts against the libraries that read them, their training data, their files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from insightface.app import FaceAnalysis
from insightface.model_zoo import get_model
from torch import Tensor, nn

from training.mini.faces import attributes, body_keypoints, detector, gender_age, onnx_files, parser, recognisers, verification
from training.mini.faces.crops import Crowd, parsing_crops, recognition_crops
from training.mini.faces.degradations import degraded
from training.mini.faces.detector_canvases import Canvases, Format, assembled, placed
from training.mini.faces.detector_targets import STRIDES, Faces, anchors_at, targets
from training.mini.faces.export import export_onnx, folded, halve
from training.mini.schedule import SMOKE_STEPS, TimedSchedule
from training.mini.world.landmarks import ARCFACE_112, arcface_grid, landmarks
from training.mini.world.parsing import SKIN

CPU = torch.device("cpu")
TRAININGS = (
    recognisers.train_recogniser, recognisers.train_judge, detector.train_detector, parser.train_parser,
    gender_age.train_gender_age, body_keypoints.train_body_keypoints, attributes.train_attributes,
)  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage, three steps each."""
    folder = tmp_path_factory.mktemp("faces")
    for train in TRAININGS:
        facts = train(1.0, CPU, folder, smoke=True)
        assert facts["steps"] == SMOKE_STEPS and facts["loss"] > 0
        assert facts["fp16_difference"] < 1e-2
    return folder


@pytest.fixture(scope="module")
def pack(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the workspace where a pack has them."""
    folder = tmp_path_factory.mktemp("pack")
    places = {
        "insightface": ("scrfd.onnx", "arcface.onnx", "genderage.onnx"), "judge": ("arcface_judge.onnx",), "parser": ("face_parser.onnx",),
        "keypoints": ("body_keypoints.onnx",), "attributes": ("attributes.onnx",),
    }  # fmt: skip
    for place, files in places.items():
        (folder / place).mkdir()
        for file in files:
            shutil.copy(workspace / file, folder / place / file)
    return folder


# --- files and the libraries that open them ---


def test_stock_insightface_opens_the_folder_and_knows_each_model(pack: Path) -> None:
    analysis = FaceAnalysis(name=str(pack / "insightface"), root=str(pack), providers=["CPUExecutionProvider"])
    assert set(analysis.models) == {"detection", "recognition", "genderage"}
    assert (analysis.models["recognition"].input_mean, analysis.models["recognition"].input_std) == (127.5, 127.5)
    assert (analysis.models["genderage"].input_mean, analysis.models["genderage"].input_std) == (127.5, 128.0)
    found = analysis.det_model
    assert (found.fmc, found._num_anchors, found.use_kps, found.static_input_size) == (3, 2, True, None)
    analysis.prepare(ctx_id=-1)  # 128 and 640, each a session of its own with fixed shapes
    boxes, points = found.detect(np.zeros((192, 160, 3), np.uint8))
    assert boxes.shape[1] == 5 and points.shape[1:] == (5, 2)
    assert found.resolution_session_input_sizes == ((128, 128), (640, 640))


def test_recognisers_embed_through_insightface_as_in_torch(workspace: Path, pack: Path) -> None:
    crops = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), dtype=np.uint8)
    planes = torch.from_numpy(crops[..., ::-1].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    files = {"recogniser": pack / "insightface" / "arcface.onnx", "judge": pack / "judge" / "arcface_judge.onnx"}
    loaders = {"recogniser": recognisers.load_recogniser, "judge": recognisers.load_judge}
    for name, load in loaders.items():
        with torch.no_grad():
            expected = load(workspace / f"{name}.safetensors")(planes).numpy()
        answered = get_model(str(files[name]), providers=["CPUExecutionProvider"]).get_feat(list(crops))
        assert answered.shape == (3, 512)
        np.testing.assert_allclose(answered, expected, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("side", [(128, 128), (192, 192), (320, 640)])
def test_exported_detector_answers_as_in_torch_at_any_size(workspace: Path, side: tuple[int, int]) -> None:
    picture = torch.rand(1, 3, *side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        expected = detector.load_detector(workspace / "detector.safetensors")(picture)
    answered = onnxruntime.InferenceSession(str(workspace / "scrfd.onnx")).run(None, {"input.1": picture.numpy()})
    for values, wanted in zip(answered, expected, strict=True):
        np.testing.assert_allclose(values, wanted.numpy(), atol=1e-2 * max(1.0, float(wanted.abs().max())))
    assert [len(values) for values in answered[:3]] == [side[0] // s * (side[1] // s) * 2 for s in STRIDES]


def test_files_are_the_same_bytes_when_made_again_elsewhere(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"recogniser\.safetensors"):
        onnx_files.write_all(tmp_path)
    for name in ("gender_age", "attributes"):
        shutil.copy(workspace / f"{name}.safetensors", tmp_path)
    assert set(onnx_files.write_all(tmp_path)) == {"genderage.onnx", "attributes.onnx"}
    for file in ("genderage.onnx", "attributes.onnx"):
        assert (tmp_path / file).read_bytes() == (workspace / file).read_bytes()


def test_all_files_fit_the_budget(workspace: Path) -> None:
    assert sum((workspace / form.file).stat().st_size for _, form in onnx_files.MODELS.values()) <= 6_600_000


def test_no_file_names_the_machine_that_made_it(workspace: Path) -> None:
    for _, form in onnx_files.MODELS.values():
        model = onnx.load(workspace / form.file)
        assert not any([*model.metadata_props, *(p for node in model.graph.node for p in node.metadata_props)])
        assert b"/" + b"python3" not in model.SerializeToString()


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3))
        for layer in self.body:
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.running_mean)  # type: ignore[arg-type]
                nn.init.uniform_(layer.running_var, 0.5, 2.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))  # type: ignore[no-any-return]


def test_export_folds_halves_and_measures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = _Net().eval(), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(folded(net)(x), net(x))
    difference = export_onnx(net, x, tmp_path / "net.onnx", ("mean",), {0: "batch"})
    assert 0 < difference < 1e-2
    assert (tmp_path / "net.onnx").stat().st_size < 0.6 * 4 * sum(p.numel() for p in net.parameters())
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    five = torch.randn(5, 3, 16, 16)
    np.testing.assert_allclose(session.run(None, {"input": five.numpy()})[0], net(five).detach().numpy(), atol=1e-2)


def test_halving_refuses_what_fp16_cannot_hold() -> None:
    weight = onnx.numpy_helper.from_array(np.full((32, 32), 7e4, np.float32), "enormous")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "enormous"], ["y"])], "g", [value("x", 1, [1, 32])], [value("y", 1, [1, 32])], [weight]
    )
    with pytest.raises(ValueError, match="enormous"):
        halve(onnx.helper.make_model(graph))


# --- the detector's answers and what it is shown ---


class _Oracle(nn.Module):
    """Answers what `targets` wants for one known face, whatever it is shown, in the exported layout."""

    def __init__(self, faces: Faces, side: int) -> None:
        super().__init__()
        wanted = [targets(faces, stride, (side, side)) for stride in STRIDES]
        scores = [w.score.view(-1, 1) for w in wanted]
        values = [*scores, *(w.box.view(-1, 4) for w in wanted), *(w.points.view(-1, 10) for w in wanted)]
        for number, value in enumerate(values):
            self.register_buffer(f"answer_{number}", value)

    def forward(self, picture: Tensor) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f"answer_{number}") + 0 * picture.mean() for number in range(9))


@pytest.mark.parametrize(
    ("size", "side"), [(17.0, 192), (40.0, 192), (57.0, 192), (90.0, 192), (150.0, 192), (180.0, 640), (300.0, 640), (460.0, 640)]
)
def test_wanted_answers_decode_in_insightface_to_exactly_one_right_face(tmp_path: Path, size: float, side: int) -> None:
    x, y = side * 0.54, side * 0.46
    box = torch.tensor([x - size * 0.42, y - size / 2, x + size * 0.42, y + size / 2])
    points = box[:2] + torch.tensor([[0.3, 0.4], [0.7, 0.38], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]]) * (box[2:] - box[:2])
    yes = torch.ones(1, 1, dtype=torch.bool)
    oracle = _Oracle(Faces(box.view(1, 1, 4), points.view(1, 1, 5, 2), yes, ~yes), side)
    export_onnx(oracle, torch.rand(1, 3, side, side), tmp_path / "scrfd.onnx", detector.FORM.outputs, {})
    model = get_model(str(tmp_path / "scrfd.onnx"), providers=["CPUExecutionProvider"])
    boxes, landmarks_found = model.detect(np.zeros((side, side, 3), np.uint8))
    assert len(boxes) == 1 and boxes[0, 4] > 0.6
    np.testing.assert_allclose(boxes[0, :4], box.numpy(), atol=size / 200)
    np.testing.assert_allclose(landmarks_found[0], points.numpy(), atol=size / 200)


def test_ignored_faces_cost_nothing_and_counted_ones_are_wanted() -> None:
    boxes = torch.tensor([[[20.0, 20, 60, 64], [100, 100, 140, 144]]])
    faces = Faces(boxes, torch.zeros(1, 2, 5, 2), torch.tensor([[True, False]]), torch.tensor([[False, True]]))
    wanted = targets(faces, 8, (192, 192))
    place, _ = anchors_at(8, (192, 192), CPU)
    ignored = ((place >= 100) & (place <= torch.tensor([140, 144]))).all(-1)
    assert (wanted.weight[0, ignored] == 0).all() and (wanted.weight[0, ~ignored] == 1).all()
    assert wanted.score[0, ignored].max() < 1e-6
    best = place[wanted.score[0].argmax()]
    assert (best - torch.tensor([40.0, 42.0])).abs().max() <= 4


def test_faces_move_with_their_pictures_onto_canvases() -> None:
    """Pictures whose red and green are their own x and y: after placing, the colour under a point says where the point was."""
    torch.manual_seed(3)
    n, axis = 64, (torch.arange(192) + 0.5) / 96 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    pictures = torch.stack([x, y, torch.zeros_like(x)]).expand(n, -1, -1, -1)
    points = (torch.rand(n, 1, 5, 2) - 0.5) * 0.6
    boxes = torch.tensor([-0.4, -0.45, 0.4, 0.45]).expand(n, 1, 4)
    form = Format(n // 4, 256, 2)
    shown = assembled(placed(pictures, boxes, points, torch.ones(n, 1, dtype=torch.bool), 128), form)
    assert shown.pictures.shape == (16, 3, 256, 256) and shown.faces.boxes.shape == (16, 4, 4)
    assert shown.faces.counted.float().mean() > 0.6
    at = ((shown.faces.points.flatten(1, 2) + 0.5) / 256 * 2 - 1)[:, None]
    colour = nn.functional.grid_sample(shown.pictures, at, align_corners=False)[:, :2, 0].transpose(1, 2).reshape(16, 4, 5, 2)
    counted = shown.faces.counted
    inside = ((shown.faces.points > 1) & (shown.faces.points < 255)).all(-1)[counted]
    difference = (colour[counted] - points.view(16, 4, 5, 2)[counted]).abs().amax(-1)[inside]
    assert (difference < 0.1).float().mean() > 0.97, "neighbouring tiles may cut a point or two"


def test_canvases_hold_faces_of_all_sizes_groups_and_nobody() -> None:
    canvases = Canvases(Crowd(16, 5, CPU), reduced=True)
    shown = [canvases.draw() for _ in range(4)]
    assert {s.pictures.shape[-1] for s in shown} == {192, 256}
    assert any(s.faces.counted.any() for s in shown)
    for s in shown:
        assert s.pictures.abs().max() <= 1 and not (s.faces.counted & s.faces.ignored).any()


# --- crops, damages, keypoints ---


def test_crops_show_the_same_face_at_the_template() -> None:
    sitters = Crowd(8, 1, CPU).draw(4)
    crops = recognition_crops(sitters, jitter=0.0)
    assert crops.shape == (4, 3, 112, 112) and crops.abs().max() <= 1
    grid = arcface_grid(landmarks(sitters.identity, sitters.scene))
    nose_x, nose_y = (round(v) for v in ARCFACE_112[2])
    true_nose = landmarks(sitters.identity, sitters.scene)[:, 2]
    assert (grid.x[:, nose_y, nose_x] - true_nose[:, 0]).abs().max() < 0.08
    _, labels = parsing_crops(sitters, 128, jitter=0.0)
    assert ((labels == SKIN).float().mean((1, 2)) > 0.1).all()


def test_damage_changes_pictures_but_moves_nothing_without_wobble() -> None:
    torch.manual_seed(4)
    pictures = torch.full((32, 3, 64, 64), -0.8)
    pictures[:, :, 20:29, 36:45] = 0.8
    damaged = degraded(pictures, wobble=0.0, colour=0.0)
    assert damaged.abs().max() <= 1 and ((damaged - pictures).abs().amax((1, 2, 3)) > 0.02).float().mean() > 0.7
    weight = (damaged.mean(1) - damaged.mean(1).flatten(1).median(1).values.view(-1, 1, 1)).clamp_min(0.4) - 0.4
    axis = torch.arange(64.0)
    x, y = ((weight * a).sum((1, 2)) / weight.sum((1, 2)) for a in (axis, axis[:, None]))
    assert (x - 40).abs().max() < 0.6 and (y - 24).abs().max() < 0.6
    again = [degraded(pictures) for _ in range(2) if torch.manual_seed(9)]
    assert torch.equal(again[0], again[1])


def test_heatmaps_become_the_joints_they_were_drawn_from() -> None:
    points = (torch.rand(16, 18, 2, generator=torch.Generator().manual_seed(2)) * 2 - 1) * 0.95
    visible = torch.arange(18).expand(16, -1) % 3 != 0
    found, peaks = body_keypoints.joints_from(body_keypoints.heatmaps_of(points, visible))
    assert torch.equal(peaks >= body_keypoints.VISIBLE_FROM, visible)
    assert ((found - points).norm(dim=-1)[visible] * 96).max() < 2.0
    assert ((found - points).norm(dim=-1)[visible] * 96).median() < 0.05


# --- recognisers, figures ---


@pytest.mark.parametrize("build", [recognisers.residual_recogniser, recognisers.mobile_recogniser])
def test_recognisers_are_differentiable_and_of_arcface_length(build: type[nn.Module]) -> None:
    torch.manual_seed(5)
    network, crops = build(), torch.randn(16, 3, 112, 112, requires_grad=True)
    embeddings = network(crops)
    assert 14 < float(embeddings.detach().norm(dim=1).mean()) < 18
    (1 - nn.functional.cosine_similarity(embeddings[:8], embeddings[8:])).sum().backward()
    assert crops.grad is not None and (crops.grad.abs().amax((1, 2, 3)) > 0).all()


def test_separation_says_how_well_people_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(6)
    people = nn.functional.normalize(torch.randn(200, 64, generator=generator), dim=1)
    perfect = recognisers.separation(people, people)
    assert perfect["same"] == 1 and perfect["tar"] == 1 and abs(perfect["different"]) < 0.02
    strangers = nn.functional.normalize(torch.randn(200, 64, generator=generator), dim=1)
    assert recognisers.separation(people, strangers)["tar"] < 0.05


def test_verification_measures_every_model_of_a_pack(pack: Path) -> None:
    figures = verification.verify(pack, 4)
    assert set(figures["detection"]) == {"default", "192", "320"}
    assert set(figures["recognition"]) == {"recogniser", "judge"}
    assert set(figures["attributes"]) == set(attributes.LABELS) and 0 <= figures["parser"]["mean_iou"] <= 1


def test_overlap_of_boxes() -> None:
    a = np.array([0, 0, 2, 2], np.float32)
    assert verification.overlap(a, a) == 1 and verification.overlap(a, a + 3) == 0
    assert verification.overlap(a, a + np.array([1, 0, 1, 0], np.float32)) == pytest.approx(1 / 3)


# --- the schedule ---


class _Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def _schedule(clock: _Clock, **options: bool) -> tuple[torch.optim.Optimizer, TimedSchedule]:
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 10.0)])
    return optimizer, TimedSchedule(optimizer, 100.0, warmup=0.1, clock=clock, **options)


def test_schedule_rises_and_falls_by_the_clock_and_not_while_compiling() -> None:
    clock = _Clock()
    optimizer, schedule = _schedule(clock)

    def rates() -> list[float]:
        return [round(group["lr"], 6) for group in optimizer.param_groups]

    for _ in range(2):
        clock.now += 500.0  # compilation
        assert not schedule.step()
    assert schedule.fraction() == 0 and rates() == [0.02, 0.2]
    clock.now += 5.0
    assert not schedule.step() and rates() == [0.5, 5.0]
    clock.now += 5.0
    assert not schedule.step() and rates() == [1.0, 10.0]
    clock.now += 45.0
    assert not schedule.step() and rates() == [0.51, 5.1]
    clock.now += 45.1
    assert schedule.step() and rates() == [0.02, 0.2] and schedule.steps == 6


def test_schedule_goes_on_where_it_stopped() -> None:
    clock = _Clock()
    optimizer, schedule = _schedule(clock)
    schedule.step(), schedule.step()
    clock.now += 55.0
    schedule.step()
    state = schedule.state_dict()
    clock.now += 3600.0
    optimizer, resumed = _schedule(clock)
    resumed.load_state_dict(state)
    assert resumed.fraction() == pytest.approx(0.55) and optimizer.param_groups[0]["lr"] == pytest.approx(0.51)
    clock.now += 30.0  # compiling again
    resumed.step(), resumed.step()
    assert resumed.fraction() == pytest.approx(0.55) and resumed.steps == 5
    clock.now += 45.1
    assert resumed.step()


def test_schedule_of_a_trial_run_counts_steps() -> None:
    _, schedule = _schedule(_Clock(), smoke=True)
    assert [schedule.step() for _ in range(SMOKE_STEPS)] == [False, False, True]
    with pytest.raises(ValueError, match="positive number of seconds"):
        TimedSchedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), 0.0)
