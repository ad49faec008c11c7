"""The tasks that a machine can be trained on, by name."""

from .copy import CopyTask
from .task import Batch, Task

TASKS: dict[str, type[Task]] = {"copy": CopyTask}

__all__ = ["TASKS", "Batch", "CopyTask", "Task"]
