"""Selection: from measurements to a table. A pure function of its input.

Rules are made from bins and their splits. Held-out shapes make none: they rule out what fails on them, and
say what the table is worth between the sizes it was made from (``certificate.py``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from dks.codegen.admission import failure, forms
from dks.codegen.certificate import certify
from dks.codegen.choose import all_costs, choose, costs, only
from dks.codegen.compare import Comparisons
from dks.codegen.few import Costs, keep_few
from dks.codegen.grid import Grid, sizes_of
from dks.codegen.invariant import one_for_all
from dks.codegen.lut import Evidence, Few, Invariant, Lut
from dks.codegen.others import others
from dks.codegen.policy import Policy
from dks.codegen.toolchains import measured_with
from dks.dispatch import pool
from dks.dispatch.environment import Environment
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import Measurement, environment_of
from dks.dispatch.modes import EAGER, GRAPH, MODES, mode_of
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.sources import source_digest
from dks.dispatch.table import Group

HELD_OUT = "held_out"

Key = tuple[str, tuple[tuple[str, str], ...], tuple[tuple[str, int], ...]]
"""An operator, its traits and its static dims."""


def select(rows: Iterable[Measurement], policy: Policy) -> Lut:
    """Choose a candidate for every bin, and judge the choices by the held-out shapes.

    Raises:
        BadInput: rows of several environments, of kernels or operators that this version does not have, the
            same problem measured twice or in two roles, or held-out shapes alone.
    """
    measured = _by_mode(rows)
    environment = _one_environment(measured)
    roles = {mode: {p: _role(p, of) for p, of in found.items()} for mode, found in measured.items()}
    held_out = {
        mode: {p: found[p] for p, role in roles[mode].items() if role == HELD_OUT}
        for mode, found in measured.items()
    }
    grids = {mode: _grids(found) for mode, found in roles.items()}
    if not any(grids.values()):
        raise BadInput(
            "measurements: found held-out shapes alone, expected at least one bin; finish the sweep, or name "
            "the run directory that holds the bins too"
        )
    barred = {mode: _barred(grids[mode], held_out[mode], policy) for mode in measured}
    # Both forms ask for many of the same ratios; a mode has rows, and so ratios, of its own.
    compared: dict[tuple[str, Problem], Comparisons] = defaultdict(lambda: Comparisons(policy.objective))

    def given(problem: Problem, form: str) -> tuple[Sequence[Measurement], dict[str, str] | None, Comparisons]:
        """What a form of a problem is chosen by: rows of its mode alone."""
        mode = mode_of(form)
        return measured[mode][problem], barred[mode].get(problem), compared[mode, problem]

    def rule(problem: Problem, form: str, among: Collection[str] | None = None) -> Evidence:
        rows, out, ratios = given(problem, form)
        kept = [row for row in rows if among is None or row.candidate in among]
        return choose(problem, form, kept, policy, out, ratios)

    def spent(problem: Problem, form: str) -> Costs:
        rows, out, ratios = given(problem, form)
        return costs(problem, form, rows, policy, out, ratios)

    evidence: list[Evidence] = []
    groups = [
        _group(key, form, grid, rule, evidence)
        for mode, found in grids.items()
        for key, grid in found.items()
        for form in forms(key[0], mode)
    ]
    all_groups, few = groups, tuple[Few, ...]()
    invariant: tuple[Invariant, ...] = ()
    if policy.batch_invariant:

        def spent_by_all(problem: Problem, form: str) -> Costs:
            rows, out, ratios = given(problem, form)
            return all_costs(problem, form, rows, policy, out, ratios)

        def forced(problem: Problem, form: str, candidate: str) -> Evidence:
            rows, _, ratios = given(problem, form)
            return only(problem, form, rows, policy, candidate, ratios)

        changed, rules, invariant = one_for_all(groups, evidence, spent_by_all, forced)
        groups = list(changed)
    else:
        rules, few = keep_few(evidence, spent, rule, policy.max_kernels)
    kept = {(each.op, each.form, each.dtype): each.after for each in few}

    def explained(made: Evidence) -> Evidence:
        problem = Problem.parse(made.problem)
        rows, out, ratios = given(problem, made.form)
        serving = kept.get((problem.op, made.form, problem.trait("dtype")))
        return replace(made, others=others(made, rows, policy, out, ratios, serving))

    rules = tuple(map(explained, rules))
    every = (row for by_problem in measured.values() for found in by_problem.values() for row in found)
    toolchains = measured_with(every, {rule.candidate for rule in rules})
    lut = Lut(environment, policy, rules, tuple(groups), _expected(all_groups, rules), few=few)
    lut = replace(lut, invariant=invariant, toolchains=toolchains)
    return replace(lut, certificate=certify(lut.table(), held_out, policy))


def _role(problem: Problem, rows: Sequence[Measurement]) -> str:
    found = sorted({row.role for row in rows})
    if len(found) > 1:
        raise BadInput(
            f"{problem.id}: found the roles {' and '.join(found)}, expected one; measure the problem again"
        )
    return found[0]


def _by_mode(rows: Iterable[Measurement]) -> dict[str, dict[Problem, list[Measurement]]]:
    """The rows of each problem in each mode that any was measured in, eager first."""
    found: dict[str, dict[Problem, list[Measurement]]] = {mode: defaultdict(list) for mode in MODES}
    seen: set[tuple[str, str, str]] = set()
    kernels = pool.kernels()
    digests = {id: source_digest(kernel) for id, kernel in kernels.items()}
    for row in rows:
        if row.op not in pool.operators() or Candidate.parse(row.candidate).kernel not in kernels:
            raise BadInput(
                f"{row.problem}: found {row.op} by {row.candidate}, expected an operator and kernel of this "
                "version; measure again"
            )
        if why := _unknown(row):
            raise BadInput(f"{row.problem}: found {why}, expected what this version declares; measure again")
        if (row.problem, row.candidate, row.mode) in seen:
            how = "" if row.mode == EAGER else f" in {row.mode} mode"
            raise BadInput(
                f"{row.problem}: found two measurements of {row.candidate}{how}, expected one; give each problem's "
                "run once"
            )
        seen.add((row.problem, row.candidate, row.mode))
        if row.kernel_digest != digests[Candidate.parse(row.candidate).kernel]:
            raise BadInput(
                f"{row.problem}: found {row.candidate} measured with another source than this version's, "
                "expected the same; run dks-profile again, which measures only what changed"
            )
        found[row.mode][Problem.parse(row.problem)].append(row)
    if not seen:
        raise BadInput("measurements: found none, expected at least one problem")
    return {mode: dict(by_problem) for mode, by_problem in found.items() if by_problem}


def _unknown(row: Measurement) -> str:
    """What of a row its operator or kernel does not declare, in words; empty where there is nothing."""
    problem, candidate = Problem.parse(row.problem), Candidate.parse(row.candidate)
    operator, kernel = pool.operator(row.op), pool.kernels()[candidate.kernel]
    traits = dict(problem.traits)
    if set(traits) != set(operator.traits):
        return f"traits {', '.join(traits) or 'none'}"
    for name, value in traits.items():
        if value not in operator.traits[name]:
            return f"{name}={value}"
    if tuple(name for name, _ in problem.dims) != operator.dims:
        return f"dims {', '.join(name for name, _ in problem.dims) or 'none'}"
    if kernel.op != row.op:
        return f"{row.candidate}, which computes {kernel.op}"
    names = tuple(name for name, _ in candidate.params)
    declared = {tuple(name for name, _ in params) for params in kernel.params}
    return "" if names in declared or kernel.search is not None else f"parameters of {row.candidate}"


def _one_environment(measured: Mapping[str, Mapping[Problem, Sequence[Measurement]]]) -> Environment:
    texts = {row.environment: row for found in measured.values() for rows in found.values() for row in rows}
    found = [environment_of(row) for row in texts.values()]
    for other in found[1:]:
        raise BadInput(
            f"measurements: found several environments ({'; '.join(found[0].diff(other))}), expected one; "
            "build one table for each"
        )
    return found[0]


def _grids(problems: Mapping[Problem, str]) -> dict[Key, Grid]:
    """The grid of every operator, traits and static dims that has bins, in the order of the table."""
    roles: dict[Key, dict[Problem, str]] = defaultdict(dict)
    for problem, role in problems.items():
        if role != HELD_OUT:
            roles[_key(problem)][problem] = role
    return {key: Grid.of(roles[key]) for key in sorted(roles, key=repr)}


def _key(problem: Problem) -> Key:
    statics = tuple((name, problem.dim(name)) for name in pool.operator(problem.op).static)
    return problem.op, problem.traits, statics


def _barred(
    grids: Mapping[Key, Grid], held_out: Mapping[Problem, Sequence[Measurement]], policy: Policy
) -> dict[Problem, dict[str, str]]:
    """By measured problem, the candidates that failed on a held-out shape of its bin, with the reason."""
    barred: dict[Problem, dict[str, str]] = defaultdict(dict)
    for problem in sorted(held_out, key=lambda p: p.id):
        grid = grids.get(_key(problem))
        answering = grid.bin_of(problem) if grid else None
        if answering is None:
            continue
        for row in held_out[problem]:
            if why := failure(policy, row):
                barred[answering].setdefault(row.candidate, f"{why} on held-out {problem.id}")
    return barred


def _group(
    key: Key, form: str, grid: Grid, rule: Callable[[Problem, str], Evidence], evidence: list[Evidence]
) -> Group:
    """One group of the table; its rules go to the end of ``evidence``."""
    op, traits, statics = key
    chosen: dict[Problem, int] = {}
    cells = {}
    for align in grid.alignments:
        indices = []
        for cell in grid.cells():
            problem = grid.answer(align, cell)
            if problem is None:
                indices.append(-1)
                continue
            if problem not in chosen:
                chosen[problem] = len(evidence)
                evidence.append(rule(problem, form))
            indices.append(chosen[problem])
        cells[align] = tuple(indices)
    return Group(op, form, traits, statics, grid.edges, cells)


def _expected(groups: Sequence[Group], evidence: Sequence[Evidence]) -> dict[str, float]:
    """Expected microseconds of one model call by activation dtype: weight x chosen time, over the problems
    that were measured in every dtype. Says in which dtype a model that may run in either should run.

    A model is called in one mode and each operator in one form: eager where that was measured, else in graphs, so
    that no problem counts twice.
    """
    mode = EAGER if any(mode_of(group.form) == EAGER for group in groups) else GRAPH
    totals: dict[str, dict[tuple[object, ...], float]] = defaultdict(dict)
    for group in groups:
        if group.form != forms(group.op, mode)[0]:
            continue
        traits = dict(group.traits)
        dtype = traits.pop("dtype")
        for index in sorted(set(group.cells[max(group.cells)]) - {-1}):
            rule = evidence[index]
            if rule.median_us is not None:
                key = (group.op, tuple(traits.items()), group.statics, sizes_of(Problem.parse(rule.problem)))
                totals[dtype][key] = rule.weight * rule.median_us
    shared = set.intersection(*(set(costs) for costs in totals.values())) if totals else set()
    return {d: round(sum(c for key, c in costs.items() if key in shared), 3) for d, costs in sorted(totals.items())}
