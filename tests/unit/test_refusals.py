"""Refusals against the real fields of ServerArgs and ModelConfig."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kvc.config.refusals import RULES, refuse_unsupported, unsupported_values
from sglang_kvc.config.refusals_model import MODEL_RULES, refuse_unsupported_model
from sglang_kvc.errors import SeamDriftError, UnsupportedModeError

REFUSED: list[tuple[str, Any]] = [
    ("device", "xpu"),
    ("tp_size", 2),
    ("pp_size", 2),
    ("dcp_size", 2),
    ("attn_cp_size", 2),
    ("nnodes", 2),
    ("tokenizer_worker_num", 2),
    ("speculative_algorithm", "EAGLE"),
    ("decoupled_spec_role", "drafter"),
    ("dllm_algorithm", "LowConfidence"),
    ("rl_on_policy_target", "fsdp"),
    ("prefill_attention_backend", "fa3"),
    ("decode_attention_backend", "triton"),
    ("hicache_storage_backend", "file"),
    ("kv_events_config", "{}"),
    ("page_size", 1),
    ("kv_cache_dtype", "fp8_e4m3"),
    ("disaggregation_mode", "prefill"),
    ("kv_canary", "log"),
    ("cuda_graph_backend_prefill", "full"),
    ("cuda_graph_backend_prefill", "tc_piecewise"),
    ("cuda_graph_backend_decode", "breakable"),
    ("schedule_policy", "dfs-weight"),
    *[
        (name, True)
        for name in (
            "enable_prefill_cp",
            "enable_prefill_context_parallel",
            "enable_dsa_prefill_context_parallel",
            "enable_dp_attention",
            "enable_two_batch_overlap",
            "enable_pdmux",
            "use_ray",
            "encoder_only",
            "language_only",
            "enable_mixed_chunk",
            "enable_mis",
            "is_embedding",
            "enable_torch_compile",
            "enable_deterministic_inference",
            "enable_return_routed_experts",
            "enable_return_indexer_topk",
            "prefill_only_disable_kv_cache",
            "enable_page_major_kv_layout",
            "enable_unified_memory",
            "enable_memory_saver",
            "enable_hierarchical_cache",
            "enable_lmcache",
            "enable_flexkv",
            "enable_hisparse",
            "enable_streaming_session",
            "enable_session_radix_cache",
            "strip_thinking_cache",
        )
    ],
]

ALLOWED: list[tuple[str, Any]] = [
    ("enable_lora", True),
    ("dp_size", 2),
    ("disable_radix_cache", True),
    ("disable_overlap_schedule", True),
    ("chunked_prefill_size", 64),
    ("kv_cache_dtype", "bf16"),
    ("page_size", 16),
    ("schedule_policy", "lpm"),
    ("cuda_graph_backend_prefill", "breakable"),
    ("cuda_graph_backend_decode", "full"),
    ("enable_metrics", True),
    ("radix_eviction_policy", "lfu"),
]


@pytest.fixture
def defaults() -> SimpleNamespace:
    """SGLang's defaults by field name, not resolved."""
    from sglang.srt.server_args import ServerArgs

    values = {f.name: f.default for f in dataclasses.fields(ServerArgs)}
    phases = {
        "prefill": SimpleNamespace(backend="disabled"),
        "decode": SimpleNamespace(backend="full"),
    }
    return SimpleNamespace(**{**values, "cuda_graph_config": SimpleNamespace(**phases)})


def test_defaults_are_served(defaults: SimpleNamespace) -> None:
    refuse_unsupported(defaults)


def test_every_rule_has_a_case() -> None:
    cases = {name for name, _ in REFUSED}
    nested = {rule.field for rule in RULES if "." in rule.field}
    assert cases == {rule.field for rule in RULES} - nested
    assert nested == {
        "cuda_graph_config.prefill.backend",
        "cuda_graph_config.decode.backend",
    }


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_refused_by_name(defaults: SimpleNamespace, name: str, value: Any) -> None:
    assert hasattr(defaults, name)
    setattr(defaults, name, value)
    with pytest.raises(UnsupportedModeError, match=f"\\({name}="):
        refuse_unsupported(defaults)
    assert any(f"({name}=" in line for line in unsupported_values({name: value}))


@pytest.mark.parametrize(("name", "value"), ALLOWED)
def test_served(defaults: SimpleNamespace, name: str, value: Any) -> None:
    setattr(defaults, name, value)
    refuse_unsupported(defaults)
    assert unsupported_values({name: value}) == []


