"""A sweep config's own shape: the keys, types and ranges of its YAML, as pydantic models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dks.dispatch import bins as schemes
from dks.dispatch.modes import EAGER, MODES
from dks.dispatch.problem import MAX_DIM
from dks.profiler.document import Document, Where, one_of, shown, unknown
from dks.profiler.problems import MAX_WEIGHT, Axis, read_histogram

VERSION = 1  # of the form; a change that old files don't survive raises it


def _number(low: float, high: float, said: str, *, whole: bool = True) -> BeforeValidator:
    def check(value: object) -> object:
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            raise ValueError(f"expected {'a whole number' if whole else 'a number'} from {said}")
        return value

    return BeforeValidator(check)


def _text(pattern: str, said: str) -> BeforeValidator:
    def check(value: object) -> object:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(f"expected {said}")
        return value

    return BeforeValidator(check)


def _flag(value: object) -> object:
    # The document keeps YAML's yes and no as text, since they are values of traits.
    if value not in (True, False, "yes", "no", "true", "false"):
        raise ValueError("expected true or false")
    return value in (True, "yes", "true")


def _alignment(value: object) -> object:
    if type(value) is not int or value not in (1, 2, 4, 8, 16, 32, 64):
        raise ValueError("expected a power of two from 1 to 64")
    return value


def _each(value: object) -> tuple[str, ...]:
    """One trait's value or values. YAML 1.1 has made booleans of yes and no."""
    items = value if isinstance(value, tuple) else (value,)
    if not items or any(item is None or isinstance(item, dict | tuple) for item in items):
        raise ValueError("expected a value or a list of values")
    return tuple(dict.fromkeys(item if isinstance(item, str) else shown(item) for item in items))


def _one(value: object) -> str:
    """One trait's one value."""
    values = _each(value)
    if len(values) != 1 or isinstance(value, tuple):
        raise ValueError("expected one value")
    return values[0]


def _modes(value: object) -> object:
    """A list of modes, in their own order."""
    items = value if isinstance(value, tuple) else ()
    if not items or any(item not in MODES for item in items) or len(set(items)) < len(items):
        raise ValueError(f"expected a list of {' and '.join(MODES)}, each once at most")
    return tuple(mode for mode in MODES if mode in items)


_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def duration(value: object) -> float:
    """Seconds from text such as ``90s``, ``5m`` or ``1.5h``. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)([smh])", value) if isinstance(value, str) else None
    if match is None or not float(match[1]):
        raise ValueError("expected a positive number and s, m or h, such as 90s or 5m")
    return float(match[1]) * _SECONDS[match[2]]


Size = Annotated[int, _number(1, MAX_DIM, "1 to 2^40")]
Text = Annotated[str, _text(".{1,200}", "text of at most 200 characters")]
Name = Annotated[str, _text("[a-z][a-z0-9_]{0,63}", "lower-case letters, digits and '_', at most 64")]
Device = Annotated[str, _text("cpu|cuda(:[0-9]{1,3})?", "cpu, cuda or cuda:N")]
Pattern = Annotated[str, _text(r"[a-z0-9_./*?-]{1,200}", "a candidate's id, in which * and ? stand for any")]
Rounds = Annotated[int, _number(2, 1_000_000, "2 to 1000000")]
Flag = Annotated[bool, BeforeValidator(_flag)]
Alignment = Annotated[int, BeforeValidator(_alignment)]


class _Form(BaseModel):
    """A mapping of the YAML. The schemes' ``axis`` takes the config's folder and raises ValueError."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PowersOfTwo(_Form):
    """``{scheme: powers_of_two, min: 1, max: 8192}``"""

    scheme: Literal["powers_of_two"]
    min: Size
    max: Size

    def axis(self, _: Path) -> Axis:
        return Axis.of(schemes.powers_of_two(self.min, self.max))


class Multiples(_Form):
    """``{scheme: multiples, of: 64, min: 64, max: 512}``"""

    scheme: Literal["multiples"]
    of: Size
    min: Size
    max: Size

    def axis(self, _: Path) -> Axis:
        return Axis.of(schemes.multiples(self.of, self.min, self.max))


class Explicit(_Form):
    """``{scheme: explicit, edges: [1, 8, 32]}``"""

    scheme: Literal["explicit"]
    edges: tuple[Size, ...]

    def axis(self, _: Path) -> Axis:
        return Axis.of(schemes.explicit(self.edges))


