"""Machines in programs: torch.export with sizes that may change, saved and loaded; states saved and loaded."""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers.backends import Backend
from helpers.machines import CLOSE, CONTROLLERS, NATIVE, flat, make, skip_without_sequence, some
from torch import nn

from ntm_fast import FastNTM, NTMCell, NTMState


def dynamic() -> dict[int, object]:
    return {0: torch.export.Dim("T", min=2, max=4096), 1: torch.export.Dim("B", min=1, max=4096)}


def operators(program: torch.export.ExportedProgram) -> list[str]:
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [name for name in names if name.startswith("ntm_fast")]


@pytest.mark.parametrize("grad", (False, True), ids=("no_grad", "grad"))
@pytest.mark.parametrize("controller", NATIVE)
def test_one_inference_operator_for_every_size(backend: Backend, controller: str, grad: bool) -> None:
    skip_without_sequence(backend.device)
    ntm = make(engine="auto", controller=controller).to(backend.device)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(ntm, (some(5, 3, 3).to(backend.device),), dynamic_shapes=(dynamic(),))
    assert operators(program) == ["ntm_fast.ntm_sequence.default"]
    (call,) = [node for node in program.graph.nodes if "ntm_sequence" in str(node.target)]
    assert call.args[-1] is False, "it keeps no trail"
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    for steps, batch in ((5, 3), (41, 64), (2, 1), (300, 7)):
        inputs = some(steps, batch, 3, seed=steps).to(backend.device)
        with torch.no_grad():
            want, end = ntm(inputs)
            for module in (program.module(), loaded.module()):
                outputs, final = module(inputs)
                assert type(final) is NTMState
                assert torch.equal(outputs, want) and all(map(torch.equal, flat(final), flat(end)))


def test_with_lengths(backend: Backend) -> None:
    ntm = make(engine="auto").to(backend.device)
    steps, batch = dynamic().values()
    inputs, lengths = some(5, 3, 3).to(backend.device), torch.tensor([2, 5, 0])
    shapes = {"inputs": {0: steps, 1: batch}, "lengths": {0: batch}}
    program = torch.export.export(ntm, (inputs,), {"lengths": lengths}, dynamic_shapes=shapes)
    for steps, given in ((5, [2, 5, 0]), (7, [7, 1, 3, 2]), (4, [4, 4])):
        inputs, lengths = some(steps, len(given), 3).to(backend.device), torch.tensor(given)
        outputs, final = program.module()(inputs, lengths=lengths)
        want, end = ntm(inputs, lengths=lengths)
        torch.testing.assert_close([outputs, *flat(final)], [want, *flat(end)], **CLOSE)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_a_cell_in_a_module_of_ones_own(backend: Backend, controller: str) -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = make(NTMCell, engine="auto", controller=controller)

        def forward(self, x: torch.Tensor, state: NTMState) -> tuple[torch.Tensor, NTMState]:
            y, state = self.cell(x, state)
            return y.sigmoid(), state

    module = Stream().to(backend.device)
    x, state = some(2, 3).to(backend.device), module.cell.initial_state(2).detach()
    program = torch.export.export(module, (x, state))
    y, new = program.module()(x, state)
    want, end = module(x, state)
    torch.testing.assert_close([y, *flat(new)], [want, *flat(end)], **CLOSE)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_a_saved_state_loads_safely(controller: str) -> None:
    state = make(controller=controller).initial_state(2).detach()
    buffer = io.BytesIO()
    torch.save({"state": state}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)["state"]
    assert type(loaded) is NTMState and all(map(torch.equal, flat(loaded), flat(state)))


@pytest.mark.slow
def test_compiled_ahead_of_time(tmp_path) -> None:
    """AOTInductor's package, in a process that imports ntm_fast and no more."""
    skip_without_sequence("cpu")
    torch.manual_seed(0)
    ntm = FastNTM(3, 4, 16, memory_locations=20, memory_width=8).eval()
    inputs = torch.randn(5, 3, 3)
    with torch.no_grad():
        program = torch.export.export(ntm, (inputs,), dynamic_shapes=(dynamic(),))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "ntm.pt2"))
        longer = torch.randn(41, 16, 3)
        torch.save((longer, ntm(longer)[0]), tmp_path / "expected.pt")
    code = f"""
        import torch, ntm_fast
        inputs, want = torch.load({str(tmp_path / "expected.pt")!r})
        outputs, state = torch._inductor.aoti_load_package({package!r})(inputs)
        torch.testing.assert_close(outputs, want, rtol=1e-4, atol=1e-5)  # the compiler's softmax rounds in its own way
        assert type(state) is ntm_fast.NTMState, type(state)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=300)
