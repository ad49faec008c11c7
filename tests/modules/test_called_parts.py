"""What people do to the parts of a machine: hooks, pruning, layers of their own. Nothing is gone past in silence."""

from __future__ import annotations

import contextlib
import copy
from typing import Any, Callable

import pytest
import torch
import torch.utils.checkpoint
from helpers.backends import Backend
from helpers.machines import CLOSE, CONTROLLERS, flat, make, skip_without_sequence, some
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import ntm_fast
from ntm_fast import FastNTM, NTMCell

T, B = 4, 3
PARTS = ("controller", "heads", "output")


class LoRA(nn.Module):
    """A wrapper with its own forward, as adapters have it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        options = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        self.down = nn.Linear(layer.in_features, 2, bias=False, **options)
        self.up = nn.Linear(2, layer.out_features, bias=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def gradients(ntm: FastNTM, inputs: Tensor, **call: Any) -> dict[str, Tensor]:
    outputs, final = ntm(inputs, **call)
    loss = outputs.square().sum() + sum(x.cos().sum() for x in flat(final))
    leaves = {"inputs": inputs, **{n: p for n, p in ntm.named_parameters() if p.requires_grad}}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"outputs": outputs, **dict(zip("abcdefg", flat(final))), **dict(zip(leaves, found))}


def inputs_for(ntm: FastNTM) -> Tensor:
    return some(T, B, 3).to(ntm.initial_reads.device).requires_grad_()


def counting(calls: list[str], name: str) -> Callable[..., None]:
    return lambda *_: calls.append(name)


HOOKS = {
    "forward": lambda part, hook: part.register_forward_hook(hook),
    "forward_pre": lambda part, hook: part.register_forward_pre_hook(hook),
    "full_backward": lambda part, hook: part.register_full_backward_hook(hook),
    "full_backward_pre": lambda part, hook: part.register_full_backward_pre_hook(hook),
}


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_called_and_change_nothing_else(backend: Backend, kind: str, part: str, controller: str) -> None:
    ntm = make(engine="auto", controller=controller).to(backend.device)
    inputs = inputs_for(ntm)
    want, calls = gradients(ntm, inputs), []
    handle = HOOKS[kind](getattr(ntm, part), counting(calls, part))
    assert f"would go past {part}, which has hooks" in ntm_fast.explain(backend.device, torch.float64, ntm)["engine"]
    for lengths in (None, [4, 1, 3]):
        calls.clear()
        found = gradients(ntm, inputs, lengths=lengths)
        assert len(calls) == (1 if part == "output" else T), "the output layer takes all steps at once"
        if lengths is None:
            torch.testing.assert_close(found, want, **CLOSE)
    cell = make(NTMCell, engine="auto", controller=controller).to(backend.device)
    with torch.no_grad():
        _, state = cell(inputs[0])
        HOOKS["forward"](getattr(cell, part), counting(calls, "cell"))
        cell(inputs[0], state)
        cell(inputs[0], state)
    assert calls.count("cell") == 2, "a repeated streamed step goes past nothing either"
    handle.remove()
    before = len(calls)
    torch.testing.assert_close(gradients(ntm, inputs), want, **CLOSE)
    assert len(calls) == before


def test_what_a_hook_returns_counts(backend: Backend) -> None:
    ntm = make(engine="auto").to(backend.device)
    twin = copy.deepcopy(ntm)
    inputs = inputs_for(ntm)
    ntm.heads.register_forward_hook(lambda module, given, y: 0.5 * y)
    ntm.output.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    with torch.no_grad():
        for p in (twin.heads.weight, twin.heads.bias):
            p.mul_(0.5)
        twin.output.weight.mul_(2)
    torch.testing.assert_close(ntm(inputs)[0], twin(inputs)[0], **CLOSE)


def test_hooks_for_all_modules(backend: Backend) -> None:
    ntm = make(engine="auto").to(backend.device)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, y: seen.append(module))
    try:
        ntm(inputs_for(ntm))
    finally:
        handle.remove()
    assert {ntm.controller, ntm.heads, ntm.output, ntm} <= set(seen)


@pytest.mark.parametrize("part", PARTS)
def test_a_forced_engine_raises_rather_than_go_past(backend: Backend, part: str) -> None:
    skip_without_sequence(backend.device)
    ntm = make(engine="sequence").to(backend.device)
    getattr(ntm, part).register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=f"engine='sequence' cannot serve: it would go past {part}, which has hooks"):
        ntm(inputs_for(ntm))
    assert "none: engine='sequence'" in ntm_fast.explain(backend.device, torch.float64, ntm)["engine"]


@pytest.mark.parametrize("engine", ("auto", "step", "reference"))
def test_pruned_heads_train(backend: Backend, engine: str) -> None:
    ntm = make(engine=engine).to(backend.device)
    prune.l1_unstructured(ntm.heads, "weight", 0.5)
    twin = make(engine="reference").to(backend.device)
    mask = ntm.heads.weight_mask
    with torch.no_grad():
        twin.heads.weight.mul_(mask)
    optimizer = torch.optim.SGD(ntm.parameters(), 0.01)
    for step in range(3):
        inputs = inputs_for(ntm)
        found, want = gradients(ntm, inputs), gradients(twin, inputs)
        torch.testing.assert_close(found["outputs"], want["outputs"], **CLOSE)
        torch.testing.assert_close(found["heads.weight_orig"], want["heads.weight"] * mask, **CLOSE)
        if step == 0:
            optimizer.zero_grad()
            ntm(inputs)[0].sum().backward()
            optimizer.step()
            names = dict(ntm.named_parameters())
            with torch.no_grad():
                for name, p in twin.named_parameters():
                    p.copy_(names[name] if name in names else names[f"{name}_orig"] * mask)
    prune.remove(ntm.heads, "weight")
    torch.testing.assert_close(ntm(inputs)[0], twin(inputs)[0], **CLOSE)


@pytest.mark.parametrize("engine", ("auto", "step", "reference"))
def test_layers_of_other_kinds(backend: Backend, engine: str) -> None:
    """No linear layer in the place of the output layer or of the heads: features, a small network, an adapter."""
    ntm = make(engine=engine).to(backend.device)
    inputs = inputs_for(ntm)
    outputs, state = ntm(inputs)
    weight, bias, ntm.output = ntm.output.weight, ntm.output.bias, nn.Identity()
    features, same = ntm(inputs)
    torch.testing.assert_close(features @ weight.t() + bias, outputs, **CLOSE)
    torch.testing.assert_close(flat(same), flat(state), **CLOSE)
    assert ntm(inputs[:, 0])[0].shape == (T, ntm.ntm_config.features_size)

    network = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, ntm.ntm_config.params_size))
    ntm.heads = network.to(backend.device, torch.float64)
    ntm.output = nn.Linear(ntm.ntm_config.features_size, 4).to(backend.device, torch.float64)
    found = gradients(ntm, inputs)
    assert all(found[f"heads.{i}.weight"].any() for i in (0, 2))
    ntm.engine = "reference"
    torch.testing.assert_close(found, gradients(ntm, inputs), **CLOSE)

    ntm = make(engine=engine).to(backend.device)
    merged = copy.deepcopy(ntm)
    for name in ("heads", "output"):
        adapter = LoRA(getattr(ntm, name))
        with torch.no_grad():
            getattr(merged, name).weight.add_(adapter.up.weight @ adapter.down.weight)
        setattr(ntm, name, adapter)
    torch.testing.assert_close(ntm(inputs)[0], merged(inputs)[0], **CLOSE)
    assert gradients(ntm, inputs)["heads.up.weight"].any()
    _, trace = ntm.trace(inputs)
    torch.testing.assert_close(list(trace), list(merged.trace(inputs)[1]), **CLOSE)


class Doubled(nn.Linear):
    """A linear layer by its class, with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_linear_layer_that_computes_something_else(backend: Backend) -> None:
    ntm, inputs = make(engine="auto").to(backend.device), some(T, B, 3).to(backend.device)
    want, _ = ntm(inputs)
    ntm.output.__class__ = Doubled
    torch.testing.assert_close(ntm(inputs)[0], 2 * want, **CLOSE)
    ntm.output.__class__ = nn.Linear
    ntm.output.forward = lambda x: torch.zeros(*x.shape[:-1], 4).to(x)
    assert not ntm(inputs)[0].any()


