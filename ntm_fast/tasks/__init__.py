"""The tasks that a model can be trained on, by name."""

from ..registry import look_up
from .bits import BitTask, answer_loss, wrong_bits
from .copy import CopyTask
from .task import Batch, Case, Task, axis_values

TASKS: dict[str, type[Task]] = {task.name: task for task in (CopyTask,)}


def find_task(name: str) -> type[Task]:
    """The task of that name: one of ``TASKS``, or a user's own as ``module:Class``. Raises ValueError or TypeError."""
    return look_up("task", name, TASKS, Task)


__all__ = [
    "TASKS",
    "Batch",
    "BitTask",
    "Case",
    "CopyTask",
    "Task",
    "answer_loss",
    "axis_values",
    "find_task",
    "wrong_bits",
]