@pytest.mark.parametrize(
    ("phase", "backend"), [("prefill", "full"), ("decode", "tc_piecewise")]
)
def test_resolved_graph_backends(
    defaults: SimpleNamespace, phase: str, backend: str
) -> None:
    getattr(defaults.cuda_graph_config, phase).backend = backend
    with pytest.raises(UnsupportedModeError, match=f"{phase}.backend='{backend}'"):
        refuse_unsupported(defaults)


def test_all_problems_are_listed_at_once(defaults: SimpleNamespace) -> None:
    defaults.pp_size, defaults.enable_lmcache = 4, True
    with pytest.raises(UnsupportedModeError) as error:
        refuse_unsupported(defaults)
    assert "(pp_size=4): use 1" in str(error.value)
    assert "(enable_lmcache=True): leave it out" in str(error.value)


def test_renamed_field_is_an_error(defaults: SimpleNamespace) -> None:
    del defaults.enable_lmcache
    with pytest.raises(SeamDriftError, match="enable_lmcache"):
        refuse_unsupported(defaults)


def test_cpu_mode_beside_a_gpu(
    defaults: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_kvc.config.refusals.no_accelerator", lambda: False)
    defaults.device = "cpu"
    with pytest.raises(UnsupportedModeError, match="CUDA_VISIBLE_DEVICES"):
        refuse_unsupported(defaults)


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """SGLang's ModelConfig of a small Llama."""
    from sglang.srt.configs.model_config import ModelConfig

    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return ModelConfig(str(tmp_path))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_llama_is_served(model: Any, on_gpu: bool) -> None:
    refuse_unsupported_model(model, on_gpu)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("attention_arch", SimpleNamespace(name="MLA"), "latent"),
        ("is_generation", False, "embedding"),
        ("is_encoder_decoder", True, "encoder-decoder"),
        ("is_multimodal", True, "image"),
        ("is_hybrid_swa", True, "sliding-window layers"),
        ("is_local_attention_model", True, "chunked local"),
        ("attention_chunk_size", 8192, "chunked local"),
        ("has_attention_sinks", True, "sinks"),
        ("sliding_window_size", 1024, "sliding-window attention"),
        ("v_head_dim", 128, "values of another width"),
        ("head_dim", 24, "head_dim"),
        ("num_key_value_heads", 3, "query heads per KV head"),
    ],
)
def test_model_refused_by_name(
    model: Any, attribute: str, value: Any, message: str
) -> None:
    setattr(model, attribute, value)
    with pytest.raises(UnsupportedModeError, match=message):
        refuse_unsupported_model(model, on_gpu=False)


@pytest.mark.parametrize(
    "name", ["attn_logit_softcapping", "dual_chunk_attention_config"]
)
def test_model_config_entry_refused(model: Any, name: str) -> None:
    setattr(model.hf_text_config, name, {"on": 1})
    with pytest.raises(UnsupportedModeError):
        refuse_unsupported_model(model, on_gpu=False)


def test_gpu_kernels_are_narrower_than_the_reference(model: Any) -> None:
    model.head_dim = model.v_head_dim = 32
    model.num_attention_heads, model.num_key_value_heads = 32, 2
    refuse_unsupported_model(model, on_gpu=False)
    with pytest.raises(UnsupportedModeError) as error:
        refuse_unsupported_model(model, on_gpu=True)
    assert "head_dim=32" in str(error.value)
    assert "num_key_value_heads=2" in str(error.value)


def test_harmless_sliding_windows(model: Any) -> None:
    model.sliding_window_size = model.context_len
    refuse_unsupported_model(model, on_gpu=False)
    model.sliding_window_size = 128
    model.hf_text_config.use_sliding_window = False
    refuse_unsupported_model(model, on_gpu=False)


def test_state_space_layers(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.configs import hybrid_arch

    monkeypatch.setattr(hybrid_arch, "mambaish_config", lambda _model: object())
    with pytest.raises(UnsupportedModeError, match="state-space"):
        refuse_unsupported_model(model, on_gpu=False)


def test_renamed_model_attribute_is_an_error(model: Any) -> None:
    for rule in MODEL_RULES:
        partial = copy.copy(model)
        delattr(partial, rule.attribute)
        with pytest.raises(SeamDriftError, match=rule.attribute):
            refuse_unsupported_model(partial, on_gpu=False)
