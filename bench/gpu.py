"""What the GPU benchmarks share: the device, and interleaved rounds on cold inputs.

A case is one workload in which several take part. Its inputs are copied until they exceed twice the last-level
cache, and calls take turns on the copies; as small inputs would take too many, other memory of that size is read
before each call as well. A case is timed in two modes: ``eager``, one call on an idle device, which includes what
the host does for it; ``graph``, the same call captured in a CUDA graph and replayed behind other work, which leaves
the device's time alone.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from bench.cells import Call, Limits, take_rounds
from bench.report import ROOT
from dks.dispatch.intervals import Interval, paired_ratio
from dks.dispatch.kernel import relative_error

HOME = ROOT / "runs" / "gpu"
MODES = EAGER, GRAPH = ("eager", "graph")
OURS, ALL = "dks", "all"
MOST_COPIES = 8
LEAST, MOST = 12, 200  # rounds of a cell
TOLERANCE = 2e-2  # of an answer, beside the peer's whose answer counts as right

Copies = Sequence[tuple[Any, ...]]
Maker = Callable[[Copies], Sequence[Call]]
"""From all copies of a case's inputs to a call for each. What it raises is why it does not take part."""


class NotHere(Exception):
    """What a benchmark needs is not on this machine; the message is one line."""


class Broken(Exception):
    """The device takes no more calls from this process."""


