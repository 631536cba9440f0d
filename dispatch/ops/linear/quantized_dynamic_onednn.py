"""Dynamic int8 linear of torch's onednn engine."""

from __future__ import annotations

from dks.dispatch.ops.linear.quantized_dynamic import dynamic_int8

KERNEL = dynamic_int8("onednn")
