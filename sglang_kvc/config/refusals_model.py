"""Models that KV-Compress does not serve, refused by name at start-up."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_kvc.config.refusals import read_field
from sglang_kvc.errors import UnsupportedModeError
from sglang_kvc.upstream.compat import no_accelerator

GPU_HEAD_DIMS = (64, 96, 128)
MAX_GROUP_SIZE = 8


@dataclass(frozen=True)
class ModelRule:
    """A property of a model and whether KV-Compress serves it.

    Parameters
    ----------
    attribute : str
        Attribute of ModelConfig, for the message and the drift check.
    supported : callable
        Takes the ModelConfig and whether a GPU is used.
    feature : str
        What is not served, in words.
    """

    attribute: str
    supported: Callable[[Any, bool], bool]
    feature: str


def _lacks(name: str) -> Callable[[Any, bool], bool]:
    return lambda model, _on_gpu: not getattr(model, name)


def _config_lacks(name: str) -> Callable[[Any, bool], bool]:
    return lambda model, _on_gpu: not getattr(model.hf_text_config, name, None)


def _no_sliding_window(model: Any, _on_gpu: bool) -> bool:
    window = model.sliding_window_size or 0
    switched_off = getattr(model.hf_text_config, "use_sliding_window", None) is False
    return window <= 0 or window >= model.context_len or switched_off


def _no_state_space(model: Any, _on_gpu: bool) -> bool:
    hybrid = importlib.import_module("sglang.srt.configs.hybrid_arch")
    return hybrid.mambaish_config(model) is None


def _head_dim_fits(model: Any, on_gpu: bool) -> bool:
    if on_gpu:
        return model.head_dim in GPU_HEAD_DIMS
    return bool(model.head_dim % 16 == 0)


def _group_size_fits(model: Any, on_gpu: bool) -> bool:
    size, rest = divmod(model.num_attention_heads, model.num_key_value_heads)
    return rest == 0 and (size <= MAX_GROUP_SIZE or not on_gpu)


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
}

MODEL_RULES = (
    ModelRule(
        "attention_arch",
        lambda model, _on_gpu: model.attention_arch.name == "MHA",
        "multi-head latent attention",
    ),
    ModelRule(
        "is_generation",
        lambda model, _on_gpu: model.is_generation,
        "embedding, reward or classification model",
    ),
    *(ModelRule(name, _lacks(name), it) for name, it in _MODEL_LACKS.items()),
    *(
        ModelRule("hf_text_config", _config_lacks(name), it)
        for name, it in _CONFIG_LACKS.items()
    ),
    ModelRule("hf_config", _no_state_space, "state-space or linear-attention layers"),
    ModelRule("sliding_window_size", _no_sliding_window, "sliding-window attention"),
    ModelRule(
        "v_head_dim",
        lambda model, _on_gpu: model.v_head_dim == model.head_dim,
        "values of another width than keys",
    ),
    ModelRule(
        "head_dim",
        _head_dim_fits,
        f"head_dim other than {GPU_HEAD_DIMS} (on a CPU: multiples of 16)",
    ),
    ModelRule(
        "num_key_value_heads",
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
    if on_gpu is None:
        on_gpu = not no_accelerator()
    problems = []
    values = [read_field(model_config, rule.attribute) for rule in MODEL_RULES]
    for rule, value in zip(MODEL_RULES, values, strict=True):
        if not rule.supported(model_config, on_gpu):
            shown = isinstance(value, (bool, int, str))
            what = f" ({rule.attribute}={value!r})" if shown else ""
            problems.append(f"\n  {rule.feature}{what}")
    if problems:
        raise UnsupportedModeError(
            f"KV-Compress does not serve {model_config.model_path}:"
            f"{''.join(problems)}\nServe it without --kv-compress."
        )
