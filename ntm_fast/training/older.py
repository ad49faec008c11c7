"""What runs written by earlier versions call differently: everything that reads a run passes through here."""

from __future__ import annotations

from typing import Any

# Before there were models to choose from, these options of the NTM lay among those of training.
_NTM_OPTIONS = (
    *("controller", "hidden_size", "num_layers", "memory_locations", "memory_width", "read_heads", "write_heads"),
    *("shift_range", "memory_init", "engine"),
)


def upgrade_config(config: dict[str, Any]) -> dict[str, Any]:
    """What config.json and checkpoints say, as fields of today's ``TrainConfig``."""
    if "model" in config:
        return config
    options = {name: config[name] for name in _NTM_OPTIONS if name in config}
    rest = {name: value for name, value in config.items() if name not in options}
    return {**rest, "model": "ntm", "model_options": options}


def upgrade_progress(progress: dict[str, Any]) -> dict[str, Any]:
    """The counters of a checkpoint, as fields of today's ``Progress``."""
    return {{"row_wrong_bits": "row_error"}.get(name, name): value for name, value in progress.items()}


def upgrade_columns(names: list[str]) -> list[str]:
    """The columns of metrics.csv by today's names."""
    return [{"bits_per_sequence": "error"}.get(name, name) for name in names]
