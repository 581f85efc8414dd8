"""The processes of the Ray that a test has started, and of no other that runs on this machine."""

from __future__ import annotations

import psutil


def replicas(deployment: str = "") -> list[psutil.Process]:
    """Of one deployment of the application, or of all."""
    return named(f"ray::ServeReplica:likeness:{deployment}")


def named(beginning: str) -> list[psutil.Process]:
    """Those whose command line begins so. Ray's processes are children of the one that started it."""
    return [process for process in psutil.Process().children(recursive=True) if title(process).startswith(beginning)]


def title(process: psutil.Process) -> str:
    """What a process calls itself; empty where it has ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