class Quantiles(_Form):
    """``{scheme: quantiles, histogram: FILE, bins: 12}``, the file relative to the config's folder.

    ``also: [1, 2, 4]`` adds edges that the recorded traffic does not ask for.
    """

    scheme: Literal["quantiles"]
    histogram: Text
    bins: Annotated[int, _number(1, schemes.MAX_BINS, f"1 to {schemes.MAX_BINS}")]
    also: tuple[Size, ...] = ()

    def axis(self, folder: Path) -> Axis:
        try:
            histogram = read_histogram(folder / self.histogram)
        except ValueError as error:
            raise ValueError(f"{self.histogram}: {error}") from None
        edges = {*schemes.quantiles(histogram, self.bins).edges, *self.also}
        return Axis.of(schemes.explicit(sorted(edges)), histogram)


Scheme = Annotated[PowersOfTwo | Multiples | Explicit | Quantiles, Field(discriminator="scheme")]
_SCHEMES: Mapping[str, type[BaseModel]] = {
    "powers_of_two": PowersOfTwo,
    "multiples": Multiples,
    "explicit": Explicit,
    "quantiles": Quantiles,
}


def _size(value: object) -> object:
    product = isinstance(value, str) and re.fullmatch(r"[a-z]+(\*[a-z]+)*", value)
    if not product and (type(value) is not int or not 1 <= value <= MAX_DIM):
        raise ValueError("expected a whole number from 1 to 2^40, or dims to multiply such as b*q")
    return value


class NeighbourForm(_Form):
    """One entry under ``before`` or ``after``: ``{op: linear, dims: {m: b*q, n: 384, k: 384}}``."""

    op: Name
    traits: dict[str, Annotated[str, BeforeValidator(_one)]] = {}
    dims: dict[str, Annotated[int | str, BeforeValidator(_size)]] = {}


class SizesForm(_Form):
    """One entry under ``sizes``: ``{dims: {m: 17}, align: 64, weight: 120}``."""

    dims: dict[str, Size]
    align: Alignment | None = None
    weight: Annotated[float, _number(1e-9, MAX_WEIGHT, f"1e-9 to {MAX_WEIGHT:g}", whole=False)] = 1.0


class EntryForm(_Form):
    """One entry under ``problems``. A list of a trait's values means each; ``count``: calls a model pass.

    ``sizes`` are measured in place of the bins, as recorded calls are: ``dks.dispatch.misses`` writes them.
    ``before`` and ``after`` are what the model runs around it, for the cache state ``pipeline``.
    """

    dims: dict[str, Size]
    traits: dict[str, Annotated[tuple[str, ...], BeforeValidator(_each)]] = {}
    count: Annotated[int, _number(1, 1e9, "1 to 10^9")] = 1
    sizes: tuple[SizesForm, ...] = ()
    before: tuple[NeighbourForm, ...] = ()
    after: tuple[NeighbourForm, ...] = ()


class OperatorForm(_Form):
    """One entry under ``operators``. A dim under ``tie`` takes the size of the dim it names.

    ``bins`` may be left out where every problem has ``sizes``.
    """

    bins: dict[str, Scheme] = {}
    tie: dict[str, Text] = {}
    problems: Annotated[tuple[EntryForm, ...], Field(min_length=1)]
    alignments: Annotated[tuple[Alignment, ...], Field(min_length=1)] = (64,)
    candidates: Annotated[tuple[Pattern, ...], Field(min_length=1)] = ("*",)


