"""The closed set of outcomes that ``stats`` counts and metrics label, each in a sentence.

A call that returned is one of HITS, served by the kernel that the table chose, or one of REASONS, served by the
framework's own operator. Nothing else is ever counted; a test holds the sources to it.
"""

from __future__ import annotations

from collections.abc import Mapping

HITS: Mapping[str, str] = {
    "exact": "this very size was measured",
    "bin": "a size in the same bin was measured",
    "nearest": "past the last edge, or less aligned than what was measured: the nearest evidence there is",
}

REASONS: Mapping[str, str] = {
    # The table was asked and had nothing.
    "zero_sized": "a dim is zero: there is nothing to choose",
    "out_of_range": "a dim lies past twice the last measured size",
    "unmeasured": "this combination of bins was not measured",
    "misaligned": "a pointer or row stride is less aligned than the chosen kernel needs",
    "unknown_shape": "the table has no entry for these traits and static dims",
    "refused": "the whole table is refused: it is damaged, or was measured elsewhere",
    "forked": "a table of a GPU in a process that was forked since it was loaded: CUDA does not survive that",
    # The chosen kernel did not serve.
    "declined": "the chosen kernel does not compute these values; it serves the next call again",
    "kernel_failed": "the chosen kernel could not be bound or launched; after a few times it is switched off",
    "kernel_changed": "the chosen kernel may not run here: its source changed, or this machine can't run it",
    # The call was never the table's to serve.
    "gradient": "autograd would record this call",
    "autocast": "autocast is on: it may change the dtype",
    "transformed": "a trace, a mode or a functorch transform must see the operator itself",
    "compiling": "torch.compile or torch.export reads the call; counted once a trace",
    "subclass": "an argument is no plain tensor",
    "dtype": "a dtype that no kernel takes, or arguments of different ones",
    "device": "a tensor that is not on the kind of device the table is for, or not on that of the others",
    "layout": "a sparse, nested or negated tensor, or one without memory",
    "strides": "a tensor that is not contiguous where kernels need it to be",
    "shape": "shapes that the operator's kernels do not take, such as ones to broadcast",
    "dim": "a softmax over another dim than the last",
    "mask": "an attention mask of a kind that no kernel takes",
    "dropout": "attention with dropout",
    "argument": "a model's attention with more than q, k, v, a mask and a scale, such as a window or sinks",
    "special": "a model's attention with uneven heads, or with more keys than causal queries",
    "unbound": "a prepared layer that is not bound to the generation that serves",
    "unpaired": "a linear that was fused with its activation was called by itself, or one of the two changed",
    "unwatched": "a prepared layer's parameter is an inference tensor on a GPU: nothing can notice a write to it",
    "weight_changed": "a prepared layer's weight or bias is another one than was bound, or was written to since",
}

OTHER = "other"
"""What a metric's label says of a name that is in no closed set; a version of another age may count one."""

LISTED = ("out_of_range", "unmeasured", "misaligned", "unknown_shape", "nearest")
"""Outcomes that measuring more would change: what ``misses`` keeps the shapes of."""
