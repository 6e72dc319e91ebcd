"""What is recorded when, without a GPU: a stand-in for CUDA's graphs that runs the work again."""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

import pytest
import torch

from fadapt.training.engine import cuda_graphs as graphs
from fadapt.training.engine.compiler import Compiler


class Stream:
    def __init__(self, device: Any = None):
        self.device = device

    def wait_stream(self, other: Any) -> None:
        pass


class Graph:
    """Replays by calling the function again on the tensors that it was recorded with."""

    made: ClassVar[list[Graph]] = []

    def __init__(self):
        self.replays = 0
        Graph.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        self.recording.result.copy_(self.function(self.recording.argument))


@pytest.fixture
def fake_cuda(monkeypatch):
    Graph.made = []
    replacements = dict(
        Stream=Stream, CUDAGraph=Graph, current_stream=lambda d: Stream(d),
        graph_pool_handle=object, stream=lambda s: contextlib.nullcontext(),
        graph=lambda *args, **kwargs: contextlib.nullcontext(),
    )  # fmt: skip
    for name, value in replacements.items():
        monkeypatch.setattr(torch.cuda, name, value)
    record = graphs.CUDAGraphed._record

    def recorded(self: Any, recording: Any) -> None:
        record(self, recording)
        recording.graph.recording, recording.graph.function = recording, self._function

    monkeypatch.setattr(graphs.CUDAGraphed, "_record", recorded)


class Work:
    """The sum of two tensors; remembers what it was called with."""

    def __init__(self):
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, argument: Any) -> torch.Tensor:
        self.seen.append((argument["a"], argument["b"]))
        return argument["a"] + argument["scale"] * argument["b"]


def batch(rows: int, value: float, scale: int = 2) -> dict[str, Any]:
    return {"a": torch.full((rows,), value), "b": torch.ones(rows), "scale": scale}


def test_each_form_is_recorded_once_and_replayed_with_new_values(fake_cuda):
    work = Work()
    recorded = graphs.CUDAGraphed(work, torch.device("cpu"))
    results = []
    for i in range(6):
        for rows, scale in ((2, 2), (3, 2), (2, 5)):
            results.append(recorded(batch(rows, float(i), scale)))
            assert results[-1].tolist() == [i + scale] * rows
    assert [g.replays for g in Graph.made] == [6 - graphs.WARMUP] * 3
    # Results are not overwritten by later calls.
    assert [r[0].item() for r in results[:3]] == [2, 2, 5]


def test_warm_up_runs_on_the_recordings_own_tensors(fake_cuda):
    work = Work()
    recorded = graphs.CUDAGraphed(work, torch.device("cpu"))
    for i in range(4):
        recorded(batch(2, float(i)))
    assert len({id(a) for a, _ in work.seen}) == 1
    assert len({id(b) for _, b in work.seen}) == 1


def test_one_tensor_in_two_places_stays_one(fake_cuda):
    work = Work()
    recorded = graphs.CUDAGraphed(work, torch.device("cpu"))
    for i in range(4):
        x = torch.full((2,), float(i))
        assert recorded({"a": x, "b": x, "scale": 1}).tolist() == [2 * i] * 2
        assert recorded({"a": x, "b": x + 1, "scale": 1}).tolist() == [2 * i + 1] * 2
    assert len(Graph.made) == 2
    assert {a is b for a, b in work.seen} == {True, False}


def test_beyond_the_limit_it_runs_as_it_is(fake_cuda):
    work = Work()
    recorded = graphs.CUDAGraphed(work, torch.device("cpu"))
    for _ in range(4):
        for rows in range(1, graphs.MOST + 3):
            assert recorded(batch(rows, 1.0)).tolist() == [3] * rows
    assert len(Graph.made) == graphs.MOST


def test_out_of_memory_while_recording_is_raised_as_such(fake_cuda, monkeypatch):
    """The end of a broken capture raises an error of its own."""

    @contextlib.contextmanager
    def breaking(*args: Any, **kwargs: Any):
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def greedy(argument: Any) -> torch.Tensor:
        if len(calls) == graphs.WARMUP:
            raise torch.OutOfMemoryError("CUDA out of memory")
        calls.append(1)
        return argument

    calls: list[int] = []
    monkeypatch.setattr(torch.cuda, "graph", breaking)
    recorded = graphs.CUDAGraphed(greedy, torch.device("cpu"))
    for _ in range(graphs.WARMUP):
        recorded(torch.ones(2))
    with pytest.raises(torch.OutOfMemoryError):
        recorded(torch.ones(2))


@pytest.mark.parametrize(
    ("options", "device", "records", "left"),
    [
        (True, "cuda", False, {}),
        ({"mode": "reduce-overhead"}, "cuda", True, {}),
        (
            {"mode": "reduce-overhead", "options": {"max_autotune": True}},
            "cuda",
            True,
            {"options": {"max_autotune": True}},
        ),
        ({"mode": "max-autotune"}, "cuda", True, {"mode": "max-autotune-no-cudagraphs"}),
        ({"mode": "reduce-overhead"}, "cpu", False, {"mode": "reduce-overhead"}),
        ({"dynamic": False}, "cuda", False, {"dynamic": False}),
    ],
)
def test_modes_that_record(options: Any, device: str, records: bool, left: dict[str, Any]):
    compiler = Compiler(options, torch.device(device))
    assert compiler.records == records
    given = {k: v for k, v in compiler.options.items() if k != "fullgraph"}
    assert given == left
