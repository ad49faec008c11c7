"""Which calls are captured, what makes a call another kind of call, and how many captured kinds are kept."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.utils.flop_counter
from helpers.captured_calls import FIRST, captured, expected, forward, gradient, train, warm
from helpers.graphs_on_host import HostRecorder
from helpers.machines import CLOSE, make, some

import ntm_fast
from ntm_fast import FastNTM
from ntm_fast.engines import graphs


def test_each_kind_of_call_by_itself(backend, tapes: list, monkeypatch) -> None:
    """A call that differs in anything that graphs depend on is another kind, and gets graphs of its own."""
    ntm, kinds = make(engine="step"), 0

    def call(module: FastNTM, *shape: int, grad: bool = True, needs_inputs: bool = False) -> None:
        nonlocal kinds
        kinds += 1
        for _ in range(FIRST):
            with torch.set_grad_enabled(grad):
                train(module, some(*shape).requires_grad_(needs_inputs)) if grad else module(some(*shape))
        assert len(captured()) == kinds

    monkeypatch.setattr(graphs, "KEYS", 100)
    call(ntm, 5, 2, 3)
    call(ntm, 5, 2, 3, needs_inputs=True)
    call(ntm, 5, 2, 3, grad=False)
    call(ntm, 4, 2, 3)
    call(ntm, 5, 3, 3)
    for options in (
        {"controller": "gru"}, {"num_layers": 2}, {"hidden_size": 6}, {"memory_locations": 8}, {"memory_width": 3},
        {"read_heads": 1}, {"write_heads": 1}, {"shift_range": 2}, {"read_first": True}, {"clip": 1.0}, {"clip": None},
        {"key_activation": "identity"}, {"add_activation": "identity"},
    ):  # fmt: skip
        call(make(engine="step", **options), 5, 2, 3)
    before = graphs._precision()
    monkeypatch.setattr(graphs, "_precision", lambda: (before, "less"))
    call(ntm, 5, 2, 3)


def test_precision_is_what_torch_allows() -> None:
    found = []
    for allowed in ("highest", "high", "highest"):
        torch.set_float32_matmul_precision(allowed)
        found.append(graphs._precision())
    assert found[0] == found[2] != found[1]


def test_each_stream_by_itself(monkeypatch) -> None:
    ntm, stream = make(engine="step"), 0
    monkeypatch.setattr(HostRecorder, "stream", staticmethod(lambda device: stream))
    for stream in (1, 2, 1, 2):
        warm(ntm)
    assert len(captured()) == 2
    stream = None  # somebody else captures this stream
    before = HostRecorder.replays
    warm(ntm)
    assert HostRecorder.replays == before


def test_what_is_not_captured(backend, tapes: list) -> None:
    """Calls under a mode, autocast or a transform, and calls with an empty batch, are not captured."""
    ntm = make(engine="step", dtype=torch.float32)
    inputs = some(5, 2, 3, dtype=torch.float32)
    for _ in range(FIRST + 1):
        with torch.utils.flop_counter.FlopCounterMode(display=False):
            ntm(inputs)
        with torch.autocast(backend.device, dtype=torch.bfloat16):
            ntm(inputs)
        torch.func.vmap(lambda x: ntm(x)[0])(torch.stack([inputs, inputs]))
        ntm(inputs[:, :0])
    assert not graphs._kinds


class Failing(HostRecorder):
    """Fails in its capture number ``at``."""

    at = 1

    def capture(self, work):
        self.count = getattr(self, "count", 0) + 1

        def failing():
            results = work()
            if self.count == Failing.at:
                raise torch.OutOfMemoryError("out of memory, as planned")
            return results

        return super().capture(failing)


@pytest.mark.parametrize("at", (1, 2))
def test_a_capture_that_fails_loses_nothing(monkeypatch, tapes: list, at: int) -> None:
    monkeypatch.setitem(graphs.RECORDERS, "cpu", Failing)
    monkeypatch.setattr(Failing, "at", at)
    ntm, others = make(engine="step"), make(engine="step", controller="gru")
    with pytest.warns(RuntimeWarning, match="out of memory, as planned") as told:
        for seed in range(FIRST + 2):
            torch.testing.assert_close(gradient(*forward(ntm, seed)), expected(ntm, seed), **CLOSE)
        warm(others)
    assert len(told) == 1 and not captured()
    assert len(tapes) == 2 * (FIRST + 2) + 1 + FIRST + 1  # one attempt for each of the two kinds
    monkeypatch.setattr(Failing, "at", 0)
    warm(ntm)
    assert not captured()  # not tried again,
    ntm_fast.empty_cache()
    warm(ntm)
    assert len(captured()) == 1  # unless one asks for it


def test_the_longest_unused_goes_first(monkeypatch) -> None:
    monkeypatch.setattr(graphs, "KEYS", 2)
    ntm = make(engine="step")

    def call(steps: int) -> None:
        with torch.no_grad():
            ntm(some(steps, 2, 3))

    def kept() -> list[int]:
        return sorted(tape.given[0].shape[0] for tape in captured())

    for steps in (1, 2):
        for _ in range(FIRST):
            call(steps)
    assert kept() == [1, 2]
    for _ in range(5):  # all are in use: none drives out another
        for steps in (1, 2, 3):
            call(steps)
    assert kept() == [1, 2]
    for _ in range(2 * FIRST):
        call(2)
        call(3)
    assert kept() == [2, 3]
    for _ in range(FIRST):
        call(1)
    assert kept() == [1, 3]
    for steps in range(4, 4 + graphs.REMEMBERED):
        graphs._see(steps)
    assert len(graphs._kinds) == graphs.REMEMBERED and not captured()


def test_memory_is_bounded(monkeypatch) -> None:
    ntm = make(engine="step")
    warm(ntm)
    (one,) = captured()
    # At least the tape: memories, weightings, gates and head parameters, for five steps and two sequences.
    assert 8 * 5 * 2 * (7 * 2 + 4 * 7 + 4 * 5 + ntm.heads.out_features) < one.bytes < 1 << 20
    monkeypatch.setattr(HostRecorder, "room", int(1.5 * one.bytes / graphs.SHARE))
    warm(make(engine="step", memory_locations=9))  # drives out the other, which nobody has used since
    assert [tape.given[1].shape[1] for tape in captured()] == [9]
    monkeypatch.setattr(HostRecorder, "room", int(0.9 * one.bytes / graphs.SHARE))
    ntm_fast.empty_cache()
    with pytest.warns(RuntimeWarning, match="all captured ones together may take 25%"):
        warm(ntm, FIRST + 1)
    assert not captured()


def test_empty_cache_drops_what_was_captured(backend, tapes: list) -> None:
    ntm = make(engine="step")
    warm(ntm)
    call, alive = forward(ntm, 0), weakref.ref(captured()[0])
    ntm_fast.empty_cache()
    assert not captured() and alive() is not None
    torch.testing.assert_close(gradient(*call), expected(ntm, 0), **CLOSE)
    del call
    assert alive() is None
    tapes.clear()
    warm(ntm)
    assert len(tapes) == FIRST and len(captured()) == 1
