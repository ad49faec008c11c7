"""Sequences of different lengths in a batch: each gets what it gets alone, whatever its batch mates and its padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.backends import CUDA_ON_HOST, Backend
from helpers.machines import CLOSE, CONTROLLERS, ENGINE_CONTROLLERS, NATIVE, flat, make, skip_without_sequence, some
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from ntm_fast import FastNTM, NTMState, ops, reference

T, LENGTHS = 6, [3, 6, 0, 1, 5, 6, 2, 4, 6, 1]  # more than a CPU's tile
B = len(LENGTHS)
ALL = [("reference", controller) for controller in CONTROLLERS] + ENGINE_CONTROLLERS


@pytest.fixture(autouse=True)
def _skipped_without_an_engine(request) -> None:
    if "backend" in request.fixturenames and "sequence" in getattr(request.node, "callspec", request).params.values():
        skip_without_sequence(request.getfixturevalue("backend").device)


def over(steps: int = T) -> Tensor:
    return reference.ended(torch.tensor(LENGTHS), steps)


def padded(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(T, B, ...) with NaN after the end of each sequence."""
    x = some(T, B, *shape, seed=seed, dtype=dtype)
    return x.masked_fill(over().view(T, B, *[1] * len(shape)), torch.nan)


def one_of(x: Tensor, b: int, index: int = 0) -> Tensor:
    """Of tensor number ``index`` of a state that of sequence b, as a batch of one."""
    return x[:, b : b + 1] if index >= 4 else x[b : b + 1]


def given_state(ntm: FastNTM, batch: int = B) -> NTMState:
    state = ntm.initial_state(batch).detach()
    tensors = [some(*x.shape, dtype=x.dtype, seed=30 + i).softmax(-1) for i, x in enumerate(flat(state))]
    return NTMState.unflatten(tensors)


def grads_of(results: list[Tensor], leaves: list[Tensor], incoming: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(results, leaves, incoming, allow_unused=True, materialize_grads=True))


def alone_and_together(ntm: FastNTM, with_state: bool) -> list[tuple[int, str, Tensor, Tensor]]:
    """For each sequence and each of its results and gradients: what it gets alone and what it gets in the batch."""
    dtype, device = ntm.heads.weight.dtype, ntm.heads.weight.device
    inputs = padded(3, seed=3, dtype=dtype).to(device).requires_grad_()
    state = given_state(ntm).map(lambda x: x.to(device).requires_grad_()) if with_state else None
    outputs, final = ntm(inputs, state, lengths=torch.tensor(LENGTHS))
    incoming = [padded(4, seed=4, dtype=dtype), *(some(*x.shape, dtype=dtype, seed=5) for x in flat(final))]
    incoming = [x.to(device) for x in incoming]
    leaves = [inputs, *(flat(state) if state is not None else [])]
    grads = grads_of([outputs, *flat(final)], leaves, incoming)
    assert not outputs[over()].any() and not grads[0][over()].any()
    found = []
    for b, length in enumerate(LENGTHS):
        own = None
        if state is not None:
            own = NTMState.unflatten([one_of(x.detach(), b, i).clone() for i, x in enumerate(flat(state))])
        elif length == 0:
            own = ntm.initial_state(1).detach()
        x = inputs.detach()[:length, b : b + 1].clone().requires_grad_()
        of_state = [one_of(grad, b, i) for i, grad in enumerate(incoming[1:])]
        if length == 0:
            found += [(b, f"final {i}", x, one_of(y, b, i)) for i, (x, y) in enumerate(zip(flat(own), flat(final)))]
            found += [(b, f"grad state {i}", x, one_of(y, b, i)) for i, (x, y) in enumerate(zip(of_state, grads[1:]))]
            continue
        own = own and own.map(Tensor.requires_grad_)
        y, end = ntm(x, own)
        own_grads = grads_of(
            [y, *flat(end)], [x, *(flat(own) if own else [])], [incoming[0][:length, b : b + 1], *of_state]
        )
        found.append((b, "outputs", y, outputs[:length, b : b + 1]))
        found += [(b, f"final {i}", x, one_of(y, b, i)) for i, (x, y) in enumerate(zip(flat(end), flat(final)))]
        found.append((b, "grad inputs", own_grads[0], grads[0][:length, b : b + 1]))
        found += [(b, f"grad state {i}", x, one_of(y, b, i)) for i, (x, y) in enumerate(zip(own_grads[1:], grads[1:]))]
    return found


