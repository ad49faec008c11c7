"""The calls of native functions: which backend serves them, which were made, and faults planted in them."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Iterator

from ntm_fast import _native

from .cases import OPERATORS

Part = _native._Part


def serve_by(monkeypatch, part: Part) -> None:
    """From now on, this part serves tensors on the CPU."""
    monkeypatch.setattr(_native, "_cpu", lambda: part)
    monkeypatch.setitem(_native._PARTS, "cpu", lambda: part)
    forget_answers(monkeypatch)


def forget_answers(monkeypatch) -> None:
    """What a part said that it serves, another may not: it is asked again."""
    monkeypatch.setattr(_native, "_reasons", {})
    monkeypatch.setattr(_native, "_refusals", {})


def intercept(monkeypatch, instead: Callable[..., None]) -> None:
    """From now on, each native call becomes ``instead(call, name, like, *values)``, ``call`` being the right one."""
    monkeypatch.setattr(_native, "call", functools.partial(instead, _native.call))


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, str]]]:
    """The native functions of operators and sequences called within: each one's name, and its backend's."""
    calls: list[tuple[str, str]] = []
    with binding_replaced(lambda binding: _Recorder(binding, calls)):
        yield calls


@contextlib.contextmanager
def binding_replaced(replace: Callable[[Any], Any]) -> Iterator[None]:
    """Within, native functions are looked for in ``replace(binding)``."""
    right = _native._extension
    _native._extension = lambda: replace(right())
    try:
        yield
    finally:
        _native._extension = right


class _Recorder:
    """The binding, noting which function of which backend is called."""

    def __init__(self, binding: Any, calls: list[tuple[str, str]]) -> None:
        self._binding, self._calls = binding, calls

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._binding, name)
        if name.removesuffix("_backward") not in (*OPERATORS, "ntm_sequence"):
            return function

        def call(backend: int, *args: Any) -> None:
            self._calls.append((name, self._binding.describe(backend)["name"]))
            function(backend, *args)

        return call
