"""NaN goes where the reference has it, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from helpers.backends import Backend
from helpers.machines import NATIVE
from helpers.sequences import Case, named, native_alone, of_sequences
from torch import Tensor

from ntm_fast import NTMState


@pytest.mark.parametrize("controller", NATIVE)
@pytest.mark.parametrize("target", ("inputs", *NTMState._fields))
def test_nan_stays_with_its_sequence_and_after_its_time(backend: Backend, controller: str, target: str) -> None:
    case = Case(controller, B=9, T=6, layers=2, dtype=torch.float32)
    ntm = native_alone(case)

    def run(engine: str, place: int | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        inputs, state = case.inputs(), case.state()
        if place is not None and target == "inputs":
            inputs[3, place, -1] = torch.nan
        elif place is not None:
            tensor = state.controller[-1][:, place] if target == "controller" else getattr(state, target)[place]
            tensor[(-1,) * tensor.dim()] = torch.nan
        ntm.engine = engine
        leaves = {
            "inputs": inputs.requires_grad_(),
            **{f"state.{n}": x.requires_grad_() for n, x in named(state).items()},
        }
        outputs, final = ntm(inputs, state)
        results = {"outputs": outputs, **{f"final.{n}": x for n, x in named(final).items()}}
        grads = torch.autograd.grad([x.sum() for x in results.values()], list(leaves.values()))
        return {n: x.detach() for n, x in results.items()}, {f"grad {n}": x for n, x in zip(leaves, grads)}

    clean = {n: x for part in run("sequence", None) for n, x in part.items()}
    for place in (0, 4, 8):
        results, grads = run("sequence", place)
        expected, expected_grads = run("reference", place)
        mates = [b for b in range(9) if b != place]
        for name, got in {**results, **grads}.items():
            assert torch.equal(
                of_sequences({name: got}, mates)[name], of_sequences({name: clean[name]}, mates)[name]
            ), name
        for name, want in {**expected, **expected_grads}.items():
            missed = want.isnan() & ~{**results, **grads}[name].isnan()
            assert not missed.any(), f"{name} is a number where the reference says NaN: {missed.nonzero()[:3]}"
        if target == "inputs":
            assert (
                torch.equal(results["outputs"][:3], clean["outputs"][:3]) and results["outputs"][3, place].isnan().any()
            )
