"""The graph: the only file that binds deployments together.

    ingress -> Workflows -> FaceServer, PromptServer, IdentityServer, ControlServer, LoraServer, DenoiserServer

Builders take one typed argument, which Ray reads from the annotation itself: this module has no `from __future__ import annotations`
(the builder would silently get a raw dictionary).
"""

from typing import Any, cast

import ray.serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from deployments.control_server import ControlServer
from deployments.denoiser_server import DenoiserServer
from deployments.face_server import FaceServer
from deployments.identity_server import IdentityServer
from deployments.lora_server import LoraServer
from deployments.prompt_server import PromptServer
from serve.ingress import HandleCalls, api
from serve.settings import QUIET, AppSettings, Pool, TorchPool
from serve.workflows import Workflows


@ray.serve.ingress()
class Ingress:
    """Serve's wrapper around the routes."""

    def __init__(self, settings: AppSettings, workflows: DeploymentHandle[Any]) -> None:
        self._settings, self._workflows = settings, workflows

    def __serve_build_asgi_app__(self) -> Any:
        return api(HandleCalls(self._workflows), self._settings.max_body_bytes, self._settings.max_lora_bytes)


def build(settings: AppSettings) -> Application:
    """The whole application, with its HTTP door: `ray.serve.run(build(settings))`, or `import_path: serve.app:build`."""
    bound: Application = _deployed(Ingress, settings.ingress).bind(settings, build_workflows(settings))
    return bound


def build_workflows(settings: AppSettings) -> Application:
    """The same without the door: its handle's methods are those of Workflows."""
    limits = settings.limits.value
    faces = _deployed(FaceServer, settings.faces.pool).bind(settings.faces.models, limits)
    prompts = _deployed(PromptServer, settings.prompts.pool, settings.prompts).bind(settings.base, settings.prompts.torch)
    identity = _deployed(IdentityServer, settings.identity.pool, settings.identity).bind(settings.methods, settings.identity.torch)
    controls = _deployed(ControlServer, settings.controls.pool).bind(settings.controls.models, limits)
    loras = _deployed(LoraServer, settings.loras).bind(settings.base, settings.store, settings.max_lora_bytes)
    # Workflows counts who may wait for the denoiser.
    drawing = _deployed(DenoiserServer, settings.denoiser.pool, settings.denoiser).options(max_queued_requests=-1)
    denoiser = drawing.bind(settings.base, settings.methods, settings.controlnets, settings.store, settings.denoiser.torch)
    bound: Application = _deployed(Workflows, settings.workflows).bind(settings, faces, prompts, identity, controls, loras, denoiser)
    return bound


def _deployed(server: Any, pool: Pool, models: TorchPool | None = None) -> Any:
    """The class as a deployment, with everything that its pool says. Threads are set before the process imports a model library."""
    options = pool.options()
    threads = str(models.torch.torch_threads) if models is not None else "1"
    environment = {**QUIET, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
    options["ray_actor_options"] = {**options["ray_actor_options"], "runtime_env": {"env_vars": environment}}
    return cast(Any, ray.serve.deployment)(server, name=server.__name__).options(**options)
