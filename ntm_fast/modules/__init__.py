"""The Neural Turing Machine as modules: :class:`FastNTM` over sequences, :class:`NTMCell` over single steps."""

from .controllers import Controller
from .ntm import FastNTM, NTMCell

__all__ = ["Controller", "FastNTM", "NTMCell"]
