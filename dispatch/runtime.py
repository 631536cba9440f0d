"""The runtime of a generated package: what its functions are made of, and which generation of its table serves.

The way of a call: eligibility (``ambient``) -> bin and alignment class (``table``) -> one rule -> the bound
kernel; compiled (``native``), and in Python (``served``, ``prepared``) where a call is out of the ordinary.
Whatever has no rule goes to the framework's own operator and is counted with its reason. Nothing here searches,
compiles or times.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from dks.dispatch import forks, misses, native, pool, ranks, traced
from dks.dispatch.choice import Choice
from dks.dispatch.disguise import Disguised
from dks.dispatch.errors import BadInput
from dks.dispatch.explain import Known, explain
from dks.dispatch.generation import Generation
from dks.dispatch.problem import MAX_ALIGNMENT, Candidate
from dks.dispatch.stats import Counters
from dks.dispatch.table import Match, Miss

if TYPE_CHECKING:
    from dks.dispatch.prepared import PreparedModule

MATCH_NAMES = tuple(match.name.lower() for match in Match)
MISS_NAMES = tuple(miss.name.lower() for miss in Miss)


@dataclass(frozen=True, slots=True)
class Swap:
    """One thing that ``optimize`` or ``restore`` did, or left, and why."""

    path: str
    op: str
    done: bool
    note: str


@dataclass(frozen=True)
class Report:
    """What ``optimize`` or ``restore`` did to a model. Prints a line for each kind of swap; ``swaps`` names every
    module."""

    swaps: tuple[Swap, ...]
    state: str = "dispatch"

    @property
    def swapped(self) -> int:
        """How many modules were changed."""
        return sum(swap.done for swap in self.swaps)

    def __str__(self) -> str:
        alike: dict[tuple[bool, str, str], list[str]] = {}
        for swap in self.swaps:
            alike.setdefault((swap.done, swap.op, swap.note), []).append(swap.path)
        lines = [f"{self.swapped} of {len(self.swaps)} modules {self.state}"]
        for (done, op, note), paths in alike.items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            lines.append(f"  {'+' if done else '-'} {paths[0] or '(the model)'}{more}  {op}: {note}")
        return "\n".join(lines)


FORKED = (
    "this process was forked from one that had loaded a table for GPUs, and CUDA does not survive a fork; expected "
    "to load it in the process that serves: fork before, or start processes by spawn"
)

FAILURES = 3
"""Launches of a kernel that may fail before it is switched off, for a layer or a kind of functional calls."""

Open = Callable[[Path], Generation]


class Runtime:
    """Serves one generation of a table at a time. A generated package makes one and hands out its methods.

    Args:
        name: the package's name, for messages.
        generation: what serves from the start.
        open: loads a package's folder for ``reload``; raises BadInput where it must not serve here.

    Attributes:
        generation: what serves now. A call takes hold of it once.
        serial: the same for the compiled fast path, by number; None without one.
        layers: the prepared layers that are alive.
        inherited: the calls, as ``stats`` has them, and ``misses.others`` that this process was forked with: its
            parent counted them.
    """

    def __init__(self, name: str, generation: Generation, open: Open | None = None) -> None:
        self.name = name
        self.generation = generation
        self.counters = Counters()
        self.misses = misses.Misses()
        self.failures: dict[str, str] = {}
        self.declined: dict[str, str] = {}
        self.switched_off: Counter[str] = Counter()
        self.layers: WeakSet[PreparedModule] = WeakSet()
        self.inherited: tuple[dict[str, Any], int] = ({}, 0)
        self._make_locks()
        self.serial = None if native.module is None else native.module.Serial()
        self._open = open
        self._previous: Generation | None = None
        self._servers = {op: operator.server(self) for op, operator in pool.operators().items()}
        self._serve(generation)
        traced.enroll(self)
        forks.enroll(self)

    def _make_locks(self) -> None:
        self.lock = threading.RLock()  # for what changes which generation serves, or who is bound to it
        self._counting = threading.Lock()  # never held while something is bound, as the other one is

    def server(self, op: str) -> Any:
        """The object that serves one operator. Raises KeyError with the names there are."""
        pool.operator(op)
        return self._servers[op]

    def _serve(self, generation: Generation) -> None:
        """The swap itself: one store for Python, one for the fast path."""
        self.generation = generation
        if self.serial is not None:
            self.serial.set(generation.serial)

    def after_fork(self) -> None:
        """End, as one that failed, a reload or rollback that another thread was at; see ``forks``. What served last
        serves on, by the framework if it is a table for GPUs. Nothing is bound."""
        self._make_locks()
        self.inherited = (self._calls(), self.misses.others)
        now = self.generation
        on_gpu = now.device != "cpu"
        if self._previous is now or on_gpu:
            self._previous = None
        if on_gpu and now.refused is None:
            now = Generation(refused=FORKED, origin=now.origin, device=now.device)
            now.blocked = "forked"
        self._serve(now)
        for layer in [] if on_gpu else list(self.layers):  # what is on a GPU can't even be freed here
            layer.keep(self.held)

    @property
    def held(self) -> tuple[Generation, ...]:
        """The generations that layers keep bindings for: the one that serves, and the one to go back to."""
        return (self.generation,) if self._previous is None else (self.generation, self._previous)

    def reload(self, path: str | Path) -> str:
        """Load the package at ``path`` and let it serve in the place of what serves now, without a pause.

        The old generation serves until the new one is checked and every living layer is bound to it; then one
        store swaps them. A call that is under way ends with the generation that it began with. The old one is
        kept for ``rollback``, with what its kernels packed, until the next reload.

        Returns:
            A line on what serves now.

        Raises:
            BadInput: the package is damaged, not to be trusted, of another machine or kind of device, or (in
                strict mode) can't be served without a search. What served before serves on.
        """
        if self._open is None:
            raise RuntimeError(f"{self.name}: this runtime was made by hand, there is nothing to load with")
        start = time.perf_counter()
        generation = self._open(Path(path))
        with self.lock:
            # A call that took its tensors for those of the one could else reach kernels of the other.
            if self.generation.refused is None and generation.device != self.generation.device:
                raise BadInput(
                    f"{path}: found a table for {generation.device}, expected one for {self.generation.device} as "
                    "the one that serves: import it as a package of its own"
                )
            count = self._bind(generation)
            dropped, self._previous = self._previous, self.generation
            self._serve(generation)
            if dropped is not None:
                for layer in list(self.layers):
                    layer.release(dropped)
        for line in generation.losses():
            warnings.warn(f"{self.name}: {line}", RuntimeWarning, stacklevel=2)
        took = time.perf_counter() - start
        return f"{self.name}: {generation} serves, {count} layers bound in {took:.2f} s"

    def rollback(self) -> str:
        """Let the generation before this one serve again: what is in memory, without disk or compiler.

        Returns:
            A line on what serves now. A second call goes forward again.

        Raises:
            RuntimeError: nothing was reloaded.
        """
        with self.lock:
            if self._previous is None:
                raise RuntimeError(f"{self.name}: found no generation to go back to: nothing was reloaded")
            previous, self._previous = self._previous, self.generation
            self._serve(previous)
            return f"{self.name}: {previous} serves again"

    def _bind(self, generation: Generation) -> int:
        layers = list(self.layers)
        try:
            for layer in layers:
                layer.hold(generation)
        except BaseException:  # an interruption: what never serves is not kept
            for layer in layers:
                layer.release(generation)
            raise
        return len(layers)

    def table_hash(self) -> str:
        """What this process chooses by, in hex: equal in two processes where both hold the same package with the
        same entries alive, whatever their paths. Ranks that differ choose differently, and may deadlock."""
        return self.generation.hash

    def check_ranks(self) -> None:
        """Compare ``table_hash`` over ``torch.distributed``, if it is initialised. All ranks must call this.

        Raises:
            RuntimeError: they hold different tables; it names the ranks.
        """
        ranks.check_ranks(self.generation.hash)

    def note_failure(self, candidate: Candidate, error: Exception) -> None:
        """Remember why a kernel could not be bound or launched; ``stats`` shows it."""
        first = (str(error) or "no message").splitlines()[0]
        self.failures[candidate.id] = f"{type(error).__name__}: {first}"

    def note_switched_off(self, candidate: Candidate) -> None:
        """Count that a kernel failed too often, in one layer or in functional calls of one kind."""
        with self._counting:
            self.switched_off[candidate.id] += 1

    def optimize(self, model: torch.nn.Module) -> Report:
        """Let the modules of ``model`` serve that the table can make faster, in place; ``restore`` undoes it.

        A module is left alone where the table holds nothing for its shape, or only the framework's own
        kernel. Modules stay the same objects, with their parameters, hooks and attributes.
        """
        refused = self.generation.refused
        if refused is not None:
            warnings.warn(f"{self.name}: nothing optimized: {refused}", RuntimeWarning, stacklevel=2)
            return Report(())
        swaps: list[Swap] = []
        for server in self._servers.values():
            swaps += server.swap(model)
        return Report((*swaps, *self._passed_over(model, {swap.path for swap in swaps})))

    def _passed_over(self, model: torch.nn.Module, named: set[str]) -> list[Swap]:
        """A line for each module that the table has an operator for and no server named."""
        servers = [server for server in self._servers.values() if server.knows_any]
        swaps: list[Swap] = []
        for path, module in model.named_modules(remove_duplicate=False):
            if path in named or isinstance(module, Disguised):
                continue
            notes = ((server.op, server.passed_over(module)) for server in servers)
            swaps += [Swap(path, op, False, note) for op, note in notes if note is not None][:1]
        return swaps

    def restore(self, model: torch.nn.Module) -> Report:
        """Undo ``optimize``: make the modules of ``model`` plain again that serve by this table, in place.

        They stay the same objects with the same parameters. A module that has no plain form, as ``prepare_linear``
        makes with an epilogue, is left as it is, with a note.
        """
        swaps: list[Swap] = []
        for server in self._servers.values():
            swaps += server.restore(model)
        return Report(tuple(swaps), "are plain again")

    def explain(self, op: str, /, *, align: int = MAX_ALIGNMENT, **asked: int | str) -> Choice:
        """What a call would run, and why.

        Args:
            op: the operator.
            align: bytes that divide every pointer and row stride of the call.
            **asked: every dim (``m=17``), and any trait (``dtype="bfloat16"``), ``form``, or ``mode`` (``"graph"``
                for a call in a CUDA graph); a trait that is left out takes the value the table holds where that
                is one, else the operator's first.

        Raises:
            KeyError: an unknown operator.
            ValueError: a dim is missing, or a name or value is none of the operator's.
        """
        now = self.generation
        known = Known(now.table, now.refused, now.dead, self.failures, now.evidence, now.device)
        return explain(op, asked, align, known)

    def export_misses(self, path: str | Path) -> int:
        """Write the calls that the table could not serve well as a sweep config for ``dks-profile run``.

        Returns:
            How many problems it measures. Where there are none, nothing is written.

        Raises:
            OSError: ``path`` can't be written; what was there is intact.
        """
        now = self.generation
        sweep = misses.plan(self.misses.snapshot(), now.table, self.misses.others)
        return misses.export(Path(path), sweep, self.name, now.device)

    def _calls(self) -> dict[str, Any]:
        ops: dict[str, Any] = {}
        for op, outcomes in self.counters.snapshot().items():
            hits = {name: n for name, n in outcomes.items() if name in MATCH_NAMES}
            rest = {name: n for name, n in outcomes.items() if name not in MATCH_NAMES}
            ops[op] = {"hits": hits, "fallbacks": rest}
        return ops

    def lookup(self) -> dict[str, str]:
        """Which form of the lookup answers each operator's calls: "compiled", or "python: why"."""
        late = "it was loaded before a package that brought the compiled fast path"
        form = "compiled" if self.serial is not None else f"python: {native.why or late}"
        return dict.fromkeys(self._servers, form)

    def stats(self) -> dict[str, Any]:
        """Hits, misses and fallbacks since the import; ``reasons`` has every name in a sentence.

        Returns:
            ``table``: "serving" or "refused: why"; ``generation``: the hash of what serves; ``lookup``: by
            operator, "compiled" or "python: why"; ``ops``: by operator, ``hits`` by match (exact, bin, nearest) and
            ``fallbacks`` by reason; each call that returned is counted once, also inside compiled graphs.
            ``failed``: the last error of each candidate that could not be bound or launched; ``switched_off``:
            how often each was switched off for failing. ``declined``: why each candidate last left a call to
            the framework.
        """
        now = self.generation
        return {
            "table": "serving" if now.refused is None else f"refused: {now.refused}",
            "generation": now.hash,
            "lookup": self.lookup(),
            "ops": self._calls(),
            "failed": dict(self.failures),
            "switched_off": dict(self.switched_off),
            "declined": dict(self.declined),
        }