class Gpu:
    """The first GPU. Tests have a stand-in with these functions."""

    def __init__(self, cuda: Any = torch.cuda) -> None:
        """Raises NotHere where PyTorch sees no GPU."""
        if not cuda.is_available():
            raise NotHere("needs an NVIDIA GPU, and PyTorch sees none here")
        self.torch = torch.device("cuda:0")
        self._cuda = cuda
        cuda.set_device(self.torch)
        self.beyond = 2 * int(cuda.get_device_properties(self.torch).L2_cache_size)
        self._scratch = torch.zeros(self.beyond // 4, dtype=torch.float32, device=self.torch)
        self._sink = torch.zeros((), dtype=torch.float32, device=self.torch)
        self._start, self._end = (cuda.Event(enable_timing=True) for _ in range(2))

    def eager(self, call: Call) -> float:
        """Nanoseconds of a call on an idle device with an unrelated cache, the host's part included."""
        self._empty_cache()
        self.wait()
        return self._between_events(call)

    def device(self, call: Call) -> float:
        """Nanoseconds that the device takes for a call, which is enqueued while it is busy with something else."""
        self._empty_cache()
        return self._between_events(call)

    def _between_events(self, call: Call) -> float:
        self._start.record()
        result = call()
        self._end.record()
        self._end.synchronize()
        del result
        return float(self._start.elapsed_time(self._end)) * 1e6

    def _empty_cache(self) -> None:
        # Read, not written: what is written would have to leave the cache on the next call's time.
        torch.sum(self._scratch, 0, out=self._sink)

    def capture(self, call: Call) -> Call:
        """A function that replays the call. Raises what it raises, of calls that can't be captured."""
        side, graph = self._cuda.Stream(), self._cuda.CUDAGraph()
        side.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(side):
            for _ in range(2):
                call()
            self._cuda.synchronize()
            # torch.cuda.graph would collect garbage and empty the allocator's cache before each of thousands.
            graph.capture_begin()
            try:
                kept = call()
            except BaseException:
                with suppress(RuntimeError):  # a capture that was broken ends with an error
                    graph.capture_end()
                raise
            graph.capture_end()
        self._cuda.current_stream().wait_stream(side)

        def replay() -> object:
            graph.replay()
            return kept

        return replay

    def tidy(self) -> None:
        """Give back the memory of graphs that are gone, which PyTorch keeps: in a capture it could not be freed."""
        free, total = self._cuda.mem_get_info()
        if 2 * free < total:
            self._cuda.empty_cache()

    def stream(self) -> int:
        """Handle of the current stream."""
        return int(self._cuda.current_stream().cuda_stream)

    def wait(self) -> None:
        """Until the device is idle. Raises Broken where an error stays."""
        try:
            self._cuda.synchronize()
        except RuntimeError as error:
            raise Broken(str(error).splitlines()[0]) from None


def each(make: Callable[..., Call]) -> Maker:
    """A maker from a function of one copy's inputs."""
    return lambda copies: [make(*copy) for copy in copies]


@dataclass(frozen=True, eq=False)
class Case:
    """One workload.

    Attributes:
        name: unique in a benchmark.
        draw: number of a copy -> its tensors, on the device.
        makers: who takes part, by name; the first one's answer counts as right. What returns None is not compared.
        weight: how much it counts in a weighted row.
        figures: of it, such as ``flop`` and ``bytes``.
        modes: in which it is timed.
    """

    name: str
    draw: Callable[[int], tuple[Any, ...]]
    makers: Mapping[str, Maker]
    weight: float = 1.0
    figures: Mapping[str, float] = field(default_factory=dict)
    modes: tuple[str, ...] = MODES


@dataclass(frozen=True)
class Cell:
    """A case as it was timed in one mode.

    Attributes:
        ns: by name, a sample a round; the n-th of all are of the same round.
        lost: who did not take part, and why.
    """

    name: str
    mode: str
    weight: float
    figures: Mapping[str, float]
    ns: Mapping[str, Sequence[float]]
    lost: Mapping[str, str]

    def ratio(self, peer: str) -> Interval | None:
        """Peer's time / ours; None where one of them has none."""
        if peer not in self.ns or OURS not in self.ns:
            return None
        return paired_ratio(self.ns[peer], self.ns[OURS])

    def us(self, who: str) -> float:
        """Median microseconds."""
        return median(self.ns[who]) / 1e3 if who in self.ns else math.nan


class Bench:
    """Measures cases; keeps on disk what it has, so that a run that was stopped goes on.

    Args:
        name: of the benchmark.
        seconds: for all that is missing.
        stamp: what the cells on disk must agree with to be taken.
    """

    def __init__(self, gpu: Gpu, name: str, seconds: float, stamp: Sequence[str] = ()) -> None:
        self.gpu, self.notes = gpu, list[str]()
        self._end = time.monotonic() + seconds
        self._rng = random.Random(1)
        self._path = HOME / "cells" / f"{name}.jsonl"
        self._stamp = list(stamp)
        self._known = self._read()

    def measure(self, cases: Iterable[Case]) -> list[Cell]:
        """A cell for each case and mode, in this order; what there is no time for is left out, and said."""
        todo = [(case, mode) for case in cases for mode in case.modes]
        missing = sum((case.name, mode) not in self._known for case, mode in todo)
        late, found = 0, []
        for case, mode in todo:
            cell = self._known.get((case.name, mode))
            if cell is None:
                left = self._end - time.monotonic()
                if left <= 0:
                    late += 1
                    continue
                try:
                    cell = self._cell(case, mode, Limits(left / missing / 2, LEAST, MOST))
                except Broken as error:
                    self.notes.append(f"stopped at {case.name}, {mode}: {error}; run it again to go on")
                    break
                missing -= 1
                self._keep(cell)
                self._say(cell)
            found.append(cell)
        if late:
            self.notes.append(f"no time for {late} of {len(todo)} cells; run it again to go on")
        return found

    def _cell(self, case: Case, mode: str, limits: Limits) -> Cell:
        self.gpu.tidy()
        copies = [case.draw(0)]
        size = sum(t.nbytes for t in copies[0] if isinstance(t, torch.Tensor))
        count = min(MOST_COPIES, max(2, -(-self.gpu.beyond // max(1, size))))
        copies += [case.draw(number) for number in range(1, count)]
        turns, lost, right = {}, {}, None
        for name, maker in case.makers.items():
            try:
                calls = maker(copies)
                if mode == GRAPH:  # first, as a table may serve it by another kernel, whose answer counts too
                    calls = [self.gpu.capture(call) for call in calls]
                y = _answer(calls[0]())
                self.gpu.wait()
                if right is None:
                    right = y if y is None else y.double()
                elif y is not None and not (error := relative_error(y, right)) <= TOLERANCE:
                    raise ValueError(f"its answer is off by {error:.1e}, expected at most {TOLERANCE:.0e}")
                turns[name] = _Turns(self.gpu.device if mode == GRAPH else self.gpu.eager, calls)
            except Broken:
                raise
            except Exception as error:  # a peer may raise anything
                lost[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
                self.gpu.wait()
        del right
        try:
            ns = take_rounds(turns, limits, self._rng)  # type: ignore[arg-type]
        except RuntimeError as error:
            self.gpu.wait()
            return Cell(case.name, mode, case.weight, case.figures, {}, {**lost, ALL: str(error).splitlines()[0]})
        return Cell(case.name, mode, case.weight, case.figures, ns, lost)

    def _say(self, cell: Cell) -> None:
        times = ", ".join(f"{name} {cell.us(name):.1f} us" for name in cell.ns)
        lost = "".join(f"; {name} left out: {why}" for name, why in cell.lost.items())
        print(f"{cell.name} {cell.mode}: {times}{lost}", flush=True)

    def _read(self) -> dict[tuple[str, str], Cell]:
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
            if not lines or json.loads(lines[0]) != self._stamp:
                return {}
        except (OSError, ValueError):
            return {}
        found = {}
        for line in lines[1:]:
            try:
                cell = Cell(**json.loads(line))
            except (ValueError, TypeError):  # the line that a kill cut short
                continue
            found[cell.name, cell.mode] = cell
        return found

    def _keep(self, cell: Cell) -> None:
        if not self._known:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self._stamp) + "\n", encoding="utf-8")
        self._known[cell.name, cell.mode] = cell
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(vars(cell), default=dict))


class _Turns:
    """Who is timed, as ``take_rounds`` wants it: the calls take turns."""

    def __init__(self, time: Callable[[Call], float], calls: Sequence[Call]) -> None:
        self._time = time
        self._calls = itertools.cycle(calls)
        for _ in calls:
            self.time()

    def time(self) -> float:
        return max(1.0, self._time(next(self._calls)))


def _answer(result: object) -> torch.Tensor | None:
    """The first tensor of what a call returned; None of one that answers nothing, such as a copy."""
    found = result[0] if isinstance(result, tuple | list) else result
    if not isinstance(found, torch.Tensor | None):
        raise TypeError(f"returned {type(result).__name__}, expected a tensor")
    return found if found is None else found.detach()


def normal(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """Unit-normal values, drawn on the device."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float32).to(dtype)


def placed(t: torch.Tensor, offset: int) -> torch.Tensor:
    """A contiguous copy that begins ``offset`` bytes past an address divisible by 256.

    Raises:
        ValueError: the offset is no multiple of the element's size, which no tensor can have.
    """
    if offset % t.element_size():
        raise ValueError(f"{t.dtype} can't begin at byte {offset}")
    room = torch.empty(t.numel() + 512 // t.element_size(), dtype=t.dtype, device=t.device)
    first = (offset - room.data_ptr()) % 256 // t.element_size()
    view = room[first : first + t.numel()].view(t.shape)
    view.copy_(t)
    return view
