"""Small machines whose parameters are far from their initial values, and what they are given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ntm_fast import FastNTM, NTMState, spec
from ntm_fast.ops.serving import why_not_native

CONTROLLERS = tuple(spec.CONTROLLERS)
NATIVE = tuple(name for name, kind in spec.CONTROLLERS.items() if kind.native is not None)  # in the sequence engine
SERVED = {"step": CONTROLLERS, "sequence": NATIVE}  # the controllers that each native engine serves
ENGINE_CONTROLLERS = [(engine, controller) for engine, controllers in SERVED.items() for controller in controllers]
SIZES = dict(
    input_size=3, output_size=4, hidden_size=5, memory_locations=7, memory_width=2, read_heads=2, write_heads=2
)
# In float64: sums in another order, amplified by up to 10 steps.
CLOSE = dict(rtol=1e-10, atol=1e-12)


def make(cls=FastNTM, engine: str = "reference", dtype: torch.dtype = torch.float64, **options):
    """A small module. Its parameters are far from their initial values, so that any mix-up changes the results."""
    module = cls(**{**SIZES, "engine": engine, "dtype": dtype, **options})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(0.7 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu"))
    return module


def some(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
    return values.to(torch.get_default_device(), dtype)


def skip_without_sequence(device: str) -> None:
    if reason := why_not_native(torch.device(device), torch.float64, "ntm_sequence"):
        pytest.skip(reason)


def flat(state: NTMState) -> list[Tensor]:
    return list(state.flatten())


def assert_states_close(a: NTMState, b: NTMState, **tolerance) -> None:
    assert type(a) is type(b) is NTMState
    torch.testing.assert_close(flat(a), flat(b), **tolerance)
