"""The graph: the only file that binds deployments together.

    ingress -> Workflows -> FaceServer, PromptServer, IdentityServer, ControlServer, LoraServer, GateServer, DenoiserServer
    ingress, JobServer -> Workflows

Builders take one typed argument, which Ray reads from the annotation itself: this module has no `from __future__ import annotations`
(the builder would silently get a raw dictionary).
"""

from typing import Any, cast

import ray.serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from deployments import metrics
from deployments.catalog import load_catalog
from deployments.control_server import ControlServer
from deployments.denoiser_server import DenoiserServer
from deployments.face_server import FaceServer
from deployments.gate_server import GateServer
from deployments.identity_server import IdentityServer
from deployments.job_server import JobServer
from deployments.lora_server import LoraServer
from deployments.prompt_server import PromptServer
from serve import logs
from serve.front import front, webhook_guard
from serve.ingress import HandleCalls
from serve.job_answers import body_of, problem_json
from serve.readiness import Part, Readiness
from serve.settings import QUIET, AppSettings, Pool, TorchPool
from serve.training_crew import training_crew
from serve.workflows import Workflows

# A replica that is found again after the controller has died, or that is to move to another node, works meanwhile.
_WORKING = frozenset({"RUNNING", "RECOVERING", "PENDING_MIGRATION"})
_GOING = frozenset({"STOPPING"})


@ray.serve.ingress()
class Ingress:
    """Serve's wrapper around the routes."""

    def __init__(self, settings: AppSettings, workflows: DeploymentHandle[Any], runners: DeploymentHandle[Any]) -> None:
        logs.configure_replica(where)
        self._settings, self._workflows, self._runners = settings, workflows, runners

    def __serve_build_asgi_app__(self) -> Any:
        # Nobody waits for a runner to hear of it: where none does, they look by themselves.
        return front(
            HandleCalls(self._workflows), self._settings, self._runners.wake.remote, Readiness(parts), call_request, echo=False
        )  # fmt: skip


def where() -> dict[str, str]:
    """What a line of the log says of this replica and of the request that it works on. Raises RayServeException outside of a replica."""
    replica = ray.serve.get_replica_context()
    request = ray.serve.context._get_serve_request_context().request_id
    return {"deployment": replica.deployment, "replica": replica.replica_tag, **({"request_id": request} if request else {})}


def call_request(id: str) -> None:
    """From here on, in this task, handles pass this id on: every replica that works on the request has it in its log."""
    ray.serve.context._set_request_context(request_id=id)


def parts() -> dict[str, Part]:
    """The deployments of this replica's application as Ray Serve's controller sees them. Asks it, and waits."""
    app = ray.serve.status().applications.get(ray.serve.get_replica_context().app_name)
    return {name: _part(deployment) for name, deployment in app.deployments.items()} if app is not None else {}


def _part(deployment: Any) -> Part:
    """deployment: a DeploymentStatusOverview."""
    states = {str(getattr(state, "value", state)): count for state, count in deployment.replica_states.items()}
    running = sum(states.get(name, 0) for name in _WORKING)
    others = sum(count for name, count in states.items() if name not in _WORKING | _GOING)
    return Part.of(running, others, deployment.status.name != "UNHEALTHY")


def build(settings: AppSettings) -> Application:
    """The whole application, with its HTTP door: `ray.serve.run(build(settings))`, or `import_path: serve.app:build`."""
    workflows = build_workflows(settings)
    runners = _deployed(JobServer, settings.runners.pool).bind(
        settings.jobs, settings.store, workflows, webhook_guard(settings), problem_json, body_of, training_crew(settings)
    )
    bound: Application = _deployed(Ingress, settings.ingress).bind(settings, workflows, runners)
    return bound


def build_workflows(settings: AppSettings) -> Application:
    """The same without the door: its handle's methods are those of Workflows. Raises UnknownModel, UnsupportedCombination for its base."""
    load_catalog().servable(settings.base)
    limits = settings.limits.value
    faces = _deployed(FaceServer, settings.faces.pool).bind(settings.faces.models, limits)
    prompts = _deployed(PromptServer, settings.prompts.pool, settings.prompts).bind(settings.base, settings.prompts.torch)
    identity = _deployed(IdentityServer, settings.identity.pool, settings.identity).bind(settings.methods, settings.identity.torch)
    controls = _deployed(ControlServer, settings.controls.pool).bind(settings.controls.models, limits)
    gate = _deployed(GateServer, settings.gate.pool).bind(settings.gate.models, limits)
    loras = _deployed(LoraServer, settings.loras).bind(settings.base, settings.store, settings.max_lora_bytes)
    # Workflows counts who may wait for the denoiser.
    drawing = _deployed(DenoiserServer, settings.denoiser.pool, settings.denoiser).options(max_queued_requests=-1)
    denoiser = drawing.bind(settings.base, settings.methods, settings.controlnets, settings.store, settings.denoiser.torch)
    bound: Application = _deployed(Workflows, settings.workflows).bind(settings, faces, prompts, identity, controls, loras, gate, denoiser)
    return bound


def _deployed(server: Any, pool: Pool, models: TorchPool | None = None) -> Any:
    """The class as a deployment, with everything that its pool says. Threads are set before the process imports a model library."""
    options = pool.options()
    threads = str(models.torch.torch_threads) if models is not None else "1"
    environment = {**QUIET, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive", **logs.environment(), **metrics.environment()}
    options["ray_actor_options"] = {**options["ray_actor_options"], "runtime_env": {"env_vars": environment}}
    replica = server if server is Ingress else logs.logged(server, where)
    return cast(Any, ray.serve.deployment)(replica, name=server.__name__).options(**options)
