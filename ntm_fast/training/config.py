"""What decides what a run computes: the task, the model, and how the one is trained on the other."""

from __future__ import annotations

from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..spec import check_option, check_options, option
from ..tasks import Task, find_task
from .checkpoint import RunError, read_json
from .models import Model, find_model
from .older import upgrade_config

# A run draws from four independent streams of random numbers.
PARAMETERS, TRAINING, VALIDATION, EVALUATION = range(4)


def stream_seed(seed: int, stream: int) -> int:
    """The seed of one of a run's streams."""
    return 4 * seed + stream


def stream_generator(seed: int, stream: int) -> torch.Generator:
    """A CPU generator at the beginning of one of a run's streams."""
    return torch.Generator().manual_seed(stream_seed(seed, stream))


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run computes. Raises RunError naming the field that is wrong.

    ``task`` and ``model`` are names in ``TASKS`` and ``MODELS``, or ``module:Class``. ``task_options`` and
    ``model_options`` are fields of their classes; those that are not given take their defaults.
    """

    task: str = "copy"
    task_options: dict[str, Any] = field(default_factory=dict)
    model: str = "ntm"
    model_options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = option("rmsprop", "optimizer", choices=("rmsprop", "adam"))
    learning_rate: float = option(3e-4, "learning rate", above=0)
    momentum: float = option(0.9, "momentum of rmsprop", least=0)
    clip_grad: float = option(10.0, "largest gradient; 0 switches clipping off", least=0)
    clip_grad_by: str = option("norm", "clip the norm of all gradients, or each value", choices=("norm", "value"))
    batch_size: int = option(8, "sequences of an update", least=1)
    max_sequences: int = option(
        200_000, "stop, solved or not, after so many training sequences", least=1, changeable=True
    )
    validate_every: int = option(500, "training sequences between two rows of metrics.csv", least=1)
    seed: int = option(0, "decides every random draw", least=0)
    device: str = option("cpu", "cpu, cuda, cuda:1, ...", changeable=True)
    dtype: str = option("float32", "dtype", choices=("float32", "float64"))
    threads: int | None = option(
        None, "CPU threads; by default as many as torch takes", least=1, optional=int, changeable=True
    )

    def __new__(cls, *args: Any, **given: Any) -> TrainConfig:
        for name in given:
            if name not in cls.__dataclass_fields__:
                raise TypeError(
                    f"TrainConfig: got {name}, which is no option of training: those of the task are given as "
                    f"task_options={{...}}, those of the model as model_options={{...}}"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for group, made in (("task_options", make_task(self)), ("model_options", make_model_options(self))):
            object.__setattr__(self, group, asdict(made))  # with the defaults: a run's are all written
        option_groups(self.task, self.model)  # raises where one name stands for two options
        try:
            for one in self.options():
                check_option(one, getattr(self, one.name))
        except (TypeError, ValueError) as error:
            raise RunError(str(error)) from error
        if self.seed >= 2**60:
            raise RunError(f"seed: got {self.seed}, expected less than 2**60")

    @classmethod
    def options(cls) -> tuple[Field[Any], ...]:
        """The fields that are options of training, with their help."""
        return tuple(one for one in fields(cls) if "help" in one.metadata)

    @classmethod
    def from_json(cls, path: Path) -> TrainConfig:
        """Read what :func:`train` wrote to ``config.json``. Raises RunError."""
        return cls.from_dict(path, read_json(path))

    @classmethod
    def from_dict(cls, path: Path, found: dict[str, Any]) -> TrainConfig:
        """The configuration that the file ``path`` holds, of this or an earlier version. Raises RunError naming it."""
        found = upgrade_config(found)
        names = [one.name for one in fields(cls)]
        for name in found:
            if name not in names:
                raise RunError(f"{path}: got the unknown field {name!r}, expected {', '.join(names)}")
        try:
            return cls(**found)
        except RunError as error:
            raise RunError(f"{path}: {error}") from error


def option_groups(task: str, model: str) -> dict[str, tuple[Field[Any], ...]]:
    """The options of a task, of a model and of training.

    Raises RunError where there is no such task or model, or where one name stands for two options.
    """
    try:
        groups = {"task": fields(find_task(task)), "model": fields(find_model(model))}
    except (TypeError, ValueError) as error:
        raise RunError(str(error)) from error
    groups["training"] = TrainConfig.options()
    owners: dict[str, str] = {one.name: "run" for one in fields(TrainConfig) if "help" not in one.metadata}
    for group, options in groups.items():
        for one in options:
            if one.name in owners:
                raise RunError(f"{one.name}: is an option of the {owners[one.name]} and of the {group}")
            owners[one.name] = group
    return groups


def changeable(config: TrainConfig) -> list[str]:
    """The options that may change when a run goes on: none is part of what has been learned."""
    groups = option_groups(config.task, config.model)
    return [one.name for options in groups.values() for one in options if one.metadata.get("changeable")]


def fixed(config: TrainConfig) -> dict[str, Any]:
    """Everything else, by name."""
    flat = {**asdict(config), **config.task_options, **config.model_options}
    left_out = (*changeable(config), "task_options", "model_options")
    return {name: value for name, value in flat.items() if name not in left_out}


def make_task(config: TrainConfig) -> Task:
    """The task, with its options. Raises RunError."""
    return _make("task_options", find_task, config.task, config.task_options)


def make_model_options(config: TrainConfig) -> Model:
    """The options of the model, which build it. Raises RunError."""
    return _make("model_options", find_model, config.model, config.model_options)


def _make(group: str, find: Any, name: str, options: dict[str, Any]) -> Any:
    if not isinstance(options, dict):
        raise RunError(f"{group}: got {options!r}, expected a dict")
    try:
        found = find(name)
        known = [one.name for one in fields(found)]
        for option_name in options:
            if option_name not in known:
                expected = "one of " + ", ".join(map(repr, known)) if known else "none"
                raise RunError(f"{group}: got {option_name!r}, expected {expected}")
        made = found(**options)
        check_options(made)
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, RunError) else RunError(str(error)) from error
    return made


def make_model(config: TrainConfig, task: Task) -> torch.nn.Module:
    """The untrained model: the same seed gives the same parameters on every device. Raises RunError."""
    device = _device(config.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(config.seed, PARAMETERS))
        try:
            options = make_model_options(config)
            model = options.build(task.input_size, task.output_size, dtype=getattr(torch, config.dtype))
        except ValueError as error:
            raise RunError(str(error)) from error
    model = model.to(device)
    _check_fit(config, task, model)
    return model


def _check_fit(config: TrainConfig, task: Task, model: torch.nn.Module) -> None:
    """Run the model once. Raises RunError where it cannot serve, or where what it gives is not what the task takes."""
    if not any(True for _ in model.parameters()):
        raise RunError(f"model: got {config.model!r}, whose module has no parameters to train")
    weight = next(model.parameters())
    batch = task.batch(1, stream_generator(config.seed, PARAMETERS)).to(weight.device, weight.dtype)
    steps = len(batch.inputs)
    expected: dict[str, tuple[int, ...]] = {
        "inputs": (steps, 1, task.input_size),
        "targets": (steps, 1, task.output_size),
        "mask": (steps, 1),
        "lengths": (1,),
    }
    for name, tensor in batch._asdict().items():
        if tensor is not None and tensor.shape != expected[name]:
            shape = tuple(tensor.shape)
            raise RunError(f"task: got {config.task!r}, whose {name} have shape {shape}, expected {expected[name]}")
    try:
        with torch.no_grad():
            outputs = batch.through(model)
    except TypeError as error:
        if batch.lengths is not None and "lengths" in str(error):
            takes = f"which takes no lengths, expected one that does: those of the sequences of {config.task} differ"
            raise RunError(f"model: got {config.model!r}, {takes}") from error
        raise
    except RuntimeError as error:
        if str(error).startswith("engine="):  # the engine asked for cannot serve
            raise RunError(str(error)) from error
        raise
    answered = isinstance(outputs, tuple) and isinstance(outputs[0], torch.Tensor)
    if not (answered and outputs[0].shape == expected["targets"]):
        found = f"outputs of shape {tuple(outputs[0].shape)}" if answered else type(outputs).__name__
        raise RunError(
            f"model: got {config.model!r}, which gives {found}, expected a tuple of outputs of shape "
            f"{expected['targets']} and a state"
        )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("tensors there hold no values")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"device: got {name!r}, which torch {torch.__version__} cannot use: {reason}") from error
    return device
