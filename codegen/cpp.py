"""The C++ form of a dispatch table: one header that stands alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from textwrap import wrap

from dks.codegen.templating import environment
from dks.dispatch.problem import check_name
from dks.dispatch.table import NEAREST_REACH, Group, Table

WIDTH = 100  # columns of a line of numbers

_LARGEST = 2**63 - 1  # follows the last edge: see Edges in lookup.hpp

_NAMESPACE = re.compile(r"[A-Za-z][A-Za-z0-9_]*\Z")

_WORDS = """
    alignas alignof and and_eq asm atomic_cancel atomic_commit atomic_noexcept auto bitand bitor bool break
    case catch char char16_t char32_t char8_t class co_await co_return co_yield compl concept const const_cast
    consteval constexpr constinit continue contract_assert decltype default delete do double dynamic_cast else
    enum explicit export extern false float for friend goto if inline int long mutable namespace new noexcept
    not not_eq nullptr operator or or_eq private protected public reflexpr register reinterpret_cast requires
    return short signed sizeof static static_assert static_cast struct switch synchronized template this
    thread_local throw true try typedef typeid typename union unsigned using virtual void volatile wchar_t
    while xor xor_eq
"""
_KEYWORDS = frozenset(_WORDS.split())

# Namespaces and functions that every program has, our own, and what GNU dialects define as macros.
_TAKEN = frozenset({"dks", "dks_table", "std", "posix", "main", "linux", "unix", "i386"})

# What stands beside the groups' namespaces in the templates.
_BESIDE = frozenset(
    {"Choice", "Group", "choose", "group", "groups", "kernel_of", "kernels", "package", "rules", "table"}
)


@dataclass(frozen=True, slots=True)
class _Axis:
    """One dynamic dim: how many edges, their text, and where each octave of sizes begins (see ``lookup.hpp``)."""

    count: int
    lines: list[str]
    first: list[str]
    most: int


@dataclass(frozen=True, slots=True)
class _Class:
    """One alignment class, and the text of its cells."""

    align: int
    lines: list[str]


@dataclass(frozen=True, slots=True)
class _Group:
    """A group as the template shows it."""

    identifier: str
    title: str
    op: str
    form: str
    traits: str
    statics: list[str]
    static_count: int
    axes: list[_Axis]
    classes: list[_Class]

    @property
    def fine(self) -> bool:
        """Whether an octave of some dim holds more edges than are compared one by one."""
        return any(axis.most > 4 for axis in self.axes)


def render_header(name: str, table: Table, lookup_source: str) -> str:
    """The text of ``table.hpp``.

    Args:
        name: the package's, and so the namespace's.
        table: what to hold. Candidates are any text: it stays inside its literal.
        lookup_source: text of ``dispatch/cpp/lookup.hpp``, which the header then holds itself.

    Raises:
        ValueError: ``name`` is no name that C++ allows for a namespace, or an operator, trait or dim is no
            lower-case identifier.
    """
    check_namespace(name)
    names = _identifiers(table.groups)
    groups = [_view(group, identifier) for group, identifier in zip(table.groups, names, strict=True)]
    template = environment().get_template("table.hpp.j2")
    return template.render(name=name, rules=table.rules, groups=groups, lookup_source=lookup_source)


def check_namespace(name: str) -> str:
    """Return ``name`` if generated code may have a namespace of that name.

    Raises:
        ValueError: it is no C++ identifier, or one that means something else already.
    """
    if not _NAMESPACE.match(name) or name in _KEYWORDS or name in _TAKEN:
        raise ValueError(
            f"name: found {name!r}, expected letters, digits and '_', the first a letter, and no "
            "word of C++; choose another --name"
        )
    return name


def _view(group: Group, identifier: str) -> _Group:
    columns = len(group.edges[-1]) if group.edges else 1
    traits = ",".join(f"{name}={value}" for name, value in group.traits)
    statics = ", ".join(f"{name}={size}" for name, size in group.statics)
    return _Group(
        identifier=identifier,
        title=f"{group.op} {group.form} [{traits}] ({statics})",
        op=group.op,
        form=group.form,
        traits=traits,
        statics=_lines([size for _, size in group.statics], len(group.statics)),
        static_count=len(group.statics),
        axes=[_axis(edges) for edges in group.edges],
        classes=[_Class(align, _lines(cells, columns)) for align, cells in group.cells.items()],
    )


def _axis(edges: Sequence[int]) -> _Axis:
    def octave(size: int) -> int:
        return (size - 1).bit_length()

    octaves = range(octave(NEAREST_REACH * edges[-1]) + 1)
    inside = [sum(octave(edge) == this for edge in edges) for this in octaves]
    before = [sum(inside[:this]) for this in octaves]
    most = max(inside)
    padded = [*edges, *[_LARGEST] * most]
    return _Axis(len(edges), _lines(padded, len(padded)), _lines(before, len(before)), most)


def _lines(numbers: Sequence[int], columns: int) -> list[str]:
    """The numbers as text, a new line after every ``columns`` of them and wherever one grows too long."""
    lines: list[str] = []
    for start in range(0, len(numbers), columns or 1):
        row = ", ".join(str(number) for number in numbers[start : start + columns])
        lines += [line.rstrip(",") for line in wrap(row, WIDTH)]
    return lines


def _identifiers(groups: Sequence[Group]) -> list[str]:
    """A readable C++ name for each group, all different."""
    names: list[str] = []
    taken = {*_KEYWORDS, *_TAKEN, *_BESIDE}
    for group in groups:
        stem = re.sub(r"[^a-z0-9]+", "_", "_".join(_words(group))).strip("_")
        stem = stem if stem[0].isalpha() else f"group_{stem}"
        name = next(n for n in chain([stem], (f"{stem}_{i}" for i in count(2))) if n not in taken)
        taken.add(name)
        names.append(name)
    return names


def _words(group: Group) -> Iterator[str]:
    yield check_name(group.op, "operator")
    yield check_name(group.form, "form")
    for name, value in group.traits:
        yield check_name(name, "trait")
        yield check_name(value, f"trait {name}")
    for name, size in group.statics:
        yield f"{check_name(name, 'dim')}{size}"
