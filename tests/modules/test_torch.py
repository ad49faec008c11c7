"""Modules under PyTorch's own tools: no_grad, autocast, torch.compile, copies, casts, meta and fake tensors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.machines import SIZES, assert_states_close, flat, make, some

from ntm_fast import FastNTM

pytestmark = pytest.mark.usefixtures("made_on_the_backend")


@pytest.mark.filterwarnings("ignore:ntm_fast has no native")
@pytest.mark.parametrize("engine", ("auto", "reference"))
def test_no_grad_keeps_no_graph(engine: str) -> None:
    ntm, inputs = make(engine=engine, dtype=torch.float32), some(3, 2, 3, dtype=torch.float32)
    packed = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), torch.autograd.graph.saved_tensors_hooks(packed.append, lambda x: x):
            outputs, state = ntm(inputs)
        assert not packed and all(x.grad_fn is None and not x.requires_grad for x in (outputs, *flat(state)))
    frozen = ntm.requires_grad_(False)
    assert not frozen(inputs)[0].requires_grad


def test_autocast(backend) -> None:
    """Products are in bfloat16, the memory in float32. Results agree with float32 to bfloat16's 3 digits."""
    ntm = FastNTM(**SIZES, engine="auto")
    inputs = some(5, 2, 3, dtype=torch.float32)
    expected, _ = ntm(inputs)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        outputs, state = ntm(inputs)
        again, _ = ntm(inputs, state)
    assert state.memory.dtype is torch.float32
    torch.testing.assert_close(outputs.float(), expected, rtol=0.05, atol=0.02)
    again.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ntm.parameters())


@pytest.mark.filterwarnings("ignore:ntm_fast has no native")
@pytest.mark.parametrize("engine", ("auto", "reference"))
def test_compile(engine: str) -> None:
    torch._dynamo.reset()
    ntm, inputs = make(engine=engine, dtype=torch.float32), some(3, 2, 3, dtype=torch.float32)
    compiled = torch.compile(ntm, backend="aot_eager", fullgraph=True)
    results = []
    for module in (ntm, compiled):
        ntm.zero_grad()
        outputs, state = module(inputs)
        (outputs.square().sum() + state.memory.sum()).backward()
        results.append([outputs.detach(), *(p.grad.clone() for p in ntm.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_copies_and_casts() -> None:
    ntm, inputs = make(memory_init="learned"), some(4, 2, 3)
    expected, state = ntm(inputs)
    for other in (copy.deepcopy(ntm), pickle.loads(pickle.dumps(ntm))):
        torch.testing.assert_close(other(inputs)[0], expected, rtol=0, atol=0)
        assert not {id(p) for p in ntm.parameters()} & {id(p) for p in other.parameters()}
    restored = pickle.loads(pickle.dumps(state.detach()))
    assert_states_close(restored, state.detach(), rtol=0, atol=0)
    single = copy.deepcopy(ntm).float()
    assert {x.dtype for x in single.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(single(inputs.float())[0].double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single.double()(inputs)[0], expected, rtol=1e-4, atol=1e-5)
    half = copy.deepcopy(ntm).to(torch.bfloat16)
    outputs, _ = half(inputs.bfloat16(), state.detach().to(torch.bfloat16))
    assert outputs.dtype is torch.bfloat16 and outputs.isfinite().all()


def test_meta_device_and_to_empty() -> None:
    ntm = FastNTM(**SIZES, device="meta")
    assert all(x.is_meta for x in ntm.state_dict().values())
    outputs, state = ntm(torch.empty(3, 2, 3, device="meta"))
    assert outputs.shape == (3, 2, 4) and outputs.is_meta
    real = ntm.to_empty(device="cpu")
    real.reset_parameters()
    assert all(x.isfinite().all() for x in real.state_dict().values())
    assert real(torch.zeros(3, 2, 3))[0].isfinite().all()


def test_fake_tensors_outside_of_their_mode() -> None:
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        module, inputs = FastNTM(**SIZES), torch.empty(3, 2, 3)
    for grad in (torch.no_grad, torch.enable_grad):
        with grad():
            outputs, state = module(inputs)
            outputs, _ = module(inputs, state)
        assert isinstance(outputs, torch._subclasses.FakeTensor) and outputs.shape == (3, 2, 4)