def test_what_a_part_gives_is_checked() -> None:
    for name, part, words in (
        ("heads", nn.Identity(), r"heads: got shape \(3, 5\) from its call, expected \(3, 40\)"),
        ("heads", nn.LSTM(5, 4, dtype=torch.float64), "heads: got tuple from its call, expected a Tensor"),
        ("output", nn.Flatten(0), r"output: got shape \(108,\) from its call, expected \(4, 3, 108\)"),
        ("controller", nn.Linear(3, 3), "controller: got Linear, expected a module with forward"),
        ("heads", nn.Linear(5, 3, dtype=torch.float64), r"heads.weight: got shape \(3, 5\), expected \(40, 5\)"),
    ):
        ntm = make(engine="auto")
        assert ntm.ntm_config.params_size == 40
        setattr(ntm, name, part)
        with pytest.raises((TypeError, ValueError), match=words):
            ntm(some(T, B, 3))


# --- what the fused engines serve, because a call would compute the same --------------------------------------------


def parametrized(ntm: FastNTM) -> None:
    parametrizations.weight_norm(ntm.heads)
    parametrizations.spectral_norm(ntm.output).eval()
    parametrizations.orthogonal(ntm.controller, "weight_hh_l0")


def frozen(ntm: FastNTM) -> None:
    ntm.heads.requires_grad_(False)
    ntm.controller.weight_ih_l0.requires_grad_(False)


