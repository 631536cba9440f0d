"""How far an output is from its reference: as a whole, and at its worst row, column and element."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isnan, sqrt

import torch

from dks.dispatch.kernel import SHORT, row_length
from dks.dispatch.problem import Precision

ELEMENT = 8.0  # of a class's limit: noise of that size has no 8-sigma element in any tensor that fits a memory
FEW = 64  # outputs with fewer elements may be near zero by chance; the size of others says what is small
_CHUNK = 2**18  # elements compared at a time, so that float64 copies stay in the cache
_CHUNK_GPU = 2**24  # there a chunk costs a dozen launches, and bandwidth is plenty


@dataclass(frozen=True, slots=True)
class Gap:
    """Errors, each over the size of what it belongs to: root mean squares, and the largest element's.

    A row is held against its own root mean square, so that no other row's size hides what is wrong with it. One of
    fewer than SHORT numbers is held against what such a row usually has, if that is larger: it may be near zero by
    cancellation. An element is held against itself and its row: it is as exact as the values around it.
    """

    total: float
    row: float
    column: float
    element: float

    def over(self, precision: Precision, shape: torch.Size, allowed: Gap | None = None) -> str:
        """Which part exceeds what ``precision`` or ``allowed`` permits, with both numbers; "" for none.

        Args:
            precision: class of the kernel.
            shape: of the output; short rows scatter more.
            allowed: errors that are nobody's fault.
        """
        n = row_length(shape)
        rows = max(1, shape.numel() // max(n, 1))
        bounds = {
            "element": ELEMENT,
            "row": 2.0 + 6.0 / sqrt(n),
            "column": 2.0 + 6.0 / sqrt(rows),
            "total": 1.0 + 6.0 / sqrt(n * rows),
        }
        for part, factor in bounds.items():
            found: float = getattr(self, part)
            limit = factor * precision.limit
            if allowed is not None and not isnan(getattr(allowed, part)):
                limit = max(limit, getattr(allowed, part))
            # Written so that NaN fails: a comparison with it is false.
            if not found <= limit:
                what = "its output" if part == "total" else f"its worst {part}"
                return f"error {found:.2e} in {what}, its class allows {limit:.1e}"
        return ""

    def times(self, factor: float) -> Gap:
        """All errors ``factor`` times as large."""
        return Gap(self.total * factor, self.row * factor, self.column * factor, self.element * factor)

    def at_most(self, precision: Precision, factor: float) -> Gap:
        """The same, but no error above ``factor`` limits of the class."""
        cap = factor * precision.limit
        return Gap(*(min(value, cap) for value in (self.total, self.row, self.column, self.element)))


def size_of(reference: torch.Tensor) -> float:
    """Root mean square of a float64 reference; 0 where it has no elements."""
    return float(torch.linalg.vector_norm(reference)) / sqrt(max(1, reference.numel()))


def gap(
    y: torch.Tensor,
    reference: torch.Tensor,
    least: float = 0.0,
    ignored: float = 0.0,
    usual: torch.Tensor | None = None,
) -> Gap:
    """Compare an output of any dtype with its float64 reference of the same shape.

    Args:
        y: the output.
        reference: finite, float64, with at least one dim. Its last dim makes rows; each number is one where it
            is the only dim, as of losses: what belongs to one row must not hide in, or spoil, those of others.
        least: root mean square that such outputs usually have; used where the reference has few elements.
        ignored: absolute error that counts as none.
        usual: float64 root mean square (rows,) that each row usually has, where rows differ in size; all rows' size
            where they do not.

    Returns:
        The gap; NaN where ``y`` has NaN, inf where it has infinity.
    """
    n = row_length(reference.shape)
    wanted, found = reference.reshape(-1, n), y.reshape(-1, n)
    rows = wanted.shape[0]
    if not rows or not n:
        return Gap(0.0, 0.0, 0.0, 0.0)
    own = size_of(reference)
    base = (max(own, least) if reference.numel() < FEW else own) or least or 1.0
    column_error = torch.zeros(n, dtype=torch.float64, device=y.device)
    column_size = torch.zeros(n, dtype=torch.float64, device=y.device)
    worst_row, worst_element = [], []
    step = max(1, (_CHUNK_GPU if y.is_cuda else _CHUNK) // n)
    for start in range(0, rows, step):
        right = wanted[start : start + step]
        error = found[start : start + step].double().sub_(right).abs_()
        if ignored:
            error = error.sub_(ignored).clamp_min_(0.0)
        squares, sizes = error.square(), right.square()
        row_size = sizes.mean(dim=1).sqrt_()
        others = row_size.new_full((), base) if usual is None else usual[start : start + step]
        if n < SHORT:
            row_size = row_size.maximum(others)
        row_size = torch.where(row_size > 0.0, row_size, base)  # a row of zeros
        worst_row.append((squares.mean(dim=1).sqrt_() / row_size).max())
        worst_element.append((error / (right.abs() + row_size[:, None])).max())
        column_error += squares.sum(dim=0)
        column_size += sizes.sum(dim=0)
    column = (column_error / rows).sqrt() / (column_size / rows).sqrt().clamp_min_(base)
    return Gap(
        total=sqrt(_number(column_error.sum()) / (rows * n)) / base,
        row=_number(torch.stack(worst_row).max()),
        column=_number(column.max()),
        element=_number(torch.stack(worst_element).max()),
    )


def gap_beside_non_finite(
    y: torch.Tensor, reference: torch.Tensor, least: float = 0.0, ignored: float = 0.0, strict: bool = True
) -> tuple[str, Gap]:
    """The same for a reference that may hold NaN or infinity: only its wholly finite rows are compared.

    Args:
        y, reference, least, ignored: as of ``gap``.
        strict: whether each NaN and infinity must stay not finite; else it is enough that no row with an
            infinity becomes wholly finite: rounding may turn a sign, and what ``relu`` makes of it.

    Returns:
        (what is wrong with the values that are not finite, or ""; the gap of the finite rows).
    """
    n = row_length(reference.shape)
    wanted, found = reference.reshape(-1, n), y.reshape(-1, n)
    finite = wanted.isfinite()
    clean = finite.all(dim=1)
    if bool(clean.all()):
        return "", gap(found, wanted, least, ignored)
    if strict:
        lost = int((found.isfinite() & ~finite).sum())
    else:
        lost = int((found.isfinite().all(dim=1) & wanted.isinf().any(dim=1)).sum()) * n
    said = f"{lost} finite values where NaN or infinity belongs" if lost else ""
    return said, gap(found[clean], wanted[clean], least, ignored)


def _number(value: torch.Tensor) -> float:
    number = float(value)
    return number if number >= 0.0 or isnan(number) else inf
