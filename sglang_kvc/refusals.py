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
        What the setting is about, in words.
    instead : str
        What the user can do.
    """

    field: str
    supported: Callable[[Any], bool]
    feature: str
    instead: str = "switch it off"


def _off(value: Any) -> bool:
    return not value


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


def _at_most_one(value: int | None) -> bool:
    return value is None or value <= 1


def _device_matches_machine(value: str | None) -> bool:
    return value != "cpu" or no_accelerator()


def _no_rocm(value: str | None) -> bool:
    common = importlib.import_module("sglang.srt.utils.common")
    return value == "cpu" or not common.is_hip()


_ONE = "use 1"
_PAGED_OUT = "it moves or shares KV pages in SGLang's own layout; switch it off"

RULES = (
    # Machine and parallelism.
    Rule(
        "device", _one_of(None, "cuda", "cpu"), "device", "use cuda, or cpu for tests"
    ),
    Rule("device", _no_rocm, "AMD GPU", "use an NVIDIA GPU"),
    Rule(
        "device",
        _device_matches_machine,
        "CPU mode on a machine with a GPU",
        "hide the GPU: CUDA_VISIBLE_DEVICES=''",
    ),
    Rule(
        "tp_size",
        _at_most_one,
        "tensor parallelism",
        "use 1: larger sizes are untested",
    ),
    Rule("pp_size", _at_most_one, "pipeline parallelism", _ONE),
    Rule("dcp_size", _at_most_one, "decode context parallelism", _ONE),
    Rule("attn_cp_size", _at_most_one, "context parallelism", _ONE),
    Rule("nnodes", _at_most_one, "several nodes", _ONE),
    Rule("enable_prefill_cp", _off, "prefill context parallelism"),
    Rule("enable_prefill_context_parallel", _off, "prefill context parallelism"),
    Rule("enable_dsa_prefill_context_parallel", _off, "prefill context parallelism"),
    Rule("enable_dp_attention", _off, "data-parallel attention"),
    Rule("enable_two_batch_overlap", _off, "two-batch overlap"),
    Rule("enable_pdmux", _off, "prefill/decode multiplexing"),
    Rule("use_ray", _off, "Ray, which copies ServerArgs without our options"),
    Rule(
        "tokenizer_worker_num",
        _at_most_one,
        "several tokenizer workers, which load no plugins",
        _ONE,
    ),
    # Ways of decoding.
    Rule("speculative_algorithm", _off, "speculative decoding"),
    Rule("decoupled_spec_role", _one_of(None, "null"), "speculative decoding"),
    Rule("dllm_algorithm", _off, "diffusion language models"),
    Rule("enable_mixed_chunk", _off, "decode rows mixed into a prefill chunk"),
    Rule("enable_mis", _off, "multi-item scoring"),
    Rule("is_embedding", _off, "embedding models"),
    Rule("enable_torch_compile", _off, "torch.compile"),
    Rule("enable_deterministic_inference", _off, "deterministic inference"),
    Rule("rl_on_policy_target", _off, "on-policy inference for training"),
    Rule("enable_return_routed_experts", _off, "capture of routed experts"),
    Rule("enable_return_indexer_topk", _off, "capture of the sparse indexer"),
    # Attention and graphs.
    Rule("prefill_attention_backend", _off, "a separate prefill attention backend"),
    Rule("decode_attention_backend", _off, "a separate decode attention backend"),
    Rule(
        "cuda_graph_backend_prefill",
        _one_of(None, "disabled", "breakable"),
        "prefill CUDA graphs other than breakable",
        "use disabled, the default with --kv-compress",
    ),
    Rule(
        "cuda_graph_config.prefill.backend",
        _one_of("disabled", "breakable"),
        "prefill CUDA graphs other than breakable",
        "use disabled, the default with --kv-compress",
    ),
    Rule(
        "cuda_graph_backend_decode",
        _one_of(None, "full", "disabled"),
        "decode CUDA graphs other than full",
        "use full or disabled",
    ),
    Rule(
        "cuda_graph_config.decode.backend",
        _one_of("full", "disabled"),
        "decode CUDA graphs other than full",
        "use full or disabled",
    ),
    # KV cache.
    Rule("page_size", _one_of(None, 16), "page size other than 16", "leave it out"),
    Rule(
        "kv_cache_dtype",
        _one_of("auto", "bf16", "bfloat16"),
        "quantised KV cache",
        "use auto or bf16",
    ),
    Rule("prefill_only_disable_kv_cache", _off, "prefill without a KV cache"),
    Rule("enable_page_major_kv_layout", _off, "page-major KV layout"),
    Rule("enable_unified_memory", _off, "unified memory pool"),
    Rule("enable_memory_saver", _off, "memory saver"),
    Rule("enable_hierarchical_cache", _off, "hierarchical cache", _PAGED_OUT),
    Rule("hicache_storage_backend", _off, "hierarchical cache", _PAGED_OUT),
    Rule("enable_lmcache", _off, "LMCache", _PAGED_OUT),
    Rule("enable_flexkv", _off, "FlexKV", _PAGED_OUT),
    Rule("enable_hisparse", _off, "HiSparse", _PAGED_OUT),
    Rule(
        "disaggregation_mode",
        _one_of(None, "null"),
        "prefill/decode disaggregation",
        _PAGED_OUT,
    ),
    Rule("kv_events_config", _off, "KV cache events"),
    Rule("kv_canary", _one_of(None, "none"), "KV canary"),
    # Prefix cache and sessions.
    Rule("enable_streaming_session", _off, "streaming sessions"),
    Rule("enable_session_radix_cache", _off, "session radix cache"),
    Rule("strip_thinking_cache", _off, "cache without thinking tokens"),
    Rule(
        "schedule_policy",
        lambda value: value != "dfs-weight",
        "dfs-weight scheduling",
        "use fcfs or lpm",
    ),
    # Encoders.
    Rule("encoder_only", _off, "encoder disaggregation"),
    Rule("language_only", _off, "encoder disaggregation"),
)


def refuse_unsupported(server_args: Any) -> None:
    """Refuse resolved settings that KV-Compress does not serve.

    Parameters
    ----------
    server_args : sglang.srt.server_args.ServerArgs

    Raises
    ------
    UnsupportedModeError
        Listing every offending setting.
    SeamDriftError
        If ServerArgs lacks a field that has to be checked.
    """
    _refuse((rule, _read(server_args, rule.field)) for rule in RULES)


def refuse_unsupported_values(values: Mapping[str, Any]) -> None:
    """Refuse raw arguments that KV-Compress does not serve.

    Parameters
    ----------
    values : Mapping
        Raw arguments by field name; absent ones and None mean "not given".

    Raises
    ------
    UnsupportedModeError
        Listing every offending argument.
    """
    given = {name: value for name, value in values.items() if value is not None}
    _refuse((rule, given[rule.field]) for rule in RULES if rule.field in given)


def _refuse(values: Iterable[tuple[Rule, Any]]) -> None:
    problems = [
        f"{rule.feature} ({rule.field}={value!r}): {rule.instead}"
        for rule, value in values
        if not rule.supported(value)
    ]
    if problems:
        raise UnsupportedModeError(
            "KV-Compress does not serve these settings:\n  " + "\n  ".join(problems)
        )


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


def _no_sliding_window(model: Any, _on_gpu: bool) -> bool:
    window = model.sliding_window_size or 0
    switched_off = getattr(model.hf_text_config, "use_sliding_window", None) is False
    return window <= 0 or window >= model.context_len or switched_off


def _no_state_space(model: Any, _on_gpu: bool) -> bool:
    hybrid = importlib.import_module("sglang.srt.configs.hybrid_arch")
    return hybrid.mambaish_config(model) is None


def _group_size_fits(model: Any, on_gpu: bool) -> bool:
    size, rest = divmod(model.num_attention_heads, model.num_key_value_heads)
    return rest == 0 and (size <= MAX_GROUP_SIZE or not on_gpu)


def _head_dim_fits(model: Any, on_gpu: bool) -> bool:
    if on_gpu:
        return model.head_dim in GPU_HEAD_DIMS
    return bool(model.head_dim % 16 == 0)


def _config_lacks(name: str) -> Callable[[Any, bool], bool]:
    return lambda model, _on_gpu: not getattr(model.hf_text_config, name, None)


def _attribute_off(name: str) -> Callable[[Any, bool], bool]:
    return lambda model, _on_gpu: not getattr(model, name)


MODEL_RULES = (
    ModelRule(
        "attention_arch",
        lambda model, _on_gpu: model.attention_arch.name == "MHA",
        "multi-head latent attention",
    ),
    ModelRule(
        "is_generation",
        lambda model, _on_gpu: model.is_generation,
        "no text generation",
    ),
    *(
        ModelRule(name, _attribute_off(name), feature)
        for name, feature in (
            ("is_encoder_decoder", "encoder-decoder"),
            ("is_multimodal", "image, audio or video input"),
            ("is_hybrid_swa", "sliding-window layers"),
            ("is_local_attention_model", "chunked local attention"),
            ("attention_chunk_size", "chunked local attention"),
            ("has_attention_sinks", "learned attention sinks"),
        )
    ),
    ModelRule("sliding_window_size", _no_sliding_window, "sliding-window attention"),
    ModelRule(
        "hf_config.architectures", _no_state_space, "state-space or linear layers"
    ),
    ModelRule(
        "hf_text_config",
        _config_lacks("attn_logit_softcapping"),
        "soft-capped attention logits",
    ),
    ModelRule(
        "hf_text_config",
        _config_lacks("dual_chunk_attention_config"),
        "dual-chunk attention",
    ),
    ModelRule(
        "v_head_dim",
        lambda model, _on_gpu: model.v_head_dim == model.head_dim,
        "values of another width than keys",
    ),
    ModelRule(
        "head_dim",
        _head_dim_fits,
        f"head_dim not in {GPU_HEAD_DIMS} (on a CPU: not a multiple of 16)",
    ),
    ModelRule(
        "num_key_value_heads",
        _group_size_fits,
        f"not 1 to {MAX_GROUP_SIZE} query heads per KV head",
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
    for rule in MODEL_RULES:
        value = _read(model_config, rule.attribute)
        if not rule.supported(model_config, on_gpu):
            shown = (
                f" ({rule.attribute}={value!r})" if "hf_" not in rule.attribute else ""
            )
            problems.append(rule.feature + shown)
    if problems:
        raise UnsupportedModeError(
            f"KV-Compress does not serve {model_config.model_path}:\n  "
            + "\n  ".join(problems)
            + "\nServe it without --kv-compress."
        )
