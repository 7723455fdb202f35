"""Settings of SGLang that KV-Compress does not serve, refused by name at start-up.

One row for each setting; `refusals_model` has those for models.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from sglang_kvc.config.pages import PAGE_SIZE
from sglang_kvc.config.rules import (
    Facts,
    Rule,
    complaints,
    off,
    one_of,
    refuse,
    value_rule,
)
from sglang_kvc.errors import Section


def _at_most_one(value: int | None) -> bool:
    return value is None or value <= 1


def _device_matches_machine(facts: Facts) -> bool:
    return facts.server_args.device != "cpu" or not facts.on_gpu


def _no_rocm(value: str | None) -> bool:
    common = importlib.import_module("sglang.srt.utils.common")
    return value == "cpu" or not common.is_hip()


_NOT_ABOVE_ONE = {
    "pp_size": "pipeline parallelism",
    "dcp_size": "decode context parallelism",
    "attn_cp_size": "context parallelism",
    "attn_dp_size": "data-parallel attention",
    "tokenizer_worker_num": "several tokenizer workers, which load no plugins",
}

_SWITCHED_OFF = {
    # Parallelism.
    "enable_prefill_cp": "prefill context parallelism",
    "enable_prefill_context_parallel": "prefill context parallelism",
    "enable_dsa_prefill_context_parallel": "prefill context parallelism",
    "enable_dp_attention": "data-parallel attention",
    "enable_two_batch_overlap": "two-batch overlap",
    "enable_cp_tp_group_sharing": "context parallelism",
    "enable_kv_cache_sharding": "a KV cache in shards",
    "enable_pdmux": "prefill/decode multiplexing",
    "enable_pd_role_switch": "prefill/decode disaggregation",
    "use_ray": "Ray, which copies ServerArgs without our options",
    "encoder_only": "encoder disaggregation",
    "language_only": "encoder disaggregation",
    # Ways of decoding.
    "speculative_algorithm": "speculative decoding",
    "uno_lora_path": "speculative decoding",
    "dllm_algorithm": "diffusion language models",
    "enable_mixed_chunk": "decode rows mixed into a prefill chunk",
    "enable_mis": "multi-item scoring",
    "is_embedding": "embedding models",
    "enable_torch_compile": "torch.compile",
    "enable_deterministic_inference": "deterministic inference",
    "rl_on_policy_target": "on-policy inference for training",
    "enable_return_routed_experts": "capture of routed experts",
    "enable_return_indexer_topk": "capture of the sparse indexer",
    "enable_return_aux_hidden_states": "capture of hidden states between layers",
    "enable_nvidia_megakernel": "a megakernel, which replaces attention",
    "enable_amd_monokernel": "a monokernel, which replaces attention",
    "enable_watermark": "watermarks (untested)",
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
    "enable_unified_cache_external_linker": "an external KV store",
    "enable_linker_mla_dedup": "an external KV store",
    "enable_hisparse": "HiSparse",
    "enable_encoder_swa_bounded_replay": "bounded replay of sliding windows",
    "enable_decoder_swa_bounded_replay": "bounded replay of sliding windows",
    "kv_events_config": "KV cache events",
    # Prefix cache and sessions.
    "enable_streaming_session": "streaming sessions",
    "enable_session_radix_cache": "session radix cache",
    "strip_thinking_cache": "prefix cache without thinking tokens",
}

_ONE_OF: dict[str, tuple[str, tuple[Any, ...]]] = {
    "device": ("this device", (None, "cuda", "cpu")),
    "page_size": ("another page size", (None, PAGE_SIZE)),
    "kv_cache_dtype": ("this KV cache", ("auto", "bf16", "bfloat16", "fp8_e4m3")),
    "disaggregation_mode": ("prefill/decode disaggregation", (None, "null")),
    "decoupled_spec_role": ("speculative decoding", (None, "null")),
    "kv_canary": ("KV canary", (None, "none")),
    "cuda_graph_backend_prefill": ("this graph", (None, "disabled", "breakable")),
    "cuda_graph_backend_decode": ("this graph", (None, "disabled", "full")),
    "cuda_graph_config.prefill.backend": ("this graph", ("disabled", "breakable")),
    "cuda_graph_config.decode.backend": ("this graph", ("disabled", "full")),
}

_SINCE = {
    "enable_unified_cache_external_linker": "0.5.20",
    "uno_lora_path": "0.5.20",
    "enable_pd_role_switch": "0.5.21",
    "enable_encoder_swa_bounded_replay": "0.5.21",
    "enable_decoder_swa_bounded_replay": "0.5.21",
    "enable_linker_mla_dedup": "0.5.21",
    "attn_dp_size": "0.5.22",
    "enable_kv_cache_sharding": "0.5.22",
    "enable_cp_tp_group_sharing": "0.5.22",
    "enable_watermark": "0.5.22",
    "enable_nvidia_megakernel": "0.5.23",
    "enable_amd_monokernel": "0.5.23",
    "enable_return_aux_hidden_states": "0.5.23",
}
"""First release that has the setting, where it is not the oldest that we support."""

_UNTIL = {
    # Then `enable_prefill_cp` says it.
    "enable_prefill_context_parallel": "0.5.20",
    "enable_dsa_prefill_context_parallel": "0.5.20",
}
"""First release that no longer has the setting."""


def _among(values: tuple[Any, ...]) -> str:
    return f"use {' or '.join(str(value) for value in values if value is not None)}"


def _setting(name: str) -> str:
    return f"server_args.{name}"


def _rule(name: str, served: Callable[[Any], bool], feature: str, instead: str) -> Rule:
    span = {"since": _SINCE.get(name, ""), "until": _UNTIL.get(name, "")}
    return value_rule(_setting(name), served, feature, instead, **span)


RULES = (
    *(_rule(name, _at_most_one, it, "use 1") for name, it in _NOT_ABOVE_ONE.items()),
    *(_rule(name, off, it, "leave it out") for name, it in _SWITCHED_OFF.items()),
    *(
        _rule(name, one_of(*values), it, _among(values))
        for name, (it, values) in _ONE_OF.items()
    ),
    value_rule(_setting("device"), _no_rocm, "AMD GPU", "use an NVIDIA GPU"),
    Rule(
        _setting("device"),
        _device_matches_machine,
        "CPU mode on a machine with a GPU",
        "hide the GPU with CUDA_VISIBLE_DEVICES=''",
    ),
    value_rule(
        _setting("schedule_policy"),
        lambda value: value != "dfs-weight",
        "dfs-weight scheduling",
        "use fcfs or lpm",
    ),
)


def refuse_settings(found: Iterable[str]) -> None:
    """Refuse settings with one line for each complaint, if there are any.

    Raises
    ------
    UnsupportedModeError
        With all complaints.
    """
    refuse("these settings", found, Section.SETTINGS)


def refuse_unsupported(server_args: Any) -> None:
    """Refuse resolved settings that KV-Compress does not serve.

    Parameters
    ----------
    server_args : Any
        What will be in force, by attribute: `Generation.resolved`.

    Raises
    ------
    UnsupportedModeError
        Listing every offending setting.
    SeamDriftError
        If ServerArgs lacks a field that has to be checked.
    """
    refuse_settings(complaints(RULES, Facts(server_args)))


def unsupported_values(given: Mapping[str, Any]) -> list[str]:
    """One sentence for each raw argument that KV-Compress does not serve."""
    rules = [rule for rule in RULES if rule.name in given]
    return complaints(rules, Facts(SimpleNamespace(**given)))
