"""AppSettings: what runs, in how many replicas, on which share of a GPU. The type of `args` in configs/serve/*.yaml.

Ray's own schemas ignore keys they do not know; these do not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deployments.control_server import ControlSettings
from deployments.denoiser_server import DenoiserSettings
from deployments.errors import InvalidCatalog
from deployments.face_server import FaceSettings
from deployments.hardware import TorchSettings
from deployments.images import DEFAULT_LIMITS, Limits
from deployments.job_runner import JobSettings
from deployments.prompt_server import PromptSettings
from deployments.provenance import ProvenanceSettings
from deployments.safety.gate import GateSettings
from deployments.store.settings import StoreSettings
from deployments.urls import UrlPolicy
from serve.door_settings import DoorSettings
from training.orders import EVALUATE
from training.placement import load_placements, pool_of

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "serve"
_RETRY_AFTER_S = 2
_GPU_CLASS_LABEL = "gpu-class"
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
"""Environment in which the model libraries keep their bars and their talk of absent optional packages to themselves."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Autoscaling(_Strict):
    """Replicas follow the load. target_ongoing_requests: what one replica should have at a time, running and waiting."""

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(ge=1)
    target_ongoing_requests: float = Field(default=1.0, gt=0)
    upscale_delay_s: float = Field(default=30.0, ge=0)
    downscale_delay_s: float = Field(default=600.0, ge=0)


