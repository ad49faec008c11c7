"""Checkpoints: everything that a run needs to go on, in one safetensors file that is never half written."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FORMAT = "ntm_fast checkpoint 1"


class RunError(ValueError):
    """A run cannot be started, continued or read; the text says what was found and what was expected."""


class CheckpointError(RunError):
    """A checkpoint is damaged, or belongs to another model."""


class Checkpoint(NamedTuple):
    """What a checkpoint file holds."""

    model: dict[str, Tensor]  # the model's state_dict
    optimizer: dict[str, Tensor]  # "{parameter}.{name of the optimizer's quantity}"
    generators: dict[str, Tensor]  # states of the CPU generators, uint8
    config: dict[str, Any]
    progress: dict[str, Any]  # counters and running sums


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: whoever reads it, and whatever happens meanwhile, finds the old or the new."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as readable JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises RunError where there is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path}: got {type(value).__name__}, expected a JSON object")
    return value


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` to ``path``, atomically."""
    from safetensors.torch import save

    tensors = {
        f"{group}.{name}": tensor.detach().to("cpu", copy=True).contiguous()  # safetensors refuses shared memory
        for group in ("model", "optimizer", "generators")
        for name, tensor in getattr(checkpoint, group).items()
    }
    metadata = {
        "format": FORMAT,
        "config": json.dumps(checkpoint.config),
        "progress": json.dumps(checkpoint.progress),
    }
    write_atomically(path, save(tensors, metadata))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, to the CPU.

    Raises CheckpointError where the file is missing, cut off, not a checkpoint, or where the optimizer's state holds a
    NaN or an infinity.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file, expected a checkpoint")
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "generators": {}}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                found = metadata.get("format", "none")
                raise CheckpointError(f"{path}: is not a checkpoint of ntm_fast: got format {found}, expected {FORMAT}")
            for key in file.keys():
                group, _, name = key.partition(".")
                groups[group][name] = file.get_tensor(key)
        config, progress = json.loads(metadata["config"]), json.loads(metadata["progress"])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is damaged or cut off ({error})") from error
    except (KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: is damaged: {error!r}") from error
    _check_finite(path, "optimizer", groups["optimizer"])
    return Checkpoint(**groups, config=config, progress=progress)


def _check_finite(path: Path, group: str, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise CheckpointError(f"{path}: {group} {name} holds {bad} values that are NaN or infinite")


def first_difference(found: dict[str, Any], expected: dict[str, Any]) -> tuple[str, str, str] | None:
    """The first name whose values differ, with both values as text; None where there is no difference."""
    for name in [*expected, *(name for name in found if name not in expected)]:
        if name not in found or name not in expected or found[name] != expected[name]:
            got, want = (_show(side[name]) if name in side else "nothing" for side in (found, expected))
            return name, got, want
    return None


def check_same(path: Path, found: dict[str, Any], expected: dict[str, Any], what: str = "") -> None:
    """Raise CheckpointError naming the first entry in which ``found``, of ``path``, is not ``expected``."""
    difference = first_difference(found, expected)
    if difference is not None:
        name, got, want = difference
        raise CheckpointError(f"{path}: belongs to another model: {what}{name}: got {got}, expected {want}")


def _show(value: Any) -> str:
    if isinstance(value, tuple):  # of _layout
        return f"shape {value[0]} {value[1]}"
    return repr(value)


def _layout(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    return {name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in tensors.items()}


def restore_model(path: Path, checkpoint: Checkpoint, model: nn.Module) -> None:
    """Put the checkpoint's parameters and buffers into ``model``.

    Raises CheckpointError naming the first that does not fit, or the first parameter that holds a NaN or an infinity.
    """
    check_same(path, _layout(checkpoint.model), _layout(model.state_dict()), "parameter ")
    # Parameters alone: a buffer may hold an infinity on purpose, as a mask does.
    _check_finite(path, "model", {name: checkpoint.model[name] for name, _ in model.named_parameters()})
    model.load_state_dict(checkpoint.model)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by the names of the parameters."""
    return {
        f"{name}.{key}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    path: Path, checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put the checkpoint's optimizer state into ``optimizer``. Raises CheckpointError where it does not fit."""
    states: dict[int, dict[str, Tensor]] = {}
    used = set()
    for index, (name, parameter) in enumerate(model.named_parameters()):
        prefix = name + "."
        state = {k[len(prefix) :]: t for k, t in checkpoint.optimizer.items() if k.startswith(prefix)}
        for key, tensor in state.items():
            used.add(prefix + key)
            if tensor.dim() and tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"{path}: optimizer state {prefix}{key}: got shape {tuple(tensor.shape)}, expected "
                    f"{tuple(parameter.shape)}"
                )
        if state:
            states[index] = state
    for key in checkpoint.optimizer:
        if key not in used:
            raise CheckpointError(f"{path}: optimizer state {key} belongs to no parameter of the model")
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
