"""Threads over one model."""

from __future__ import annotations

import threading

import fadapt
from tests.helpers import make, make_batch, trained


class TestThreads:
    def test_two_threads_take_turns(self) -> None:
        model, batch = make("qwen3"), make_batch("qwen3")
        objects = dict(model.named_parameters())
        members = [trained(model, fadapt.LoRA(r=2), seed=s) for s in range(4)]
        expected = [fadapt.run(model, p, batch).item() for p in members]
        failures: list[str] = []

        def work(i: int) -> None:
            try:
                for _ in range(15):
                    loss = fadapt.run(model, members[i], batch)
                    loss.backward()
                    if loss.item() != expected[i]:
                        failures.append(f"{i}: {loss.item()} != {expected[i]}")
            except Exception as error:
                failures.append(repr(error))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert all(p is objects[n] for n, p in model.named_parameters())

    def test_bound_holds_for_its_own_thread_alone(self) -> None:
        model, batch = make("qwen3"), make_batch("qwen3")
        params, other = (trained(model, fadapt.LoRA(r=2), seed=s) for s in (0, 1))
        wanted = [model(**batch).loss.item(), fadapt.run(model, other, batch).item()]
        found: list[float] = []

        def work() -> None:
            found.append(model(**batch).loss.item())
            found.append(fadapt.run(model, other, batch).item())

        with fadapt.bound(model, params):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join(timeout=20)
        assert found == wanted
