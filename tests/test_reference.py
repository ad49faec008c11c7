"""The reference compared with results worked out by hand, and with the paper's equations as plain loops in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ntm_fast import FastNTM, reference

EXACT = dict(rtol=1e-12, atol=1e-12)


def f64(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_content_addressing_by_hand() -> None:
    # A 3-4-5 triangle: cosines with the key (3, 4) are 1, 3/5, 4/5, -1.
    memory = f64([[[6, 8], [2, 0], [0, 0.5], [-3, -4]]])
    beta = math.log(2) * 5
    weights = reference.content_addressing(memory, f64([[[3, 4]]]), f64([[beta]]))
    expected = f64([2**5, 2**3, 2**4, 2**-5])  # exp(5 log 2 cosine)
    torch.testing.assert_close(weights[0, 0], expected / expected.sum(), **EXACT)


def test_content_addressing_of_each_head_and_batch_element() -> None:
    memory = f64([[[1, 0], [0, 1]], [[0, 1], [1, 0]]])
    key = f64([[[1, 0], [0, 1]], [[1, 0], [0, 1]]])
    weights = reference.content_addressing(memory, key, f64([[math.log(3), math.log(4)], [0.0, math.log(9)]]))
    torch.testing.assert_close(
        weights, f64([[[3 / 4, 1 / 4], [1 / 5, 4 / 5]], [[1 / 2, 1 / 2], [9 / 10, 1 / 10]]]), **EXACT
    )


def test_content_addressing_with_a_visible_eps() -> None:
    # Norms sqrt(3 + 1) = 2 of the key, sqrt(8 + 1) = 3 and sqrt(0 + 1) = 1 of the rows; the dot product is sqrt(24).
    weights = reference.content_addressing(f64([[[8**0.5], [0.0]]]), f64([[[3**0.5]]]), f64([[2.0]]), eps=1.0)
    high = math.exp(2 * 24**0.5 / 6)
    torch.testing.assert_close(weights[0, 0], f64([high / (high + 1), 1 / (high + 1)]), **EXACT)


def test_interpolate_by_hand() -> None:
    content, previous = f64([[[1, 0, 0], [0, 0, 1]]]), f64([[[0, 0.5, 0.5], [1, 0, 0]]])
    gated = reference.interpolate(content, previous, f64([[0.25, 1.0]]))
    torch.testing.assert_close(gated, f64([[[0.25, 0.375, 0.375], [0, 0, 1]]]), **EXACT)


@pytest.mark.parametrize("focus", range(5))
@pytest.mark.parametrize("move", (-2, -1, 0, 1, 2))
def test_circular_shift_moves_the_focus_by_j(focus: int, move: int) -> None:
    weights, shift = torch.zeros(1, 1, 5), torch.zeros(1, 1, 5)
    weights[0, 0, focus] = 1
    shift[0, 0, move + 2] = 1  # index 0 is a shift of -2
    shifted = reference.circular_shift(weights, shift)
    assert shifted.argmax() == (focus + move) % 5 and shifted.sum() == 1


def test_circular_shift_by_hand() -> None:
    # Every location i gets 0.1 of its right neighbour (shift -1), 0.2 of itself and 0.7 of its left one (shift +1).
    shifted = reference.circular_shift(f64([[[1, 2, 3, 4]]]), f64([[[0.1, 0.2, 0.7]]]))
    expected = [
        0.1 * 2 + 0.2 * 1 + 0.7 * 4,
        0.1 * 3 + 0.2 * 2 + 0.7 * 1,
        0.1 * 4 + 0.2 * 3 + 0.7 * 2,
        0.1 * 1 + 0.2 * 4 + 0.7 * 3,
    ]
    torch.testing.assert_close(shifted, f64([[expected]]), **EXACT)


def test_sharpen_by_hand() -> None:
    weights = f64([[[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]])
    sharpened = reference.sharpen(weights, f64([[2.0, 1.0]]))
    torch.testing.assert_close(sharpened, f64([[[4 / 6, 1 / 6, 1 / 6], [0.2, 0.3, 0.5]]]), **EXACT)


@pytest.mark.parametrize("gamma", (1.0, 8.0, 1e2, 1e4, 1e30))
def test_sharpened_weights_sum_to_one(gamma: float) -> None:
    weights = torch.stack([torch.full((128,), 1 / 128), torch.rand(128), torch.eye(128)[3], torch.zeros(128)])
    sharpened = reference.sharpen(weights.unsqueeze(0), torch.full((1, 4), gamma))
    torch.testing.assert_close(sharpened.sum(-1), torch.ones(1, 4))
    torch.testing.assert_close(sharpened[0, 0], weights[0])  # uniform stays uniform
    assert sharpened[0, 2, 3] == 1


def test_erase_then_add_by_hand() -> None:
    # Both heads erase before either adds: 10 (1 - 0.5*1) (1 - 1*0.5) + 0.5*4 + 1*3, not ((10*0.5) + 2) * 0.5 + 3.
    written = reference.erase_add_write(
        f64([[[10.0], [10.0]]]), f64([[[0.5, 0.0], [1.0, 0.0]]]), f64([[[1.0], [0.5]]]), f64([[[4.0], [3.0]]])
    )
    torch.testing.assert_close(written, f64([[[10 * 0.5 * 0.5 + 2 + 3], [10.0]]]), **EXACT)


def test_erase_and_add_by_column() -> None:
    # The erase and add vectors differ by column, the weights by row.
    written = reference.erase_add_write(
        f64([[[1, 2], [3, 4]]]), f64([[[1.0, 0.5]]]), f64([[[1.0, 0.0]]]), f64([[[5.0, 6.0]]])
    )
    torch.testing.assert_close(written, f64([[[0 + 5, 2 + 6], [1.5 + 2.5, 4 + 3]]]), **EXACT)


def test_read_by_hand() -> None:
    reads = reference.read(f64([[[1, 2], [3, 4], [5, 6]]]), f64([[[1, 0, 0], [0.5, 0.25, 0.25]]]))
    torch.testing.assert_close(reads, f64([[[1, 2], [2.5, 3.5]]]), **EXACT)


# --- the layout of the raw parameters ---------------------------------------------------------------------------------


def test_parameter_layout_and_activations() -> None:
    """Two read heads and one write head of width 2, with one shift. Each raw parameter has its place and activation."""
    raw = [
        *(0.1, 0.2), 0.3, 0.4, *(0.5, 0.6, 0.7), 0.8,  # first read head: k, beta, g, s, gamma
        *(1.1, 1.2), 1.3, 1.4, *(1.5, 1.6, 1.7), 1.8,  # second read head
        *(2.1, 2.2), 2.3, 2.4, *(2.5, 2.6, 2.7), 2.8,  # write head
        *(3.1, 3.2), *(4.1, 4.2),  # the write head's e and a
    ]  # fmt: skip
    assert len(raw) == reference.params_size(2, 1, 2, 1) == 3 * (2 + 2 + 4) + 2 * 2
    p = reference.head_parameters(f64([raw]), 2, 1, 2, shift_range=1)
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    total = 1 + math.exp(0.1) + math.exp(0.2)
    expected = (
        [[math.tanh(h + 0.1), math.tanh(h + 0.2)] for h in range(3)],
        [softplus(h + 0.3) for h in range(3)],
        [sigmoid(h + 0.4) for h in range(3)],
        [[1 / total, math.exp(0.1) / total, math.exp(0.2) / total]] * 3,
        [1 + softplus(h + 0.8) for h in range(3)],
        [[sigmoid(3.1), sigmoid(3.2)]],
        [[math.tanh(4.1), math.tanh(4.2)]],
    )
    for got, want in zip(p, expected):
        torch.testing.assert_close(got[0], f64(want), **EXACT)
    identity = reference.head_parameters(
        f64([raw]), 2, 1, 2, shift_range=1, key_activation="identity", add_activation="identity"
    )
    torch.testing.assert_close(identity.key[0, 2], f64([2.1, 2.2]), **EXACT)
    torch.testing.assert_close(identity.add[0, 0], f64([4.1, 4.2]), **EXACT)


@pytest.mark.parametrize("raw", (-700.0, -30.0, 0.0, 19.0, 21.0, 30.0, 39.0, 41.0, 700.0))
def test_softplus_is_exact_beyond_torchs_threshold(raw: float) -> None:
    params = torch.full((1, reference.params_size(1, 0, 1, 0)), raw, dtype=torch.float64)
    p = reference.head_parameters(params, 1, 0, 1, shift_range=0, clip=None)
    expected = math.log1p(math.exp(-abs(raw))) + max(raw, 0.0)
    torch.testing.assert_close(p.beta.item(), expected, rtol=1e-15, atol=0)
    torch.testing.assert_close(p.gamma.item(), 1 + expected, rtol=1e-15, atol=0)


def test_two_write_heads_interleave_erase_and_add() -> None:
    raw = torch.zeros(1, reference.params_size(1, 2, 1, 0))
    raw[0, -4:] = torch.tensor([1.0, 2.0, 3.0, 4.0])  # e and a of the first, e and a of the second
    p = reference.head_parameters(raw, 1, 2, 1, shift_range=0, add_activation="identity")
    torch.testing.assert_close(p.erase.flatten(), torch.sigmoid(torch.tensor([1.0, 3.0])))
    torch.testing.assert_close(p.add.flatten(), torch.tensor([2.0, 4.0]))


@pytest.mark.parametrize(("readers", "writers", "width", "reach"), [(1, 1, 20, 1), (3, 2, 1, 0), (1, 4, 7, 3)])
def test_params_size_is_the_formula(readers: int, writers: int, width: int, reach: int) -> None:
    expected = (readers + writers) * (width + 2 * reach + 4) + 2 * writers * width
    assert reference.params_size(readers, writers, width, reach) == expected


def test_clip_and_its_gradient() -> None:
    raw = f64([[-30.0, -2.0, -1.9, 0.5, 1.9, 2.0, 30.0] + [0.0]]).requires_grad_()
    p = reference.head_parameters(raw, 1, 0, 4, shift_range=0, key_activation="identity", clip=2.0)
    torch.testing.assert_close(p.key, f64([[[-2.0, -2.0, -1.9, 0.5]]]), **EXACT)
    torch.testing.assert_close(p.beta, f64([[math.log1p(math.exp(1.9))]]), **EXACT)
    p.key.sum().backward()
    assert raw.grad[0, :4].tolist() == [0.0, 1.0, 1.0, 1.0]
    unclipped = reference.head_parameters(raw, 1, 0, 4, shift_range=0, key_activation="identity", clip=None)
    assert unclipped.key[0, 0, 0] == -30


# --- extremes ---------------------------------------------------------------------------------------------------------

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_value", (0.0, 1e-6, 1.0))
@pytest.mark.parametrize("raw_value", (-30.0, 0.0, 30.0))
def test_every_dtype_stays_finite(dtype: torch.dtype, memory_value: float, raw_value: float) -> None:
    """Zero keys (raw 0), zero and constant memories, saturated parameters: forward and backward have no NaN."""
    memory = torch.full((2, 16, 3), memory_value, dtype=dtype, requires_grad=True)
    weights = torch.eye(16, dtype=dtype)[:2].unsqueeze(1).requires_grad_()
    params = torch.full((2, reference.params_size(1, 1, 3, 1)), raw_value, dtype=dtype, requires_grad=True)
    outputs = reference.memory_step(memory, weights, weights, params, shift_range=1)
    for output in outputs:
        assert output.dtype is dtype and output.isfinite().all()
    for weighting in outputs[2:]:
        torch.testing.assert_close(weighting.float().sum(-1), torch.ones(2, 1), rtol=0, atol=0.02)
    sum(output.sum() for output in outputs).backward()
    # 1/eps is too large for float16, so there the gradient of a key or of a row of zeros is infinite. That is right.
    if dtype is not torch.float16:
        assert all(x.grad.isfinite().all() for x in (memory, weights, params))


def test_a_zero_key_and_a_zero_row_are_like_nothing() -> None:
    memory = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    key = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    weights = reference.content_addressing(memory, key, torch.tensor([[5.0, math.log(3)]]))
    torch.testing.assert_close(weights, torch.tensor([[[0.5, 0.5], [0.75, 0.25]]]))


@pytest.mark.parametrize("name", ("memory", "read_weights", "write_weights", "params"))
def test_nan_in_nan_out(name: str) -> None:
    given = {
        "memory": torch.rand(2, 8, 3),
        "read_weights": torch.rand(2, 1, 8),
        "write_weights": torch.rand(2, 1, 8),
        "params": torch.rand(2, reference.params_size(1, 1, 3, 1)),
    }
    given[name][1].view(-1)[0] = torch.nan
    reads, *_ = reference.memory_step(**given, shift_range=1)
    assert reads[1].isnan().all() and not reads[0].isnan().any()


# --- the whole machine, as loops --------------------------------------------------------------------------------------


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def loop_address(M, w_prev, k, beta, g, s, gamma, eps=1e-8) -> np.ndarray:
    """The paper's equations 5 to 9 for one head of one batch element, one location after another."""
    N, S = len(M), len(s) // 2
    cosine = np.array([(k * row).sum() / np.sqrt(((k**2).sum() + eps**2) * ((row**2).sum() + eps**2)) for row in M])
    w_c = _softmax(beta * cosine)
    w_g = g * w_c + (1 - g) * w_prev
    w_s = np.zeros(N)
    for i in range(N):
        for j in range(-S, S + 1):
            w_s[i] += s[j + S] * w_g[(i - j) % N]
    return w_s**gamma / (w_s**gamma).sum()


