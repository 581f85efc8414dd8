"""ONNX files opened on the provider that was asked for, and on no other.

onnxruntime falls back to the CPU with a line in its log where CUDA does not start; here that is an error. Knows no model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NotImplemented,
    RuntimeException,
)

from deployments.errors import DamagedWeights, MissingWeights, ProviderUnavailable

Provider = Literal["cpu", "cuda"]

UNREADABLE = (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf, NotImplemented, RuntimeException, RuntimeError)
"""What onnxruntime raises for a file that is no model, or none that they know."""

_NAMES: dict[Provider, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_WARNINGS_AND_WORSE = 3


def session_arguments(provider: Provider, threads: int) -> dict[str, Any]:
    """The keywords that InferenceSession, and insightface for its own, take. threads: of one run; 0 is one a core.

    Raises ProviderUnavailable if this onnxruntime was built without the provider.
    """
    name = _NAMES[provider]
    built = onnxruntime.get_available_providers()
    if name not in built:
        raise ProviderUnavailable(f"The ONNX models are to run on {provider}, but this onnxruntime has only {', '.join(built)}.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = _WARNINGS_AND_WORSE
    # A thread that spins while it waits takes a core from the process next door.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return {"providers": list(dict.fromkeys([name, _NAMES["cpu"]])), "sess_options": options}


def require(provider: Provider, session: Any, what: object) -> None:
    """Raises ProviderUnavailable unless the session truly runs on the provider. what: names the model."""
    used = session.get_providers()
    if used[:1] != [_NAMES[provider]]:
        raise ProviderUnavailable(f"{what} is to run on {provider}, but its session runs on {', '.join(used)}: {provider} did not start.")


def open_session(path: Path, provider: Provider, threads: int) -> Any:
    """An onnxruntime.InferenceSession. Raises MissingWeights, DamagedWeights, ProviderUnavailable."""
    arguments = session_arguments(provider, threads)
    require_file(path)
    try:
        session = onnxruntime.InferenceSession(str(path), **arguments)
    except UNREADABLE as error:
        raise DamagedWeights(f"{path} cannot be opened as an ONNX model: {error}") from error
    require(provider, session, path)
    return session


def require_file(path: Path) -> None:
    if not path.is_file():
        raise MissingWeights(f"The ONNX model {path} is not there.", "Fetch it, or correct the catalogue's entry.")
