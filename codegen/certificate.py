"""The certificate: what a table is worth on held-out shapes, which no rule was made from.

For each held-out shape the table is asked what would run, and that is compared with the best candidate on that
very shape. The regret is time(chosen) / time(best) - 1.

The best of many noisy candidates looks better than it is, since luck helps to be picked (the winner's curse).
So it is picked on the rounds with odd numbers and compared on those with even ones, which had no part in the
pick. What is left is unbiased for the candidate that was picked; where luck picked one that is not the best,
the regret may come out below zero, and is left so.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from dks.codegen.admission import admits, forms, instability, is_timed, saved_ns, simplicity
from dks.codegen.compare import Pairs, point
from dks.codegen.policy import Policy
from dks.dispatch import pool
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import FEWEST_CLEAN, Measurement, paired
from dks.dispatch.modes import EAGER, GRAPH, MODES, mode_of
from dks.dispatch.problem import Problem
from dks.dispatch.table import Table

NO_SHAPES = "the run has no held-out shapes"
NO_JOULES = "the objective is energy: joules come one a candidate, and the certificate compares round by round"
DRAWS = 2000  # of the bootstrap; the ends of a 95 % interval are then good to a few hundredths of its width
FEWEST_SHAPES = 6  # that give a mean an interval, as with the pairs of a ratio
AT_SIGHT = 1.5  # a lead in every one of few pairs that is no accident
NAMED = 5  # worst shapes that a refusal names


@dataclass(frozen=True, slots=True)
class Shape:
    """One held-out problem in one form.

    Attributes:
        problem: ``Problem.id``.
        form: ``prepared`` or ``direct``, and in graphs ``prepared_graph`` or ``direct_graph``.
        chosen: what the table would run; the default where the lookup misses.
        hit: whether the lookup hit.
        best: the best candidate among the chosen one, the default, and those that the policy admits on this
            shape and that save more there than dispatching costs.
        regret: time(chosen) / time(best) - 1; null if it can't be said.
        note: why it can't; empty if it can.
        pairs: shared samples behind the regret; 0 where the chosen one is the best.
        split: whether best was picked on other rounds than those it is compared on; there are too few rounds
            for that where not.
        best_us: time of the best, in microseconds.
        weight: of the shape in traffic.
    """

    problem: str
    form: str
    chosen: str
    hit: bool
    best: str | None = None
    regret: float | None = None
    note: str = ""
    pairs: int = 0
    split: bool = True
    best_us: float = 0.0
    weight: float = 0.0


@dataclass(frozen=True, slots=True)
class Summary:
    """The regret over several held-out shapes, each in every form it can be called in.

    Attributes:
        shapes: how many problems.
        n: how many regrets; a shape that is judged in two forms has two.
        geomean: geometric mean of 1 + regret, less 1: value and ends of its 95 % interval, by a bootstrap over
            shapes (null: fewer than six say nothing).
        p95: 95th percentile (nearest rank).
        max: the largest.
        worst: where that is: problem, form, chosen and best.
    """

    shapes: int
    n: int
    geomean: list[float | None]
    p95: float
    max: float
    worst: dict[str, str]


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a table is worth between the sizes it was made from.

    Attributes:
        overall: of all shapes; None where there is nothing to say, and ``note`` says why.
        operators: the same by operator, and by operator and form (``linear prepared``) where it has several.
        weighted: regret of the total time, each shape weighted by its traffic, in the form that a model calls
            it in (prepared where there is a choice; eager where that was measured); None where no weight is known.
        shapes: every held-out shape in every form.
    """

    overall: Summary | None = None
    operators: dict[str, Summary] = dataclasses.field(default_factory=dict)
    weighted: float | None = None
    shapes: tuple[Shape, ...] = ()
    note: str = NO_SHAPES

    def to_json(self) -> dict[str, Any]:
        """``certificate`` (None where there is none) and ``certificate_note``, without the single shapes."""
        if self.overall is None:
            return {"certificate": None, "certificate_note": self.note}
        judged = [shape for shape in self.shapes if shape.regret is not None]
        found = {
            "overall": dataclasses.asdict(self.overall),
            "operators": {name: dataclasses.asdict(summary) for name, summary in self.operators.items()},
            "weighted": self.weighted,
            "missed": sum(not shape.hit for shape in judged),
            "unsplit": sum(not shape.split for shape in judged),
            "unmeasured": [f"{s.problem} {s.form}: {s.note}" for s in self.shapes if s.regret is None],
        }
        return {"certificate": found, "certificate_note": ""}