def loop_memory_step(M, read_w, write_w, raw, S, read_first, key_tanh=True, add_tanh=True, clip=20.0):
    """The memory step of one batch element. It takes the raw parameters from left to right."""
    (N, width), R, W = M.shape, len(read_w), len(write_w)
    raw = raw if clip is None else np.clip(raw, -clip, clip)
    position = 0

    def take(count: int) -> np.ndarray:
        nonlocal position
        position += count
        return raw[position - count : position]

    heads = []
    for _ in range(R + W):
        k = np.tanh(take(width)) if key_tanh else take(width)
        beta, g = np.log1p(np.exp(take(1)[0])), _sigmoid(take(1)[0])
        s, gamma = _softmax(take(2 * S + 1)), 1 + np.log1p(np.exp(take(1)[0]))
        heads.append((k, beta, g, s, gamma))
    writes = []
    for _ in range(W):
        e = _sigmoid(take(width))
        writes.append((e, np.tanh(take(width)) if add_tanh else take(width)))
    assert position == len(raw)

    write_w = [loop_address(M, w, *head) for w, head in zip(write_w, heads[R:])]
    written = M.copy()
    for i in range(N):
        for w, (e, _) in zip(write_w, writes):
            written[i] = written[i] * (1 - w[i] * e)
        for w, (_, a) in zip(write_w, writes):
            written[i] = written[i] + w[i] * a
    source = M if read_first else written
    read_w = [loop_address(source, w, *head) for w, head in zip(read_w, heads[:R])]
    reads = [sum(w[i] * source[i] for i in range(N)) for w in read_w]
    return np.array(reads), written, np.array(read_w), np.array(write_w)


