"""The one comparison of an operator with the float64 reference."""

from __future__ import annotations

import os
from typing import Callable

import pytest
import torch
from torch import Tensor

from helpers.backends import Backend
from helpers.cases import Case, cast, evaluate
from helpers.poison import poisoned_operators
from ntm_fast import ops, reference

SWEEP_SEED = int(os.environ.get("NTM_SWEEP_SEED", 0))
SWEEP_CASES = int(os.environ.get("NTM_SWEEP_CASES", 40))


def sweep(node: str, check_seed: Callable[[int], None]) -> None:
    """Check random cases. With NTM_SWEEP_SEED and NTM_SWEEP_CASES one can repeat one case, or run many more."""
    failures = []
    for seed in range(SWEEP_SEED, SWEEP_SEED + SWEEP_CASES):
        try:
            check_seed(seed)
        except AssertionError as error:
            failures.append(f"NTM_SWEEP_SEED={seed} NTM_SWEEP_CASES=1 pytest '{node}'\n{error}")
    if failures:
        pytest.fail(f"{len(failures)} of {SWEEP_CASES} cases:\n\n" + "\n\n".join(failures[:5]), pytrace=False)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """The L2 distance for each element of the batch."""
    return (a.double() - b.double()).flatten(1).norm(dim=1) if a.numel() else a.new_zeros(0, dtype=torch.float64)


def assert_agrees(
    actual: dict[str, Tensor],
    truth: dict[str, Tensor],
    single: dict[str, Tensor],
    *,
    floor: float = 0.0,
    grad_norm: float = 1.0,
) -> None:
    """Compare each tensor with the float64 reference, ``truth``; ``single`` is the float32 reference.

    float32: a relative L2 error of 1e-5, about a hundred ulp, which covers sums over hundreds of terms. A case may be
    worse conditioned; torch's own float32 shows that, so twice its error is allowed too, and 8 ulp more because its
    error may be 0 by luck.
    float64: 1e-12, some 5,000 ulp; or eight times the error of torch's float32, scaled by the ratio of the ulps.
    ``floor``, in ulp, times ``grad_norm`` for gradients, is added: see Extreme.amplification. It is at least a tenth of
    an ulp, because some gradients are sums over all locations that cancel, down to a single number for one head.

    Each element of the batch is compared alone too, with ten times the tolerance: an element of small numbers cannot
    hide behind one of large numbers.
    """
    problems = []
    for name, got in actual.items():
        want, low = truth[name], single[name]
        assert got.shape == want.shape, f"{name}: got shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        assert got.dtype in (torch.float32, torch.float64)
        got = got.cpu()
        eps = torch.finfo(got.dtype).eps
        unusable = int((~got.isfinite()).sum())
        if unusable:
            problems.append(f"{name}: {unusable} of {got.numel()} elements are not finite (or never written)")
            continue
        errors, torch_errors, norms = _distances(got, want), _distances(low, want), _distances(want, 0 * want)
        least = max(floor, 0.1) * eps * (grad_norm if name.startswith("grad_") else 1.0)

        def allowed(norm: Tensor, torch_error: Tensor) -> Tensor:
            if eps > 1e-10:
                return torch.maximum(1e-5 * norm, 2 * torch_error) + 8 * eps * norm
            return torch.maximum(1e-12 * norm, 8 * torch_error * (eps / torch.finfo(torch.float32).eps))

        total = allowed(norms.norm(), torch_errors.norm()) + least
        if errors.norm() > total:
            problems.append(
                f"{name}: error {errors.norm():.3g}, allowed {total:.3g} (norm {norms.norm():.3g}, float32 torch's "
                f"error {torch_errors.norm():.3g})"
            )
            continue
        each = 10 * (allowed(norms, torch_errors) + least) + 8 * eps * norms.norm()
        for b in torch.nonzero(errors > each).flatten().tolist():
            problems.append(
                f"{name}[{b}]: error {errors[b]:.3g}, allowed {each[b]:.3g} (norm {norms[b]:.3g}, float32 torch's "
                f"error {torch_errors[b]:.3g})"
            )
    if problems:
        raise AssertionError("\n".join(problems))


def check(case: Case, backend: Backend) -> None:
    """Forward and every gradient of one case on ``backend``, against the float64 reference."""
    inputs, grads = case.tensors(backend.device)
    before = {name: x.clone() for name, x in {**inputs, **grads}.items()}
    twin = getattr(reference, case.op)
    with poisoned_operators() as poison:
        with backend.serves(case.op, f"{case.op}_backward"):
            actual = evaluate(getattr(ops, case.op), inputs, case.keywords(), grads)
        poison.check()
    for name, x in {**inputs, **grads}.items():
        assert torch.equal(x, before[name]), f"{case}\n{name} was modified"
    truth = evaluate(twin, cast(inputs, torch.float64), case.keywords(), cast(grads, torch.float64))
    single = evaluate(twin, cast(inputs, torch.float32), case.keywords(), cast(grads, torch.float32))
    try:
        assert_agrees(
            actual,
            truth,
            single,
            floor=8 * case.amplification(inputs),
            grad_norm=sum(g.double().square().sum().item() for g in grads.values()) ** 0.5,
        )
    except AssertionError as error:
        raise AssertionError(f"{case}\n{error}") from None
