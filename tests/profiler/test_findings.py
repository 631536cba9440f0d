"""What is known of a problem, to rows and back."""

from __future__ import annotations

from dks.dispatch.evidence import Measurement, clean_samples, paired
from dks.dispatch.problem import Candidate, Problem
from dks.profiler.findings import Finding, Findings, Header, Round, counted, fastest, from_rows, to_rows
from tests.codegen.rows import ENVIRONMENT

PROBLEM = Problem.of("linear", {"dtype": "float32", "bias": "yes", "epilogue": "none"}, {"m": 8, "n": 64, "k": 64})
NAMES = ("torch.linear", "torch.addmm", "mkldnn.linear_packed")
CANDIDATES = [Candidate(name) for name in NAMES]


def findings() -> Findings:
    """Three candidates over two processes; the second left early, the third failed after three rounds."""
    known = Findings(
        {name: Finding(errors={"normal": 1e-7, "outliers": 2e-7, "rows": 1e-7}, stable=True) for name in NAMES}
    )
    for number in range(20):
        ns = {"torch.linear": 1000 + number, "torch.addmm": 500 + number}
        if number >= 14:
            del ns["torch.addmm"]
        if number < 3:
            ns["mkldnn.linear_packed"] = 700
        known.rounds.append(Round(number, number // 10, ns, "a neighbour" if number in (4, 5) else ""))
    known.found["mkldnn.linear_packed"] = Finding("crashed", "killed by signal 11")
    return known


def rows() -> dict[str, Measurement]:
    import json

    header = Header(PROBLEM, "bin", 2.0, "cold", json.dumps(ENVIRONMENT.to_dict()))
    return {row.candidate: row for row in to_rows(header, findings(), CANDIDATES)}


def test_rows_hold_what_was_found_and_a_failed_one_keeps_no_times() -> None:
    found = rows()
    default, other, failed = (found[name] for name in NAMES)
    assert (default.ratio, default.ratio_low, default.ratio_high) == (1.0, 1.0, 1.0)
    assert other.rounds == list(range(14)) and other.processes == [0] * 10 + [1] * 4
    assert other.disturbed == [number in (4, 5) for number in range(14)]
    assert other.ratio is not None and 1.8 < other.ratio < 2.1 and other.error == 2e-7
    assert (failed.status, failed.samples_ns, failed.median_ns, failed.form_bytes) == ("crashed", [], None, 0)


def test_disturbed_rounds_are_kept_and_left_out_of_every_figure() -> None:
    found = rows()
    default, other = found["torch.linear"], found["torch.addmm"]
    assert len(default.samples_ns) == 20 and len(clean_samples(default)) == 18
    assert [len(pairs) for pairs in paired(default, other)] == [8, 4]
    few = Findings(found=findings().found, rounds=[Round(n, 0, {"torch.linear": 10}, "steal") for n in range(9)])
    assert counted(few.rounds, 10) == [] and len(counted(few.rounds, 9)) == 9


def test_rows_give_back_the_findings_they_came_from() -> None:
    known, again = findings(), from_rows(rows().values())
    assert {n: f.status for n, f in again.found.items()} == {n: f.status for n, f in known.found.items()}
    for old, new in zip(known.rounds, again.rounds, strict=True):
        old.ns.pop("mkldnn.linear_packed", None)
        assert (old.number, old.process, old.ns, bool(old.disturbed)) == (
            new.number, new.process, new.ns, bool(new.disturbed),
        )  # fmt: skip


def test_a_round_counts_once_however_often_it_comes() -> None:
    known = findings()
    known.add(findings().rounds)
    assert len(known.rounds) == 20 and known.next_round == 20


def test_forgetting_a_candidate_keeps_the_others_and_forgetting_the_default_leaves_no_pair() -> None:
    known = findings()
    known.forget("torch.addmm", "torch.linear")
    assert "torch.addmm" not in known.found and all("torch.addmm" not in r.ns for r in known.rounds)
    assert len(known.rounds) == 20
    known.forget("torch.linear", "torch.linear")
    assert known.rounds == []


def test_the_fastest_is_by_pairs_and_a_tie_is_the_default_s() -> None:
    rounds = [Round(n, 0, {"torch.linear": 100 * (n + 1), "torch.addmm": 90 * (n + 1)}) for n in range(5)]
    assert fastest(["torch.linear", "torch.addmm"], "torch.linear", rounds) == "torch.addmm"
    for each in rounds:
        each.ns["torch.addmm"] = each.ns["torch.linear"]
    assert fastest(["torch.addmm", "torch.linear"], "torch.linear", rounds) == "torch.linear"
