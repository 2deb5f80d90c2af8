"""Faults that look like learning dynamics, which check must find each, and what fixes it.

Used by the tests and by `benchmarks/preflight.py`, which plants all of them on all architectures,
and applies every remedy.
"""

from fault_fixes import Fault
from planted_batch_faults import BATCH_FAULTS
from planted_setup_faults import SETUP_FAULTS

__all__ = ["FAULTS", "Fault"]

FAULTS: tuple[Fault, ...] = (*BATCH_FAULTS, *SETUP_FAULTS)
