"""Several forwards share one pair of graphs, and their backwards come in any order.

A forward has its turn on the graphs until its backward has run or its outputs are gone. Meanwhile others run without.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import warnings

import pytest
import torch
import torch.utils.checkpoint
from helpers.captured_calls import FIRST, captured, expected, forward, gradient, warm, without_graphs
from helpers.machines import CLOSE, make, some


def test_a_second_forward_before_the_firsts_backward(backend, tapes: list) -> None:
    ntm = make(engine="step")
    warm(ntm)
    tapes.clear()
    calls = [forward(ntm, seed) for seed in range(3)]
    assert len(tapes) == 2  # the first is in the graphs, the others are run kernel by kernel
    for seed in (1, 0, 2):
        torch.testing.assert_close(gradient(*calls[seed]), expected(ntm, seed), **CLOSE)
    tapes.clear()
    assert gradient(*forward(ntm, 3)) is not None and not tapes  # their turn is over, though their outputs still exist


def test_a_forward_that_is_never_gone_back_over(backend, tapes: list) -> None:
    """A validation that forgets no_grad does this: the turn ends when the outputs go."""
    ntm = make(engine="step")
    warm(ntm)
    tapes.clear()
    for seed in range(3):
        outputs, state = forward(ntm, seed)[1:]
        del outputs, state
    assert not tapes
    torch.testing.assert_close(gradient(*forward(ntm, 3)), expected(ntm, 3), **CLOSE)


def test_retained_graphs_keep_their_turn(backend, tapes: list) -> None:
    ntm = make(engine="step")
    warm(ntm)
    call = forward(ntm, 0)
    first = gradient(*call, retain_graph=True)
    tapes.clear()
    other = gradient(*forward(ntm, 1))
    assert len(tapes) == 1
    torch.testing.assert_close(other, expected(ntm, 1), **CLOSE)
    again = gradient(*call)
    torch.testing.assert_close(again, first, **CLOSE)
    torch.testing.assert_close(first, expected(ntm, 0), **CLOSE)
    with pytest.raises(RuntimeError, match="second time"):
        gradient(*call)
    tapes.clear()
    gradient(*forward(ntm, 2))
    assert not tapes


def test_gradients_through_a_state_carried_on(backend) -> None:
    """Two calls of one kind before one backward: the second runs without graphs."""
    ntm = make(engine="step", memory_init="learned")
    warm(ntm)
    found = []
    for context in (contextlib.nullcontext, without_graphs):
        with context():
            inputs = some(10, 2, 3).requires_grad_()
            outputs, state = ntm(inputs[:5])
            more, _ = ntm(inputs[5:], state)
            found.append(torch.autograd.grad(torch.cat([outputs, more]).square().sum(), [inputs, *ntm.parameters()]))
    torch.testing.assert_close(*found, **CLOSE)


def test_gradient_penalty(backend) -> None:
    """Second derivatives come from the reference, as without graphs."""
    ntm = make(engine="step")
    warm(ntm)
    found = []
    for context in (contextlib.nullcontext, without_graphs):
        with context():
            inputs, outputs, _ = forward(ntm, 0)
            (grad,) = torch.autograd.grad(outputs.square().sum(), inputs, create_graph=True)
            (outputs.sum() + grad.square().sum()).backward()
            found.append([grad, *(p.grad for p in ntm.parameters())])
            ntm.zero_grad()
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("what", ("memory", "read_weights", "write_weights", "inputs", "parameter"))
def test_changes_in_place_before_backward_are_noticed(backend, what: str) -> None:
    ntm = make(engine="step")
    warm(ntm)
    inputs, outputs, state = forward(ntm, 0)
    changed = {"inputs": inputs, "parameter": ntm.heads.weight, **state._asdict()}[what]
    with torch.no_grad():
        changed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(inputs, outputs, state)


def test_under_torch_checkpoint(backend) -> None:
    ntm = make(engine="step")
    for _ in range(FIRST + 2):
        found = []
        for reentrant in (False, True, None):
            with without_graphs() if reentrant is None else contextlib.nullcontext():
                inputs = some(5, 2, 3).requires_grad_()
                if reentrant is None:
                    outputs = ntm(inputs)[0]
                else:
                    outputs = torch.utils.checkpoint.checkpoint(lambda x: ntm(x)[0], inputs, use_reentrant=reentrant)
                ntm.zero_grad()
                outputs.square().sum().backward()
                found.append([inputs.grad, *(p.grad for p in ntm.parameters())])
        torch.testing.assert_close(found[0], found[2], **CLOSE)
        torch.testing.assert_close(found[1], found[2], **CLOSE)
    assert captured()


def test_gradients_batched_over_directions_are_right_or_refused(backend) -> None:
    ntm = make(engine="step")
    warm(ntm)
    inputs, outputs, _ = forward(ntm, 0)
    directions = torch.stack([some(*outputs.shape, seed=seed) for seed in (1, 2)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            (found,) = torch.autograd.grad(outputs, inputs, directions, is_grads_batched=True, retain_graph=True)
        except RuntimeError:
            return
    with without_graphs():
        inputs, outputs, _ = forward(ntm, 0)
        wanted = [torch.autograd.grad(outputs, inputs, x, retain_graph=True)[0] for x in directions]
    torch.testing.assert_close(found, torch.stack(wanted), **CLOSE)


def test_threads_take_turns(backend) -> None:
    ntm = make(engine="step")
    warm(ntm)
    wanted = [expected(ntm, seed) for seed in range(2)]

    def work(seed: int) -> None:
        with torch.device(backend.device):
            for _ in range(10):
                torch.testing.assert_close(gradient(*forward(ntm, seed)), wanted[seed], **CLOSE)

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        list(threads.map(work, range(2)))
