"""The step engine in CUDA graphs: captured once, then a whole sequence is one launch, forward or back.

A step is some six kernels each way, which Python cannot launch as fast as a GPU runs them. So a call whose shapes come
again and again is captured. Its graphs always read and write at the same addresses. What is handed in is copied to
where they read. What they write is copied before it is handed out, so that no later call overwrites it.

Each captured call has memory of its own. In a pool shared by several, a replay of one call could overwrite what
another's forward keeps for its backward.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import itertools
import threading
import warnings
import weakref
from collections import OrderedDict
from typing import Any, Callable, Hashable, Sequence

import torch
from torch import Tensor

from .. import native

# The call of its kind that is captured. Those before it set up libraries and load kernels: torch's manual asks for
# three warm-up calls.
CAPTURED_AT = 4
KEYS = 32  # kinds of calls captured at a time on a device: copy's 20 lengths, and those of a validation
SHARE = 0.25  # the part of a device's memory that they may hold together
REMEMBERED = 256  # kinds of calls that are counted


class CUDARecorder:
    """Captures work on a device and replays it.

    All graphs of one recorder share memory: one overwrites what another wrote, once no tensor holds it.
    """

    _idle: dict[torch.device, list[torch.cuda.Stream]] = {}

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes, self.pool = device, 0, torch.cuda.graph_pool_handle()
        # cuBLAS keeps a workspace for each stream, and graphs captured there go on using it. So each recorder has its
        # own stream, with a priority that hardly any other code asks for.
        idle = self._idle.setdefault(device, [])
        self.capture_stream = idle.pop() if idle else torch.cuda.Stream(device, priority=-1)

    def __del__(self) -> None:
        self._idle[self.device].append(self.capture_stream)

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """-> a function that does the work again, on the current stream, and the results, which it overwrites."""
        graph = torch.cuda.CUDAGraph()
        # torch leaves the capturing stream current if the capture turns out to be invalid at its end.
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream(self.device)):
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(self.device)
            try:
                # Other threads may go on allocating and asking for events.
                with torch.cuda.graph(graph, self.pool, self.capture_stream, capture_error_mode="thread_local"):
                    results = work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # before torch 2.12 an invalid capture's pool stays open
                    torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
                raise
            self.bytes += torch.cuda.memory_reserved(self.device) - before
        return graph.replay, results

    @staticmethod
    def stream(device: torch.device) -> int | None:
        """The current stream; None while somebody captures it."""
        if torch.cuda.is_current_stream_capturing():
            return None
        return torch._C._cuda_getCurrentRawStream(device.index)

    @staticmethod
    def memory(device: torch.device) -> int:
        """Bytes that the device has."""
        return torch.cuda.get_device_properties(device).total_memory


RECORDERS: dict[str, Any] = {"cuda": CUDARecorder}  # by device


def _copy_in(targets: list[Tensor], sources: Sequence[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(targets, list(sources))  # pyright: ignore[reportPrivateImportUsage]


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    fresh = [torch.empty_like(x) for x in tensors]
    _copy_in(fresh, tensors)
    return fresh


class _Captured:
    """A tape's forward and backward as graphs. ``make``: its tensors in a row -> the tape."""

    def __init__(self, recorder: Any, make: Callable, tensors: Sequence[Tensor], keep: bool, needs_inputs: bool):
        self.turn: Callable[[], _Turn | None] = lambda: None
        with torch.inference_mode(False), torch.no_grad():  # tensors that may be written to in any mode
            self.given = [torch.empty_like(x) for x in tensors]

            def forward() -> tuple:
                tape = make(self.given)
                return tape, tape.forward()

            # The tape is kept for the addresses of what its backward needs.
            self.replay_forward, (self.tape, self.outputs) = recorder.capture(forward)
            self.grads: list[Tensor] = []
            if keep:
                self.grads = [torch.empty_like(x) for x in self.outputs]
                self.replay_backward, self.found = recorder.capture(
                    lambda: self.tape.backward(needs_inputs, self.outputs[1:4], self.grads)
                )
        self.device = self.given[0].device
        self.bytes = recorder.bytes + sum(x.numel() * x.element_size() for x in (*self.given, *self.grads))
        self.recorder = recorder  # last: it goes after the graphs

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        _copy_in(self.given, tensors)
        self.replay_forward()
        return tuple(_copies(self.outputs))

    def backward(self, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        _copy_in(self.grads, grads)
        self.replay_backward()
        of_inputs, *others = self.found
        return of_inputs if of_inputs is None else of_inputs.clone(), *_copies(others)


class _Turn:
    """A captured tape for one forward and all of its backwards. As long as this lives, nobody else has the tape."""

    def __init__(self, captured: _Captured, tensors: Sequence[Tensor]) -> None:
        self.captured, self.tensors = captured, tensors

    def forward(self) -> tuple[Tensor, ...]:
        tensors, self.tensors = self.tensors, ()
        return self.captured.forward(tensors)

    def backward(self, needs_inputs: bool, outputs: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """As :meth:`StepTape.backward`; ``outputs`` are not used: the graph reads its own."""
        return self.captured.backward(grads)


@dataclasses.dataclass
class _Kind:
    """Calls that one captured tape can serve."""

    used: int = 0  # the number of its last call, among all calls
    seen: int = 0  # how many of its calls were counted
    since: int = 0  # the number of the first of these
    captured: _Captured | None = None
    refused: bool = False


_kinds: OrderedDict[Hashable, _Kind] = OrderedDict()  # the last used last
_calls = itertools.count()
_lock = threading.RLock()
_warned = False


def tape(make: Callable, options: tuple, tensors: Sequence[Tensor], keep: bool, needs_inputs: bool) -> Any:
    """``make(tensors)``, a tape, or one captured earlier that does the same.

    ``options``: all that ``make`` depends on besides the tensors' shapes. ``keep``: whether there may be a backward,
    ``needs_inputs``: whether to the inputs too. While a captured tape's backward may still come, another call of its
    kind is not captured.
    """
    device = tensors[0].device
    recorder = RECORDERS.get(device.type)
    stream = None if recorder is None else recorder.stream(device)
    if stream is None:
        return make(tensors)
    # Work on one stream runs in order, so no replay overwrites results before they are copied.
    key = (stream, _precision(), options, keep, needs_inputs, *((x.shape, x.dtype, x.device) for x in tensors))
    with _lock:
        kind = _see(key)
        if kind.captured is None and not kind.refused and kind.seen >= CAPTURED_AT:
            if _make_room(kind, device, 0):
                _capture(kind, recorder, make, tensors, keep, needs_inputs)
            else:
                kind.seen = 0
        captured = kind.captured
        if captured is not None and captured.turn() is None:
            turn = _Turn(captured, tensors)
            captured.turn = weakref.ref(turn)
            return turn
    return make(tensors)


def _precision() -> Hashable:
    """The precision set for products in float32. A captured product keeps the one that was set then."""
    own = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if own is None:  # before torch 2.9
        return torch.get_float32_matmul_precision()
    return own, getattr(torch.backends, "fp32_precision", None)


def _see(key: Hashable) -> _Kind:
    now = next(_calls)
    kind = _kinds.setdefault(key, _Kind())
    kind.used = now
    kind.since = kind.since if kind.seen else now
    kind.seen += 1
    _kinds.move_to_end(key)
    if len(_kinds) > REMEMBERED:
        _kinds.popitem(last=False)
    return kind


def _make_room(kind: _Kind, device: torch.device, size: int) -> bool:
    """Whether so many bytes have room, after dropping captures that were unused since counting of ``kind`` began.

    The others stay. Otherwise lengths that alternate would drop each other, and be captured again and again.
    """
    taken = [(k, k.captured.bytes) for k in _kinds.values() if k.captured and k.captured.device == device]
    others = [(other, own) for other, own in taken if other is not kind]
    while len(others) >= KEYS or sum(own for _, own in others) + size > _most(device):
        if not others or others[0][0].used > kind.since:
            return False
        oldest, _ = others.pop(0)
        oldest.captured, oldest.seen = None, 0
    return True


def _most(device: torch.device) -> float:
    return SHARE * RECORDERS[device.type].memory(device)


def _capture(kind: _Kind, recorder: Any, make: Callable, tensors: Sequence[Tensor], *needs: bool) -> None:
    """Try to capture, once. If it fails, this call and all later ones of its kind run kernel by kernel."""
    device = tensors[0].device
    try:
        captured = _Captured(recorder(device), make, tensors, *needs)
        if not _make_room(kind, device, captured.bytes):
            raise RuntimeError(
                f"it takes {captured.bytes >> 20} MiB, and all captured ones together may take {SHARE:.0%} of the "
                f"device's {RECORDERS[device.type].memory(device) >> 20} MiB"
            )
    except Exception as error:
        kind.refused = True
        _warn_once(f"{type(error).__name__}: {error}")
    else:
        kind.captured = captured


def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        warnings.warn(
            f"ntm_fast could not capture a step engine's call into CUDA graphs, and launches it kernel by kernel: "
            f"{reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    _warned = True


@atexit.register  # while CUDA is still there
def clear() -> None:
    """Drop all captures. Those that still await a backward are freed after it."""
    with _lock:
        _kinds.clear()


def empty_cache() -> int:
    """Give back what is kept for later calls; returns how many bytes of main memory.

    That is main memory for the next training step, at most 256 MB, and the step engine's captured CUDA graphs with
    their device memory: docs/memory.md. What tensors still use, or a backward may still need, is not touched.
    """
    clear()
    return native.release_pool()
