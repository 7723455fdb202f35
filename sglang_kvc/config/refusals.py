"""Settings of SGLang that KV-Compress does not serve, refused by name at start-up.

One row for each setting; `refusals_model` has those for models. A row that no longer
matches a field of SGLang is an error of its own: a check must never pass because its
subject was renamed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_kvc.config.options import PAGE_SIZE
from sglang_kvc.errors import SeamDriftError, UnsupportedModeError
from sglang_kvc.upstream.compat import no_accelerator


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


def refuse_unsupported(server_args: Any) -> None:
    """Refuse resolved settings (ServerArgs) that KV-Compress does not serve.

    Raises
    ------
    UnsupportedModeError
        Listing every offending setting.
    SeamDriftError
        If ServerArgs lacks a field that has to be checked.
    """
    raise_if_any(
        _problems((rule, read_field(server_args, rule.field)) for rule in RULES)
    )


def unsupported_values(given: Mapping[str, Any]) -> list[str]:
    """One sentence for each raw argument that KV-Compress does not serve."""
    return _problems((rule, given[rule.field]) for rule in RULES if rule.field in given)


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


def read_field(record: Any, path: str) -> Any:
    """Value at a dotted path; SeamDriftError if SGLang has no such field."""
    for name in path.split("."):
        if not hasattr(record, name):
            raise SeamDriftError(
                f"{type(record).__name__} of the installed SGLang has no {name} "
                f"({path}), which KV-Compress must check. Install a supported SGLang, "
                "or adapt sglang_kvc/config/refusals.py."
            )
        record = getattr(record, name)
    return record
