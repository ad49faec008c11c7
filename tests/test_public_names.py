"""What the package promises to have."""

from __future__ import annotations

import ntm_fast


def test_public_names() -> None:
    for name in (
        "FastNTM",
        "NTMCell",
        "NTMState",
        "NTMTrace",
        "available",
        "capabilities",
        "explain",
        "ops",
        "reference",
    ):
        assert name in ntm_fast.__all__ and hasattr(ntm_fast, name)
    assert {"cpu", "cuda"} <= set(ntm_fast.capabilities())
