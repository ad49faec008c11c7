"""Shapes, states and initial states of FastNTM and NTMCell, as nn.LSTM has them."""

from __future__ import annotations

import pytest
import torch
from helpers.machines import CLOSE, CONTROLLERS, SIZES, assert_states_close, flat, make, some

from ntm_fast import FastNTM, NTMCell, NTMState

pytestmark = pytest.mark.usefixtures("made_on_the_backend")


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("layers", (1, 2))
def test_shapes(controller: str, layers: int) -> None:
    T, B = 6, 3
    ntm = make(controller=controller, num_layers=layers)
    count = {"lstm": 2, "gru": 1, "feedforward": 0}[controller]
    outputs, state = ntm(some(T, B, 3))
    assert outputs.shape == (T, B, 4)
    assert [tuple(x.shape) for x in flat(state)] == [(B, 7, 2), (B, 2, 7), (B, 2, 7), (B, 2, 2)] + [
        (layers, B, 5)
    ] * count
    outputs, state = ntm(some(T, 3))
    assert outputs.shape == (T, 4)
    assert [tuple(x.shape) for x in flat(state)] == [(7, 2), (2, 7), (2, 7), (2, 2)] + [(layers, 5)] * count
    outputs, _ = ntm(some(T, 3), state)
    assert outputs.shape == (T, 4)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_batch_first_and_unbatched_are_the_same_numbers(controller: str) -> None:
    ntm, turned = make(controller=controller), make(controller=controller, batch_first=True)
    inputs = some(5, 3, 3)
    outputs, state = ntm(inputs)
    turned_outputs, turned_state = turned(inputs.transpose(0, 1))
    torch.testing.assert_close(turned_outputs.transpose(0, 1), outputs, **CLOSE)
    assert_states_close(turned_state, state, **CLOSE)
    for b in range(3):
        for module in (ntm, turned):  # batch_first does not concern unbatched inputs
            alone, alone_state = module(inputs[:, b])
            torch.testing.assert_close(alone, outputs[:, b], **CLOSE)
            torch.testing.assert_close(
                flat(alone_state), [*(x[b] for x in state[:4]), *(x[:, b] for x in state.controller)], **CLOSE
            )
    # The state of one can be given to the other.
    again, _ = turned(inputs.transpose(0, 1), state)
    torch.testing.assert_close(again.transpose(0, 1), ntm(inputs, state)[0], **CLOSE)


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("layers", (1, 2))
def test_a_sequence_in_parts_and_step_by_step(controller: str, layers: int) -> None:
    options = dict(controller=controller, num_layers=layers)
    ntm, cell = make(**options), make(NTMCell, **options)
    inputs = some(10, 3, 3)
    whole, final = ntm(inputs)
    first, state = ntm(inputs[:4])
    second, parts_final = ntm(inputs[4:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole, **CLOSE)
    assert_states_close(parts_final, final, **CLOSE)
    cell.load_state_dict(ntm.state_dict())
    state, steps = None, []
    for x in inputs:
        y, state = cell(x, state)
        assert y.shape == (3, 4)
        steps.append(y)
    torch.testing.assert_close(torch.stack(steps), whole, **CLOSE)
    assert_states_close(state, final, **CLOSE)
    y, state = cell(inputs[0, 0])
    assert y.shape == (4,) and state.memory.shape == (7, 2)
    torch.testing.assert_close(cell(inputs[1, 0], state)[0], whole[1, 0], **CLOSE)


def test_initial_state_is_the_default_and_learns() -> None:
    for controller in CONTROLLERS:
        ntm = make(controller=controller, memory_init="learned")
        inputs = some(3, 2, 3)
        torch.testing.assert_close(ntm(inputs, ntm.initial_state(2))[0], ntm(inputs)[0], rtol=0, atol=0)
        ntm(inputs)[0].square().sum().backward()
        without = [
            n for n, p in ntm.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
        ]
        assert not without, f"no gradient for {without}"


class _StartsAside(FastNTM):
    def initial_state(self, batch_size: int) -> NTMState:
        return super().initial_state(batch_size).map(lambda x: x + 0.3)


def test_an_initial_state_of_ones_own_is_asked_for() -> None:
    inputs = some(3, 2, 3)
    wanted = make(_StartsAside, controller="lstm")(inputs)[0]
    assert not torch.allclose(make(controller="lstm")(inputs)[0], wanted)
    torch.testing.assert_close(make(_StartsAside, "auto", controller="lstm")(inputs)[0], wanted, **CLOSE)


def test_gradients_reach_the_state_given() -> None:
    ntm = make()
    state = ntm.initial_state(2).map(lambda x: x.detach().clone().requires_grad_())
    outputs, final = ntm(some(3, 2, 3), state)
    (outputs.sum() + final.memory.square().sum()).backward()
    assert all(x.grad.any() for x in flat(state))


@pytest.mark.parametrize(
    ("mode", "learned", "constant"),
    [("constant", False, True), ("learned_constant", True, True), ("learned", True, False), ("random", False, False)],
)
def test_memory_init(mode: str, learned: bool, constant: bool) -> None:
    ntm = FastNTM(**SIZES, memory_init=mode)
    assert ("initial_memory" in dict(ntm.named_parameters())) == learned
    assert ("initial_memory" in dict(ntm.named_buffers())) == (not learned)
    assert "initial_memory" in ntm.state_dict()
    assert bool((ntm.initial_memory == 1e-6).all()) == constant
    assert constant or ntm.initial_memory.unique().numel() == ntm.initial_memory.numel()
    before = ntm.initial_memory.detach().clone()
    optimiser = torch.optim.SGD(ntm.parameters(), lr=1.0)
    ntm(some(4, 2, 3, dtype=torch.float32))[0].square().sum().backward()
    optimiser.step()
    assert torch.equal(before, ntm.initial_memory) != learned
    # In a constant memory only the weightings tell locations apart, so each head must start at some location.
    for weights in FastNTM(**SIZES, memory_init=mode).initial_state(1)[1:3]:
        assert (weights.max(-1).values > 3 * weights.median(-1).values).all()


def test_truncated_backpropagation() -> None:
    ntm = make(memory_init="learned")
    inputs = some(6, 2, 3)
    _, state = ntm(inputs[:3])
    assert all(x.grad_fn is not None for x in flat(state))
    outputs, _ = ntm(inputs[3:], state.detach())
    outputs.square().sum().backward()
    # Only the initial state lies before the cut, so it alone gets no gradient.
    assert all(p.grad is None for n, p in ntm.named_parameters() if "initial" in n)
    assert all(p.grad.any() for n, p in ntm.named_parameters() if "initial" not in n)
    moved = state.to(torch.float32)
    assert isinstance(moved, NTMState) and all(x.dtype is torch.float32 for x in flat(moved))


@pytest.mark.parametrize("engine", ("auto", "reference"))
@pytest.mark.filterwarnings("ignore:ntm_fast has no native")
def test_the_smallest_and_the_empty(engine: str) -> None:
    tiny = FastNTM(1, 1, 1, memory_locations=1, memory_width=1, shift_range=0, engine=engine)
    tiny(torch.zeros(2, 1, 1))[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in tiny.parameters())
    outputs, state = make(engine=engine)(some(3, 0, 3))
    assert outputs.shape == (3, 0, 4) and state.memory.shape == (0, 7, 2)
    outputs.sum().backward()


def test_fresh_machines_have_finite_gradients_over_long_sequences() -> None:
    """The standard machine at its initial values over 100 steps, with inputs that are mostly zero, as in a copy."""
    for controller in CONTROLLERS:
        ntm = FastNTM(9, 8, controller=controller, memory_locations=32)
        inputs = torch.zeros(100, 4, 9)
        inputs[:20] = (torch.rand(20, 4, 9) > 0.5).float()
        ntm(inputs)[0].square().sum().backward()
        assert all(p.grad.isfinite().all() for p in ntm.parameters())