def tied(ntm: FastNTM) -> None:
    ntm.controller.bias_hh_l0 = ntm.controller.bias_ih_l0


@pytest.mark.parametrize("change", (parametrized, frozen, tied), ids=lambda f: f.__name__)
def test_served_in_one_call(backend: Backend, change: Callable[[FastNTM], None]) -> None:
    skip_without_sequence(backend.device)
    ntm = make(engine="auto").to(backend.device)
    change(ntm)
    inputs = inputs_for(ntm)
    with backend.serves("ntm_sequence", "ntm_sequence_backward"):
        found = gradients(ntm, inputs)
    ntm.engine = "reference"
    torch.testing.assert_close(found, gradients(ntm, inputs), rtol=1e-9, atol=1e-11)


def test_under_torchs_own_tools(backend: Backend) -> None:
    """functional_call, an ensemble by vmap, checkpoint, detect_anomaly: also where parts are called."""
    for hooked in (False, True):
        ntm = make(engine="auto").to(backend.device)
        if hooked:
            ntm.heads.register_forward_hook(lambda *_: None)
        inputs = inputs_for(ntm)
        want = gradients(ntm, inputs)
        other = {n: 0.5 * p for n, p in ntm.named_parameters()}
        called, _ = torch.func.functional_call(ntm, other, (inputs,))
        stack = {n: torch.stack([p, 0.5 * p]).detach() for n, p in ntm.named_parameters()}
        run = lambda weights: torch.func.functional_call(ntm, weights, (inputs,))[0]  # noqa: B023, E731
        ensemble = torch.func.vmap(run)(stack)
        torch.testing.assert_close(list(ensemble), [want["outputs"], called], rtol=1e-9, atol=1e-11)
        twin = lambda x: ntm(x)[0]  # noqa: B023, E731
        again = torch.utils.checkpoint.checkpoint(twin, inputs, use_reentrant=False)
        torch.testing.assert_close(again, want["outputs"], **CLOSE)
        with torch.autograd.detect_anomaly(check_nan=True), contextlib.suppress(UserWarning):
            torch.testing.assert_close(gradients(ntm, inputs), want, **CLOSE)
