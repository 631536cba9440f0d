"""What every operator's server shares: try the table, else the framework, and count which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from dks.dispatch import pool
from dks.dispatch.ambient import (
    grad_enabled,
    objection,
    tensor_objection,
    wants_gradient,
)
from dks.dispatch.kernel import DTYPES, Declined, Launch, Output
from dks.dispatch.problem import Candidate
from dks.dispatch.runtime import MATCH_NAMES, MISS_NAMES, Plan, Runtime, Swap
from dks.dispatch.table import Match

_Output = TypeVar("_Output", bound=Output)

NEAREST = int(Match.NEAREST)  # an enum's own comparison takes ten times as long
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Dispatch:
    """A plan with its kernels bound: serves calls by their sizes and alignment, and counts each once."""

    __slots__ = ("_blocked", "_calls", "_counters", "_find", "_hits", "_note", "_op", "_runtime", "kernels", "plan")

    def __init__(self, runtime: Runtime, plan: Plan, bind: Callable[[Candidate], Launch]) -> None:
        """Bind each candidate of ``plan`` once; one that can't be bound is recorded and never runs."""
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
        self._find = plan.find
        self._blocked = plan.blocked or ""
        self._runtime = runtime
        self._counters = runtime.counters
        self._note = runtime.misses.of(plan.problem)
        self._hits = tuple(runtime.counters.counter(self._op, match) for match in MATCH_NAMES)

    def serve(self, framework: Callable[..., _Output], align: int, sizes: tuple[int, ...], *args: Any) -> _Output:
        """Run the kernel chosen for these dynamic sizes on ``args``; without one, ``framework(*args)``."""
        if self._find is None:
            self._counters.add(self._op, self._blocked)
            if self._blocked == "unknown_shape":
                self._note(sizes, align, self._blocked)
            return framework(*args)
        code = self._find(align, *sizes)
        if code < 0:
            self._counters.add(self._op, MISS_NAMES[-1 - code])
            self._note(sizes, align, MISS_NAMES[-1 - code])
            return framework(*args)
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
        return self._after_failure(failure, rule, framework, args)

    def _after_failure(
        self, failure: Exception, rule: int, framework: Callable[..., _Output], args: tuple[Any, ...]
    ) -> _Output:
        """The framework's answer, or its error where the call was wrong; else the kernel is out for good."""
        y = framework(*args)
        candidate = self.plan.candidates[rule]
        if isinstance(failure, Declined):
            self._counters.add(self._op, "declined")
            self._runtime.declined[candidate.id] = str(failure)
            return y
        self._counters.add(self._op, "kernel_failed")
        self._calls = {r: call for r, call in self._calls.items() if self.plan.candidates[r] != candidate}
        self._runtime.note_failure(candidate, failure)
        return y


class Server:
    """Base of the servers in ``ops/*/serve.py``."""

    op: str

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._direct: dict[tuple[object, ...], Dispatch] = {}

    def swap(self, model: nn.Module) -> list[Swap]:
        """Swap what this operator can serve in ``model``, in place; returns what it did and left."""
        raise NotImplementedError

    def count(self, outcome: str) -> None:
        """Count one call that never reached the table."""
        self.runtime.counters.add(self.op, outcome)

    def direct(self, key: tuple[object, ...], plan: Callable[[], Plan], statics: int) -> Dispatch:
        """The dispatch of calls without preparation, cached by ``key``.

        Its kernels take the dynamic arguments and then the operator's ``statics`` constant ones, and bind
        those at each call: direct kernels use the caller's tensors as they are, so binding copies nothing.
        """
        found = self._direct.get(key)
        if found is None:
            made = plan()
            kernels, problem = pool.kernels(), made.problem

            def late(candidate: Candidate) -> Launch:
                bind, params = kernels[candidate.kernel].bind, candidate.params
                if not statics:
                    return bind(problem, params)
                return lambda *args: bind(problem, params, *args[-statics:])(*args[:-statics])

            found = self._direct[key] = Dispatch(self.runtime, made, late)
        return found


def tensors_objection(x: object, *constants: torch.Tensor | None) -> str | None:
    """Why the framework must serve a functional call on these tensors, the activations first, or None."""
    if not isinstance(x, torch.Tensor):
        return "subclass"
    if x.dtype not in DTYPE_NAMES:
        return "dtype"
    if (reason := objection(x, x.dtype)) is not None:
        return reason
    for t in constants:
        if t is not None and (reason := tensor_objection(t, x.dtype)) is not None:
            return reason
    return "gradient" if grad_enabled() and wants_gradient(x, *constants) else None


def residual_objection(residual: torch.Tensor, x: torch.Tensor, n: int) -> str | None:
    """Why the framework must add ``residual`` to an output (..., n) of ``x``, to which nothing objects; or None."""
    if (reason := tensor_objection(residual, x.dtype)) is not None:
        return reason
    if grad_enabled() and wants_gradient(residual):
        return "gradient"
    if residual.shape != (*x.shape[:-1], n):
        return "shape"  # the framework broadcasts either to the other
    return None if residual.is_contiguous() else "strides"