def certify(
    table: Table, held_out: Mapping[str, Mapping[Problem, Sequence[Measurement]]], policy: Policy
) -> Certificate:
    """Judge ``table`` by held-out shapes. A pure function: neither the order of shapes nor of rows matters.

    Args:
        held_out: by mode, rows by problem, the default's among them.
    """
    asked = {p: [mode for mode in MODES if p in held_out.get(mode, {})] for each in held_out.values() for p in each}
    if not asked or policy.objective == "energy":
        return Certificate(note=NO_JOULES if asked else NO_SHAPES)
    groups = {group.key: index for index, group in enumerate(table.groups)}
    shapes = []
    for problem in sorted(asked, key=lambda p: p.id):
        for mode in asked[problem]:
            for form in forms(problem.op, mode):
                chosen, hit = _look_up(table, groups, problem, form)
                shape = Shape(problem.id, form, chosen, hit)
                shapes.append(_judge(shape, problem, held_out[mode][problem], policy))
    judged = [shape for shape in shapes if shape.regret is not None]
    if not judged:
        note = f"none of {len(asked)} held-out shapes can be judged; the first: {shapes[0].note}"
        return Certificate(shapes=tuple(shapes), note=note)
    parts: dict[str, list[Shape]] = defaultdict(list)
    several = {op for op in {p.op for p in asked} if len({s.form for s in shapes if _op(s) == op}) > 1}
    for shape in judged:
        op = _op(shape)
        parts[op].append(shape)
        if op in several:
            parts[f"{op} {shape.form}"].append(shape)
    operators = {name: _summary(parts[name]) for name in sorted(parts)}
    return Certificate(_summary(judged), operators, _weighted(judged), tuple(shapes), "")


def _look_up(
    table: Table, groups: Mapping[tuple[object, ...], int], problem: Problem, form: str
) -> tuple[str, bool]:
    """What would run, and whether the lookup hit."""
    operator = pool.operator(problem.op)
    statics = tuple((name, problem.dim(name)) for name in operator.static)
    group = groups.get((problem.op, form, problem.traits, statics))
    if group is None:
        return operator.default, False
    code = table.find(group, problem.align, *(problem.dim(name) for name in operator.dynamic))
    return (table.rules[code >> 2].candidate, True) if code >= 0 else (operator.default, False)


def _judge(shape: Shape, problem: Problem, rows: Sequence[Measurement], policy: Policy) -> Shape:
    by_id = {row.candidate: row for row in rows}
    chosen = by_id.get(shape.chosen)
    if chosen is None or not is_timed(chosen):
        why = "was not measured there" if chosen is None else f"{chosen.status} there: {chosen.reason}"
        return dataclasses.replace(shape, note=f"{shape.chosen} {why}")
    best, gain, halves = chosen, 1.0, _Halves((), (), True)
    for row in _rivals(chosen, problem, shape.form, rows, policy):
        found = _split(chosen, row)
        if found is None:
            # One that stopped early lies behind, mostly; where it does not, nothing may be claimed.
            if (row.median_ns or math.inf) < (chosen.median_ns or 0.0):
                note = (
                    f"{shape.chosen} shares fewer than {FEWEST_CLEAN} rounds with {row.candidate}, which is ahead"
                )
                return dataclasses.replace(shape, note=note)
            continue
        seen = point(found.pick, policy.objective)
        if seen > gain:
            best, gain, halves = row, seen, found
    regret = point(halves.compare, policy.objective) - 1.0 if best is not chosen else 0.0
    pairs = [pair for process in halves.compare for pair in process]
    best_ns = median(ours for _, ours in pairs) if pairs else chosen.median_ns or 0.0
    return dataclasses.replace(
        shape,
        best=best.candidate,
        regret=round(regret, 6),
        pairs=len(pairs),
        split=halves.split,
        best_us=round(best_ns / 1e3, 3),
        weight=chosen.weight,
    )


