"""Faults planted in captured calls are found, and the emulation refuses what a capture on a GPU refuses."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from helpers.captured_calls import check, expected, forward, gradient, warm
from helpers.graphs_on_host import HostRecorder
from helpers.machines import CLOSE, make

from ntm_fast.engines import graphs


def _skip(count: int, index: int):
    """A fault: where ``count`` tensors are copied, the one at ``index`` is left out."""
    right = graphs._copy_in

    def wrong(targets, sources):
        if len(targets) == count:
            targets, sources = ([x for i, x in enumerate(xs) if i != index] for xs in (targets, sources))
        right(targets, sources)

    return "_copy_in", wrong


GIVEN, RESULTS = 13, 7  # the tensors of an LSTM's sequence: inputs, a state of 6, weights of 6; features and that state
FAULTS = {
    **{f"given {index} is not copied": lambda index=index: _skip(GIVEN, index) for index in range(GIVEN)},
    **{f"result or its gradient {index} is not copied": lambda i=index: _skip(RESULTS, i) for index in range(RESULTS)},
    "static tensors are handed out": lambda: ("_copies", lambda tensors: list(tensors)),
}


@pytest.mark.parametrize("fault", [None, *FAULTS], ids=str)
def test_planted_faults_are_found(monkeypatch, fault: str | None) -> None:
    if fault is not None:
        monkeypatch.setattr(graphs, *FAULTS[fault]())
    with contextlib.nullcontext() if fault is None else pytest.raises(AssertionError):
        check(given=True)


def test_a_tape_that_is_not_kept_is_found(monkeypatch) -> None:
    """Without the tape, the memory that the graphs use may be given to others."""
    right = graphs._Captured.__init__

    def wrong(self, *args):
        right(self, *args)
        self.tape = None

    monkeypatch.setattr(graphs._Captured, "__init__", wrong)
    with pytest.raises(AssertionError):
        check()


def test_a_turn_that_is_not_taken_is_found(monkeypatch, tapes: list) -> None:
    monkeypatch.setattr(graphs, "weakref", types.SimpleNamespace(ref=lambda turn: lambda: None))
    ntm = make(engine="step")
    warm(ntm)
    calls = [forward(ntm, seed) for seed in range(2)]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gradient(*calls[0]), expected(ntm, 0), **CLOSE)


def test_the_emulation_refuses_what_a_capture_refuses() -> None:
    """It refuses to read numbers on the host, and to capture within a capture."""
    recorder = HostRecorder(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        recorder.capture(lambda: torch.ones(1).item())
    assert recorder.stream(recorder.device) == 0
    _, within = recorder.capture(lambda: recorder.stream(recorder.device))
    assert within is None
    x = torch.ones(3)
    replay, (y, z) = recorder.capture(lambda: (x + 1, (x * 2).sum()))
    assert y.isnan().all() and z.isnan()
    replay()
    assert y.tolist() == [2, 2, 2] and z == 6
    x.fill_(2)
    replay()
    assert y.tolist() == [3, 3, 3] and z == 12
