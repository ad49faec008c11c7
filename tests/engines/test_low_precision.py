"""Modules in bfloat16 and float16: the native engines compute them in float32, and round at the door."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.backends import Backend
from helpers.machines import CONTROLLERS, ENGINE_CONTROLLERS, NATIVE, flat, make, skip_without_sequence, some

import ntm_fast
from ntm_fast import NTMCell

LOW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _skipped_without_an_engine(request) -> None:
    if "sequence" in getattr(request.node, "callspec", request).params.values():
        skip_without_sequence(request.getfixturevalue("backend").device)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("engine", "controller"), ENGINE_CONTROLLERS)
def test_answers_and_gradients_are_rounded_once(backend: Backend, engine: str, controller: str, dtype) -> None:
    """Against float64 with the same, rounded, parameters: what is stored in the dtype errs by its rounding alone, and
    by what float32 loses on the way."""
    low = make(engine=engine, controller=controller, dtype=torch.float32).to(backend.device, dtype)
    assert ntm_fast.explain(backend.device, dtype, low)["engine"].startswith(engine)
    truth = copy.deepcopy(low).double()
    truth.engine = "reference"
    inputs = some(6, 3, 3, dtype=dtype).to(backend.device).requires_grad_()
    wide = inputs.detach().double().requires_grad_()
    outputs, state = low(inputs, lengths=[6, 2, 5])
    want, end = truth(wide, lengths=[6, 2, 5])
    incoming = [some(*x.shape, seed=5).to(x) for x in (want, *flat(end))]
    leaves, twins = [inputs, *low.parameters()], [wide, *truth.parameters()]
    grads = torch.autograd.grad([outputs, *flat(state)], leaves, [x.to(dtype) for x in incoming])
    expected = torch.autograd.grad([want, *flat(end)], twins, [x.to(dtype).double() for x in incoming])
    names = ["outputs", *state._fields[:4], *("controller" for _ in state.controller), "inputs"]
    names += [name for name, _ in low.named_parameters()]
    for name, got, exact in zip(names, (outputs, *flat(state), *grads), (want, *flat(end), *expected), strict=True):
        # The module's own initial weightings are a softmax in the dtype: that rounds several times.
        most = (4 if "initial" in name else 1.5) * torch.finfo(dtype).eps
        assert got.dtype is dtype
        assert (got.double() - exact).norm() <= most * exact.norm(), name


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_streams_and_traces(backend: Backend, controller: str, dtype: torch.dtype) -> None:
    ntm = make(engine="auto", controller=controller, dtype=torch.float32).to(backend.device, dtype)
    cell = make(NTMCell, engine="auto", controller=controller, dtype=torch.float32).to(backend.device, dtype)
    inputs = some(5, 2, 3, dtype=dtype).to(backend.device)
    outputs, final = ntm(inputs)
    with torch.no_grad():
        state, steps = None, []
        for x in inputs:
            y, state = cell(x, state)
            steps.append(y)
    assert all(x.dtype is dtype for x in (*steps, *flat(state)))
    # From one step to the next the state is rounded here, and is not there.
    torch.testing.assert_close(torch.stack(steps), outputs, rtol=0.1, atol=0.1)
    seen, trace = ntm.trace(inputs)
    assert all(x.dtype is dtype for x in (seen, *trace))
    torch.testing.assert_close(seen, outputs)
    assert ntm(inputs, final)[0].dtype is dtype


@pytest.mark.parametrize("controller", NATIVE)
def test_served_by_the_native_code(backend: Backend, controller: str) -> None:
    skip_without_sequence(backend.device)
    ntm = make(engine="auto", controller=controller, dtype=torch.float32).to(backend.device, torch.bfloat16)
    inputs = some(5, 2, 3, dtype=torch.bfloat16).to(backend.device)
    with backend.serves("ntm_sequence", "ntm_sequence_backward"):
        ntm(inputs)[0].sum().backward()
    with torch.autocast(torch.device(backend.device).type, torch.float16), backend.serves("ntm_sequence"):
        outputs, _ = ntm(inputs)
    assert outputs.dtype is torch.bfloat16


@pytest.mark.parametrize("part", ("controller", "heads", "output"))
def test_parts_that_are_called_stay_in_the_dtype(backend: Backend, part: str) -> None:
    ntm = make(engine="auto", dtype=torch.float32).to(backend.device, torch.bfloat16)
    inputs = some(5, 2, 3, dtype=torch.bfloat16).to(backend.device)
    want, _ = ntm(inputs)
    seen = []
    getattr(ntm, part).register_forward_hook(lambda module, given, found: seen.append(given[0].dtype))
    with backend.serves():
        outputs, state = ntm(inputs)
    assert outputs.dtype is torch.bfloat16 and set(seen) == {torch.bfloat16}
    torch.testing.assert_close(outputs, want, rtol=0.1, atol=0.1)  # rounded at every step
    assert "not for torch.bfloat16" in ntm_fast.explain(backend.device, torch.bfloat16, ntm)["engine"]
