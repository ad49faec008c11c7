"""Which engine serves, and the error where a forced engine cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.machines import CONTROLLERS, SERVED, make, skip_without_sequence, some
from helpers.native_calls import serve_by

from ntm_fast import FastNTM, NTMCell, native
from ntm_fast.engines import choose as choosing
from ntm_fast.engines import step
from ntm_fast.ops import sequence
from ntm_fast.ops.serving import why_not_native

pytestmark = pytest.mark.usefixtures("made_on_the_backend")


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_auto_takes_the_fastest_engine_that_serves(backend, controller: str) -> None:
    inputs = some(2, 2, 3, dtype=torch.float32)
    auto = make(engine="auto", dtype=torch.float32, controller=controller)
    whole = backend.device == "cpu" and controller != "feedforward"
    gates = [] if controller == "feedforward" else [f"{controller}_gates"]
    forward = ["ntm_sequence"] if whole else [*gates, "memory_step"] * 2
    backward = ["memory_step_backward", *(f"{g}_backward" for g in gates)] * 2
    backward = ["ntm_sequence_backward"] if whole else backward
    with backend.serves(*forward), torch.no_grad():
        auto(inputs)
    with backend.serves(*forward, *backward):
        auto(inputs)[0].sum().backward()
    with backend.serves(), torch.no_grad():
        make(engine="reference", dtype=torch.float32, controller=controller)(inputs)
    with backend.serves(*[*gates, "memory_step"] * 2), torch.no_grad():
        make(engine="step", dtype=torch.float32, controller=controller)(inputs)


@pytest.mark.parametrize("engine", SERVED)
def test_a_forced_engine_that_cannot_serve_says_why(monkeypatch, engine: str) -> None:
    serve_by(monkeypatch, native.Part(None, None, "it is switched off here"))
    with pytest.raises(RuntimeError, match=f"engine='{engine}' cannot serve: it is switched off here"):
        make(engine=engine)(some(2, 2, 3))
    outputs, _ = make(engine="auto")(some(2, 2, 3))
    assert outputs.isfinite().all()


def test_the_sequence_engine_refuses_a_feedforward_controller(backend) -> None:
    skip_without_sequence(backend.device)
    for cls, inputs in ((FastNTM, some(2, 2, 3)), (NTMCell, some(2, 3))):
        with pytest.raises(RuntimeError, match="engine='sequence' cannot serve.*lstm, gru, not feedforward"):
            make(cls, engine="sequence", controller="feedforward")(inputs)


def test_auto_takes_large_controllers_in_steps_on_cuda(monkeypatch) -> None:
    """The choice alone, on tensors without storage, as if CUDA had all kernels."""

    def chosen(engine: str = "auto", device: str = "cuda", **options: Any) -> str:
        ntm = FastNTM(3, 4, engine=engine, device="meta", **options)
        return choosing.choose_engine(ntm.ntm_config, torch.device(device), torch.float32).engine

    monkeypatch.setattr(choosing, "why_not_native", lambda *_: None)
    monkeypatch.setattr(sequence, "why_not_native", lambda *_: None)
    monkeypatch.setattr(sequence, "why_no_room", lambda *_: None)
    limit = choosing.LARGEST_HIDDEN
    assert chosen(hidden_size=limit) == "sequence" and chosen(hidden_size=limit + 1) == "step"
    assert chosen(hidden_size=limit, controller="feedforward") == "step"
    assert chosen(hidden_size=4 * limit, device="cpu") == "sequence"
    assert chosen("sequence", hidden_size=4 * limit) == "sequence" and chosen("step", hidden_size=8) == "step"
    with monkeypatch.context() as patch:
        patch.setattr(step, "in_one_node", lambda device_type: False)  # autocast, torch.compile: no graphs then
        assert chosen(hidden_size=4 * limit) == "sequence"
    monkeypatch.setattr(sequence, "why_not_native", lambda *_: "no such kernel")
    assert chosen(hidden_size=8) == "step"
    assert f"of more than {limit}" in FastNTM.__doc__


def test_compiled_code_is_not_unrolled_for_it(backend, monkeypatch) -> None:
    """torch.compile cannot use our CUDA graphs, so there one operator does all steps."""
    if reason := why_not_native(torch.device(backend.device), torch.float32, "ntm_sequence"):
        pytest.skip(reason)
    monkeypatch.setattr(choosing, "_faster_in_steps", lambda *_: step.in_one_node("cpu"))
    ntm, inputs = make(engine="auto", dtype=torch.float32), some(3, 2, 3, dtype=torch.float32)
    torch._dynamo.reset()
    with torch.no_grad():
        with backend.serves(*["lstm_gates", "memory_step"] * 3):
            ntm(inputs)
        compiled = torch.compile(ntm, backend="aot_eager", fullgraph=True)
        with backend.serves("ntm_sequence"):
            compiled(inputs)
    torch._dynamo.reset()
