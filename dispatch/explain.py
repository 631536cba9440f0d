"""The whole story of a choice: bin, alignment, evidence, runner-up, and why nothing else was chosen.

Asks the table as a call does, and then reads what a call never reads: the Lut beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dks.dispatch import pool
from dks.dispatch.bins import Bins
from dks.dispatch.choice import Choice
from dks.dispatch.modes import EAGER, MODES, eager_form, form_in, mode_of
from dks.dispatch.problem import Candidate, Problem, short
from dks.dispatch.reasons import HITS, REASONS
from dks.dispatch.table import NEAREST_REACH, Group, Match, Miss, Rule, Table, find

MOST_HELD = 6  # shapes that the table holds, shown where the asked one is not among them

Story = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Known:
    """What a runtime knows of itself.

    Attributes:
        refused: why the table does not serve, or None.
        dead: candidates that must not run here, with the reason.
        failures: candidates that failed in this process, with their last error.
        evidence: the Lut's text, or empty.
        device: kind of device that the table is for.
    """

    table: Table
    refused: str | None
    dead: Mapping[str, str]
    failures: Mapping[str, str]
    evidence: str
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class _Question:
    form: str
    mode: str
    align: int
    problem: Problem

    @property
    def forms(self) -> tuple[str, ...]:
        """Of the groups that may answer, in the order that a call asks them in; see ``modes.plan``."""
        return tuple(dict.fromkeys((form_in(self.mode, self.form), self.form)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The dynamic dims."""
        return tuple(self.problem.dim(name) for name in pool.operator(self.problem.op).dynamic)

    @property
    def statics(self) -> dict[str, int]:
        return {name: self.problem.dim(name) for name in pool.operator(self.problem.op).static}

    def __str__(self) -> str:
        traits = ",".join(f"{name}={value}" for name, value in self.problem.traits)
        return f"{self.problem.op}[{traits}] with {self.statics} ({self.form}{_in_mode(self.mode)})"


def explain(op: str, asked: Mapping[str, int | str], align: int, known: Known) -> Choice:
    """What a call would run, and why; see ``Runtime.explain`` for the arguments and errors."""
    operator = pool.operator(op)
    question, zero = _question(op, asked, align, known.table)
    if known.refused is not None:
        return Choice(op, operator.default, "default", f"the table is refused: {known.refused}")
    group = next(filter(None, (_group(known.table, question, form) for form in question.forms)), None)
    if group is None:
        return Choice(op, operator.default, "default", f"no entry for {question}; {_held(op, known.table)}")
    if zero:
        return Choice(op, operator.default, "default", REASONS["zero_sized"])
    code = find(group, known.table.rules, question.sizes, align)
    where = (*_mode(group, question), *_where(group, question))
    if code < 0:
        miss = Miss(-1 - code)
        return Choice(op, operator.default, "default", _why_missed(miss, group, question, known.table), None, where)
    rule = known.table.rules[code >> 2]
    match = Match(code & 3).name.lower()
    evidence = _evidence(known.evidence, code >> 2)
    story = (*where, *_alignment(question, rule, evidence), *_told(operator.default, evidence, known.device))
    if rule.candidate in known.dead:
        why = f"{rule.candidate} was chosen and may not run: {known.dead[rule.candidate]}"
        return Choice(op, operator.default, "default", why, None, story)
    reason = str(evidence.get("reason", "")) or HITS[match]
    if rule.candidate in known.failures:
        reason += f"; it failed in this process: {known.failures[rule.candidate]}"
    return Choice(op, rule.candidate, match, reason, evidence, story)


