"""How a call on a GPU is executed: at once, or as a part of a CUDA graph that is replayed.

What is fastest may differ: an eager call pays for its launches on the host, a replayed one does not. A mode is so a
dimension of the evidence, and of the table: its groups of ``form`` ``direct_graph`` and ``prepared_graph`` stand
beside those of ``direct`` and ``prepared``, which are the eager ones. A CPU knows no other mode than eager.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dks.dispatch.generation import Generation, Plan

EAGER, GRAPH = MODES = ("eager", "graph")

_SUFFIX = f"_{GRAPH}"


def form_in(mode: str, form: str) -> str:
    """The name, in a mode, of ``direct`` or ``prepared``."""
    return form + _SUFFIX if mode == GRAPH else form


def mode_of(form: str) -> str:
    """The mode of a group by its form."""
    return GRAPH if form.endswith(_SUFFIX) else EAGER


def eager_form(form: str) -> str:
    """``direct`` or ``prepared``: what a form is called in eager mode."""
    return form.removesuffix(_SUFFIX)


def current(cuda: Any = torch.cuda) -> str:
    """The mode that a call is made in now. Only asked by tables that know graphs: it takes some 100 ns."""
    return GRAPH if cuda.is_initialized() and cuda.is_current_stream_capturing() else EAGER


def plan(
    generation: Generation, op: str, form: str, traits: Mapping[str, str], statics: Mapping[str, int], mode: str
) -> Plan:
    """The plan for calls in a mode. Where a table has none for graphs, as where graphs were never measured, a call
    in a graph takes the eager one: it is the nearest evidence there is."""
    if mode == GRAPH:
        found = generation.plan(op, form_in(GRAPH, form), traits, statics)
        if found.find is not None:
            return found
    return generation.plan(op, form, traits, statics)
