"""Neural Turing Machines for PyTorch: fused native kernels, exact to the paper."""

__version__ = "0.1.0"

from . import ops, reference
from .engines import empty_cache, explain
from .modules import FastNTM, NTMCell
from .native import available, capabilities
from .spec import NTMState, NTMTrace

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