@pytest.mark.parametrize("change", [{}, {"num_layers": 2, "memory_checkpoint": 2}, {"read_first": True}], ids=str)
@pytest.mark.parametrize(("engine", "controller"), ALL)
def test_each_sequence_gets_what_it_gets_alone(backend: Backend, engine: str, controller: str, change: dict) -> None:
    ntm = make(engine=engine, controller=controller, **change).to(backend.device)
    for with_state in (False, True):
        for b, what, alone, together in alone_and_together(ntm, with_state):
            torch.testing.assert_close(together, alone, **CLOSE, msg=lambda text: f"{b} {what}: {text}")  # noqa: B023


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("controller", NATIVE)
def test_to_the_bit_on_the_cpu(kernels: Backend, controller: str, dtype: torch.dtype) -> None:
    if kernels.device != "cpu" or kernels is CUDA_ON_HOST:
        pytest.skip("on CUDA the size of the batch decides how many warps share an element")
    for change in ({}, {"num_layers": 2, "memory_checkpoint": 2, "hidden_size": 33}):
        ntm = make(engine="sequence", controller=controller, dtype=dtype, **change)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for b, what, alone, together in alone_and_together(ntm, True):
                assert torch.equal(alone, together), f"{change}, {threads} threads, sequence {b}: {what}"


@pytest.mark.parametrize(("engine", "controller"), ALL)
def test_full_lengths_change_nothing(backend: Backend, engine: str, controller: str) -> None:
    ntm, inputs = make(engine=engine, controller=controller).to(backend.device), some(T, B, 3).to(backend.device)
    for lengths in ([T] * B, torch.full((B,), T, dtype=torch.int32)):
        (a, s), (b, z) = ntm(inputs), ntm(inputs, lengths=lengths)
        assert torch.equal(a, b) and all(map(torch.equal, flat(s), flat(z)))


@pytest.mark.parametrize("engine", ("reference", "step", "sequence"))
def test_weights_get_the_sum_of_what_each_sequence_gives(backend: Backend, engine: str) -> None:
    """Of sequences that go on from their own initial state: the module's, which is learned too."""
    ntm = make(engine=engine, memory_init="learned").to(backend.device)
    inputs, incoming = padded(3, seed=3).to(backend.device), padded(4, seed=4).to(backend.device)
    ntm(inputs, lengths=LENGTHS)[0].backward(incoming)
    together = {name: p.grad for name, p in ntm.named_parameters()}
    ntm.zero_grad()
    for b, length in enumerate(LENGTHS):
        if length:
            ntm(inputs[:length, b : b + 1])[0].backward(incoming[:length, b : b + 1])
    torch.testing.assert_close(together, {name: p.grad for name, p in ntm.named_parameters()}, **CLOSE)


# --- as nn.LSTM does it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", (False, True))
@pytest.mark.parametrize("enforce_sorted", (False, True))
@pytest.mark.parametrize("with_state", (False, True))
@pytest.mark.parametrize("engine", ("reference", "step", "sequence"))
def test_packed_sequences_side_by_side_with_nn_lstm(
    backend: Backend, engine: str, with_state: bool, enforce_sorted: bool, batch_first: bool
) -> None:
    lengths = [5, 4, 4, 2, 1] if enforce_sorted else [2, 5, 1, 4, 4]
    whole = some(5, 5, 3).to(backend.device)
    whole = whole.transpose(0, 1) if batch_first else whole
    packed = pack_padded_sequence(whole, torch.tensor(lengths), batch_first, enforce_sorted)
    lstm = nn.LSTM(3, 4, batch_first=batch_first, dtype=torch.float64).to(backend.device)
    ntm = make(engine=engine, batch_first=batch_first).to(backend.device)
    state = given_state(ntm, 5).to(backend.device) if with_state else None
    theirs, _ = lstm(packed)
    ours, final = ntm(packed, state)
    assert isinstance(ours, PackedSequence)
    for own, other in zip(ours[1:], theirs[1:]):  # batch sizes, and the order
        assert (own is other is None) or torch.equal(own, other)
    outputs, found = pad_packed_sequence(ours, batch_first)
    assert found.tolist() == lengths
    want, end = ntm(whole, state, lengths=lengths)
    torch.testing.assert_close([outputs, *flat(final)], [want, *flat(end)], **CLOSE)
    # nn.LSTM's states are in the order of the sequences before packing; so are ours.
    hidden, (h, _) = lstm(packed)
    last = pad_packed_sequence(hidden, batch_first)[0]
    for b, length in enumerate(lengths):
        own = last[b, length - 1] if batch_first else last[length - 1, b]
        assert torch.equal(own, h[0, b])
        start = None
        if state is not None:
            start = NTMState.unflatten([one_of(x, b, i) for i, x in enumerate(flat(state))])
        x = whole[b : b + 1, :length] if batch_first else whole[:length, b : b + 1]
        _, alone = ntm(x, start)
        for i, (mine, single) in enumerate(zip(flat(final), flat(alone))):
            torch.testing.assert_close(one_of(mine, b, i), single, **CLOSE)


