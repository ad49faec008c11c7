"""The native code, as Python sees it: what there is, why a part is missing, and the calls.

Nothing here raises at import: without a native part the reference serves. NTM_CPU=baseline|x86-64-v3|x86-64-v4 forces
one CPU variant, NTM_CPU=off none.
"""

from .build import PLAIN, Missing, sources_digest
from .calls import Signature, call, refusal, signature, without_autocast
from .parts import Part, available, bounded, capabilities, part, warn_once, why_not
from .tensors import POOLED, Layout, empty, empty_as, layouts, release_pool

# torch.compile asks these while it traces, and takes the answers as they are.
for _function in (why_not, available, bounded, warn_once):
    setattr(_function, "_dynamo_marked_constant", True)

__all__ = [
    "PLAIN",
    "POOLED",
    "Layout",
    "Missing",
    "Part",
    "Signature",
    "available",
    "bounded",
    "call",
    "capabilities",
    "empty",
    "empty_as",
    "layouts",
    "part",
    "refusal",
    "release_pool",
    "signature",
    "sources_digest",
    "warn_once",
    "why_not",
    "without_autocast",
]
