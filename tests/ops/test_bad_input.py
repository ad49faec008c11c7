"""Errors name the bad argument, and ``explain`` names every operator."""

from __future__ import annotations

import pytest
import torch
from helpers.backends import Backend
from helpers.cases import OPERATORS, SHAPES, Case

import ntm_fast
from ntm_fast import ops


def _bad(op: str, name: str, change) -> tuple[list, dict]:
    case = Case(op, B=2, N=9, M=4, H=3, R=2, W=1)
    inputs, _ = case.tensors()
    inputs[name] = change(inputs[name])
    return list(inputs.values()), case.keywords()


@pytest.mark.parametrize("op", OPERATORS)
def test_bad_tensors_are_named(op: str) -> None:
    """Each argument is wrong in turn. The message names it and says what it was; nothing is computed."""
    first = next(iter(SHAPES[op][0]))
    letters_of_all = "".join(SHAPES[op][0].values())
    longer = lambda x: torch.cat([x, x[..., :1]], -1)  # noqa: E731
    for name, letters in SHAPES[op][0].items():
        for error, change, expected in (
            (TypeError, lambda x: x.tolist(), "list"),
            (ValueError, lambda x: x.unsqueeze(0), f"{len(letters)} dimensions"),
            (ValueError, lambda x: x[..., 0], None),
            (ValueError, longer, None),
            (ValueError, lambda x: x[..., :0], None),
            (TypeError, lambda x: x.double(), "float64") if name != first else (TypeError, lambda x: x.int(), "int32"),
            (ValueError, lambda x: x.to("meta"), "meta"),
        ):
            if change is longer and letters[-1] not in "KPG" and letters_of_all.count(letters[-1]) == 1:
                continue  # no other argument has this dimension, so any length is right
            tensors, options = _bad(op, name, change)
            with Backend("none", "cpu").serves(), pytest.raises(error) as caught:
                getattr(ops, op)(*tensors, **options)
            # Two arguments disagree about a size or dtype. The message names one of them, and the operator.
            text = str(caught.value)
            assert op in text and any(n in text for n in SHAPES[op][0]), text
            assert expected is None or expected in text, text


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"shift_range": -1}, ValueError, ("shift_range", "-1")),
        ({"shift_range": 5}, ValueError, ("9",)),
        ({"shift_range": 2}, ValueError, ("params",)),
        ({"key_activation": "relu"}, ValueError, ("key_activation", "relu", "tanh")),
        ({"add_activation": None}, ValueError, ("add_activation", "None", "tanh")),
        ({"clip": 0.0}, ValueError, ("clip", "0")),
        ({"clip": -1.0}, ValueError, ("clip", "-1")),
        ({"clip": float("nan")}, ValueError, ("clip", "nan")),
        ({"eps": 0.0}, ValueError, ("eps", "0")),
    ],
    ids=str,
)
def test_bad_options_are_named(options: dict, error: type, words: tuple) -> None:
    inputs, _ = Case("memory_step", B=2, N=9, M=4).tensors()
    with Backend("none", "cpu").serves(), pytest.raises(error) as caught:
        ops.memory_step(*inputs.values(), **{"shift_range": 1, **options})
    for word in ("memory_step", *words):
        assert word in str(caught.value)


def test_shifts_must_be_odd_and_fit() -> None:
    weights = torch.full((2, 1, 5), 0.2)
    for shifts in (2, 4, 7):
        with pytest.raises(ValueError, match=rf"circular_shift.*{shifts}"):
            ops.circular_shift(weights, torch.ones(2, 1, shifts))


def test_explain_names_every_operator() -> None:
    for device, dtype in (
        ("cpu", torch.float32),
        ("cpu", torch.float16),
        ("cuda", torch.float32),
        ("meta", torch.float64),
    ):
        answers = ntm_fast.explain(device, dtype)
        assert set(answers) == {*OPERATORS, "ntm_sequence"}
        assert all(answer == "native" or answer.startswith("reference: ") for answer in answers.values())


def test_what_was_checked_is_no_excuse_for_its_equal() -> None:
    """True equals 1, but it is no number: that 1 was checked before does not let True pass."""
    inputs = list(Case("content_addressing").tensors()[0].values())
    ops.content_addressing(*inputs, eps=1)
    with pytest.raises(TypeError, match="eps.*True"):
        ops.content_addressing(*inputs, eps=True)
