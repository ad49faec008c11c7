"""Captured calls give the results of calls without graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.captured_calls import CALLS, FIRST, captured, check, without_graphs
from helpers.machines import CLOSE, CONTROLLERS, NATIVE, flat, make, some

import ntm_fast
from ntm_fast import FastNTM, NTMCell
from ntm_fast.spec import MEMORY_INITS

TABLE: list[dict[str, Any]] = [
    *({"controller": c, "num_layers": n} for c in CONTROLLERS for n in (1, 2)),
    *({"controller": c, "needs_inputs": False} for c in CONTROLLERS),
    *({"controller": c, "num_layers": 3, "given": True} for c in CONTROLLERS),
    {"read_heads": 1, "write_heads": 1, "read_first": True, "key_activation": "identity", "clip": None},
    {"read_heads": 3, "write_heads": 1, "controller": "gru", "read_first": True, "shift_range": 0, "given": True},
    {"read_heads": 1, "write_heads": 3, "add_activation": "identity", "clip": 1.0, "shift_range": 3},
    *({"memory_init": init} for init in MEMORY_INITS if init != "learned"),
]


@pytest.mark.parametrize("options", TABLE, ids=str)
def test_captured_calls_give_the_same(backend, tapes: list, options: dict) -> None:
    check(**options)
    # The twin made a tape for each call. Ours made one for each call up to the captured one, and none after it.
    assert len(tapes) == CALLS + FIRST and len(captured()) == 1


@pytest.mark.parametrize("controller", NATIVE)
def test_every_build_of_the_kernels(kernels, controller: str) -> None:
    """Also the CUDA kernels, compiled for the host, which ask for a workspace."""
    check(controller=controller)


def test_float32_too(backend) -> None:
    check(dtype=torch.float32, hidden_size=16, close=dict(rtol=1e-4, atol=1e-5))


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_streaming(backend, tapes: list, controller: str, mode: Any) -> None:
    """One step in each call, with the state carried on. Every output and state is still intact at the end."""
    for cls in (FastNTM, NTMCell):
        ntm, held, states = make(cls, engine="step", controller=controller), [], [None, None]
        ntm_fast.empty_cache()
        tapes.clear()
        for call in range(8):
            x = some(*((2, 3) if cls is NTMCell else (1, 2, 3)), seed=call)
            with mode():
                found, states[0] = ntm(x, states[0])
                with without_graphs():
                    wanted, states[1] = ntm(x, states[1])
            held.append(([found, *flat(states[0])], [wanted, *flat(states[1])]))
        for found, wanted in held:
            torch.testing.assert_close(found, wanted, **CLOSE)
        assert tapes == [False] * (8 + FIRST)


def test_first_in_one_mode_then_in_another(backend) -> None:
    """Captured under inference_mode, where every new tensor is one that autograd refuses; then used under no_grad."""
    ntm, inputs = make(engine="step"), some(5, 2, 3)
    with without_graphs(), torch.no_grad():
        wanted, _ = ntm(inputs)
    for mode in (*[torch.inference_mode] * FIRST, torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            found, state = ntm(inputs)
        torch.testing.assert_close(found, wanted, **CLOSE)
        assert found.is_inference() == (mode is torch.inference_mode)
    assert len(captured()) == 1
