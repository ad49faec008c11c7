"""The pool keeps main memory from one training step to the next."""

from __future__ import annotations

import threading

import pytest
import torch

import ntm_fast
from ntm_fast import native
from ntm_fast.native import build

pytestmark = pytest.mark.skipif(not ntm_fast.available("cpu"), reason=str(ntm_fast.capabilities()["cpu_reason"]))

MB = 1 << 20
LIKE = {dtype: torch.empty(0, dtype=dtype) for dtype in (torch.float32, torch.float64)}


def empty(like: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    (found,) = native.empty(like, (sizes,))
    return found


@pytest.fixture(autouse=True, params=["by torch's table", "one by one, as before torch 2.10"])
def empty_pool(request, monkeypatch):
    if request.param != "by torch's table":
        monkeypatch.setattr(build.extension(), "empty_as", lambda *_: None)
    ntm_fast.empty_cache()
    yield
    ntm_fast.empty_cache()


def test_an_ordinary_tensor() -> None:
    for dtype, like in LIKE.items():
        x = empty(like, (3, 5, 20_000))
        assert x.shape == (3, 5, 20_000) and x.dtype is dtype and x.is_contiguous() and x.data_ptr() % 64 == 0
        assert not x.requires_grad and not x._is_view() and x.device.type == "cpu"
        x.fill_(2)
        assert float((x * x).sum()) == 4 * x.numel()
    del x
    assert ntm_fast.empty_cache() >= 15 * 20_000 * 12
    assert ntm_fast.empty_cache() == 0


def test_small_ones_and_empty_ones_are_not_from_it() -> None:
    for sizes in ((0,), (4, 0, 1 << 20), (100, 100)):
        assert empty(LIKE[torch.float32], sizes).shape == sizes
    assert ntm_fast.empty_cache() == 0


def test_what_is_given_back_is_taken_again_and_not_before() -> None:
    x = empty(LIKE[torch.float32], (1000, 1000))
    place = x.data_ptr()
    row = x[7]
    del x
    other = empty(LIKE[torch.float32], (1000, 1000))
    assert other.data_ptr() != place  # a view still holds the block
    del row
    again = empty(LIKE[torch.float64], (499, 1000))  # a block that is a few percent smaller fits
    assert again.data_ptr() == place
    much_smaller = empty(LIKE[torch.float32], (300, 1000))
    assert ntm_fast.empty_cache() == 0
    del other, much_smaller


def test_it_is_bounded_and_the_oldest_go_first() -> None:
    places = []
    blocks = [empty(LIKE[torch.float32], (count * MB // 4,)) for count in (60, 70, 80, 90)]
    for block in blocks:
        places.append(block.data_ptr())
    del block
    while blocks:
        del blocks[0]
    assert empty(LIKE[torch.float32], (80 * MB // 4,)).data_ptr() == places[2]
    assert ntm_fast.empty_cache() == 240 * MB  # of 300 MB the oldest 60 went back to the system
    del blocks
    huge = empty(LIKE[torch.float32], (300 * MB // 4,))
    del huge
    assert ntm_fast.empty_cache() == 0


def test_many_threads() -> None:
    """Each thread fills its blocks and later finds them unchanged: no block is given out twice."""
    failures = []

    def work(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        held = []
        for turn in range(200):
            x = empty(LIKE[torch.float32], (int(torch.randint(40_000, 60_000, (), generator=generator)),))
            value = number * 1000 + turn
            held.append((value, x.fill_(value)))
            if len(held) > 3:
                expected, x = held.pop(0)
                if not bool((x == expected).all()):
                    failures.append((number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
