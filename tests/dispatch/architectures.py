"""Tiny models of every architecture of transformers: its default config, each number shrunk by its name."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers.models.auto import modeling_auto

VOCAB, WINDOW, LARGEST = 64, 4, 5_000_000  # tokens; keys that a window shows; parameters of a model that is tiny
FIRST, LAST = 8, 50  # tokens of a prompt lie between: no special ones

CLASSES = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "seq2seq": AutoModelForSeq2SeqLM}
ARCHITECTURES = sorted(
    [("causal", name) for name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    + [("masked", name) for name in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES]
    + [("seq2seq", name) for name in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES]
)

SPREADS = ("initializer_range", "init_std")  # of weights: as small as they come, any attention is nearly uniform
SIZES: tuple[tuple[str, float], ...] = (
    (r"^pad_(token_id|index)", 0),
    (r"^bos_(token_id|index)|decoder_start_token_id", 1),
    (r"^eos_(token_id|index)", 2),
    (r"(token|boi|eoi|boa|eoa|image|audio|video|mask|sep|cls|unk)_(id|index|token_id)$", VOCAB - 2),
    (r"vocab", VOCAB),
    (r"kv_shared_layers|max_window_layers|first_k_dense|topk_group|n_group$|expert_group$|layer_offset", 1),
    (r"experts?_per_tok|topk$|moe_k|top_?k|layer_period", 2),
    (r"experts?$|expert_num", 4),
    (r"layers?$|depth$|num_blocks", 2),
    (r"lora_rank|index_head_dim|qk_head_dim|mamba_(d_head|head_?dim)|ssm_state", 16),
    (r"head_?(dim|size)|dim_head|d_head|d_kv|channels$|rotary_dim|d_state|state_size|chunk_(size|len)", 8),
    (r"(key_value|kv)_heads|query_groups", 2),
    (r"heads?$", 4),
    (r"(sliding|attention)_window|local_attention|window_(size|len)", WINDOW),
    (r"position|context|max_seq|n_ctx|max_.*length", 128),
    (r"capacity|mamba_d_ssm", 64),
    (r"intermediate|ff|hidden_dim", 48),
    (r"hidden|d_model|embd|embed|^dim$|width|d_inner|d_latents", 32),
    (r"image_size", 16),
    (r"patch_size", 8),
    ("|".join(SPREADS), 0.2),
)
"""What a number becomes, by the first pattern that its name matches; any other is cut to 32."""

WHERE_NONE = {"head_dim": 8, "num_key_value_heads": 4, "num_experts_per_tok": 2, "vocab_size": VOCAB}
UNSHRUNK = re.compile("rope|label")  # dicts with numbers that are no sizes
LEFT_OUT = {"transformers_version", "model_type", "architectures", "per_layer_config", "attention_layers", "dtype"}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "dots1": {"n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"head_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"attention_head_dim": 16},
}


def tiny(kind: str, name: str) -> nn.Module:
    """A model with random weights in float32. Raises what its library does, and ValueError if it is not tiny."""
    numbers = shrunk(AutoConfig.for_model(name).to_dict()) | EXCEPTIONS.get(name, {})
    config = AutoConfig.for_model(name, **numbers)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in build(kind, config).parameters())
    if size > LARGEST:
        raise ValueError(f"found {size} parameters, expected at most {LARGEST}")
    torch.manual_seed(0)
    return build(kind, config).eval()


def build(kind: str, config: Any) -> nn.Module:
    """The model of a config."""
    model: nn.Module = CLASSES[kind].from_config(config, dtype=torch.float32)
    return model


def shrunk(numbers: dict[str, Any]) -> dict[str, Any]:
    """A config's values, each size small, and one layer of each kind of layers."""
    kinds = next((v for k, v in numbers.items() if "layer_types" in k and v and isinstance(v[0], str)), [])
    layers = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    layers = layers * 2 if len(layers) == 1 else layers
    small = {}
    for name, value in numbers.items():
        if name in LEFT_OUT:
            continue
        if value is None and name in WHERE_NONE:
            small[name] = WHERE_NONE[name]
        elif isinstance(value, dict) and not UNSHRUNK.search(name):
            small[name] = shrunk(value)
        elif isinstance(value, list) and kinds and len(value) == len(kinds):
            small[name] = [value[i] for i in layers]
        else:
            small[name] = shrunk_number(name, value, numbers)
    if "num_hidden_layers" in small and layers:
        small["num_hidden_layers"] = len(layers)
    return small


def shrunk_number(name: str, value: Any, beside: dict[str, Any]) -> Any:
    """One value of a config; what is no size stays."""
    is_size = type(value) is int and (abs(value) > 2 or name.endswith("_id"))
    if not is_size and name not in SPREADS:
        return value
    heads = next((beside[key] for key in ("num_attention_heads", "n_heads", "n_head") if key in beside), None)
    if re.search("(key_value|kv)_heads", name) and value == heads:
        return 4
    return next((small for pattern, small in SIZES if re.search(pattern, name)), min(value, 32))