def _rivals(
    chosen: Measurement, problem: Problem, form: str, rows: Sequence[Measurement], policy: Policy
) -> list[Measurement]:
    """The default, and what the policy would let win here, the simplest first; without the chosen one."""
    default_id = pool.operator(problem.op).default
    default = next((row for row in rows if row.candidate == default_id and is_timed(row)), None)
    found = [default] if default is not None else []
    for row in rows:
        if row.candidate == default_id or not admits(policy, problem, form, row) or instability(policy, row):
            continue
        # As in a choice: what saves less than dispatching costs would make the call slower.
        if default is None or saved_ns(default, row) > policy.overhead_ns:
            found.append(row)
    return sorted((row for row in found if row is not chosen), key=simplicity)


@dataclass(frozen=True, slots=True)
class _Halves:
    """Pairs to pick the best on, and pairs to compare it on; the same ones where ``split`` is false."""

    pick: Pairs
    compare: Pairs
    split: bool


def _split(chosen: Measurement, row: Measurement) -> _Halves | None:
    """(chosen, row) pairs of odd and of even rounds; of all rounds where either half has fewer than six; None
    where even those are fewer."""
    odd, even = (paired(_half(chosen, parity), _half(row, parity)) for parity in (1, 0))
    if min(_count(odd), _count(even)) >= FEWEST_CLEAN:
        return _Halves(odd, even, True)
    every = paired(chosen, row)
    pairs = [theirs / ours for process in every for theirs, ours in process]
    # Racing drops at sight what is far behind: two pairs that agree on that are worth a regret.
    at_sight = len(pairs) >= 2 and min(pairs) > AT_SIGHT
    return _Halves(every, every, False) if len(pairs) >= FEWEST_CLEAN or at_sight else None


def _half(row: Measurement, parity: int) -> Measurement:
    """The row with its samples of odd (1) or even (0) rounds alone."""
    kept = [index for index, number in enumerate(row.rounds) if number % 2 == parity]
    return dataclasses.replace(
        row,
        samples_ns=[row.samples_ns[i] for i in kept],
        rounds=[row.rounds[i] for i in kept],
        processes=[row.processes[i] for i in kept],
        disturbed=[row.disturbed[i] for i in kept],
    )


def _count(pairs: Pairs) -> int:
    return sum(map(len, pairs))


def _summary(judged: Sequence[Shape]) -> Summary:
    """Of at least one shape that has a regret."""
    regrets = sorted(_regret(shape) for shape in judged)
    worst = max(judged, key=_regret)
    names = {"problem": worst.problem, "form": worst.form, "chosen": worst.chosen, "best": str(worst.best)}
    return Summary(
        shapes=len({shape.problem for shape in judged}),
        n=len(judged),
        geomean=_geomean(judged),
        p95=regrets[math.ceil(0.95 * len(regrets)) - 1],
        max=regrets[-1],
        worst=names,
    )


def _geomean(judged: Sequence[Shape]) -> list[float | None]:
    """The geometric mean less 1 and its interval. A shape is drawn with all of its forms: they share samples."""
    import numpy as np

    logs: dict[str, list[float]] = defaultdict(list)
    for shape in judged:
        logs[shape.problem].append(math.log1p(_regret(shape)))
    value = round(math.expm1(fmean(log for one in logs.values() for log in one)), 6)
    if len(logs) < FEWEST_SHAPES:
        return [value, None, None]
    sums = np.array([math.fsum(one) for one in logs.values()])
    counts = np.array([len(one) for one in logs.values()])
    drawn = np.random.default_rng(0).integers(len(sums), size=(DRAWS, len(sums)))
    low, high = np.quantile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [0.025, 0.975])
    return [value, round(math.expm1(low), 6), round(math.expm1(high), 6)]


