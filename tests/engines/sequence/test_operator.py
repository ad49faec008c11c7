"""ops.ntm_sequence against its twin in plain PyTorch, what it refuses, and how it names bad arguments."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from helpers.backends import CUDA_ON_HOST, Backend, usable
from helpers.native_calls import forget_answers
from helpers.sequences import Case, arguments, assert_agrees, tensors_of, train

import ntm_fast
from ntm_fast import NTMState, native, ops, reference
from ntm_fast.native import build, calls, parts
from ntm_fast.spec import STEP_OPTIONS, native_values


@pytest.mark.parametrize("shared", (False, True), ids=("state of each", "state of all"))
@pytest.mark.parametrize("controller", ("lstm", "gru", "feedforward"))
def test_operator_and_twin_agree(backend: Backend, controller: str, shared: bool) -> None:
    """Values and gradients of public calls. For a feedforward controller the reference serves."""
    case = Case(controller if controller != "feedforward" else "gru", layers=2, R=2)
    values, options = arguments(case, shared)
    if controller == "feedforward":
        values[5], values[6] = (), [w for w in values[6] if len(w) == 3 * case.hidden]
        values[6] = [w[: case.hidden] for w in (values[6][0], values[6][2], values[6][4], values[6][6])]
        options["controller"] = "feedforward"
    found = []
    for module in (reference, ops):
        leaves = [x.detach().clone().requires_grad_() for x in tensors_of(values)]
        shaped = torch.utils._pytree.tree_unflatten(leaves, torch.utils._pytree.tree_structure(values))
        called = () if module is reference or controller == "feedforward" else ("ntm_sequence", "ntm_sequence_backward")
        with backend.serves(*called):
            outputs, *final = module.ntm_sequence(*shaped, **options, lengths=None)
            assert isinstance(final[4], tuple) and len(final[4]) == len(values[5])
            loss = outputs.square().sum() + sum(x.cos().sum() for x in tensors_of(final))
            found.append([outputs, *tensors_of(final), *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


def test_a_state_for_all_is_that_state_for_each(backend: Backend) -> None:
    """One initial state for the batch gives what copies of it give. Also in the reference, the ground truth."""
    values, options = arguments(Case(layers=2, R=2, W=2), shared=True)
    for module in (reference, ops):
        found = []
        for each in (False, True):
            leaves = [x.detach().requires_grad_() for x in tensors_of(values[1:6])]
            state = torch.utils._pytree.tree_unflatten(leaves, torch.utils._pytree.tree_structure(values[1:6]))
            if each:
                state = NTMState(*state).for_batch(values[0].shape[1])
            outputs, *final = module.ntm_sequence(values[0], *state, *values[6:], **options)
            loss = outputs.square().sum() + sum(x.cos().sum() for x in tensors_of(final))
            found.append([outputs, *tensors_of(final), *torch.autograd.grad(loss, leaves)])
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_what_a_block_cannot_hold(monkeypatch) -> None:
    """Where one element's state does not fit in a CUDA block, the step engine serves, and ``explain`` says why."""
    backend = usable(CUDA_ON_HOST, monkeypatch)
    case = Case(N=64, hidden=100, dtype=torch.float32)
    ntm, forced = case.module("auto"), case.module("sequence")
    assert ntm_fast.explain("cpu", module=ntm)["ntm_sequence"] == "native"
    forget_answers(monkeypatch)
    monkeypatch.setenv("NTM_HOST_SHARED", "6000")
    words = "one element's state takes .* bytes of a block's shared memory, which the device limits to 6000"
    assert re.search(words, ntm_fast.explain("cpu", module=ntm)["ntm_sequence"])
    with pytest.raises(RuntimeError, match=f"engine='sequence' cannot serve: .*{words}"):
        forced(case.inputs())
    found = train(case, "auto", ntm=ntm)
    assert_agrees(found, train(case, "reference", torch.float64), [train(case, "reference")])
    with backend.serves(*["lstm_gates", "memory_step"] * case.T):
        with torch.no_grad():
            ntm(case.inputs())
    values, options = arguments(case)
    with backend.serves(), torch.no_grad():  # without a step engine: its twin in PyTorch serves
        outputs, *_ = ops.ntm_sequence(*values, **options)
    assert outputs.isfinite().all()


def sizes_alone(name: str, **changes: int) -> tuple[list, list]:
    """What a native function of sequences is called with: scalars, and 0 in the place of every address."""
    sizes = dict(T=3, B=2, I=3, O=4, L=1, H=5, controller=0, R=1, W=1, N=6, M=3, K=3, every=1, shared=0, keep=0)
    options = native_values(STEP_OPTIONS, [own.default for own in STEP_OPTIONS.values()])
    values = options | sizes | changes
    signature = native.signature(name)
    return [values[own] for own in signature.scalars], [0] * len(signature.tensors)