@pytest.mark.parametrize("read_first", (False, True))
@pytest.mark.parametrize(
    ("N", "width", "R", "W", "S", "options"),
    [
        (3, 1, 1, 1, 1, {}),
        (7, 4, 2, 3, 2, {"clip": 0.7}),
        (9, 3, 3, 1, 0, {"clip": None, "key_activation": "identity"}),
        (8, 5, 1, 2, 3, {"add_activation": "identity"}),
    ],
)
def test_memory_step_against_loops(N, width, R, W, S, options, read_first) -> None:
    B = 2
    memory, params = random(B, N, width, seed=1), random(B, reference.params_size(R, W, width, S), seed=2)
    read_w, write_w = (random(B, h, N, seed=3 + h).softmax(-1) for h in (R, W))
    actual = reference.memory_step(memory, read_w, write_w, params, shift_range=S, read_first=read_first, **options)
    flags = (
        options.get("key_activation") != "identity",
        options.get("add_activation") != "identity",
        options.get("clip", 20.0),
    )
    for b in range(B):
        expected = loop_memory_step(*(x[b].numpy() for x in (memory, read_w, write_w, params)), S, read_first, *flags)
        for got, want in zip(actual, expected):
            np.testing.assert_allclose(got[b].numpy(), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("controller", ("lstm", "gru", "feedforward"))
def test_a_sequence_against_loops(controller: str) -> None:
    """FastNTM computed from its state_dict alone, because names and layouts are part of the contract."""
    T, B, I, H, R, W, N, width, S = 4, 2, 3, 5, 2, 2, 6, 3, 1
    torch.manual_seed(5)
    ntm = FastNTM(
        I, 4, H, controller=controller, memory_locations=N, memory_width=width, read_heads=R, write_heads=W,
        shift_range=S, memory_init="learned", engine="reference", dtype=torch.float64,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in ntm.parameters():
            parameter.copy_(0.7 * torch.randn_like(parameter))
    inputs = random(T, B, I)
    outputs, final = ntm(inputs)
    p = {name: value.numpy() for name, value in ntm.state_dict().items()}

    def step(x, h, c):
        gates = p["controller.weight_ih_l0"] @ x + p["controller.bias_ih_l0"]
        if controller == "feedforward":
            return np.tanh(gates), c
        recurrent = p["controller.weight_hh_l0"] @ h + p["controller.bias_hh_l0"]
        if controller == "lstm":
            i, f, g, o = np.split(gates + recurrent, 4)
            c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
            return _sigmoid(o) * np.tanh(c), c
        (r, z, n), (hr, hz, hn) = np.split(gates, 3), np.split(recurrent, 3)
        z = _sigmoid(z + hz)
        return (1 - z) * np.tanh(n + _sigmoid(r + hr) * hn) + z * h, c

    for b in range(B):
        M, reads = p["initial_memory"], p["initial_reads"]
        read_w = np.array([_softmax(x) for x in p["initial_read_weights"]])
        write_w = np.array([_softmax(x) for x in p["initial_write_weights"]])
        h, c = (p.get(f"controller.initial_{name}", np.zeros((1, H)))[0] for name in ("hidden", "cell"))
        for t in range(T):
            h, c = step(np.concatenate([inputs[t, b].numpy(), reads.reshape(-1)]), h, c)
            raw = p["heads.weight"] @ h + p["heads.bias"]
            reads, M, read_w, write_w = loop_memory_step(M, read_w, write_w, raw, S, False)
            y = p["output.weight"] @ np.concatenate([h, reads.reshape(-1)]) + p["output.bias"]
            np.testing.assert_allclose(outputs[t, b].detach().numpy(), y, rtol=1e-10, atol=1e-12)
        for got, want in zip(final[:4], (M, read_w, write_w, reads)):
            np.testing.assert_allclose(got[b].detach().numpy(), want, rtol=1e-10, atol=1e-12)


# --- controllers' gates -----------------------------------------------------------------------------------------------


def test_lstm_gates_are_nn_lstm() -> None:
    lstm = nn.LSTM(3, 4, dtype=torch.float64)
    x, h, c = random(2, 3, seed=1), random(2, 4, seed=2), random(2, 4, seed=3)
    gates = x @ lstm.weight_ih_l0.T + lstm.bias_ih_l0 + h @ lstm.weight_hh_l0.T + lstm.bias_hh_l0
    _, expected = lstm(x.unsqueeze(0), (h.unsqueeze(0), c.unsqueeze(0)))
    for got, want in zip(reference.lstm_gates(gates, c), expected):
        torch.testing.assert_close(got, want[0], **EXACT)


def test_gru_gates_are_nn_gru() -> None:
    gru = nn.GRU(3, 4, dtype=torch.float64)
    x, h = random(2, 3, seed=1), random(2, 4, seed=2)
    input_gates = x @ gru.weight_ih_l0.T + gru.bias_ih_l0
    hidden_gates = h @ gru.weight_hh_l0.T + gru.bias_hh_l0
    _, expected = gru(x.unsqueeze(0), h.unsqueeze(0))
    torch.testing.assert_close(reference.gru_gates(input_gates, hidden_gates, h), expected[0], **EXACT)
    # The other convention, (1 - z) h + z n, is this one with the signs of z's weights and biases flipped.
    flip = f64([1, -1, 1]).repeat_interleave(4)
    z = torch.sigmoid((input_gates + hidden_gates)[:, 4:8])
    n = torch.tanh(input_gates[:, 8:] + torch.sigmoid((input_gates + hidden_gates)[:, :4]) * hidden_gates[:, 8:])
    other = reference.gru_gates(input_gates * flip, hidden_gates * flip, h)
    torch.testing.assert_close(other, (1 - z) * h + z * n, **EXACT)


# --- the derivatives that the native code computes, as derived by hand ------------------------------------------------


def softmax_backward(w: Tensor, dw: Tensor) -> Tensor:
    return w * (dw - (w * dw).sum(-1, keepdim=True))


def read_backward(memory: Tensor, w: Tensor, dr: Tensor) -> tuple[Tensor, Tensor]:
    return torch.einsum("bhn,bhm->bnm", w, dr), torch.einsum("bnm,bhm->bhn", memory, dr)


def write_backward(memory, w, erase, add, d):
    heads = range(w.shape[1])
    kept = [1 - w[:, h, :, None] * erase[:, h, None] for h in heads]
    dw, de, da = torch.zeros_like(w), torch.zeros_like(erase), torch.zeros_like(add)
    for h in heads:
        others = math.prod((kept[o] for o in heads if o != h), start=torch.ones_like(memory))
        dw[:, h] = (d * (add[:, h, None] - memory * erase[:, h, None] * others)).sum(2)
        de[:, h] = -(d * memory * w[:, h, :, None] * others).sum(1)
        da[:, h] = (d * w[:, h, :, None]).sum(1)
    return d * math.prod(kept), dw, de, da


def content_backward(memory, key, beta, eps, dw):
    A = (key.square().sum(-1) + eps**2).sqrt()[..., None]  # (B, H, 1)
    norms = (memory.square().sum(-1) + eps**2).sqrt()[:, None]  # (B, 1, N)
    c = key @ memory.transpose(1, 2) / (A * norms)
    dz = softmax_backward(torch.softmax(beta[..., None] * c, -1), dw)
    dc = beta[..., None] * dz
    dkey = (dc / (A * norms)) @ memory - key / A.square() * (dc * c).sum(-1, keepdim=True)
    dmemory = torch.einsum("bhn,bhm->bnm", dc / (A * norms), key) - memory * (dc * c / norms.square()).sum(1)[..., None]
    return dmemory, dkey, (dz * c).sum(-1)


def shift_backward(weights, shift, d):
    reach = shift.shape[-1] // 2
    moves = range(-reach, reach + 1)
    dshift = torch.stack([(d * weights.roll(j, -1)).sum(-1) for j in moves], -1)
    return sum(shift[..., j + reach, None] * d.roll(-j, -1) for j in moves), dshift


def sharpen_backward(weights, gamma, dw):
    logs = weights.log()
    q = softmax_backward(torch.softmax(gamma[..., None] * logs, -1), dw)
    return gamma[..., None] * q / weights, (q * logs).sum(-1)


def interpolate_backward(content, previous, gate, d):
    return gate[..., None] * d, (1 - gate[..., None]) * d, (d * (content - previous)).sum(-1)


def _inputs(B=2, N=7, M=3, H=3, K=3) -> dict[str, Tensor]:
    weightings = {name: random(B, H, N, seed=seed).softmax(-1) for name, seed in (("w", 1), ("v", 2))}
    return {
        "memory": random(B, N, M, seed=3), "key": random(B, H, M, seed=4), "beta": random(B, H, seed=5).exp(),
        "gate": random(B, H, seed=6).sigmoid(), "shift": random(B, H, K, seed=7).softmax(-1),
        "gamma": 1 + random(B, H, seed=8).exp(), "erase": random(B, H, M, seed=9).sigmoid(),
        "add": random(B, H, M, seed=10), **weightings,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("function", "names", "derived"),
    [
        (reference.read, ("memory", "w"), read_backward),
        (reference.erase_add_write, ("memory", "w", "erase", "add"), write_backward),
        (reference.sharpen, ("w", "gamma"), sharpen_backward),
        (reference.circular_shift, ("w", "shift"), shift_backward),
        (reference.interpolate, ("w", "v", "gate"), interpolate_backward),
        (
            reference.content_addressing,
            ("memory", "key", "beta"),
            lambda m, k, b, d: content_backward(m, k, b, 1e-8, d),
        ),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_derived_gradients(function, names, derived) -> None:
    inputs = [x.requires_grad_() for x in map(_inputs().get, names)]
    output = function(*inputs)
    grad = torch.randn_like(output)
    for name, got, want in zip(names, torch.autograd.grad(output, inputs, grad), derived(*inputs, grad)):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13, msg=lambda m: f"{name}: {m}")


def test_gradient_of_the_clamp_in_sharpen() -> None:
    """0 where a weight is at most tiny; the formula elsewhere."""
    weights = f64([[[0.5, 0.5, 0.0, 1e-310]]]).requires_grad_()
    gamma = f64([[1.0]]).requires_grad_()
    grad = f64([[[1.0, 2.0, 3.0, 4.0]]])
    found, _ = torch.autograd.grad(reference.sharpen(weights, gamma), (weights, gamma), grad)
    # q = w (dw - 1.5) = (-0.25, 0.25), divided by ws
    torch.testing.assert_close(found, f64([[[-0.5, 0.5, 0.0, 0.0]]]), **EXACT)


def test_reference_is_differentiable_twice() -> None:
    inputs = [
        x.requires_grad_()
        for x in map(_inputs(1, 3, 2, 1).get, ("memory", "v", "key", "beta", "gate", "shift", "gamma"))
    ]
    assert torch.autograd.gradgradcheck(reference.address, inputs)