@dataclass(frozen=True, slots=True)
class Measure:
    """How problems are timed.

    Attributes:
        min_rounds: rounds of every contender in each process that are timed whatever they show.
        max_rounds: rounds in one process after which timing stops whatever they show.
        seconds: cap on the kernel time of one problem in one process.
        precision: timing stops when the half-width of the confidence interval of every ratio that matters
            is below this.
        processes: in how many processes, each with fresh memory, what is left of the candidates is timed.
        max_processes: in how many at most where a choice is still in doubt.
        racing: false keeps every candidate to the end, for a run that is to be replayed.
        cache: state of caches while timing; see ``Measurement.cache``.
        modes: how calls are executed, eager and as a CUDA graph; each mode is measured and chosen for by itself.
        energy: whether joules are read; null is yes on a CPU, and no on a GPU, where it takes ten seconds for each
            of the fastest few.
        held_out: whether a ragged shape inside each bin is measured too, by no rule of the table's.
        split: a bin is split where its representative's best candidate is slower than the best one on its
            held-out shape by this share, with confidence; null never splits.
        timeout: seconds of silence after which a candidate is killed.
        seed: of inputs and of the order of candidates.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    min_rounds: Rounds = 10
    max_rounds: Rounds = 100
    seconds: Annotated[float, _number(1e-3, 3600, "0.001 to 3600", whole=False)] = 1.0
    precision: Annotated[float, _number(1e-6, 1, "0.000001 to 1", whole=False)] = 0.02
    processes: Annotated[int, _number(1, 100, "1 to 100")] = 3
    max_processes: Annotated[int, _number(1, 100, "1 to 100")] = 6
    racing: Flag = True
    cache: Annotated[str, _text("cold|warm|pipeline", "cold, warm or pipeline")] = "cold"
    modes: Annotated[tuple[str, ...], BeforeValidator(_modes)] = (EAGER,)
    energy: Flag | None = None
    held_out: Flag = True
    split: Annotated[float, _number(0.001, 10, "0.001 to 10", whole=False)] | None = 0.1
    timeout: Annotated[float, _number(0.1, 86400, "0.1 to 86400", whole=False)] = 120.0
    seed: Annotated[int, _number(0, 2**63 - 1, "0 to 2^63 - 1")] = 0


class SweepForm(_Form):
    """The whole file."""

    version: int
    name: Name
    device: Device = "cpu"
    threads: Annotated[int, _number(1, 1024, "1 to 1024")] | None = None
    budget: Annotated[float, BeforeValidator(duration)] | None = None
    operators: Annotated[dict[str, OperatorForm], Field(min_length=1)]
    measure: Measure = Measure()


def read_form(document: Document) -> SweepForm:
    """The document's data, with every key, type and range checked.

    Raises:
        ConfigError: what is wrong with them.
    """
    data = document.data
    if isinstance(data, dict):
        version = data.get("version")
        if type(version) is not int or version != VERSION:
            step = "this release reads no other form"
            document.fault(("version",), f"found {shown(version)}, expected {VERSION}; {step}")
            document.check()
    try:
        form = SweepForm.model_validate(data)
    except ValidationError as errors:
        for error in errors.errors(include_url=False):
            _fault(document, error)
        document.check()
        raise
    low, high = form.measure.min_rounds, form.measure.max_rounds
    if low > high:
        document.fault(("measure", "max_rounds"), f"found {high}, expected at least min_rounds ({low})")
        document.check()
    return form


def _fault(document: Document, error: Mapping[str, Any]) -> None:
    """Say what pydantic found in the form of every other message."""
    where: Where = error["loc"]
    kind, found = error["type"], shown(error["input"])
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        text = unknown(str(where[-1]), _allowed(where[:-1]))
    elif kind == "missing":
        text = "found nothing, expected it: this key has no default"
    elif kind == "union_tag_invalid":
        where, text = (*where, "scheme"), unknown(error["ctx"]["tag"], _SCHEMES)
    elif kind == "union_tag_not_found":
        where, text = (*where, "scheme"), f"found nothing, expected {one_of(_SCHEMES)}"
    elif kind == "value_error":
        text = f"found {found}, {error['ctx']['error']}"
    elif kind == "too_short":
        if error["input"]:  # it had items, and they are at fault themselves
            return
        text = "found nothing in it, expected at least one"
    elif kind == "tuple_type":
        text = f"found {found}, expected a list"
    else:
        text = f"found {found}, expected a mapping"
    # Inside a scheme, pydantic's location has the scheme's name as one more level.
    document.fault(where[:4] + where[5:] if where[2:3] == ("bins",) and len(where) > 5 else where, text)


def _allowed(where: Where) -> Sequence[str]:
    """The keys that belong at ``where``, a location of pydantic's."""
    match where:
        case ():
            return list(SweepForm.model_fields)
        case ("measure",):
            return [each.name for each in fields(Measure)]
        case (_, _, "bins", _, str(scheme)):
            return list(_SCHEMES[scheme].model_fields)
        case (_, _, "problems", _):
            return list(EntryForm.model_fields)
        case (_, _, "problems", _, "sizes", _):
            return list(SizesForm.model_fields)
        case _:
            return list(OperatorForm.model_fields)
