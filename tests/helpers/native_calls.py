"""Native calls: which part serves them, which calls were made, and where a test can step in."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Iterator

from ntm_fast import native
from ntm_fast.native import build, calls, parts

from .cases import OPERATORS


def serve_by(monkeypatch, part: native.Part) -> None:
    """From now on, this part serves tensors on the CPU."""
    monkeypatch.setitem(parts.PARTS, "cpu", lambda: part)
    forget_answers(monkeypatch)


def forget_answers(monkeypatch) -> None:
    """Ask again what the part serves: the answers so far may come from another part."""
    monkeypatch.setattr(parts, "_reasons", {})
    monkeypatch.setattr(calls, "_refusals", {})


def intercept(monkeypatch, instead: Callable[..., None]) -> None:
    """From now on, each native call becomes ``instead(call, name, like, scalars, addresses)``, ``call`` being the
    right one."""
    monkeypatch.setattr(native, "call", functools.partial(instead, native.call))


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, str]]]:
    """The list of the native calls made inside the block: the function's name, and its backend's name."""
    made: list[tuple[str, str]] = []
    with binding_replaced(lambda binding: _Recorder(binding, made)):
        yield made


@contextlib.contextmanager
def binding_replaced(replace: Callable[[Any], Any]) -> Iterator[None]:
    """Inside the block, native functions are taken from ``replace(binding)``."""
    right = build.extension
    build.extension = lambda: replace(right())
    try:
        yield
    finally:
        build.extension = right


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
