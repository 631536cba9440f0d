"""Counters: each outcome once, none lost between threads."""

from __future__ import annotations

import threading

from dks.dispatch.stats import Counters


def test_counts_by_operator_and_outcome() -> None:
    counters = Counters()
    assert counters.snapshot() == {}
    exact = counters.counter("linear", "exact")
    assert counters.snapshot() == {}, "an outcome that never came is left out"
    next(exact)
    next(exact)
    counters.add("linear", "gradient")
    counters.add("attention", "exact")
    assert counters.snapshot() == {"attention": {"exact": 1}, "linear": {"exact": 2, "gradient": 1}}
    assert counters.snapshot() == counters.snapshot(), "reading counts nothing"
    assert counters.counter("linear", "exact") is exact


def test_threads_lose_nothing() -> None:
    counters = Counters()
    threads, each = 8, 5000

    def work() -> None:
        for i in range(each):
            counters.add("linear", f"outcome{i % 50}")

    running = [threading.Thread(target=work) for _ in range(threads)]
    for thread in running:
        thread.start()
    while any(thread.is_alive() for thread in running):
        counters.snapshot()
    assert sum(counters.snapshot()["linear"].values()) == threads * each
    assert set(counters.snapshot()["linear"].values()) == {threads * each // 50}
