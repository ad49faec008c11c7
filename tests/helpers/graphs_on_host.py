"""An emulation of CUDA graphs without a GPU.

A capture runs the work and notes each torch operation with its tensors, and each native function with its raw
addresses. On a GPU a capture computes nothing, so here its results are filled with NaN afterwards. A replay repeats
what was noted, in the same memory; it runs none of the Python code around it. On a GPU, memory that only the graphs
still hold may be given to others, so here it is filled with NaN after every capture and replay.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from helpers.native_calls import binding_replaced

NAN = 0xFF  # a number whose bytes are all 0xFF is NaN
NATIVE = {"memory_step", "lstm_gates", "gru_gates"}  # what the step engine calls
ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}  # these launch nothing


class HostRecorder:
    """Stands in for graphs.CUDARecorder."""

    recording = False
    replays = 0  # of all graphs together
    room = 1 << 40

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0
        self.blocks: dict[int, Tensor] = {}  # a tensor over the whole of each storage that the graphs know, by address
        self.aliases: dict[int, list[Tensor]] = {}  # the tensors over each storage that the graphs hold
        self.given: set[int] = set()  # storages that existed before the capture

    @staticmethod
    def stream(device: torch.device) -> int | None:
        return None if HostRecorder.recording else 0

    @staticmethod
    def memory(device: torch.device) -> int:
        return HostRecorder.room

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        known = set(self.blocks)
        operations: list[Callable[[], None]] = []
        HostRecorder.recording = True
        try:
            with binding_replaced(lambda binding: _NotingBinding(binding, operations)), _Noting(self, operations):
                results = work()
        finally:
            HostRecorder.recording = False
        for address in set(self.blocks) - known - self.given:
            self.blocks[address].fill_(NAN)
            self.bytes += self.blocks[address].nbytes
        self._scribble()

        def replay() -> None:
            HostRecorder.replays += 1
            with torch.inference_mode(False), torch.no_grad():
                for operation in operations:
                    operation()
                self._scribble()

        return replay, results

    def alias(self, tensor: Tensor) -> Tensor:
        """Another tensor over the same memory, held by the graphs alone."""
        address = tensor.untyped_storage().data_ptr()
        if address not in self.blocks:
            size = tensor.untyped_storage().nbytes()
            self.blocks[address] = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), 0, (size,))
            self.aliases[address] = [self.blocks[address]]
        own = tensor.new_empty(0)
        own.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
        self.aliases[address].append(own)
        return own

    def _scribble(self) -> None:
        for address, block in self.blocks.items():
            # The question itself adds one use, by Python.
            if torch._C._storage_Use_Count(block.untyped_storage()._cdata) == len(self.aliases[address]) + 1:
                block.fill_(NAN)


class _NotingBinding:
    """The binding to the native functions, which notes their calls."""

    def __init__(self, binding: Any, operations: list) -> None:
        self._binding, self._operations = binding, operations

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._binding, name)

        def call(*arguments: Any) -> None:
            self._operations.append(lambda: function(*arguments))
            function(*arguments)

        return call if name.removesuffix("_backward") in NATIVE else function


class _Noting(TorchDispatchMode):
    def __init__(self, recorder: HostRecorder, operations: list) -> None:
        super().__init__()
        self.recorder, self.operations = recorder, operations

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._schema.name.removeprefix("aten::"), kwargs or {}
        if name in ("_local_scalar_dense", "nonzero"):
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        before = set(self.recorder.blocks)
        own_args, own_kwargs = tree_map_only(Tensor, self.recorder.alias, (args, kwargs))
        self.recorder.given |= set(self.recorder.blocks) - before
        results = function(*args, **kwargs)
        own_results = tree_map_only(Tensor, self.recorder.alias, results)

        def again() -> None:
            for result, own in zip(_flat(function(*own_args, **own_kwargs)), _flat(own_results), strict=True):
                if result.data_ptr() != own.data_ptr():  # the result is neither a view nor written in place
                    own.copy_(result)

        if name not in ALLOCATE:
            self.operations.append(again)
        return results


def _flat(results: Any) -> list[Tensor]:
    return list(results) if isinstance(results, (tuple, list)) else [results]
