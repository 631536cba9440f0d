"""The stopping rule and the rounds, fed with numbers: no kernel and no clock."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from dks.profiler.timing import Level, Rounds, StoppingRule, covers

EXACT, PACKED, BF16 = (0, 0), (0, 1), (1, 1)


class FakeMachine:
    """A clock that calls advance by their own, possibly noisy, time."""

    def __init__(self) -> None:
        self.now = 0
        self.order: list[str] = []

    def clock(self) -> int:
        return self.now

    def call(self, name: str, ns: Callable[[], float]) -> Callable[[], object]:
        def run() -> object:
            self.order.append(name)
            self.now += int(ns())
            return object()

        return run


def run(
    machine: FakeMachine, times: dict[str, Callable[[], float]], rule: StoppingRule, levels: dict[str, Level]
) -> dict[str, list[int]]:
    calls = {name: [machine.call(name, ns)] for name, ns in times.items()}
    return Rounds(rule, random.Random(0), machine.clock).run(calls, "default", levels)


def test_a_constant_machine_stops_at_the_first_look_after_min_rounds() -> None:
    samples = run(
        FakeMachine(),
        {"default": lambda: 1000, "other": lambda: 900},
        StoppingRule(min_rounds=10, max_rounds=100, seconds=9),
        {"default": EXACT, "other": EXACT},
    )
    assert samples == {"default": [1000] * 10, "other": [900] * 10}


def test_noise_asks_for_more_rounds_than_a_constant_machine() -> None:
    noise = random.Random(1)
    samples = run(
        FakeMachine(),
        {"default": lambda: 1000 * noise.lognormvariate(0, 0.1), "other": lambda: 1000},
        StoppingRule(min_rounds=10, max_rounds=200, seconds=9, precision=0.02),
        {"default": EXACT, "other": EXACT},
    )
    assert 50 < len(samples["default"]) <= 200


def test_max_rounds_and_seconds_end_it() -> None:
    noise = random.Random(1)

    def wild() -> float:
        return 1e6 * noise.lognormvariate(0, 1)

    levels = {"default": EXACT, "other": EXACT}
    by_rounds = run(FakeMachine(), {"default": wild, "other": wild}, StoppingRule(10, 25, 1e9), levels)
    assert len(by_rounds["default"]) == 25
    by_time = run(FakeMachine(), {"default": wild, "other": wild}, StoppingRule(10, 10**6, 0.1), levels)
    assert 10 <= len(by_time["default"]) < 200


def test_min_rounds_are_finished_even_out_of_time() -> None:
    samples = run(FakeMachine(), {"default": lambda: 10**9}, StoppingRule(8, 100, 0.001), {"default": EXACT})
    assert len(samples["default"]) == 8


def test_a_trailing_candidate_stops_once_it_has_an_interval_and_the_default_never() -> None:
    samples = run(
        FakeMachine(),
        {"default": lambda: 5000, "good": lambda: 1000, "bad": lambda: 2000},
        StoppingRule(10, 100, 9, trailing=1.5),
        {"default": EXACT, "good": EXACT, "bad": EXACT},
    )
    assert {name: len(times) for name, times in samples.items()} == {"default": 10, "good": 10, "bad": 6}


def test_without_racing_everybody_stays() -> None:
    samples = run(
        FakeMachine(),
        {"default": lambda: 5000, "good": lambda: 1000, "bad": lambda: 9000},
        StoppingRule(10, 100, 9, racing=False),
        dict.fromkeys(("default", "good", "bad"), EXACT),
    )
    assert {len(times) for times in samples.values()} == {10}


def test_a_candidate_whose_interval_is_wholly_behind_stops_and_the_survivors_get_the_samples() -> None:
    noise = random.Random(1)
    times = {"default": 1000, "good": 800, "close": 805, "behind": 900}
    samples = run(
        FakeMachine(),
        {name: (lambda ns=ns: ns * noise.lognormvariate(0, 0.05)) for name, ns in times.items()},
        StoppingRule(10, 100, 9, precision=0.01),
        dict.fromkeys(times, EXACT),
    )
    rounds = {name: len(ns) for name, ns in samples.items()}
    assert rounds["behind"] < rounds["default"] == rounds["good"]
    assert rounds["close"] == rounds["good"], "what can't be told apart stays in"


def test_a_less_precise_or_more_demanding_rival_drops_nobody() -> None:
    samples = run(
        FakeMachine(),
        {"default": lambda: 5000, "exact": lambda: 4000, "packed": lambda: 2000, "bf16": lambda: 500},
        StoppingRule(10, 100, 9),
        {"default": EXACT, "exact": EXACT, "packed": PACKED, "bf16": BF16},
    )
    assert all(len(times) == 10 for times in samples.values())


@pytest.mark.parametrize(
    ("one", "other", "expected"), [(EXACT, BF16, True), (BF16, EXACT, False), (PACKED, EXACT, False)]
)
def test_covers(one: Level, other: Level, expected: bool) -> None:
    assert covers(one, other) is expected


def test_every_round_holds_every_contender_once_in_changing_order() -> None:
    machine = FakeMachine()
    names = ["default", "a", "b", "c"]
    run(machine, {n: lambda: 100 for n in names}, StoppingRule(20, 20, 9), dict.fromkeys(names, EXACT))
    rounds = [tuple(machine.order[i : i + 4]) for i in range(4, len(machine.order), 4)]  # after the warm-up
    assert all(sorted(r) == sorted(names) for r in rounds)
    assert len(set(rounds)) > 5


def test_weight_copies_rotate() -> None:
    machine = FakeMachine()
    copies = [machine.call(f"copy{i}", lambda: 100) for i in range(3)]
    Rounds(StoppingRule(7, 7, 9), random.Random(0), machine.clock).run(
        {"default": copies}, "default", {"default": EXACT}
    )
    assert machine.order[:3] == ["copy0", "copy1", "copy2"], "each is warmed up before it counts"
    assert machine.order[3:] == [f"copy{i % 3}" for i in range(7)]
