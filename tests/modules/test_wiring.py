"""Each head uses its own parameters and weighting, and each part of the state goes to its place."""

from __future__ import annotations

import pytest
import torch
from helpers.machines import CLOSE, SERVED, make, some

from ntm_fast import FastNTM, NTMTrace, reference

pytestmark = pytest.mark.usefixtures("made_on_the_backend")


def test_heads_keep_to_their_own_state() -> None:
    """Any swap of two parts of the state changes the outputs."""
    ntm = make(read_heads=2, write_heads=2)
    inputs = some(1, 1, 3)
    state = ntm.initial_state(1).detach()
    outputs, final = ntm(inputs, state)
    swaps = {
        "read and write heads": state._replace(read_weights=state.write_weights, write_weights=state.read_weights),
        "two read heads": state._replace(read_weights=state.read_weights.flip(1)),
        "two write heads": state._replace(write_weights=state.write_weights.flip(1)),
        "two reads": state._replace(reads=state.reads.flip(1)),
        "hidden and cell": state._replace(controller=state.controller[::-1]),
    }
    for name, swapped in swaps.items():
        other, other_final = ntm(inputs, swapped)
        assert not torch.allclose(other, outputs, rtol=1e-6), f"swapping {name} changes nothing"


def _check_hand_set_machine(engine: str) -> None:
    """Biases alone steer the heads: each moves on by one location a step, the read head two behind the write head."""
    N, big = 6, 40.0
    ntm = FastNTM(
        1, 1, 2, memory_locations=N, memory_width=1, engine=engine, dtype=torch.float64, add_activation="identity",
        clip=None,
    )  # fmt: skip
    with torch.no_grad():
        for p in ntm.parameters():
            p.zero_()
        ntm.controller.weight_ih_l0[4:6, 0] = 1.0  # h = tanh(tanh(x)): i and o are open, f is shut
        ntm.controller.bias_ih_l0.copy_(torch.tensor([big, big, -big, -big, 0, 0, big, big]))
        head = [0.0, 0.0, -big, -big, -big, big, big]  # k, beta, g (keep the previous weighting), s (move by +1), gamma
        ntm.heads.bias.copy_(torch.tensor([*head, *head, big, 0.0]))  # e: erase everything
        ntm.heads.weight[-1, 0] = 1.0  # a = h
        ntm.initial_write_weights[0, 0] = 100 * big  # so the first write is to location 1
        ntm.initial_read_weights[0, N - 2] = 100 * big  # and the first read from location N - 1
        ntm.output.weight[0, 2] = 1.0  # output = read
    inputs = some(5, 1)
    outputs, state = ntm(inputs)
    stored = torch.tanh(torch.tanh(inputs))[:, 0]
    torch.testing.assert_close(state.memory[1:, 0], stored, **CLOSE)
    torch.testing.assert_close(outputs[2:, 0], stored[:3], **CLOSE)
    assert state.write_weights.argmax() == 5 and state.read_weights.argmax() == 3


def test_a_hand_set_machine_repeats_what_it_is_told() -> None:
    _check_hand_set_machine("reference")


@pytest.mark.parametrize("engine", SERVED)
def test_a_hand_set_machine_on_the_native_engines(backend, engine: str) -> None:
    _check_hand_set_machine(engine)


@pytest.mark.parametrize("fault", ("weights out", "weights in", "parameters", "stale memory", "stale weights"))
def test_planted_faults_in_the_wiring_are_found(monkeypatch, fault: str) -> None:
    right = reference.memory_step

    def wrong(memory, read_weights, write_weights, params, **options):
        if fault == "weights in":
            read_weights, write_weights = write_weights, read_weights
        if fault == "parameters":  # the read head's shift, turned round
            params = torch.cat([params[:, :3], params[:, 3:6].flip(1), params[:, 6:]], 1)
        reads, new_memory, new_reads, new_writes = right(memory, read_weights, write_weights, params, **options)
        if fault == "weights out":
            new_reads, new_writes = new_writes, new_reads
        if fault == "stale weights":
            new_writes = write_weights
        return reads, memory if fault == "stale memory" else new_memory, new_reads, new_writes

    monkeypatch.setattr(reference, "memory_step", wrong)
    with pytest.raises(AssertionError):
        _check_hand_set_machine("reference")


def test_trace_is_what_forward_did() -> None:
    for batched in (True, False):
        ntm, inputs = make(shift_range=2), some(5, *([3] if batched else []), 3)
        outputs, state = ntm(inputs)
        traced, trace = ntm.trace(inputs)
        assert isinstance(trace, NTMTrace)
        torch.testing.assert_close(traced, outputs, rtol=0, atol=0)
        for name in ("read_weights", "write_weights", "reads"):
            torch.testing.assert_close(getattr(trace, name)[-1], getattr(state, name), rtol=0, atol=0)
        lead = (5, 3) if batched else (5,)
        for name, shape in (
            ("read_weights", (2, 7)), ("write_weights", (2, 7)), ("reads", (2, 2)), ("key", (4, 2)), ("beta", (4,)),
            ("gate", (4,)), ("shift", (4, 5)), ("gamma", (4,)), ("erase", (2, 2)), ("add", (2, 2)),
        ):  # fmt: skip
            assert getattr(trace, name).shape == (*lead, *shape), name
        assert trace.read_weights.sum(-1).allclose(torch.ones(1).double()) and trace.shift.sum(-1).allclose(
            torch.ones(1).double()
        )
        # The recorded heads, applied to the weightings recorded at one step, give the weightings recorded at the next.
        if batched:
            t, memory = 1, ntm(inputs[:1])[1].memory
            heads = [x[t][:, 2:] for x in (trace.key, trace.beta, trace.gate, trace.shift, trace.gamma)]
            weights = reference.address(memory, trace.write_weights[t - 1], *heads)
            torch.testing.assert_close(weights, trace.write_weights[t], **CLOSE)
            written = reference.erase_add_write(memory, weights, trace.erase[t], trace.add[t])
            torch.testing.assert_close(reference.read(written, trace.read_weights[t]), trace.reads[t], **CLOSE)