class Pool(_Strict):
    """The replicas of one deployment.

    num_cpus, num_gpus: reserved for each replica; fractions of a GPU are kept by the process itself (see deployments/hardware.py).
    gpu_class: our own label of nodes (`gpu-class: a6000`); Ray's autodetected names differ by version.
    max_ongoing_requests: what a replica works on at once. max_queued_requests: what may wait for a free one; beyond it, queue_full.
    The denoiser's queue is the one that fills; those before it are longer, so that whoever is refused is refused there.
    graceful_shutdown_s: how long a replica that goes may finish its work: longer than the longest picture takes.
    """

    replicas: int = Field(default=1, ge=1)
    autoscaling: Autoscaling | None = None
    num_cpus: float = Field(default=0.1, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    gpu_class: str | None = None
    max_ongoing_requests: int = Field(default=1, ge=1)
    max_queued_requests: int = Field(default=1024, ge=1)
    graceful_shutdown_s: float = Field(default=60.0, gt=0)

    @property
    def most(self) -> int:
        """How many replicas there are at most."""
        return self.autoscaling.max_replicas if self.autoscaling else self.replicas

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a Ray Serve deployment."""
        actor: dict[str, Any] = {"num_cpus": self.num_cpus, **({"num_gpus": self.num_gpus} if self.num_gpus else {})}
        if self.gpu_class is not None:
            actor["label_selector"] = {_GPU_CLASS_LABEL: self.gpu_class}
        scaling: dict[str, Any] = (
            {"autoscaling_config": self.autoscaling.model_dump()} if self.autoscaling else {"num_replicas": self.replicas}
        )
        return {
            **scaling,
            "ray_actor_options": actor,
            "max_ongoing_requests": self.max_ongoing_requests,
            "max_queued_requests": self.max_queued_requests,
            # Of the ingress; what is refused further inside is a LikenessError by then.
            "backpressure_config": {"status_code": 429, "retry_after_s": _RETRY_AFTER_S},
            "graceful_shutdown_timeout_s": self.graceful_shutdown_s,
        }


class FacePool(_Strict):
    """FaceServer."""

    models: FaceSettings = FaceSettings(faces="faces-mini", judge="face-judge-mini", parser="face-parser-mini")
    pool: Pool = Pool(max_ongoing_requests=2)


class ControlPool(_Strict):
    """ControlServer."""

    models: ControlSettings = ControlSettings(keypoints="body-keypoints-mini")
    pool: Pool = Pool(max_ongoing_requests=2)


class GatePool(_Strict):
    """GateServer."""

    models: GateSettings = GateSettings()
    pool: Pool = Pool(max_ongoing_requests=2)


class TrainingSection(_Strict):
    """Trainings and evaluations as jobs.

    placement: a class of configs/training/placement.yaml, where trainings run. slots: how many of them at once; evaluations: likewise, each
    of which draws one picture after another. preset: of configs/training, where a request names none; by default one for `base`. datasets:
    an absolute folder of curated datasets that every caller with the scope `train` may train on, by name. plan: of configs/evaluation,
    where an evaluation names none. candidates: how many checkpoints are compared. quota, evaluation_quota: how many trainings, and how
    many evaluations, of one owner may wait or run. sets: how many requests for either an ingress takes in at once (each may hold
    `max_set_bytes`, on the disk and then in memory), and owner_sets how many of one owner's.
    shown: how many pictures one may be shown, steps x batch x grad_accum: eight times as many as the largest preset.
    attempts: how often one is begun; each death of a runner that follows one counts. sweep_s: how often what nobody wants is looked for.
    """

    enabled: bool = True
    placement: str = "local"
    slots: int = Field(default=1, ge=1)
    evaluations: int = Field(default=1, ge=1)
    preset: str | None = None
    datasets: Path | None = None
    plan: str | None = None
    candidates: int = Field(default=4, ge=1, le=20)
    quota: int = Field(default=10, ge=1)
    evaluation_quota: int = Field(default=10, ge=1)
    sets: int = Field(default=4, ge=1)
    owner_sets: int = Field(default=2, ge=1)
    shown: int = Field(default=40_000, ge=1)
    attempts: int = Field(default=20, ge=1)
    sweep_s: float = Field(default=10.0, gt=0)

    @field_validator("placement")
    @classmethod
    def _placement_is_there(cls, placement: str) -> str:
        """Or every request would be refused for what the operator wrote."""
        known = load_placements()
        if placement not in known:
            raise ValueError(f"{placement!r} is no class of configs/training/placement.yaml; there are: {', '.join(sorted(known))}")
        return placement


class RunnerPool(_Strict):
    """JobServer: runners of jobs."""

    jobs: JobSettings = JobSettings()
    pool: Pool = Pool(max_ongoing_requests=64, graceful_shutdown_s=120)


class TorchPool(_Strict):
    """A deployment whose process computes with torch. torch: what that may use of the machine, within what the pool reserves."""

    torch: TorchSettings = TorchSettings()
    pool: Pool = Pool(max_ongoing_requests=2)

    @model_validator(mode="after")
    def _gpu_is_reserved(self) -> Self:
        torch, pool = self.torch, self.pool
        if (torch.device == "cuda") != (pool.num_gpus > 0):
            raise ValueError(f"device is {torch.device} with num_gpus {pool.num_gpus:g}; a GPU is used exactly if it is reserved")
        if torch.device == "cuda" and torch.gpu_fraction > pool.num_gpus:
            raise ValueError(f"gpu_fraction {torch.gpu_fraction:g} is more than the num_gpus {pool.num_gpus:g} that is reserved")
        return self


class PromptPool(TorchPool):
    """PromptServer."""

    torch: PromptSettings = PromptSettings()


class IdentityPool(TorchPool):
    """IdentityServer."""


class DenoiserPool(TorchPool):
    """DenoiserServer. One transformer draws one picture at a time. Where there is one replica, a second request may wait in its hand, and
    begins when the first has ended: Serve would bring it up to half a second later (its router looks for room ever more seldom). Where
    there are several, another of them might be free meanwhile, which Serve's router need not know: then each has one."""

    torch: DenoiserSettings = DenoiserSettings()
    pool: Pool = Pool(max_ongoing_requests=2, max_queued_requests=32, graceful_shutdown_s=120)

    @property
    def room(self) -> int:
        """How many requests may be drawn or wait at once, in the eyes of each replica of Workflows."""
        return self.pool.most + self.pool.max_queued_requests

    @model_validator(mode="after")
    def _one_at_a_time(self) -> Self:
        if self.pool.max_ongoing_requests > 2:
            raise ValueError("a denoiser draws one picture at a time: max_ongoing_requests is 1 or 2; add replicas instead")
        if self.pool.max_ongoing_requests > 1 and self.pool.most > 1:
            raise ValueError("of several denoisers each has one request at a time: max_ongoing_requests is 1; another one may be free")
        return self


class PictureLimits(_Strict):
    """What a picture that comes in may be: bytes of its file, pixels (width x height)."""

    bytes: int = Field(default=DEFAULT_LIMITS.bytes, ge=2**10)
    pixels: int = Field(default=DEFAULT_LIMITS.pixels, ge=2**10)

    @property
    def value(self) -> Limits:
        return Limits(bytes=self.bytes, pixels=self.pixels)


class AppSettings(_Strict):
    """base: the catalogue's id of the base model; methods: of the identity methods that fit it and are deployed with it; controlnets: of
    its ControlNets.

    workflows, ingress: these hold connections and no models; thousands may wait. limits: of reference pictures, where they are
    opened; max_body_bytes: of a request; max_set_bytes: of a form with the pictures of a training or an evaluation, and of those that they
    name by address; max_lora_bytes: of a LoRA's file. store: where LoRAs, characters, jobs and keys are kept.
    training: trainings and evaluations. door: who may come in. pictures_by_url: which addresses pictures are fetched from, none by
    default; webhooks: which are posted to. gate: what judges pictures. provenance: what signs them. output_folder: where
    `response_format: file` writes; None refuses it.
    """

    base: str = "flux1-mini"
    methods: tuple[str, ...] = ("pulid-mini", "xlabs-ip-adapter-mini", "instantx-ip-adapter-mini")
    controlnets: tuple[str, ...] = ("flux1-mini-controlnet-union",)
    faces: FacePool = FacePool()
    controls: ControlPool = ControlPool()
    prompts: PromptPool = PromptPool()
    identity: IdentityPool = IdentityPool()
    loras: Pool = Pool(max_ongoing_requests=4, max_queued_requests=16)
    gate: GatePool = GatePool()
    runners: RunnerPool = RunnerPool()
    training: TrainingSection = TrainingSection()
    denoiser: DenoiserPool = DenoiserPool()
    workflows: Pool = Pool(max_ongoing_requests=512, max_queued_requests=1024)
    ingress: Pool = Pool(max_ongoing_requests=1024, max_queued_requests=2048)
    limits: PictureLimits = PictureLimits()
    max_body_bytes: int = Field(default=64 * 2**20, ge=2**10)
    max_set_bytes: int = Field(default=512 * 2**20, ge=2**10)
    store: StoreSettings = StoreSettings()
    door: DoorSettings = DoorSettings()
    pictures_by_url: UrlPolicy = UrlPolicy()
    webhooks: UrlPolicy = UrlPolicy(fetch="public", timeout_s=15)
    provenance: ProvenanceSettings = ProvenanceSettings()
    max_lora_bytes: int = Field(default=2**30, ge=2**10)
    output_folder: str | None = None

    @property
    def jobs(self) -> JobSettings:
        """Of the runners. Of pools whose slots they do not say: one job is prepared while every denoiser draws another, and trainings and
        evaluations have what `training` says. (A pool without slots would take jobs that nobody ever does.)"""
        own, training = self.runners.jobs, self.training
        slots = {"draw": self.denoiser.pool.most + 1}
        if training.enabled:
            slots |= {pool_of(training.placement): training.slots, EVALUATE: training.evaluations}
        said = own.slots if "slots" in own.model_fields_set else {}
        return own.model_copy(update={"slots": {**slots, **said}})


def load_settings(name: str = "local") -> AppSettings:
    """The `args` of the first application in configs/serve/<name>.yaml, or in the file of that path. Raises InvalidCatalog."""
    path = Path(name) if name.endswith(".yaml") else CONFIGS / f"{name}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return AppSettings.model_validate(content["applications"][0]["args"])
    except (OSError, KeyError, IndexError, TypeError, yaml.YAMLError, ValidationError) as error:
        known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
        raise InvalidCatalog(f"{path} holds no valid settings: {error}", f"Correct it, or use one of: {known}.") from error
