"""Triton kernels of paged attention on a GPU, the keys of a sequence shared out; see ``gpu/paged.py``."""

from __future__ import annotations

from dks.dispatch.gpu import paged
from dks.dispatch.gpu.call import Buffer, Recipe, Value, bound, buffer, given, number, size, steps
from dks.dispatch.gpu.elements import EXACTNESS, class_of
from dks.dispatch.gpu.program import Program
from dks.dispatch.kernel import Kernel, Params, Run
from dks.dispatch.problem import Problem


def decode(align: int) -> Kernel:
    """The kernel ``triton.paged``, of 16-byte alignment, or the one for less, where ``align`` is 0."""

    def programs(problem: Problem, params: Params) -> tuple[Program, ...]:
        dtype, d, page = problem.trait("dtype"), problem.dim("d"), problem.dim("page")
        groups = problem.dim("h") // problem.dim("hkv")
        return paged.decode(dtype, d, page, groups, params, class_of(dtype, align))

    def bind(problem: Problem, params: Params) -> Run:
        """run(q (b, h, d), k_cache, v_cache (pages, page, hkv, d), block_table, lengths, scale) -> (b, h, d).

        All are contiguous; block_table (b, max_pages) and lengths (b,) are int32. Raises Missing where a program
        has no compiled form here.
        """
        dtype, splits = problem.trait("dtype"), dict(params)["splits"]
        h, hkv, d, page = (problem.dim(name) for name in ("h", "hkv", "d", "page"))
        values: dict[str, Value] = {
            **{"q": given(0), "k": given(1), "v": given(2), "block_table": given(3), "lengths": given(4)},
            **{"y": buffer(0), "workspace": 0, "b": size(0, 0), "h": h, "hkv": hkv, "splits": splits},
            **{"q_b": h * d, "q_h": d, "table_stride": size(3, -1), "scale": number(5, d**-0.5)},
            **{f"{name}_p": page * hkv * d for name in "kv"},
            **{f"{name}_s": hkv * d for name in "kv"},
            **{f"{name}_h": d for name in "kv"},
        }
        buffers = [Buffer()]
        if room := paged.workspace_bytes(1, 1, d, params):  # of each query head
            values["workspace"] = buffer(1)
            buffers.append(Buffer(last=room // 4, dtype="float32", returned=False))
        inputs = (dtype, dtype, dtype, "int32", "int32", "number")
        return bound(  # type: ignore[return-value]
            Recipe(inputs, steps(programs(problem, params), values), tuple(buffers))
        )

    return Kernel(
        id="triton.paged" if align else "triton.paged_scalar",
        op="paged_attention",
        precision=EXACTNESS,
        bind=bind,
        params=paged.PARAMS if align else paged.SCALAR_PARAMS,
        programs=programs,
        sources=("paged.py",),
        align=align,
        supports=lambda problem: paged.objection(problem.dim("d")),
        suits=lambda problem, params: paged.unsuited(params, problem.dim("kv")),
        rank=20 if align else 21,
        devices=("cuda",),
    )


KERNELS = (decode(16), decode(0))