def _question(op: str, asked: Mapping[str, int | str], align: int, table: Table) -> tuple[_Question, bool]:
    """The question in full, and whether a dynamic dim is zero; such a one is 1 in it. Raises ValueError."""
    if isinstance(align, bool) or not isinstance(align, int) or align < 1 or align & (align - 1):
        raise ValueError(f"{op}: found align={align!r}, expected a power of two")
    operator = pool.operator(op)
    known = {*operator.dims, *operator.traits, "form", "mode"}
    if odd := sorted(set(asked) - known):
        raise ValueError(f"{op}: found {', '.join(odd)}, expected names among {', '.join(sorted(known))}")
    if missing := [name for name in operator.dims if name not in asked]:
        raise ValueError(f"{op}: found no {', '.join(missing)}, expected all of {', '.join(operator.dims)}")
    dims = {}
    for name in operator.dims:
        size = asked[name]
        if not isinstance(size, int) or isinstance(size, bool):
            raise ValueError(f"{op}: found {name}={size!r}, expected a whole number")
        dims[name] = size
    statics = tuple((name, dims[name]) for name in operator.static)
    held = [group for group in table.groups if group.op == op and group.statics == statics]
    traits = {}
    for name, allowed in operator.traits.items():
        values = {dict(group.traits)[name] for group in held}
        traits[name] = str(asked.get(name, values.pop() if len(values) == 1 else allowed[0]))
        if traits[name] not in allowed:
            raise ValueError(f"{op}: found {name}={traits[name]}, expected {' or '.join(allowed)}")
    forms = {eager_form(group.form) for group in held}
    prepared = "prepared" in forms or (not forms and hasattr(operator.server, "prepare"))
    form = str(asked.get("form", "prepared" if prepared else "direct"))
    if form not in ("prepared", "direct"):
        raise ValueError(f"{op}: found form={form}, expected prepared or direct")
    mode = str(asked.get("mode", EAGER))
    if mode not in MODES:
        raise ValueError(f"{op}: found mode={mode}, expected {' or '.join(MODES)}")
    zeros = [name for name in operator.dynamic if dims[name] == 0]
    problem = Problem.of(op, traits, {**dims, **dict.fromkeys(zeros, 1)})
    return _Question(form, mode, align, problem), bool(zeros)


def _group(table: Table, question: _Question, form: str) -> Group | None:
    statics = tuple(question.statics.items())
    key = (question.problem.op, form, question.problem.traits, statics)
    return next((group for group in table.groups if group.key == key), None)


def _held(op: str, table: Table) -> str:
    held = sorted({str(dict(group.statics)) for group in table.groups if group.op == op})
    more = f" and {len(held) - MOST_HELD} more" if len(held) > MOST_HELD else ""
    return f"the table holds {', '.join(held[:MOST_HELD]) or 'nothing'}{more}"


def _why_missed(miss: Miss, group: Group, question: _Question, table: Table) -> str:
    why = REASONS[miss.name.lower()]
    if miss is Miss.OUT_OF_RANGE:
        names = pool.operator(group.op).dynamic
        ends = [
            f"{name}={size} past {NEAREST_REACH} x {edges[-1]}"
            for name, size, edges in zip(names, question.sizes, group.edges, strict=True)
            if size > NEAREST_REACH * edges[-1]
        ]
        return f"a dim lies past {NEAREST_REACH} times the last measured size: {', '.join(ends)}"
    if miss is Miss.MISALIGNED:
        code = find(group, table.rules, question.sizes, max(group.cells))
        rule = table.rules[code >> 2]
        return f"{why}: {rule.candidate} needs {rule.align} bytes, the call has {question.align}"
    return why


def _in_mode(mode: str) -> str:
    return "" if mode == EAGER else f", {mode} mode"


def _mode(group: Group, question: _Question) -> Story:
    """Whose evidence it is, where a mode was asked for."""
    if question.mode == EAGER:
        return ()
    own = mode_of(group.form) == question.mode
    return (
        ("mode", question.mode if own else f"{question.mode}: not measured, so the choice is that of eager mode"),
    )


def _where(group: Group, question: _Question) -> Story:
    """The cell that the sizes fall in: the bounds of each dynamic dim."""
    parts = []
    for name, size, edges in zip(pool.operator(group.op).dynamic, question.sizes, group.edges, strict=True):
        bins = Bins(tuple(edges))
        index = bins.index(size)
        if index == len(bins):
            parts.append(f"{name}={size} beyond the last edge {edges[-1]}")
        else:
            low, high = bins.bounds(index)
            parts.append(f"{name}={low}..{high}" if low < high else f"{name}={high}")
    return (("bin", " ".join(parts)),) if parts else ()


