"""The operators: a contract each, and beside it the public function.

Every function has the name, the signature, the answers and the description of its twin in :mod:`ntm_fast.reference`.
"""

from __future__ import annotations

from typing import Any, Sequence

from torch import Tensor

from .. import reference
from ..spec import EPS, STEP_OPTIONS, NTMState, SequenceTensors
from .contract import MEMORY, Contract, check_options, step_sizes
from .registration import Served, served
from .sequence import call_sequence
from .serving import call

__all__ = [
    "address",
    "circular_shift",
    "content_addressing",
    "erase_add_write",
    "gru_gates",
    "interpolate",
    "lstm_gates",
    "memory_step",
    "ntm_sequence",
    "read",
    "sharpen",
]

_EPS = {"eps": STEP_OPTIONS["eps"]}

CONTRACTS: dict[str, Contract] = {}
_SERVED: dict[str, Served] = {}


def _contract(contract: Contract) -> None:
    CONTRACTS[contract.name] = contract
    _SERVED[contract.name] = served(contract)


def _call(name: str, *tensors: Tensor, **options: Any) -> Any:
    if options:
        check_options(name, options)
    return call(CONTRACTS[name], _SERVED[name], tensors, options)


_contract(
    Contract(
        "content_addressing",
        {"memory": MEMORY, "key": "BHM", "beta": "BH"},
        {"content": "BHN"},
        saved=("content",),
        options=_EPS,
    )
)


def content_addressing(memory: Tensor, key: Tensor, beta: Tensor, *, eps: float = EPS) -> Tensor:
    return _call("content_addressing", memory, key, beta, eps=eps)


_contract(Contract("interpolate", {"content": "BHN", "previous": "BHN", "gate": "BH"}, {"gated": "BHN"}))


def interpolate(content: Tensor, previous: Tensor, gate: Tensor) -> Tensor:
    return _call("interpolate", content, previous, gate)


_contract(Contract("circular_shift", {"weights": "BHN", "shift": "BHK"}, {"shifted": "BHN"}))


def circular_shift(weights: Tensor, shift: Tensor) -> Tensor:
    return _call("circular_shift", weights, shift)


_contract(Contract("sharpen", {"weights": "BHN", "gamma": "BH"}, {"sharpened": "BHN"}, saved=("sharpened",)))


def sharpen(weights: Tensor, gamma: Tensor) -> Tensor:
    return _call("sharpen", weights, gamma)


_contract(
    Contract(
        "address",
        {
            "memory": MEMORY,
            "previous": "BHN",
            "key": "BHM",
            "beta": "BH",
            "gate": "BH",
            "shift": "BHK",
            "gamma": "BH",
        },
        {"weights": "BHN"},
        saved=("weights",),
        options=_EPS,
    )
)


def address(
    memory: Tensor,
    previous: Tensor,
    key: Tensor,
    beta: Tensor,
    gate: Tensor,
    shift: Tensor,
    gamma: Tensor,
    *,
    eps: float = EPS,
) -> Tensor:
    return _call("address", memory, previous, key, beta, gate, shift, gamma, eps=eps)


_contract(
    Contract(
        "erase_add_write",
        {"memory": MEMORY, "weights": "BHN", "erase": "BHM", "add": "BHM"},
        {"written": MEMORY},
    )
)


def erase_add_write(memory: Tensor, weights: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    return _call("erase_add_write", memory, weights, erase, add)


_contract(Contract("read", {"memory": MEMORY, "weights": "BHN"}, {"reads": "BHM"}))


def read(memory: Tensor, weights: Tensor) -> Tensor:
    return _call("read", memory, weights)


_contract(
    Contract(
        "memory_step",
        {"memory": MEMORY, "read_weights": "BRN", "write_weights": "BWN", "params": "BP"},
        {"reads": "BRM", "new_memory": MEMORY, "new_read_weights": "BRN", "new_write_weights": "BWN"},
        saved=("new_memory", "new_read_weights", "new_write_weights"),
        options=STEP_OPTIONS,
        derived=step_sizes,
    )
)


def memory_step(
    memory: Tensor,
    read_weights: Tensor,
    write_weights: Tensor,
    params: Tensor,
    *,
    shift_range: int,
    read_first: bool = False,
    key_activation: str = "tanh",
    add_activation: str = "tanh",
    clip: float | None = 20.0,
    eps: float = EPS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _call(
        "memory_step",
        memory,
        read_weights,
        write_weights,
        params,
        shift_range=shift_range,
        read_first=read_first,
        key_activation=key_activation,
        add_activation=add_activation,
        clip=clip,
        eps=eps,
    )


_contract(
    Contract(
        "lstm_gates",
        {"gates": "BG", "cell": "BH"},
        {"hidden": "BH", "new_cell": "BH"},
        saved=("new_cell",),
        derived=lambda sizes: {"G": 4 * sizes["H"]},
    )
)


def lstm_gates(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    return _call("lstm_gates", gates, cell)


_contract(
    Contract(
        "gru_gates",
        {"input_gates": "BG", "hidden_gates": "BG", "hidden": "BH"},
        {"new_hidden": "BH"},
        derived=lambda sizes: {"G": 3 * sizes["H"]},
    )
)


def gru_gates(input_gates: Tensor, hidden_gates: Tensor, hidden: Tensor) -> Tensor:
    return _call("gru_gates", input_gates, hidden_gates, hidden)


def ntm_sequence(
    inputs: Tensor,
    memory: Tensor,
    read_weights: Tensor,
    write_weights: Tensor,
    reads: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    heads_weight: Tensor,
    heads_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    *,
    controller: str = "lstm",
    shift_range: int,
    read_first: bool = False,
    key_activation: str = "tanh",
    add_activation: str = "tanh",
    clip: float | None = 20.0,
    eps: float = EPS,
    memory_checkpoint: str | int = "auto",
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    for name, tensor in (("output_weight", output_weight), ("output_bias", output_bias)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"ntm_sequence: {name} must be a Tensor, got {type(tensor).__name__}")
    initial = NTMState(memory, read_weights, write_weights, reads, tuple(state))
    layers = heads_weight, heads_bias, output_weight, output_bias
    step = shift_range, read_first, key_activation, add_activation, clip, eps
    x = SequenceTensors(inputs, initial, tuple(weights), *layers, lengths)
    outputs, final = call_sequence(x, controller, step, memory_checkpoint)
    return outputs, final.memory, final.read_weights, final.write_weights, final.reads, final.controller


for _name in __all__:
    globals()[_name].__doc__ = getattr(reference, _name).__doc__
