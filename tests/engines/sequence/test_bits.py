"""What must not change a bit of the results: batch mates, threads, and how many memories are kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from helpers.backends import CUDA_ON_HOST, Backend
from helpers.machines import NATIVE
from helpers.sequences import BITS, Case, assert_same_bits, named, native_alone, of_sequences, train
from torch import Tensor

from ntm_fast import NTMState, native
from ntm_fast.native import parts


class _Part(NamedTuple):
    """Some elements of a case's batch, as a case."""

    case: Case
    which: slice | list[int]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.case, name)

    def inputs(self) -> Tensor:
        return self.case.inputs()[:, self.which]

    def state(self) -> NTMState:
        *memory, controller = self.case.state()
        return NTMState(*(x[self.which].clone() for x in memory), tuple(x[:, self.which].clone() for x in controller))

    def normal(self, *shape: int, seed: int) -> Tensor:
        """These elements' part of the gradient that comes in for outputs or for a tensor of the final state."""
        place = 1 if seed == 20 or seed >= 25 else 0
        whole = self.case.normal(*shape[:place], self.case.B, *shape[place + 1 :], seed=seed)
        return whole[:, self.which] if place else whole[self.which]


# On CUDA the size of the batch decides how many warps share an element, and that may change bits. Which other elements
# are in the batch must not. So parts of the batch are for the CPU; on CUDA the batch is shuffled.
PARTS = [slice(0, 1), slice(7, 8), slice(12, 13), slice(3, 5), slice(2, 13)]
SHUFFLED = [[(5 * i + 3) % 13 for i in range(13)]]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("change", BITS, ids=str)
def test_neither_batch_mates_nor_threads_change_a_bit(kernels: Backend, change: dict, dtype: torch.dtype) -> None:
    case = Case(**{**dict(B=13, T=5, hidden=20, N=33), **change}, dtype=dtype)
    ntm = native_alone(case)
    whole = train(case, "sequence", ntm=ntm)
    assert not torch.equal(whole["outputs"][:, 0], whole["outputs"][:, 1])
    on_cpu = kernels is not CUDA_ON_HOST and kernels.device == "cpu"
    for threads in (1, 2, 3) if on_cpu else (1,):  # CUDA kernels have no threads of the CPU
        torch.set_num_threads(threads)
        assert_same_bits(
            of_sequences(train(case, "sequence", ntm=ntm), slice(None)), of_sequences(whole, slice(None)), threads
        )
        for which in PARTS if on_cpu else SHUFFLED:
            part = train(_Part(case, which), "sequence", ntm=ntm)
            assert_same_bits(of_sequences(part, slice(None)), of_sequences(whole, which), (which, threads))


@pytest.mark.parametrize("change", [*BITS, {"given": False}, {"given": False, "controller": "gru"}], ids=str)
def test_weight_gradients_are_pytorchs_on_any_number_of_threads(backend: Backend, change: dict, monkeypatch) -> None:
    if native.why_not("cpu", True, "ntm_sequence_weight_gradients"):
        pytest.skip("these are PyTorch's")
    case = Case(**{**dict(B=13, T=25), **change})  # more rows than the kernel takes at a time
    names = [name for name, _ in case.module("sequence").named_parameters()]
    products = "controller", "heads", "output", "initial"  # one initial state for all: a sum, too
    own = [f"grad {name}" for name in names if name.startswith(products)]
    found = []
    for threads in (1, 2, 3, 50):
        torch.set_num_threads(threads)
        found.append({name: x for name, x in train(case, "sequence").items() if name in own})
        assert_same_bits(found[-1], found[0], threads)
    monkeypatch.setitem(parts._reasons, ("cpu", True, "ntm_sequence_weight_gradients"), "switched off")
    plain = train(case, "sequence")
    assert found[0].keys() == plain.keys() & own
    for name, x in found[0].items():
        torch.testing.assert_close(x, plain[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("change", BITS, ids=str)
def test_forward_is_the_same_whatever_is_kept(backend: Backend, change: dict) -> None:
    """Bit for bit: one call for all steps, with or without gradients, and T calls of one step (streaming)."""
    case = Case(**{**dict(B=9, T=7), **change}, dtype=torch.float32)
    found = []
    for checkpoint in ("all", 1, 2, 5, 70, "auto"):
        ntm = native_alone(case._replace(checkpoint=checkpoint))
        inputs, state = case.inputs(), case.state()
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                outputs, final = ntm(inputs, state)
            assert outputs.requires_grad == (mode is torch.enable_grad)
            found.append({"outputs": outputs, **named(final)})
    steps = []
    with torch.no_grad():
        for x in inputs.split(1):
            y, state = ntm(x, state)
            steps.append(y)
    found.append({"outputs": torch.cat(steps), **named(state)})
    for index, other in enumerate(found[1:], 1):
        assert_same_bits(other, found[0], index)


@pytest.mark.parametrize("controller", NATIVE)
def test_gradients_are_the_same_whatever_is_kept(backend: Backend, controller: str) -> None:
    """Bit for bit: a memory that is computed again is what it was."""
    case = Case(controller, T=11, layers=2, R=2, W=2, dtype=torch.float32)
    found = [train(case._replace(checkpoint=k), "sequence") for k in ("all", 2, 3, 10, 11, 50)]
    for index, other in enumerate(found[1:], 1):
        assert_same_bits(other, found[0], index)