def test_gradients_go_through_packing(backend: Backend) -> None:
    ntm = make(engine="auto").to(backend.device)
    pieces = [some(n, 3, seed=n).to(backend.device).requires_grad_() for n in (2, 5, 3)]
    outputs, _ = ntm(pack_sequence(pieces, enforce_sorted=False))
    grads = torch.autograd.grad(outputs.data.square().sum(), pieces)
    for piece, grad in zip(pieces, grads):
        (own,) = torch.autograd.grad(ntm(piece)[0].square().sum(), piece)
        torch.testing.assert_close(grad, own, **CLOSE)


# --- traces, tools, bad input -----------------------------------------------------------------------------------------


def test_a_trace_is_zero_where_nothing_happens(backend: Backend) -> None:
    ntm, inputs = make(engine="auto").to(backend.device), padded(3, seed=3).to(backend.device)
    outputs, trace = ntm.trace(inputs, lengths=LENGTHS)
    torch.testing.assert_close(outputs, ntm(inputs, lengths=LENGTHS)[0], **CLOSE)
    for name, x in trace._asdict().items():
        assert not x[over()].any(), name
        for b, length in enumerate(LENGTHS):
            if length:
                _, alone = ntm.trace(inputs[:length, b : b + 1])
                torch.testing.assert_close(x[:length, b : b + 1], getattr(alone, name), **CLOSE)


