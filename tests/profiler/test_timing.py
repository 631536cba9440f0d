"""The stopping rule and the race, fed with numbers: no kernel and no clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import pytest

from dks.profiler.findings import Round, counted
from dks.profiler.timing import Entrants, Level, StoppingRule, covers, race

EXACT, PACKED, BF16 = (0, 0), (0, 1), (1, 1)
ALONE = Entrants(("default",), "default", {"default": EXACT})


class Machine:
    """Times from functions; every window whose index is in ``noisy`` is disturbed."""

    def __init__(self, times: Mapping[str, Callable[[], float]], noisy: Callable[[int], bool] = lambda _: False):
        self.times, self.noisy, self.windows = times, noisy, -1

    def round(self, names: Sequence[str]) -> dict[str, int]:
        return {name: int(self.times[name]()) for name in names}

    def watch(self) -> None:
        self.windows += 1

    def disturbed(self) -> str:
        return "a neighbour" if self.noisy(self.windows) else ""


def take(
    times: Mapping[str, Callable[[], float]],
    rule: StoppingRule,
    levels: Mapping[str, Level],
    rounds: list[Round] | None = None,
    process: int = 0,
    machine: Machine | None = None,
) -> list[Round]:
    rounds = [] if rounds is None else rounds
    given = list(rounds)
    machine = machine or Machine(times)
    windows = list(race(rule, machine, rounds, Entrants(tuple(times), "default", levels), process))
    assert given + [each for window in windows for each in window] == rounds, "every round is handed over once"
    return rounds


def run(
    times: Mapping[str, Callable[[], float]], rule: StoppingRule, levels: Mapping[str, Level]
) -> dict[str, list[int]]:
    rounds = take(times, rule, levels)
    return {name: [each.ns[name] for each in rounds if name in each.ns] for name in times}


def test_a_constant_machine_stops_at_the_first_look_after_min_rounds() -> None:
    samples = run(
        {"default": lambda: 1000, "other": lambda: 900},
        StoppingRule(min_rounds=10, max_rounds=100, seconds=9),
        {"default": EXACT, "other": EXACT},
    )
    assert samples == {"default": [1000] * 10, "other": [900] * 10}


def test_noise_asks_for_more_rounds_than_a_constant_machine() -> None:
    noise = random.Random(1)
    samples = run(
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
    by_rounds = run({"default": wild, "other": wild}, StoppingRule(10, 25, 1e9), levels)
    assert len(by_rounds["default"]) == 25
    by_time = run({"default": wild, "other": wild}, StoppingRule(10, 10**6, 0.1), levels)
    assert 10 <= len(by_time["default"]) < 200


def test_min_rounds_are_finished_even_out_of_time() -> None:
    samples = run({"default": lambda: 10**9}, StoppingRule(8, 100, 0.001), {"default": EXACT})
    assert len(samples["default"]) == 8


def test_a_candidate_far_behind_stops_at_the_first_look_and_the_default_never() -> None:
    samples = run(
        {"default": lambda: 5000, "good": lambda: 1000, "bad": lambda: 2001},
        StoppingRule(10, 100, 9),
        {"default": EXACT, "good": EXACT, "bad": EXACT},
    )
    assert {name: len(times) for name, times in samples.items()} == {"default": 10, "good": 10, "bad": 2}


def test_without_racing_everybody_stays() -> None:
    samples = run(
        {"default": lambda: 5000, "good": lambda: 1000, "bad": lambda: 9000},
        StoppingRule(10, 100, 9, racing=False),
        dict.fromkeys(("default", "good", "bad"), EXACT),
    )
    assert {len(times) for times in samples.values()} == {10}


def test_a_candidate_whose_interval_is_wholly_behind_stops_and_the_survivors_get_the_samples() -> None:
    noise = random.Random(1)
    times = {"default": 1000, "good": 800, "close": 805, "behind": 900}
    samples = run(
        {name: (lambda ns=ns: ns * noise.lognormvariate(0, 0.05)) for name, ns in times.items()},
        StoppingRule(10, 100, 9, precision=0.01),
        dict.fromkeys(times, EXACT),
    )
    rounds = {name: len(ns) for name, ns in samples.items()}
    assert rounds["behind"] < rounds["default"] == rounds["good"]
    assert rounds["close"] == rounds["good"], "what can't be told apart stays in"


def test_a_less_precise_or_more_demanding_rival_drops_nobody() -> None:
    samples = run(
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


def test_a_trailing_candidate_stops_once_it_has_an_interval() -> None:
    times = {"default": lambda: 1000.0, "behind": lambda: 1400.0}
    samples = run(times, StoppingRule(10, 100, 9), dict.fromkeys(times, EXACT))
    assert len(samples["behind"]) == 6


def test_one_bad_sample_drops_nobody_before_there_is_an_interval() -> None:
    slow = iter([9000.0, *[900.0] * 99])
    times = {"default": lambda: 1000.0, "unlucky": lambda: next(slow)}
    assert len(run(times, StoppingRule(10, 100, 9), dict.fromkeys(times, EXACT))["unlucky"]) == 10


def test_who_was_dropped_stays_dropped_in_the_next_process_and_a_newcomer_takes_part() -> None:
    rule = StoppingRule(10, 100, 9)
    times = {"default": lambda: 1000.0, "good": lambda: 900.0, "bad": lambda: 5000.0}
    levels = dict.fromkeys((*times, "new"), EXACT)
    rounds = take(times, rule, levels)
    entrants = Entrants(tuple(times), "default", levels)
    assert not rule.done(rounds, entrants, 1)
    take(times, rule, levels, rounds, process=1)
    assert rule.done(rounds, entrants, 1)
    assert {each.number for each in rounds} == set(range(20))
    assert all(set(each.ns) == {"default", "good"} for each in rounds if each.process == 1)
    more = {**times, "new": lambda: 950.0}
    take(more, rule, levels, rounds, process=2)
    assert all(set(each.ns) == {"default", "good", "new"} for each in rounds if each.process == 2)


def test_a_process_that_was_interrupted_goes_on_where_it_was() -> None:
    rule = StoppingRule(10, 100, 9)
    times = {"default": lambda: 1000.0, "good": lambda: 900.0}
    rounds = take(times, rule, dict.fromkeys(times, EXACT))[:7]
    take(times, rule, dict.fromkeys(times, EXACT), rounds)
    assert len(rounds) == 10


def test_disturbed_rounds_are_marked_and_repeated() -> None:
    times = {"default": lambda: 6e7, "good": lambda: 5e7}  # a window a round
    machine = Machine(times, noisy=lambda window: window in (2, 5, 6))
    rounds = take(times, StoppingRule(10, 100, 99), dict.fromkeys(times, EXACT), machine=machine)
    assert [each.number for each in rounds if each.disturbed] == [2, 5, 6]
    assert len(rounds) == 13 and len(counted(rounds, 10)) == 10


def test_a_machine_that_is_always_busy_still_comes_to_an_end_with_its_rounds_marked() -> None:
    times = {"default": lambda: 6e7, "good": lambda: 5e7}
    machine = Machine(times, noisy=lambda _: True)
    rounds = take(times, StoppingRule(10, 100, 99), dict.fromkeys(times, EXACT), machine=machine)
    assert 10 <= len(rounds) <= 20 and all(each.disturbed for each in rounds)


def test_time_that_runs_out_ends_it_and_what_was_taken_is_handed_over() -> None:
    rounds: list[Round] = []
    left = iter([False] * 4 + [True] * 99)
    machine = Machine({"default": lambda: 1000.0})
    rule = StoppingRule(10, 100, 9)
    windows = list(race(rule, machine, rounds, ALONE, 0, lambda: next(left)))
    assert sum(map(len, windows)) == len(rounds) == 4
