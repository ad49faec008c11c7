"""The order in which CUDARecorder calls torch.cuda, tested with a stand-in for each call."""

from __future__ import annotations

import contextlib

import pytest
import torch

from ntm_fast.engines import graphs


@pytest.mark.parametrize("invalid", (False, True))
def test_calls_of_cuda(monkeypatch, invalid: bool) -> None:
    log: list[str] = []

    @contextlib.contextmanager
    def stream(which):
        log.append(f"on {which}")
        try:
            yield
        finally:
            log.append(f"off {which}")

    @contextlib.contextmanager
    def graph(it, pool, stream, capture_error_mode):
        log.append(f"begin {pool} {stream} {capture_error_mode}")
        yield
        log.append("end")
        if invalid:
            raise RuntimeError("the capture is invalid")

    class Graph:
        def replay(self):
            log.append("replay")

    reserved, streams = iter((100, 160)), iter(range(5))
    stand_ins = {
        "Stream": lambda device, priority: f"side {next(streams)}", "graph_pool_handle": lambda: "pool",
        "CUDAGraph": Graph, "stream": stream,
        "current_stream": lambda device: "current", "graph": graph, "empty_cache": lambda: log.append("empty"),
        "memory_reserved": lambda device: next(reserved), "device": lambda device: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: invalid,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *_: log.append("close"), raising=False)
    monkeypatch.setattr(graphs.CUDARecorder, "_idle", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 40 + index, raising=False)
    device = torch.device("cuda", 1)
    recorder = graphs.CUDARecorder(device)
    before = ["on current", "empty", "begin pool side 0 thread_local", "work", "end"]
    if invalid:
        with pytest.raises(RuntimeError, match="invalid"):
            recorder.capture(lambda: log.append("work"))
        assert log == [*before, "close", "off current"] and recorder.stream(device) is None
        return
    replay, results = recorder.capture(lambda: log.append("work") or 5)
    assert log == [*before, "off current"] and results == 5 and recorder.bytes == 60
    replay()
    assert log[-1] == "replay" and recorder.stream(device) == 41
    # Each recorder has a stream of its own; when the recorder goes, the stream is used again.
    other = graphs.CUDARecorder(device)
    assert other.capture_stream == "side 1"
    del other
    assert graphs.CUDARecorder(device).capture_stream == "side 1"
