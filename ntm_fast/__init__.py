"""Neural Turing Machines for PyTorch: fused native kernels, exact to the paper."""

__version__ = "0.1.0"

from . import ops, reference
from ._native import available, capabilities
from .graphs import empty_cache
from .modules import FastNTM, NTMCell
from .ops import explain
from .state import NTMState, NTMTrace

__all__ = [
    "FastNTM",
    "NTMCell",
    "NTMState",
    "NTMTrace",
    "available",
    "capabilities",
    "empty_cache",
    "explain",
    "ops",
    "reference",
]
