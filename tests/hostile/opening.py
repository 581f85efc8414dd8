"""`python -m tests.hostile.opening FILE...`: opens each file as the server opens a picture; a line of JSON each.

In a process of its own, so that what a file costs in memory is known, and what it would break stays there.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from deployments.errors import LikenessError
from deployments.images import decode, encode, parameters_of


def main(paths: list[str]) -> None:
    # As in the server, where nothing turns warnings into errors.
    warnings.simplefilter("ignore")
    decode(encode(np.zeros((8, 8, 3), np.uint8)))  # what is imported and allocated once is not the first file's
    for path in paths:
        data = Path(path).read_bytes()
        before, started = _peak_mb(), time.process_time()
        outcome: dict[str, object] = {}
        for name, read in (("decode", decode), ("parameters", parameters_of)):
            try:
                found = read(data)
                outcome[name] = list(getattr(found, "shape", ()))
            except LikenessError as error:
                outcome[name] = error.code
                outcome["says"] = str(error)
        print(json.dumps({**outcome, "seconds": time.process_time() - started, "mb": _peak_mb() - before}), flush=True)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(sys.argv[1:])
