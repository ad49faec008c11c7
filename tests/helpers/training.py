"""A small run, how to stop it, and when two runs are the same."""

from dataclasses import replace

import torch

from ntm_fast.training import TrainConfig, loop
from ntm_fast.training.checkpoint import load_checkpoint
from ntm_fast.training.metrics import read_metrics

SMALL = TrainConfig(
    task_options={"bits": 2, "max_length": 3},
    model_options={"hidden_size": 8, "memory_locations": 8, "memory_width": 4, "engine": "reference"},
    batch_size=4,
    learning_rate=3e-3,
    validate_every=30,  # not a multiple of the batch: rows end between updates
    max_sequences=160,
    seed=3,
    threads=1,
)
EASY = replace(
    SMALL, task_options={"bits": 1, "max_length": 1}, batch_size=16, validate_every=160, max_sequences=20_000
)


def with_model(config: TrainConfig, **options) -> TrainConfig:
    """``config`` with other options of its model."""
    return replace(config, model_options={**config.model_options, **options})


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(folder) -> dict[str, torch.Tensor]:
    """Everything that the checkpoint of a run holds."""
    checkpoint = load_checkpoint(folder / "checkpoint.safetensors")
    return {**checkpoint.model, **checkpoint.optimizer, **checkpoint.generators}


def rows(folder) -> list:
    """What metrics.csv says but for times."""
    return [row._replace(seconds=0, sequences_per_second=0) for row in read_metrics(folder / "metrics.csv")]


def assert_same_run(one, other) -> None:
    """Bit for bit: parameters, optimizer, generators, counters, and what metrics.csv says but for times."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].equal(second[name]), name
    progress = [load_checkpoint(folder / "checkpoint.safetensors").progress for folder in (one, other)]
    assert progress[0].keys() == progress[1].keys()
    for name in progress[0].keys() - {"seconds", "row_seconds"}:
        assert progress[0][name] == progress[1][name], name
    assert rows(one) == rows(other)


def stop_at(monkeypatch, updates, action) -> None:
    """Do ``action`` after that many updates."""
    original, count = loop.update, 0

    def patched(run):
        nonlocal count
        original(run)
        count += 1
        if count == updates:
            action()

    monkeypatch.setattr(loop, "update", patched)


def files(folder) -> dict[str, bytes]:
    """What lies in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def copied(folder, destination):
    """The files of ``folder``, again in ``destination``."""
    destination.mkdir(exist_ok=True)
    for name, data in files(folder).items():
        (destination / name).write_bytes(data)
    return destination
