"""The story of a choice: every fact of it, in lines that people read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dks.dispatch import pool
from dks.dispatch.choice import WIDTH, Choice
from dks.dispatch.generation import Generation
from dks.dispatch.runtime import Runtime
from dks.dispatch.table import Group, Rule, Table

TRAITS = (("bias", "yes"), ("dtype", "float32"), ("epilogue", "none"))
RULES = (Rule("torch.linear", 4), Rule("mkldnn.linear_packed", 4))
ID = "linear[bias=yes,dtype=float32,epilogue=none](m={m},n=64,k=32)@64"
CHOSEN = {
    "candidate": "mkldnn.linear_packed",
    "problem": ID.format(m=8),
    "form": "prepared",
    "reason": "faster than the default: mkldnn.linear_packed at 2.000x [1.900, 2.100]",
    "median_us": 50.0,
    "default_us": 100.0,
    "ratio": [2.0, 1.9, 2.1],
    "rounds": 40,
    "error": 3e-7,
    "form_bytes": 8192,
    "runner_up": "torch.addmm",
    "margin": [1.2, 1.1, None],
    "processes": 4,
    "tied": ["mkldnn.linear_packed", "torch.addmm"],
    "others": [1, 0],
}
DEFAULT = {
    "candidate": "torch.linear",
    "problem": ID.format(m=64),
    "form": "prepared",
    "reason": "the default serves",
    "median_us": 70.0,
    "default_us": 70.0,
    "ratio": [1.0, 1.0, 1.0],
    "rounds": 9,
    "processes": 1,
    "others": [0],
}
OTHERS = [
    {
        "reason": "crashed: its process died: signal 11",
        "kernels": {"torch.linear_inplace": 1, "mkl.linear_packed": 3},
    },
    {"reason": "no clear lead over the default", "kernels": {"torch.addmm": 1}},
]


@pytest.fixture
def runtime() -> Runtime:
    """m in 1, 2..8 by the packed kernel; 9..64 by the default; n=64, k=32."""
    evidence = json.dumps({"rules": [DEFAULT, CHOSEN], "others": OTHERS})
    cells = {64: (1, 1, 0), 4: (-1, -1, 0)}
    group = Group("linear", "prepared", TRAITS, (("n", 64), ("k", 32)), ((1, 8, 64),), cells)
    return Runtime("t", Generation(Table(RULES, (group,)), evidence=evidence))


def story(choice: Choice) -> dict[str, str]:
    return {label: text for label, text in choice.story if label}


def ask(runtime: Runtime, m: int, align: int = 64, **more: Any) -> Choice:
    return runtime.explain("linear", m=m, n=64, k=32, align=align, **more)


def test_all_that_is_known_of_a_challenger(runtime: Runtime) -> None:
    choice = ask(runtime, 5)
    assert (choice.candidate, choice.match) == ("mkldnn.linear_packed", "bin") and choice.reason == CHOSEN["reason"]
    assert story(choice) == {
        "bin": "m=2..8",
        "measured at": "m=8, aligned to 64 bytes",
        "alignment": "64 bytes in the call; the kernel needs 4",
        "time": "50.0 us a call; 100.0 us by the default, torch.linear",
        "ratio": "2.000x [1.900, 2.100] to the default; 40 rounds in 4 processes",
        "error": "3e-07 relative to float64",
        "packed": "0.01 MiB for each weight",
        "runner-up": "torch.addmm",
        "margin": "1.200x: the runner-up's time over the choice's",
        "tied": "mkldnn.linear_packed, torch.addmm",
        "not chosen": "no clear lead over the default",
    }
    assert choice.rule is not None and choice.rule["others"] == [OTHERS[1], OTHERS[0]], "in the rule's own order"


def test_every_candidate_of_the_pool_is_accounted_for(runtime: Runtime) -> None:
    lines = [text for _, text in ask(runtime, 5).story]
    start = lines.index("no clear lead over the default")
    assert lines[start + 1 : start + 4] == [
        "  torch.addmm",
        "crashed: its process died: signal 11",
        "  torch.linear_inplace, mkl.linear_packed (3)",
    ]
    assert lines[start + 4] == "not measured"
    named = {"torch.linear", "mkldnn.linear_packed", "torch.addmm", "torch.linear_inplace", "mkl.linear_packed"}
    unmeasured = {item.split(" (")[0] for item in lines[start + 5].strip().split(", ")}
    assert unmeasured == {kernel.id for kernel in pool.kernels_for("linear", "cpu")} - named


def test_the_default_has_samples_and_no_ratio_to_itself(runtime: Runtime) -> None:
    told = story(ask(runtime, 64))
    assert told["bin"] == "m=9..64" and told["time"] == "70.0 us a call"
    assert told["samples"] == "9 rounds in 1 process" and "ratio" not in told


def test_past_the_edges(runtime: Runtime) -> None:
    nearest = ask(runtime, 100)
    assert nearest.match == "nearest" and story(nearest)["bin"] == "m=100 beyond the last edge 64"
    past = ask(runtime, 129)
    assert past.match == "default" and past.reason.endswith("m=129 past 2 x 64") and past.rule is None
    assert story(past) == {"bin": "m=129 beyond the last edge 64"}


def test_less_aligned_calls(runtime: Runtime) -> None:
    choice = ask(runtime, 8, align=16)
    assert choice.match == "nearest" and story(choice)["alignment"] == "16 bytes in the call; the kernel needs 4"
    assert "mkldnn.linear_packed needs 4 bytes, the call has 2" in ask(runtime, 8, align=2).reason


def test_a_switched_off_candidate_keeps_its_story(runtime: Runtime) -> None:
    runtime.generation.dead["mkldnn.linear_packed"] = "its source changed"
    choice = ask(runtime, 5)
    assert (choice.candidate, choice.match) == ("torch.linear", "default")
    assert choice.reason == "mkldnn.linear_packed was chosen and may not run: its source changed"
    assert story(choice)["bin"] == "m=2..8" and story(choice)["runner-up"] == "torch.addmm"


def test_what_the_table_holds_is_listed_up_to_a_few() -> None:
    groups = tuple(
        Group("linear", "direct", TRAITS, (("n", n), ("k", 8)), ((1,),), {4: (0,)}) for n in range(10, 30)
    )
    reason = Runtime("t", Generation(Table(RULES, groups))).explain("linear", m=1, n=5, k=8).reason
    assert reason.count("'n'") == 7 and reason.endswith("and 14 more")


def test_lines_are_short_and_aligned(runtime: Runtime) -> None:
    lines = str(ask(runtime, 5)).splitlines()
    assert lines[0] == "linear -> mkldnn.linear_packed  (bin match)"
    assert lines[1].startswith("  why          faster than") and "  bin          m=2..8" in lines
    assert max(map(len, lines)) <= WIDTH
    assert "               crashed: its process died: signal 11" in lines
    assert "                 torch.linear_inplace, mkl.linear_packed (3)" in lines


def test_an_older_lut_tells_what_it_has(runtime: Runtime) -> None:
    old = {key: value for key, value in CHOSEN.items() if key not in ("others", "tied")}
    runtime.generation.evidence = json.dumps({"rules": [DEFAULT | {"others": []}, old]})
    told = story(ask(runtime, 5))
    assert "not chosen" not in told and told["runner-up"] == "torch.addmm"
