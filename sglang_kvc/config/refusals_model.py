"""Models that KV-Compress does not serve, refused by name at start-up."""

from __future__ import annotations

import importlib
from typing import Any

from sglang_kvc.config.rules import (
    Facts,
    Rule,
    complaints,
    off,
    refuse,
    value_rule,
)
from sglang_kvc.errors import Section

GPU_HEAD_DIMS = (64, 80, 96, 128, 256)
MAX_GROUP_SIZE = 16


def _no_sliding_window(facts: Facts) -> bool:
    model = facts.model_config
    window = model.sliding_window_size or 0
    switched_off = getattr(model.hf_text_config, "use_sliding_window", None) is False
    return window <= 0 or window >= model.context_len or switched_off


def _no_state_space(facts: Facts) -> bool:
    hybrid = importlib.import_module("sglang.srt.configs.hybrid_arch")
    return hybrid.mambaish_config(facts.model_config) is None


def _value_as_wide_as_key(facts: Facts) -> bool:
    return bool(facts.model_config.v_head_dim == facts.model_config.head_dim)


def _head_dim_fits(facts: Facts) -> bool:
    head_dim = facts.model_config.head_dim
    return head_dim in GPU_HEAD_DIMS if facts.on_gpu else head_dim % 16 == 0


def _group_size_fits(facts: Facts) -> bool:
    model = facts.model_config
    size, rest = divmod(model.num_attention_heads, model.num_key_value_heads)
    return rest == 0 and size <= MAX_GROUP_SIZE


def _no_made_up_heads(facts: Facts) -> bool:
    model = facts.model_config
    name = "original_total_num_kv_heads"
    own = getattr(model.hf_text_config, name, model.num_key_value_heads)
    return bool(own == model.num_key_value_heads)


_MODEL_LACKS = {
    "is_encoder_decoder": "encoder-decoder",
    "is_multimodal": "image, audio or video input",
    "is_hybrid_swa": "sliding-window layers",
    "is_local_attention_model": "chunked local attention",
    "attention_chunk_size": "chunked local attention",
    "has_attention_sinks": "learned attention sinks",
}

_CONFIG_LACKS = {
    "attn_logit_softcapping": "soft-capped attention logits",
    "dual_chunk_attention_config": "dual-chunk attention",
    "sparse_attention_config": "sparse attention",
    "sparse_config": "sparse attention",
}


def _model(name: str) -> str:
    return f"model_config.{name}"


def _config_rule(name: str, feature: str) -> Rule:
    """A rule for an entry that most models lack."""

    def lacks(config: Any) -> bool:
        return not getattr(config, name, None)

    return value_rule(_model("hf_text_config"), lacks, feature)


MODEL_RULES = (
    value_rule(
        _model("attention_arch"),
        lambda kind: kind.name == "MHA",
        "multi-head latent attention",
    ),
    value_rule(
        _model("is_generation"), bool, "embedding, reward or classification model"
    ),
    *(value_rule(_model(name), off, it) for name, it in _MODEL_LACKS.items()),
    *(_config_rule(name, it) for name, it in _CONFIG_LACKS.items()),
    Rule(
        _model("hf_config"), _no_state_space, "state-space or linear-attention layers"
    ),
    Rule(_model("sliding_window_size"), _no_sliding_window, "sliding-window attention"),
    Rule(
        _model("v_head_dim"),
        _value_as_wide_as_key,
        "values of another width than keys",
    ),
    Rule(
        _model("head_dim"),
        _head_dim_fits,
        f"head_dim other than {GPU_HEAD_DIMS} (on a CPU: multiples of 16)",
    ),
    Rule(
        _model("num_key_value_heads"),
        _no_made_up_heads,
        "heads that do not divide by --tp-size (a CPU gets empty ones from SGLang)",
    ),
    Rule(
        _model("num_key_value_heads"),
        _group_size_fits,
        f"more than {MAX_GROUP_SIZE}, or a broken number of, query heads per KV head",
    ),
)


def refuse_unsupported_model(model_config: Any, on_gpu: bool | None = None) -> None:
    """Refuse a model that KV-Compress does not serve.

    Parameters
    ----------
    model_config : sglang.srt.configs.model_config.ModelConfig
    on_gpu : bool, optional
        Whether GPU kernels will be used; found out if not given.

    Raises
    ------
    UnsupportedModeError
        Listing every reason.
    SeamDriftError
        If ModelConfig lacks an attribute that has to be checked.
    """
    facts = Facts(model_config=model_config)
    if on_gpu is not None:
        facts = Facts(model_config=model_config, on_gpu=on_gpu)
    refuse(
        model_config.model_path,
        complaints(MODEL_RULES, facts),
        Section.MODELS,
        "Serve it without --kv-compress.",
    )
