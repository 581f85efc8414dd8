"""Who does trainings and evaluations in a JobServer: the executors by kind, and the sweeps that see to what nobody wants any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from deployments.job_runner import Execute, Loop
from deployments.job_server import Crew
from deployments.store.jobs import JobStore
from deployments.store.provisional import Provisional
from serve.settings import AppSettings


def training_crew(settings: AppSettings) -> Crew | None:
    """None where the settings want neither. Can be sent to another process."""
    return partial(_crew, settings) if settings.training.enabled else None


def _crew(settings: AppSettings, store: JobStore, workflows: Any) -> tuple[Mapping[str, Execute], Sequence[Loop]]:
    # Only where they are executed: whoever builds the application needs none of them.
    from training import executor as trainings
    from training.evaluation import executor as evaluations
    from training.orders import EVALUATION, TRAINING
    from training.ray_jobs import RayTrainings
    from training.registry import Registry

    files, faces, chosen = settings.store.files, settings.faces.models, settings.training
    provisional = Provisional(settings.store.database, files)
    training = trainings.TrainingExecutor(
        store=store,
        trainings=RayTrainings(),
        registry=Registry(workflows, provisional, faces, chosen.candidates),
        provisional=provisional,
        root=files / trainings.FOLDER,
        faces=faces,
        datasets=chosen.datasets,
    )
    evaluation = evaluations.EvaluationExecutor(store, workflows, provisional.characters, files / evaluations.FOLDER, faces)
    sweeps = [
        Loop("trainings that nobody wants", training.sweep, chosen.sweep_s),
        Loop("evaluations that have ended", evaluation.sweep, chosen.sweep_s),
    ]
    return {TRAINING: training, EVALUATION: evaluation}, sweeps
