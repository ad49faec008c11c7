"""Names and shapes in the state_dict, and weights loaded from and into nn.LSTM and nn.GRU."""

from __future__ import annotations

import io

import pytest
import torch
from helpers.machines import CLOSE, CONTROLLERS, SIZES, make, some
from torch import Tensor, nn

from ntm_fast import FastNTM, NTMCell, ops, reference, spec

pytestmark = pytest.mark.usefixtures("made_on_the_backend")


@pytest.mark.parametrize("layers", (1, 2))
def test_state_dict_names_and_shapes(layers: int) -> None:
    rows = {"lstm": 20, "gru": 15, "feedforward": 5}
    initial = {"lstm": ("hidden", "cell"), "gru": ("hidden",), "feedforward": ()}
    for controller in CONTROLLERS:
        expected = {
            "heads.weight": (4 * (2 + 2 + 4) + 2 * 2 * 2, 5),
            "heads.bias": (40,),
            "output.weight": (4, 5 + 2 * 2),
            "output.bias": (4,),
            "initial_memory": (7, 2),
            "initial_reads": (2, 2),
            "initial_read_weights": (2, 7),
            "initial_write_weights": (2, 7),
            **{f"controller.initial_{name}": (layers, 5) for name in initial[controller]},
        }
        for layer in range(layers):
            kinds = ("ih", "hh") if initial[controller] else ("ih",)
            for kind in kinds:
                columns = 3 + 2 * 2 if kind == "ih" and layer == 0 else 5
                expected[f"controller.weight_{kind}_l{layer}"] = (rows[controller], columns)
                expected[f"controller.bias_{kind}_l{layer}"] = (rows[controller],)
        for cls in (FastNTM, NTMCell):
            for mode in ("constant", "learned", "learned_constant", "random"):
                state = cls(**SIZES, controller=controller, num_layers=layers, memory_init=mode).state_dict()
                assert {name: tuple(x.shape) for name, x in state.items()} == expected


@pytest.mark.parametrize(("name", "layers"), [("lstm", 1), ("lstm", 3), ("gru", 1), ("gru", 3)])
def test_controller_weights_are_nn_lstms_and_nn_grus(name: str, layers: int) -> None:
    """Weights can be loaded both ways, and the controller computes what nn.LSTM or nn.GRU computes."""
    ntm = make(controller=name, num_layers=layers)
    rnn = getattr(nn, name.upper())(3 + 2 * 2, 5, layers, dtype=torch.float64)
    for module in (ops, reference):
        ntm.controller.load_state_dict(rnn.state_dict(), strict=False)
        state = tuple(some(layers, 2, 5, seed=9 + i) for i in range(len(ntm.controller.state_names)))
        inputs = some(6, 2, 7)
        expected, expected_state = rnn(inputs, state if name == "lstm" else state[0])
        steps = [reference.LAYERS[name](module, own) for own in spec.by_layer(ntm.controller.weights(), 4)]
        layer_states = [[x[layer] for x in state] for layer in range(layers)]
        for x, want in zip(inputs, expected):
            for layer, step in enumerate(steps):
                layer_states[layer] = step(x, *layer_states[layer])
                x = layer_states[layer][0]
            torch.testing.assert_close(x, want, **CLOSE)
        final = tuple(torch.stack(x) for x in zip(*layer_states))
        torch.testing.assert_close(final, expected_state if name == "lstm" else (expected_state,), **CLOSE)
    learned = {
        n: x for n, x in make(controller=name, num_layers=layers).controller.state_dict().items() if "initial" not in n
    }
    rnn.load_state_dict(learned)
    assert all(torch.equal(x, learned[n]) for n, x in rnn.state_dict().items())


def test_state_dict_round_trip_and_its_errors() -> None:
    ntm, other = make(), FastNTM(**SIZES, dtype=torch.float64)
    buffer = io.BytesIO()
    torch.save(ntm.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    inputs = some(4, 2, 3)
    torch.testing.assert_close(other(inputs)[0], ntm(inputs)[0], **CLOSE)
    # A buffer can be loaded into a parameter: names are the same in every mode of memory_init.
    make(memory_init="learned").load_state_dict(ntm.state_dict())
    with pytest.raises(RuntimeError, match="heads.weight"):
        make(shift_range=2).load_state_dict(ntm.state_dict())
    with pytest.raises(RuntimeError, match="weight_hh_l0"):
        make(controller="feedforward").load_state_dict(ntm.state_dict())


def test_seeds_decide_the_parameters() -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return FastNTM(**SIZES, memory_init="random").state_dict()

    first, same, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(first[n], same[n]) for n in first)
    assert not torch.equal(first["heads.weight"], other["heads.weight"])
    assert "memory=7x2" in repr(make())
