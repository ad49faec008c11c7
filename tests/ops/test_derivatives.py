"""Gradients compared with finite differences, second derivatives, and gradients of some inputs alone."""

from __future__ import annotations

import pytest
import torch
from helpers.backends import Backend
from helpers.cases import OPERATORS, Case, cast, evaluate
from helpers.comparison import assert_agrees
from torch import Tensor

from ntm_fast import ops, reference


def _small(op: str, backend: Backend, layout: str = "contiguous", **more) -> tuple[list[Tensor], dict]:
    case = Case(op, B=2, N=4, M=2, H=2, R=1, W=2, dtype=torch.float64, layouts=(layout,), **more)
    inputs, _ = case.tensors()
    return [x.to(backend.device).detach().requires_grad_() for x in inputs.values()], case.keywords()


@pytest.mark.parametrize("layout", ("contiguous", "reversed"))
@pytest.mark.parametrize("op", OPERATORS)
def test_gradcheck(kernels: Backend, op: str, layout: str) -> None:
    leaves, options = _small(op, kernels, layout)
    assert torch.autograd.gradcheck(lambda *x: getattr(ops, op)(*x, **options), leaves)


@pytest.mark.parametrize("op", OPERATORS)
def test_gradgradcheck(backend: Backend, op: str) -> None:
    leaves, options = _small(op, backend)
    assert torch.autograd.gradgradcheck(lambda *x: getattr(ops, op)(*x, **options), leaves)


@pytest.mark.parametrize("op", OPERATORS)
def test_gradient_penalty(backend: Backend, op: str) -> None:
    """A loss that contains the norm of a gradient, with more of a graph around the operator, as in training."""

    def penalty(function, inputs: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = function(*[x * 1.5 for x in leaves])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum(y.square().sum() for y in outputs)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return list(torch.autograd.grad(loss + sum(g.square().sum() for g in first), leaves))

    case = Case(op, B=2, N=9, M=3, H=2, R=2, W=2)
    inputs, _ = case.tensors()
    options = case.keywords()
    actual = penalty(
        lambda *x: getattr(ops, op)(*x, **options), list(cast(inputs, torch.float32, backend.device).values())
    )
    twin = getattr(reference, op)
    truth = penalty(lambda *x: twin(*x, **options), list(cast(inputs, torch.float64).values()))
    single = penalty(lambda *x: twin(*x, **options), list(inputs.values()))
    assert_agrees(*(dict(zip(inputs, x)) for x in (actual, truth, single)))


@pytest.mark.parametrize("op", OPERATORS)
def test_each_input_and_each_output_alone(backend: Backend, op: str) -> None:
    """The gradient of one input from one output is the same as when all are computed."""
    case = Case(op, B=2, N=9, M=3, H=2, R=2, W=2, dtype=torch.float64)
    inputs, grads = case.tensors()
    inputs, grads = cast(inputs, case.dtype, backend.device), cast(grads, case.dtype, backend.device)
    for index, name in enumerate(inputs):
        tensors = [x.detach().requires_grad_(i == index) for i, x in enumerate(inputs.values())]
        outputs = getattr(ops, op)(*tensors, **case.keywords())
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for output, (kept, grad) in zip(outputs, grads.items()):
            found = torch.autograd.grad(output, tensors[index], grad, retain_graph=True)[0]
            others_zero = {n: g if n == kept else torch.zeros_like(g) for n, g in grads.items()}
            expected = evaluate(
                getattr(reference, op), cast(inputs, case.dtype), case.keywords(), cast(others_zero, case.dtype)
            )
            torch.testing.assert_close(
                found.cpu(), expected[f"grad_{name}"], rtol=1e-9, atol=1e-12, msg=lambda m: f"{name} from {kept}: {m}"
            )


def test_batched_gradients_are_right_or_refused(backend: Backend) -> None:
    """``is_grads_batched`` runs a backward under vmap."""
    inputs, _ = Case("read", B=2, N=5, M=3, dtype=torch.float64).tensors()
    leaves = [x.to(backend.device).requires_grad_() for x in inputs.values()]
    outputs = ops.read(*leaves)
    directions = torch.randn(4, *outputs.shape, dtype=torch.float64, device=backend.device)
    try:
        found = torch.autograd.grad(outputs, leaves, directions, is_grads_batched=True, retain_graph=True)
    except RuntimeError:
        return
    for index, direction in enumerate(directions):
        for got, want in zip(found, torch.autograd.grad(outputs, leaves, direction, retain_graph=True)):
            torch.testing.assert_close(got[index], want)
