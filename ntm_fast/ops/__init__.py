"""The operators: ``torch.ops.ntm_fast.*`` with schemas and fakes, and their public, differentiable form.

Every public function here has the name, the signature and the answers of its twin in :mod:`ntm_fast.reference`, takes
strided and expanded inputs, and is served by a native kernel where one exists for the device and dtype, else by the
reference; :func:`ntm_fast.explain` says which and why. All of them raise TypeError or ValueError, naming the argument,
what it was and what it must be, before anything is computed.

A memory has the paper's shape (B, N, M) and, inside the native code, locations contiguous: memories returned here are
transposed views, and passing them on costs no copy.
"""

from .operators import *  # noqa: F403  # the public functions
from .operators import CONTRACTS as CONTRACTS
from .operators import __all__ as NAMES  # noqa: F401
