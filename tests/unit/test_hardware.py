"""The most memory that a process had, of one piece of work and not of the one before."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from deployments.hardware import forget_peak, peak_bytes

_BYTES = 256 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak is that of the process's whole life")
def test_a_peak_is_that_of_the_work_since_it_was_forgotten() -> None:
    forget_peak("cpu")
    before = peak_bytes("cpu")
    assert before > 20 * 2**20  # Python and numpy
    np.ones(_BYTES, np.uint8).sum()  # and gone again
    assert _BYTES * 0.9 < peak_bytes("cpu") - before < _BYTES * 1.5
    forget_peak("cpu")
    assert peak_bytes("cpu") - before < _BYTES * 0.2