def _alignment(question: _Question, rule: Rule, evidence: Mapping[str, Any]) -> Story:
    text = f"{question.align} bytes in the call; the kernel needs {rule.align}"
    if "problem" in evidence:
        problem = Problem.parse(evidence["problem"])
        sizes = " ".join(f"{name}={problem.dim(name)}" for name in pool.operator(problem.op).dynamic)
        return (("measured at", f"{sizes}, aligned to {problem.align} bytes"), ("alignment", text))
    return (("alignment", text),)


def _told(default: str, evidence: Mapping[str, Any], device: str) -> Story:
    """The evidence in words; what it does not hold is left out."""
    lines: list[tuple[str, str]] = []
    chosen = evidence.get("candidate")
    if evidence.get("median_us") is not None:
        beside = "" if chosen == default else f"; {evidence['default_us']} us by the default, {default}"
        lines.append(("time", f"{evidence['median_us']} us a call{beside}"))
    rounds, processes = evidence.get("rounds"), evidence.get("processes")
    counted = f"{rounds} rounds in {processes} process{'es' * (processes != 1)}" if processes else ""
    if evidence.get("ratio") and chosen != default:
        lines.append(
            ("ratio", "; ".join(filter(None, (f"{_interval(evidence['ratio'])} to the default", counted))))
        )
    elif counted:
        lines.append(("samples", counted))
    if evidence.get("error") is not None:
        lines.append(("error", f"{evidence['error']:.2g} relative to float64"))
    if evidence.get("toolchain"):
        lines.append(("compiled", f"measured and shipped with {evidence['toolchain']}"))
    if evidence.get("form_bytes"):
        lines.append(("packed", f"{evidence['form_bytes'] / 2**20:.2f} MiB for each weight"))
    if evidence.get("runner_up"):
        lines.append(("runner-up", short(str(evidence["runner_up"]))))
        lines.append(("margin", f"{_interval(evidence['margin'])}: the runner-up's time over the choice's"))
    if evidence.get("tied"):
        lines.append(("tied", ", ".join(map(short, evidence["tied"]))))
    return (*lines, *_not_chosen(default, chosen, evidence.get("others"), device))


def _interval(ends: Sequence[float | None]) -> str:
    value, low, high = ends
    if value is None:
        return "not known"
    return f"{value:.3f}x" + (f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else "")


def _not_chosen(default: str, chosen: object, others: Sequence[Mapping[str, Any]] | None, device: str) -> Story:
    """Why every other candidate was not chosen, by reason; what the pool has for the device beyond them was not
    measured."""
    if others is None:
        return ()
    known = pool.kernels_for(pool.kernels()[default].op, device)
    left = {kernel.id: len(kernel.candidates()) for kernel in known}
    for id in {default, str(chosen)}:
        kernel = Candidate.parse(id).kernel
        left[kernel] = left.get(kernel, 0) - 1  # the pool of another version may lack it
    told = [(other["reason"], other["kernels"]) for other in others]
    for _, kernels in told:
        for id, n in kernels.items():
            left[id] = left.get(id, 0) - n
    if unmeasured := {kernel: n for kernel, n in left.items() if n > 0}:
        told.append(("not measured", unmeasured))
    lines: list[tuple[str, str]] = []
    for reason, kernels in told:
        names = ", ".join(kernel if n == 1 else f"{kernel} ({n})" for kernel, n in kernels.items())
        lines += [("" if lines else "not chosen", reason), ("", f"  {names}")]
    return tuple(lines)


def _evidence(text: str, rule: int) -> dict[str, Any]:
    """One rule of the Lut, with what it shares with others written out."""
    if not text:
        return {}
    lut = json.loads(text)
    found: dict[str, Any] = lut["rules"][rule]
    if "others" in found:
        found["others"] = [lut["others"][index] for index in found["others"]]
    kernel = Candidate.parse(found["candidate"]).kernel
    if kernel in lut.get("toolchains", {}):
        found["toolchain"] = lut["toolchains"][kernel]
    return found
