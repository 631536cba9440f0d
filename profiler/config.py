"""Sweep configs: what ``dks-profile run`` measures, as YAML. ``load`` is the only way in.

``document`` reads the file, ``forms`` checks its shape; what it means is checked here, against the pool.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from dks.dispatch import pool
from dks.dispatch.bins import Bins
from dks.dispatch.kernel import Operator
from dks.dispatch.modes import EAGER, GRAPH
from dks.dispatch.problem import Candidate
from dks.profiler.document import ConfigError, Document, Where, one_of, unknown
from dks.profiler.forms import Measure, NeighbourForm, OperatorForm, Quantiles, SizesForm, read_form
from dks.profiler.problems import (
    MAX_PROBLEMS,
    Axis,
    Entry,
    Kind,
    Neighbour,
    Neighbours,
    Plan,
    Sized,
    WeightedProblem,
)

__all__ = ["ConfigError", "Measure", "OperatorSweep", "Sweep", "WeightedProblem", "load"]


@dataclass(frozen=True, slots=True)
class OperatorSweep:
    """What is measured of one operator.

    Attributes:
        op: its name.
        problems: grouped by static dims and traits, dynamic dims ascending in a group.
        candidates: the framework's own kernel first.
        bins: of each dynamic dim, in the operator's order; a tied dim has those of the dim it follows.
        tie: dims that take the size of another one.
        neighbours: what the model runs before and after a problem, by its operator, traits and static dims.
        patterns: of the config, one of which a candidate's id must match.
    """

    op: str
    problems: tuple[WeightedProblem, ...]
    candidates: tuple[Candidate, ...]
    bins: Mapping[str, Bins]
    tie: Mapping[str, str] = field(default_factory=dict)
    neighbours: Mapping[Kind, Neighbours] = field(default_factory=dict)
    patterns: tuple[str, ...] = ("*",)


@dataclass(frozen=True, slots=True)
class Sweep:
    """One config, checked and enumerated.

    Attributes:
        threads: intra-op threads; None is what torch takes by itself.
        budget: seconds for the whole sweep; None is no limit.
        source: the config's file.
    """

    name: str
    device: str
    threads: int | None
    budget: float | None
    operators: tuple[OperatorSweep, ...]
    measure: Measure
    source: Path

    def restrict(self, ops: Iterable[str]) -> Sweep:
        """The same sweep of these operators alone, in the config's order.

        Raises:
            ConfigError: none is named, or one that this sweep does not have.
        """
        wanted, known = set(ops), [each.op for each in self.operators]
        for name in sorted(wanted - set(known)):
            raise ConfigError(f"operators: {unknown(name, known)}")
        if not wanted:
            raise ConfigError(f"operators: found none, expected {one_of(known)}")
        return replace(self, operators=tuple(each for each in self.operators if each.op in wanted))


def load(path: str | Path, device: str = "") -> Sweep:
    """Read, check and enumerate one sweep config. Needs no device.

    Args:
        device: in the place of the config's, if it is not empty.

    Raises:
        ConfigError: all that is wrong with it, one line each.
    """
    document = Document(Path(path))
    form = read_form(document)
    device = device or form.device
    if GRAPH in form.measure.modes and device == "cpu":
        step = "leave it out, or name a GPU with device: cuda:0"
        document.fault(("measure", "modes"), f"found {GRAPH} on a CPU, expected {EAGER}: it has no graphs; {step}")
    found = pool.operators()
    plans: list[tuple[Plan, tuple[Candidate, ...]]] = []
    for name, operator_form in form.operators.items():
        if name in found:
            plan = _plan(document, found[name], operator_form, form.measure.cache)
            known = pool.candidates_for(name, device.partition(":")[0])
            plans.append((plan, _candidates(document, found[name], known, operator_form.candidates)))
        else:
            document.fault(("operators", name), unknown(name, found))
    document.check()
    size = sum(plan.size for plan, _ in plans)
    if size > MAX_PROBLEMS:
        step = "take fewer bins, alignments or traits"
        document.fault(("operators",), f"found {size} problems, expected at most {MAX_PROBLEMS}; {step}")
    document.check()
    patterns = {name: tuple(operator_form.candidates) for name, operator_form in form.operators.items()}
    operators = tuple(_enumerate(plan, candidates, patterns[plan.op.name]) for plan, candidates in plans)
    return Sweep(form.name, device, form.threads, form.budget, operators, form.measure, document.path)


def _enumerate(plan: Plan, candidates: tuple[Candidate, ...], patterns: tuple[str, ...]) -> OperatorSweep:
    problems, neighbours = plan.problems(), plan.neighbours()
    return OperatorSweep(plan.op.name, problems, candidates, plan.bins(), plan.tie, neighbours, patterns)


def _plan(document: Document, op: Operator, form: OperatorForm, cache: str) -> Plan:
    entries = []
    for index, entry in enumerate(form.problems):
        where = ("operators", op.name, "problems", index)
        _check_dims(document, op, entry.dims, (*where, "dims"))
        _check_traits(document, op, entry.traits, (*where, "traits"))
        traits = {name: entry.traits.get(name, values[:1]) for name, values in op.traits.items()}
        before, after = (
            _neighbours(document, op, getattr(entry, side), (*where, side)) for side in ("before", "after")
        )
        sizes = _sizes(document, op, form, entry.sizes, (*where, "sizes"))
        entries.append(Entry(entry.dims, traits, entry.count, Neighbours(before, after), sizes))
        if cache == "pipeline" and not (entry.before or entry.after):
            document.fault(
                where, "found neither before nor after, expected a neighbour: the cache state is pipeline"
            )
    tie = _tie(document, op, form.tie)
    return Plan(op, tuple(entries), _axes(document, op, form, tie), tie, form.alignments)


def _check_dims(document: Document, op: Operator, dims: Mapping[str, int], where: Where) -> None:
    for name in dims:
        if name not in op.static:
            step = "a dynamic dim belongs in bins" if name in op.dynamic else ""
            document.fault((*where, name), unknown(name, op.static, step))
    for name in op.static:
        if name not in dims:
            document.fault(where, f"found no {name!r}, expected {', '.join(op.static)}")
    if set(dims) == set(op.static) and (odd := op.odd_dims(dims)):
        document.fault(where, f"found {', '.join(f'{name}={size}' for name, size in dims.items())}, but {odd}")


def _check_traits(doc: Document, op: Operator, traits: Mapping[str, Sequence[str]], where: Where) -> None:
    for name, values in traits.items():
        if name not in op.traits:
            doc.fault((*where, name), unknown(name, op.traits))
            continue
        for value in values:
            if value not in op.traits[name]:
                doc.fault((*where, name), unknown(value, op.traits[name]))


def _neighbours(
    document: Document, op: Operator, forms: Sequence[NeighbourForm], where: Where
) -> tuple[Neighbour, ...]:
    """Those that make sense, after noting what does not."""
    found = []
    for index, form in enumerate(forms):
        here = (*where, index)
        if form.op not in pool.operators():
            document.fault((*here, "op"), unknown(form.op, pool.operators()))
            continue
        theirs = pool.operator(form.op)
        _check_traits(document, theirs, {name: (value,) for name, value in form.traits.items()}, (*here, "traits"))
        sizes = {name: tuple(s.split("*")) if isinstance(s, str) else s for name, s in form.dims.items()}
        for name, size in sizes.items():
            if name not in theirs.dims:
                document.fault((*here, "dims", name), unknown(name, theirs.dims))
            for other in size if isinstance(size, tuple) else ():
                if other not in op.dims:
                    document.fault((*here, "dims", name), unknown(other, op.dims))
        for name in theirs.dims:
            if name not in sizes and name not in op.dims:
                document.fault(
                    (*here, "dims"), f"found no {name!r}, expected it: {op.name} has no dim of that name"
                )
        found.append(Neighbour(form.op, form.traits, sizes))
    return tuple(found)


def _sizes(
    document: Document, op: Operator, form: OperatorForm, sizes: Sequence[SizesForm], where: Where
) -> tuple[Sized, ...]:
    """The sizes, after noting what is wrong with them."""
    if sizes and form.tie:
        document.fault(where, "found sizes beside a tie, expected one of the two: write every dim out")
    for index, sized in enumerate(sizes):
        for name in sized.dims:
            if name not in op.dynamic:
                step = "a static dim matches exactly and belongs in the entry's dims" if name in op.static else ""
                document.fault((*where, index, "dims", name), unknown(name, op.dynamic, step))
        for name in op.dynamic:
            if name not in sized.dims:
                document.fault((*where, index, "dims"), f"found no {name!r}, expected {', '.join(op.dynamic)}")
    return tuple(Sized(sized.dims, sized.align, sized.weight) for sized in sizes)


def _tie(document: Document, op: Operator, tie: Mapping[str, str]) -> Mapping[str, str]:
    """The ties that make sense, after noting those that don't."""
    where = ("operators", op.name, "tie")
    free = [name for name in op.dynamic if name not in tie]
    good = {}
    for name, source in tie.items():
        if name not in op.dynamic:
            document.fault((*where, name), unknown(name, op.dynamic))
        elif source not in free:
            step = "a dim follows one that is not tied itself"
            document.fault((*where, name), unknown(source, free, step))
        else:
            good[name] = source
    return good