def _op(shape: Shape) -> str:
    return Problem.parse(shape.problem).op


def _weighted(judged: Sequence[Shape]) -> float | None:
    """Total time of what would run / that of the best, less 1, each shape as often as traffic has it: once, in the
    mode and form that a model calls it in."""
    mode = EAGER if any(mode_of(shape.form) == EAGER for shape in judged) else GRAPH
    called = [shape for shape in judged if shape.form == forms(_op(shape), mode)[0]]
    best = math.fsum(shape.weight * shape.best_us for shape in called)
    chosen = math.fsum(shape.weight * shape.best_us * (1.0 + _regret(shape)) for shape in called)
    return round(chosen / best - 1.0, 6) if best > 0.0 else None


def _regret(shape: Shape) -> float:
    return shape.regret or 0.0


def check_regret(certificate: Certificate, limit: float | None) -> None:
    """Hold a certificate to the policy's ``max_regret``; None asks nothing.

    Raises:
        BadInput: the 95th percentile is above the limit, or there is no certificate to judge by.
    """
    if limit is None:
        return
    if certificate.overall is None:
        raise BadInput(
            f"certificate: found none ({certificate.note}), expected one to hold to a regret of {limit:g}; measure "
            "held-out shapes with dks-profile run, or build without --max-regret"
        )
    blind = [shape for shape in certificate.shapes if shape.regret is None]
    if len(blind) > limit * len(certificate.shapes):
        raise BadInput(
            f"certificate: found {len(blind)} of {len(certificate.shapes)} held-out shapes and forms that can't be "
            f"judged ({blind[0].problem} {blind[0].form}: {blind[0].note}), expected at most {percent(limit)} of "
            "them; run dks-profile run again without a budget, or build without --max-regret"
        )
    if certificate.overall.p95 > limit:
        beyond = sorted((s for s in certificate.shapes if _regret(s) > limit), key=_regret, reverse=True)
        worst = "; ".join(
            f"{s.problem} {s.form}: {s.chosen} is {percent(_regret(s))} behind {s.best}" for s in beyond[:NAMED]
        )
        raise BadInput(
            f"certificate: found a regret of {percent(certificate.overall.p95)} at the 95th percentile of "
            f"{certificate.overall.shapes} held-out shapes, expected at most {percent(limit)}; the worst: "
            f"{worst}; give the config more bins there and measure again, or allow more with --max-regret"
        )


def describe(certificate: Mapping[str, Any] | None, note: str) -> str:
    """A stored certificate in one line.

    Raises:
        BadInput: it does not read as one.
    """
    if certificate is None:
        return f"no certificate: {note or 'built by a version that made none'}"
    try:
        overall, worst = certificate["overall"], certificate["overall"]["worst"]
        line = (
            f"regret on {overall['shapes']} held-out shapes: {interval_words(overall['geomean'])}, 95th percentile "
            f"{percent(overall['p95'])}, at most {percent(overall['max'])} ({worst['problem']} {worst['form']}: "
            f"{worst['chosen']}, best {worst['best']})"
        )
        counts = caveats(certificate)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"certificate: found none that reads ({type(error).__name__}: {error}), expected one that dks-codegen "
            "wrote; build the package again"
        ) from None
    return "; ".join([line, *counts])


def caveats(certificate: Mapping[str, Any]) -> list[str]:
    """Of a stored certificate: how many shapes, counted in each form, say less than the others, and why."""
    counts = {
        "not in the table, where the default runs": certificate["missed"],
        "with too few rounds to pick the best on others than it is compared on": certificate["unsplit"],
        "not judged": len(certificate["unmeasured"]),
    }
    return [f"{n} {what}" for what, n in counts.items() if n]


def interval_words(geomean: Sequence[float | None]) -> str:
    """A geometric mean and its interval in percent."""
    value, low, high = geomean
    ends = "" if low is None or high is None else f" [{percent(low)}, {percent(high)}]"
    return f"{percent(value or 0.0)}{ends}"


def percent(share: float) -> str:
    """0.05 as ``5.0 %``."""
    return f"{100 * share:.1f} %"
