"""The vocabulary: what is asked (Problem), what could answer (Candidate), how exact it must be (Precision).

Identity is derived, never typed: every id below is computed from the readable fields of its object and
parses back into them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

LONG = 100  # characters of a candidate's id; those made of sizes are shorter
MAX_ALIGNMENT = 64  # bytes; one cache line, and the widest vector register of today's CPUs
MAX_DIM = 2**40  # a larger dimension is a corrupt number, not a tensor

_NAME = re.compile(r"[a-z0-9][a-z0-9_.]*\Z")
_PROBLEM = re.compile(r"(?P<op>[a-z0-9_]+)\[(?P<traits>[^\]]*)\]\((?P<dims>[^)]*)\)@(?P<align>\d+)\Z")


class Precision(str, Enum):
    """The class of arithmetic a kernel declares; ``limit`` bounds ||y - ref|| / ||ref|| of each row."""

    EXACT = "exact"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def limit(self) -> float:
        """Largest relative error, on unit-normal data, that a correct kernel of this class shows."""
        return {"exact": 1e-5, "bf16": 1e-2, "int8": 5e-2, "int4": 2e-1}[self.value]


def check_name(text: str, what: str) -> str:
    """Return ``text`` if it is a lower-case identifier that is safe inside generated code.

    Raises:
        ValueError: it is not; the message names ``what``.
    """
    if not _NAME.match(text):
        raise ValueError(f"{what}: found {text!r}, expected lower-case letters, digits, '_' and '.'")
    return text


def alignment(*values: int) -> int:
    """The largest power of two, at most 64, that divides every value (addresses and strides in bytes)."""
    bits = MAX_ALIGNMENT
    for value in values:
        bits |= value
    return bits & -bits


@dataclass(frozen=True, slots=True)
class Problem:
    """One measurable question: an operator, its traits (matched exactly), its dims and its alignment class.

    Attributes:
        op: the operator's name.
        traits: (name, value) pairs sorted by name; dtypes, epilogue, mask kind.
        dims: (name, size) pairs in the operator's own order, sizes in elements.
        align: bytes; a power of two up to 64 that divides every pointer and row stride.
    """

    op: str
    traits: tuple[tuple[str, str], ...]
    dims: tuple[tuple[str, int], ...]
    align: int = MAX_ALIGNMENT

    @classmethod
    def of(cls, op: str, traits: Mapping[str, str], dims: Mapping[str, int], align: int = MAX_ALIGNMENT) -> Problem:
        """Build a problem from mappings, checking every name and range.

        Raises:
            ValueError: a name that is not an identifier, a dim outside 1..2^40, or an alignment that is
                not a power of two up to 64.
        """
        check_name(op, "operator")
        if "." in op:
            raise ValueError(f"operator: found {op!r}, expected no '.'")
        for name, value in traits.items():
            check_name(name, "trait")
            check_name(value, f"trait {name}")
        for name, size in dims.items():
            check_name(name, "dim")
            if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_DIM:
                raise ValueError(f"dim {name}: found {size!r}, expected a whole number from 1 to 2^40")
        if align not in (1, 2, 4, 8, 16, 32, 64):
            raise ValueError(f"alignment: found {align!r}, expected a power of two from 1 to 64")
        return cls(op, tuple(sorted(traits.items())), tuple(dims.items()), align)

    @classmethod
    def parse(cls, text: str) -> Problem:
        """The inverse of ``id``. Raises ValueError for anything else."""
        match = _PROBLEM.match(text)
        if match is None:
            raise ValueError(f"problem: found {text!r}, expected op[trait=value,...](dim=size,...)@align")
        traits = dict(_pairs(match["traits"]))
        dims = {name: int(size) for name, size in _pairs(match["dims"])}
        problem = cls.of(match["op"], traits, dims, int(match["align"]))
        if problem.id != text:  # other spellings of a number, a name twice, traits out of order
            raise ValueError(f"problem: found {text!r}, expected it spelled {problem.id!r}")
        return problem

    @property
    def id(self) -> str:
        """Readable and unique, e.g. ``linear[bias=yes,dtype=float32,epilogue=none](m=64,n=384,k=384)@64``."""
        traits = ",".join(f"{name}={value}" for name, value in self.traits)
        dims = ",".join(f"{name}={size}" for name, size in self.dims)
        return f"{self.op}[{traits}]({dims})@{self.align}"

    @property
    def slug(self) -> str:
        """``id`` in the letters that are safe in a file's name."""
        traits = "-".join(value for _, value in self.traits)
        dims = "-".join(f"{name}{size}" for name, size in self.dims)
        return f"{self.op}.{traits}.{dims}.a{self.align}"

    def trait(self, name: str) -> str:
        """The value of one trait. Raises KeyError where the operator has no such trait."""
        return dict(self.traits)[name]

    def dim(self, name: str) -> int:
        """The size of one dim, in elements. Raises KeyError where the operator has no such dim."""
        return dict(self.dims)[name]


def _pairs(text: str) -> list[tuple[str, str]]:
    pairs = []
    for item in filter(None, text.split(",")):
        name, sign, value = item.partition("=")
        if not sign:
            raise ValueError(f"found {item!r}, expected name=value")
        pairs.append((name, value))
    return pairs


@dataclass(frozen=True, slots=True)
class Candidate:
    """A kernel with its parameters, e.g. ``mkl.linear_packed/rows512``."""

    kernel: str
    params: tuple[tuple[str, int], ...] = ()

    @property
    def id(self) -> str:
        """``kernel`` or ``kernel/name1-name2...``: readable, unique, parses back."""
        if not self.params:
            return self.kernel
        return self.kernel + "/" + "-".join(f"{name}{value}" for name, value in self.params)

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """The inverse of ``id``. Raises ValueError for anything else."""
        kernel, slash, rest = text.partition("/")
        check_name(kernel, "kernel")
        params = []
        for item in rest.split("-") if slash else ():
            match = re.fullmatch(r"([a-z_]+)(\d+)", item)
            if match is None:
                raise ValueError(f"candidate: found {text!r}, expected kernel/name1-name2")
            params.append((match[1], int(match[2])))
        candidate = cls(kernel, tuple(params))
        if candidate.id != text:
            raise ValueError(f"candidate: found {text!r}, expected it spelled {candidate.id!r}")
        return candidate

    def __str__(self) -> str:
        return self.id


def short(id: str) -> str:
    """A candidate's id for people: where it is long, its kernel and 8 hex digits of a SHA-256 of it, as in
    ``cublaslt.matmul/#3f2a91c0``."""
    if len(id) <= LONG:
        return id
    return f"{id.partition('/')[0]}/#{hashlib.sha256(id.encode()).hexdigest()[:8]}"