def _axes(document: Document, op: Operator, form: OperatorForm, tie: Mapping[str, str]) -> Mapping[str, Axis]:
    """One axis for each dynamic dim, where nothing is noted."""
    where = ("operators", op.name, "bins")
    axes: dict[str, Axis] = {}
    for name, scheme in form.bins.items():
        if name not in op.dynamic:
            step = "a static dim matches exactly and belongs in dims" if name in op.static else ""
            document.fault((*where, name), unknown(name, op.dynamic, step))
            continue
        try:
            axes[name] = scheme.axis(document.path.parent)
        except ValueError as error:
            place = (*where, name, "histogram") if isinstance(scheme, Quantiles) else (*where, name)
            document.fault(place, str(error).removeprefix("bins: ").removeprefix(f"{scheme.scheme}: "))
    for name, source in tie.items():
        if name in axes and source in axes and axes[name].bins != axes[source].bins:
            text = f"found other bins than its tie {source!r} has, expected the same; leave it out"
            document.fault((*where, name), text)
        elif source in axes:
            axes[name] = axes[source]
    binned = not all(entry.sizes for entry in form.problems)
    for name in op.dynamic if binned else ():
        if name not in form.bins and name not in form.tie:
            document.fault(where, f"found no {name!r}, expected bins for {', '.join(op.dynamic)}")
    return axes


def _candidates(
    document: Document, op: Operator, all_: Iterable[Candidate], patterns: Sequence[str]
) -> tuple[Candidate, ...]:
    """Those that a pattern matches, after the framework's own, which no pattern leaves out."""
    known = {candidate.id: candidate for candidate in all_}
    for index, pattern in enumerate(patterns):
        if not any(fnmatchcase(name, pattern) for name in known):
            document.fault(("operators", op.name, "candidates", index), unknown(pattern, known))
    kept = [
        candidate
        for name, candidate in known.items()
        if candidate.kernel == op.default or any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    return tuple(sorted(kept, key=lambda candidate: candidate.kernel != op.default))
