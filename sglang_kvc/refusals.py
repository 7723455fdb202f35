"""What KV-Compress does not serve, refused by name at start-up.

One row for each setting of SGLang and each property of a model. A row that no longer
matches a field of SGLang is an error of its own: a check must never pass because its
subject was renamed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_kvc.compat import no_accelerator
from sglang_kvc.errors import SeamDriftError, UnsupportedModeError
from sglang_kvc.options import PAGE_SIZE

GPU_HEAD_DIMS = (64, 96, 128)
MAX_GROUP_SIZE = 8


@dataclass(frozen=True)
class Rule:
    """A setting of ``ServerArgs`` and the values that KV-Compress serves.

    Parameters
    ----------
    field : str
        Field of ServerArgs; dots reach into a nested record of the resolved object.
    supported : callable
        Whether a value is served; must hold for SGLang's default.
    feature : str
        What is not served, in words.
    instead : str
        What the user can do.
    """

    field: str
    supported: Callable[[Any], bool]
    feature: str
    instead: str = "leave it out"


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


def _off(value: Any) -> bool:
    return not value


def _at_most_one(value: int | None) -> bool:
    return value is None or value <= 1


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


def _device_matches_machine(value: str | None) -> bool:
    return value != "cpu" or no_accelerator()


def _no_rocm(value: str | None) -> bool:
    common = importlib.import_module("sglang.srt.utils.common")
    return value == "cpu" or not common.is_hip()


_NOT_ABOVE_ONE = {
    "tp_size": "tensor parallelism (untested)",
    "pp_size": "pipeline parallelism",
    "dcp_size": "decode context parallelism",
    "attn_cp_size": "context parallelism",
    "nnodes": "several nodes",
    "tokenizer_worker_num": "several tokenizer workers, which load no plugins",
}

_SWITCHED_OFF = {
    # Parallelism.
    "enable_prefill_cp": "prefill context parallelism",
    "enable_prefill_context_parallel": "prefill context parallelism",
    "enable_dsa_prefill_context_parallel": "prefill context parallelism",
    "enable_dp_attention": "data-parallel attention",
    "enable_two_batch_overlap": "two-batch overlap",
    "enable_pdmux": "prefill/decode multiplexing",
    "use_ray": "Ray, which copies ServerArgs without our options",
    "encoder_only": "encoder disaggregation",
    "language_only": "encoder disaggregation",
    # Ways of decoding.
    "speculative_algorithm": "speculative decoding",
    "dllm_algorithm": "diffusion language models",
    "enable_mixed_chunk": "decode rows mixed into a prefill chunk",
    "enable_mis": "multi-item scoring",
    "is_embedding": "embedding models",
    "enable_torch_compile": "torch.compile",
    "enable_deterministic_inference": "deterministic inference",
    "rl_on_policy_target": "on-policy inference for training",
    "enable_return_routed_experts": "capture of routed experts",
    "enable_return_indexer_topk": "capture of the sparse indexer",
    "prefill_attention_backend": "a separate prefill attention backend",
    "decode_attention_backend": "a separate decode attention backend",
    # KV cache: these move, share or describe KV pages in SGLang's own layout.
    "prefill_only_disable_kv_cache": "prefill without a KV cache",
    "enable_page_major_kv_layout": "page-major KV layout",
    "enable_unified_memory": "unified memory pool",
    "enable_memory_saver": "memory saver",
    "enable_hierarchical_cache": "hierarchical cache",
    "hicache_storage_backend": "hierarchical cache",
    "enable_lmcache": "LMCache",
    "enable_flexkv": "FlexKV",
    "enable_hisparse": "HiSparse",
    "kv_events_config": "KV cache events",
    # Prefix cache and sessions.
    "enable_streaming_session": "streaming sessions",
    "enable_session_radix_cache": "session radix cache",
    "strip_thinking_cache": "prefix cache without thinking tokens",
}

_ONE_OF: dict[str, tuple[str, tuple[Any, ...]]] = {
    "device": ("this device", (None, "cuda", "cpu")),
    "page_size": ("another page size", (None, PAGE_SIZE)),
    "kv_cache_dtype": ("a quantised KV cache", ("auto", "bf16", "bfloat16")),
    "disaggregation_mode": ("prefill/decode disaggregation", (None, "null")),
    "decoupled_spec_role": ("speculative decoding", (None, "null")),
    "kv_canary": ("KV canary", (None, "none")),
    "cuda_graph_backend_prefill": ("this graph", (None, "disabled", "breakable")),
    "cuda_graph_backend_decode": ("this graph", (None, "disabled", "full")),
    "cuda_graph_config.prefill.backend": ("this graph", ("disabled", "breakable")),
    "cuda_graph_config.decode.backend": ("this graph", ("disabled", "full")),
}


def _among(values: tuple[Any, ...]) -> str:
    return f"use {' or '.join(str(value) for value in values if value is not None)}"


RULES = (
    *(Rule(name, _at_most_one, it, "use 1") for name, it in _NOT_ABOVE_ONE.items()),
    *(Rule(name, _off, it) for name, it in _SWITCHED_OFF.items()),
    *(
        Rule(name, _one_of(*values), it, _among(values))
        for name, (it, values) in _ONE_OF.items()
    ),
    Rule("device", _no_rocm, "AMD GPU", "use an NVIDIA GPU"),
    Rule(
        "device",
        _device_matches_machine,
        "CPU mode on a machine with a GPU",
        "hide the GPU with CUDA_VISIBLE_DEVICES=''",
    ),
    Rule(
        "schedule_policy",
        lambda value: value != "dfs-weight",
        "dfs-weight scheduling",
        "use fcfs or lpm",
    ),
)


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


def refuse_unsupported(server_args: Any) -> None:
    """Refuse resolved settings (ServerArgs) that KV-Compress does not serve.

    Raises
    ------
    UnsupportedModeError
        Listing every offending setting.
    SeamDriftError
        If ServerArgs lacks a field that has to be checked.
    """
    raise_if_any(_problems((rule, _read(server_args, rule.field)) for rule in RULES))


def unsupported_values(given: Mapping[str, Any]) -> list[str]:
    """One sentence for each raw argument that KV-Compress does not serve."""
    return _problems((rule, given[rule.field]) for rule in RULES if rule.field in given)


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
    values = [_read(model_config, rule.attribute) for rule in MODEL_RULES]
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


def raise_if_any(problems: list[str]) -> None:
    """Raise UnsupportedModeError with one line for each problem, if there are any."""
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise UnsupportedModeError(f"KV-Compress does not serve these settings:{lines}")


def _problems(values: Iterable[tuple[Rule, Any]]) -> list[str]:
    return [
        f"{rule.feature} ({rule.field}={value!r}): {rule.instead}"
        for rule, value in values
        if not rule.supported(value)
    ]


def _read(record: Any, path: str) -> Any:
    for name in path.split("."):
        if not hasattr(record, name):
            raise SeamDriftError(
                f"{type(record).__name__} of the installed SGLang has no {name} "
                f"({path}), which KV-Compress must check. Install a supported SGLang, "
                "or adapt sglang_kvc/refusals.py."
            )
        record = getattr(record, name)
    return record