@pytest.mark.parametrize("engine", ("reference", "step", "sequence"))
def test_second_derivatives(backend: Backend, engine: str) -> None:
    ntm = make(engine=engine).to(backend.device)
    lengths = torch.tensor([3, 0, 1, 2])
    inputs = some(3, 4, 3, seed=3).masked_fill(reference.ended(lengths, 3).unsqueeze(-1), torch.nan)
    inputs = inputs.to(backend.device).requires_grad_()
    leaves = [inputs, *ntm.parameters()]
    outputs, final = ntm(inputs, lengths=lengths)
    first = torch.autograd.grad(outputs.square().sum() + final.memory.sum(), leaves, create_graph=True)
    penalty = sum(x.square().sum() for x in first)
    second = torch.autograd.grad(penalty, leaves, allow_unused=True, materialize_grads=True)
    twin = make(engine="reference").to(backend.device)
    own = [inputs.detach().requires_grad_(), *twin.parameters()]
    loss = 0.0
    for b, length in ((0, 3), (2, 1), (3, 2)):
        y, end = twin(own[0][:length, b : b + 1])
        loss = loss + y.square().sum() + end.memory.sum()
    loss = loss + twin.initial_state(1).memory.sum()
    want = torch.autograd.grad(loss, own, create_graph=True)
    penalty = sum(x.square().sum() for x in want)
    again = torch.autograd.grad(penalty, own, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close([*first, *second], [*want, *again], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_compiled(backend: Backend, controller: str) -> None:
    torch._dynamo.reset()
    ntm = make(engine="auto", controller=controller).to(backend.device)
    compiled = torch.compile(ntm, backend="aot_eager", fullgraph=True)
    for lengths in (LENGTHS, [T] * B, LENGTHS[::-1]):
        given = torch.tensor(lengths)
        found = []
        for module in (ntm, compiled):
            inputs = some(T, B, 3).to(backend.device).requires_grad_()
            outputs, final = module(inputs, lengths=given)
            loss = outputs.square().sum() + final.memory.sum()
            found.append([outputs, *flat(final), *torch.autograd.grad(loss, inputs)])
        torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_autocast_and_modes(backend: Backend) -> None:
    ntm = make(engine="auto", dtype=torch.float32).to(backend.device)
    inputs = padded(3, seed=3, dtype=torch.float32).to(backend.device)
    want = ntm(inputs, lengths=LENGTHS)[0]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(ntm(inputs, lengths=LENGTHS)[0], want)
    with torch.autocast(torch.device(backend.device).type, torch.bfloat16):
        outputs, _ = ntm(inputs.bfloat16(), lengths=LENGTHS)
    assert not outputs.isnan().any() and not outputs[over()].any()
    torch.testing.assert_close(outputs.float(), want, rtol=0.05, atol=0.05)  # bfloat16 has eight bits


@pytest.mark.parametrize("engine", ("reference", "step", "sequence"))
@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([1, 2], "got shape (2,), expected 3 integers from 0 to 4"),
        (torch.tensor(2), "got shape ()"),
        ([1, 5, 2], "got 5 for sequence 1"),
        ([1, 2, -1], "got -1 for sequence 2"),
        ([1.0, 2.0, 3.0], "got [1.0, 2.0, 3.0]"),
        ([True, True, True], "got [True"),
        ("123", "got '123'"),
        (3, "got 3"),
        ([1, 2, 2**70], "got 1180591620717411303424 for sequence 2"),
        (b"\1\2\3", "got b'"),
        (torch.tensor([1, 2, 3]).to_sparse(), "got a tensor without numbers in a row"),
        (torch.zeros(3, dtype=torch.int64, device="meta"), "got a tensor without numbers in a row"),
        (torch.tensor([1.0, 2.0, 3.0]), "got dtype torch.float32"),
        (torch.tensor([True, False, True]), "got dtype torch.bool"),
    ],
    ids=str,
)
def test_bad_lengths_are_named(engine: str, lengths: Any, words: str) -> None:
    if engine == "sequence":
        skip_without_sequence("cpu")
    ntm, inputs = make(engine=engine), some(4, 3, 3)
    for call in (ntm, ntm.trace):
        with pytest.raises((TypeError, ValueError)) as caught:
            call(inputs, lengths=lengths)
        assert str(caught.value).startswith("lengths: ") and words in str(caught.value)
    state = ntm.initial_state(3)
    x = inputs, *state, ntm.controller.weights(), ntm.heads.weight, ntm.heads.bias, ntm.output.weight, ntm.output.bias
    for module, name in ((ops, "ntm_sequence: lengths: "), (reference, "lengths: ")):
        with pytest.raises((TypeError, ValueError)) as caught:
            module.ntm_sequence(*x, shift_range=1, lengths=lengths)
        assert str(caught.value).startswith(name) and words in str(caught.value)


def test_lengths_where_there_can_be_none() -> None:
    ntm = make()
    with pytest.raises(ValueError, match="lengths: got lengths for an unbatched sequence"):
        ntm(some(4, 3), lengths=[4])
    packed = pack_sequence([some(2, 3), some(1, 3)])
    with pytest.raises(ValueError, match="lengths: got lengths for a PackedSequence"):
        ntm(packed, lengths=[2, 1])
    with pytest.raises(ValueError, match=r"inputs: got a PackedSequence of shape \(3,\)"):
        ntm(pack_sequence([some(2), some(1)]))
    with pytest.raises(ValueError, match="inputs: got shape .*input_size = 3"):
        ntm(pack_sequence([some(2, 5), some(1, 5)]))
    with pytest.raises(ValueError, match=r"state.memory: got shape \(3, 7, 2\), expected \(2, 7, 2\)"):
        ntm(packed, ntm.initial_state(3))


def test_kinds_of_lengths_that_say_the_same(backend: Backend) -> None:
    ntm, inputs = make(engine="auto").to(backend.device), padded(3, seed=3).to(backend.device)
    kinds = [LENGTHS, tuple(LENGTHS)]
    kinds += [torch.tensor(LENGTHS, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)]
    kinds.append(torch.tensor([n for n in LENGTHS for _ in range(2)])[::2])
    found = [ntm(inputs, lengths=lengths)[0] for lengths in kinds]
    assert all(torch.equal(x, found[0]) for x in found)
    batch = inputs.new_empty(T, 0, 3)
    assert ntm(batch, lengths=[])[0].shape == (T, 0, 4)
