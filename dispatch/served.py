"""What every operator's server shares: try the table, else the framework, and count which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from dks.dispatch import modes, native, pool
from dks.dispatch.ambient import (
    grad_enabled,
    objection,
    tensor_objection,
    wants_gradient,
)
from dks.dispatch.generation import Generation, Plan
from dks.dispatch.kernel import DTYPES, Declined, Launch, Output
from dks.dispatch.problem import Candidate
from dks.dispatch.runtime import FAILURES, MATCH_NAMES, MISS_NAMES, Runtime, Swap
from dks.dispatch.table import Match

_Output = TypeVar("_Output", bound=Output)

NEAREST = int(Match.NEAREST)  # an enum's own comparison takes ten times as long
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Question(NamedTuple):
    """What a server asks a generation for a plan of: the arguments of ``Generation.plan``."""

    op: str
    form: str
    traits: Mapping[str, str]
    statics: Mapping[str, int]


class Dispatch:
    """A plan with its kernels bound: serves calls by their sizes and alignment, and counts each once.

    Attributes:
        plan: of one generation.
        kernels: the bound kernels, by candidate id.
        native: the compiled form of the plan, or None: the lookup is then the one in Python.
    """

    __slots__ = (
        "_blocked", "_calls", "_counters", "_failed", "_find", "_hits", "_note", "_op", "_runtime", "kernels",
        "native", "plan",
    )  # fmt: skip

    def __init__(
        self, runtime: Runtime, plan: Plan, bind: Callable[[Candidate], Launch], *, is_framework: bool = False
    ) -> None:
        """Bind each candidate of ``plan`` once; one that can't be bound is recorded and never runs.

        Args:
            is_framework: whether the operator's default kernel, for this plan, is the framework's own function of
                the same arguments and nothing else; the compiled form then calls that.
        """
        self.plan = plan
        self.kernels: dict[str, Launch] = {}
        for candidate in set(plan.candidates.values()):
            try:
                self.kernels[candidate.id] = bind(candidate)
            except Exception as error:  # a kernel may raise anything; the framework serves without it
                runtime.note_failure(candidate, error)
        self._calls: dict[int, Callable[..., Any]] = {
            rule: self.kernels[candidate.id]
            for rule, candidate in plan.candidates.items()
            if candidate.id in self.kernels
        }
        self._op = plan.problem.op
        self._blocked = plan.blocked or ""
        self._failed: dict[str, count[int]] = {}
        self._runtime = runtime
        self._counters = runtime.counters
        self._note = runtime.misses.of(plan.problem)
        self._hits = tuple(runtime.counters.counter(self._op, match) for match in MATCH_NAMES)
        self.native = self._compiled(is_framework)
        self._find = plan.find if self.native is None else self.native.find

    def _compiled(self, is_framework: bool) -> Any:
        group = self.plan.group
        if native.module is None or group is None or self._runtime.serial is None:
            return None
        default = pool.operator(self._op).default
        entries = {
            rule: None if is_framework and self.plan.candidates[rule].kernel == default else call
            for rule, call in self._calls.items()
        }
        edges, cells = tuple(map(tuple, group.edges)), tuple((a, tuple(c)) for a, c in group.cells.items())
        return native.module.Plan(edges, cells, self.plan.needs, entries, self._counters.served(self._op))

    def serve(self, framework: Callable[..., _Output], align: int, sizes: tuple[int, ...], *args: Any) -> _Output:
        """Run the kernel chosen for these dynamic sizes on ``args``; without one, ``framework(*args)``."""
        if self._find is None:
            return self._miss(self._blocked, framework, align, sizes, args)
        code = self._find(align, *sizes)
        if code < 0:
            return self._miss(MISS_NAMES[-1 - code], framework, align, sizes, args)
        rule = code >> 2
        call = self._calls.get(rule)
        if call is None:
            known = rule in self.plan.candidates
            self._counters.add(self._op, "kernel_failed" if known else "kernel_changed")
            return framework(*args)
        try:
            y: _Output = call(*args)
        except Exception as error:  # a kernel may raise anything; the framework judges the call
            failure = error
        else:
            next(self._hits[code & 3])
            if code & 3 == NEAREST:
                self._note(sizes, align, "nearest")
            return y
        return self.failed(rule, failure, framework, *args)

    def _miss(
        self,
        reason: str,
        framework: Callable[..., _Output],
        align: int,
        sizes: tuple[int, ...],
        args: tuple[Any, ...],
    ) -> _Output:
        self._counters.add(self._op, reason)
        self._note(sizes, align, reason)
        return framework(*args)

    def failed(self, rule: int, failure: Exception, framework: Callable[..., _Output], *args: Any) -> _Output:
        """The framework's answer after a rule's kernel raised, or the framework's error where the call was wrong.

        A kernel that declined serves the next call. One that failed FAILURES times is switched off here.
        """
        y = framework(*args)
        candidate = self.plan.candidates[rule]
        if isinstance(failure, Declined):
            self._counters.add(self._op, "declined")
            self._runtime.declined[candidate.id] = str(failure)
            return y
        self._counters.add(self._op, "kernel_failed")
        self._runtime.note_failure(candidate, failure)
        if next(self._failed.setdefault(candidate.id, count(1))) == FAILURES:
            self._switch_off(candidate)
        return y

    def _switch_off(self, candidate: Candidate) -> None:
        self._runtime.note_switched_off(candidate)
        self._calls = {r: call for r, call in self._calls.items() if self.plan.candidates[r] != candidate}
        if self.native is not None:
            for rule, chosen in self.plan.candidates.items():
                if chosen == candidate:
                    self.native.drop(rule)


class Unknown:
    """What serves a call that the table has no group for: the framework.

    Made anew for each such call and kept nowhere, so that nothing grows with the shapes that come.
    """

    __slots__ = ("_plan", "_runtime")

    def __init__(self, runtime: Runtime, plan: Plan) -> None:
        self._runtime, self._plan = runtime, plan

    def serve(self, framework: Callable[..., _Output], align: int, sizes: tuple[int, ...], *args: Any) -> _Output:
        """``framework(*args)``, counted as ``Dispatch.serve`` counts it."""
        problem, reason = self._plan.problem, self._plan.blocked or ""
        self._runtime.counters.add(problem.op, reason)
        self._runtime.misses.note(problem, sizes, align, reason)
        return framework(*args)


class Server:
    """Base of the servers in ``ops/*/serve.py``."""

    op: str

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def swap(self, model: nn.Module) -> list[Swap]:
        """Swap what this operator can serve in ``model``, in place; returns what it did and left."""
        raise NotImplementedError

    def passed_over(self, module: nn.Module) -> str | None:  # noqa: ARG002
        """Why a module that computes what this operator does was neither swapped nor named by ``swap``; None of any
        other."""
        return None

    @property
    def knows_any(self) -> bool:
        """Whether the table has anything for this operator."""
        return any(group.op == self.op for group in self.runtime.generation.table.groups)

    def restore(self, model: nn.Module) -> list[Swap]:  # noqa: ARG002
        """Undo what ``swap`` did to ``model``, in place; returns what it did and left."""
        return []

    def count(self, outcome: str) -> None:
        """Count one call that never reached the table."""
        self.runtime.counters.add(self.op, outcome)

    @property
    def device(self) -> str:
        """The kind of device that the table is for, ``cpu`` or ``cuda``."""
        return self.runtime.generation.device

    def plan(self, question: Question) -> Plan:
        """The plan of the generation that serves now, for eager calls."""
        return self.runtime.generation.plan(*question)

    def changes_anything(self, question: Question) -> bool:
        """Whether in some mode some bin chose another kernel than the framework's own."""
        generation = self.runtime.generation
        return any(modes.plan(generation, *question, mode).changes_anything for mode in generation.modes)

    def mode(self) -> str:
        """The mode that a call is made in now, as far as the table knows any but eager."""
        return modes.current() if len(self.runtime.generation.modes) > 1 else modes.EAGER

    def direct(
        self,
        key: tuple[object, ...],
        question: Callable[[], Question],
        statics: int,
        quicken: Callable[[Generation, Dispatch], None] | None = None,
    ) -> Dispatch | Unknown:
        """The dispatch of calls without preparation, cached by ``key`` where the table has a group for them.

        Its kernels take the dynamic arguments and then the operator's ``statics`` constant ones, and bind
        those at each call: direct kernels use the caller's tensors as they are, so binding copies nothing. Where
        that takes time all the same, a kernel is one of its own for such calls, measured as such (``kernel.Late``).

        Args:
            quicken: called once with a dispatch whose default kernel is the framework's own function of the
                same arguments, to let the fast path serve it.
        """
        generation, mode = self.runtime.generation, self.mode()
        key = (self.op, mode, *key)
        found: Dispatch | None = generation.dispatches.get(key)
        if found is None:
            made = modes.plan(generation, *question(), mode)
            if made.group is None:
                return Unknown(self.runtime, made)
            kernels, problem = pool.kernels(), made.problem

            def late(candidate: Candidate) -> Launch:
                kernel, params = kernels[candidate.kernel], candidate.params
                bind = kernel.bind
                if kernel.unprepared is not None:
                    return kernel.unprepared(problem, params)
                if not statics:
                    return bind(problem, params)
                return lambda *args: bind(problem, params, *args[-statics:])(*args[:-statics])

            found = Dispatch(self.runtime, made, late, is_framework=quicken is not None)
            found = generation.dispatches.setdefault(key, found)
            if quicken is not None and mode == modes.EAGER:
                quicken(generation, found)
        return found


def tensors_objection(device: str, x: object, *constants: torch.Tensor | None) -> str | None:
    """Why the framework must serve a functional call on these tensors, the activations first, or None.

    Args:
        device: kind of device that the table is for; all must be on the same one of them.
    """
    if not isinstance(x, torch.Tensor):
        return "subclass"
    if x.dtype not in DTYPE_NAMES:
        return "dtype"
    if (reason := objection(x, x.dtype, device)) is not None:
        return reason
    for t in constants:
        if t is not None and (reason := tensor_objection(t, x.dtype, device, x)) is not None:
            return reason
    return "gradient" if grad_enabled() and wants_gradient(x, *constants) else None


def residual_objection(residual: torch.Tensor, x: torch.Tensor, n: int) -> str | None:
    """Why the framework must add ``residual`` to an output (..., n) of ``x``, to which nothing objects; or None."""
    device = "cpu" if x.is_cpu else "cuda"
    if (reason := tensor_objection(residual, x.dtype, device, x)) is not None:
        return reason
    if grad_enabled() and wants_gradient(residual):
        return "gradient"
    if residual.shape != (*x.shape[:-1], n):
        return "shape"  # the framework broadcasts either to the other
    return None if residual.is_contiguous() else "strides"