@pytest.mark.parametrize("name", ("ntm_sequence", "ntm_sequence_backward"))
def test_sizes_that_cannot_be_counted_are_refused(backend: Backend, name: str) -> None:
    """Refused before any memory is touched: every address here is 0."""
    like = torch.empty(0, device=backend.device)
    for size in ("T", "I", "N", "every"):
        with pytest.raises(OverflowError, match=f"{1 << 31} is too large a size"):
            native.call(name, like, *sizes_alone(name, **{size: 1 << 31}))
    too_large = [{"N": 1 << 20, "M": 1 << 9}, {"H": 1 << 28}, {"O": 1 << 28}]
    if name == "ntm_sequence_backward":
        too_large.append({"N": 1 << 10, "M": 1 << 10, "every": 1 << 8})  # a segment of memories that are computed again
    for changes in too_large:
        with pytest.raises(RuntimeError, match="one element of the batch is too large"):
            native.call(name, like, *sizes_alone(name, **changes))


def test_a_failing_device_is_not_taken_for_a_refusal(monkeypatch) -> None:
    """An error of the device is raised, and not remembered as an answer."""
    answers = ["ntm_fast: kernel ntm_sequence: out of luck", None, "ntm_fast: it does not fit"]

    class Extension:
        @staticmethod
        def ntm_sequence_workspace(*values) -> int:
            if answer := answers.pop(0):
                raise RuntimeError(answer)
            return 0

    monkeypatch.setattr(build, "extension", lambda: Extension)
    monkeypatch.setattr(calls, "_refusals", {})
    monkeypatch.setitem(parts.PARTS, "cuda", lambda: parts.Part(0, "80", None, bounded=True))
    ask = functools.partial(native.refusal, "ntm_sequence", torch.device("cuda", 0), False)
    with pytest.raises(RuntimeError, match="out of luck"):
        ask([1])
    assert ask([1]) is None and ask([1]) is None
    assert ask([2]) == ask([2]) == "ntm_fast: it does not fit"


def test_bad_arguments_are_named() -> None:
    """Each argument is wrong in turn. The message names it and says what it was; nothing is computed."""
    case = Case(layers=2, R=2, B=2)
    names = ["inputs", "memory", "read_weights", "write_weights", "reads", "state[0]", "state[1]"]
    names += [f"weights[{index}]" for index in range(8)]
    names += ["heads_weight", "heads_bias", "output_weight", "output_bias"]
    for index, name in enumerate(names):
        for error, change, expected in (
            (TypeError, lambda x: x.tolist(), "list"),
            (ValueError, lambda x: x.unsqueeze(0), "dimensions"),
            (ValueError, lambda x: x[..., 0], None),
            (ValueError, lambda x: torch.cat([x, x[..., :1]], -1), None),
            (ValueError, lambda x: x[..., :0], None),
            (TypeError, lambda x: x.float() if name != "inputs" else x.int(), "float32" if index else "int32"),  # noqa: B023
            (ValueError, lambda x: x.to("meta"), "meta"),
        ):
            values, options = arguments(case)
            flat, shape = torch.utils._pytree.tree_flatten(values)
            flat[index] = change(flat[index])
            first, state, weights, last = flat[:5], flat[5:7], flat[7:15], flat[15:]
            with Backend("none", "cpu").serves(), pytest.raises(error) as caught:
                ops.ntm_sequence(*first, state, weights, *last, **options)
            text = str(caught.value)
            assert "ntm_sequence" in text and any(n in text for n in names), text
            assert expected is None or expected in text, text
    for change, words in (
        ({"controller": "rnn"}, ("controller", "'rnn'", "'lstm'", "'gru'")),
        ({"controller": "gru"}, ("state", "1 tensors", "'gru'", "got 2")),
        ({"controller": "feedforward"}, ("state", "0 tensors", "got 2")),
        ({"memory_checkpoint": 0}, ("memory_checkpoint", "0")),
        ({"memory_checkpoint": "some"}, ("memory_checkpoint", "'some'")),
        ({"shift_range": -1}, ("shift_range", "-1")),
        ({"shift_range": 2}, ("heads_weight", "P =")),
        ({"key_activation": "relu"}, ("key_activation", "'relu'")),
        ({"clip": 0.0}, ("clip", "0.0")),
        ({"eps": 0.0}, ("eps", "0.0")),
    ):
        values, options = arguments(case)
        with Backend("none", "cpu").serves(), pytest.raises(ValueError) as caught:
            ops.ntm_sequence(*values, **{**options, **change})
        assert all(word in str(caught.value) for word in ("ntm_sequence", *words)), caught.value
    values, options = arguments(case)
    for wrong in (values[6][:-1], []):
        with pytest.raises(ValueError, match=f"weights must be 4 tensors for each layer.*got {len(wrong)}"):
            ops.ntm_sequence(*values[:6], wrong, *values[7:], **options)
