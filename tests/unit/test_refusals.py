"""Refusals against the real fields of ServerArgs and ModelConfig."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kvc.config.refusals import RULES, refuse_unsupported, unsupported_values
from sglang_kvc.config.refusals_model import MODEL_RULES, refuse_unsupported_model
from sglang_kvc.config.rules import Facts, Rule, complaints, off, value_rule
from sglang_kvc.errors import SeamDriftError, Section, UnsupportedModeError, pointed
from sglang_kvc.upstream import compat
from sglang_kvc.upstream.compat import in_force
from tests.doubles import LLAMA
from tests.unit.test_docs import GUIDE, anchors

INSTALLED = [rule for rule in RULES if in_force(rule.since, rule.until)]

CASES: list[tuple[str, Any]] = [
    ("device", "xpu"),
    ("pp_size", 2),
    ("dcp_size", 2),
    ("attn_cp_size", 2),
    ("attn_dp_size", 2),
    ("tokenizer_worker_num", 2),
    ("speculative_algorithm", "EAGLE"),
    ("decoupled_spec_role", "drafter"),
    ("uno_lora_path", "draft"),
    ("dllm_algorithm", "LowConfidence"),
    ("rl_on_policy_target", "fsdp"),
    ("prefill_attention_backend", "fa3"),
    ("decode_attention_backend", "triton"),
    ("hicache_storage_backend", "file"),
    ("kv_events_config", "{}"),
    ("page_size", 1),
    ("kv_cache_dtype", "fp8_e5m2"),
    ("kv_cache_dtype", "mxfp8"),
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
            "enable_cp_tp_group_sharing",
            "enable_kv_cache_sharding",
            "enable_pd_role_switch",
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
            "enable_return_aux_hidden_states",
            "enable_nvidia_megakernel",
            "enable_amd_monokernel",
            "enable_watermark",
            "prefill_only_disable_kv_cache",
            "enable_page_major_kv_layout",
            "enable_unified_memory",
            "enable_memory_saver",
            "enable_hierarchical_cache",
            "enable_lmcache",
            "enable_flexkv",
            "enable_unified_cache_external_linker",
            "enable_linker_mla_dedup",
            "enable_hisparse",
            "enable_encoder_swa_bounded_replay",
            "enable_decoder_swa_bounded_replay",
            "enable_streaming_session",
            "enable_session_radix_cache",
            "strip_thinking_cache",
        )
    ],
]
"""A value that is refused for each setting of any release."""

REFUSED = [case for case in CASES if case[0] in {rule.name for rule in INSTALLED}]

ALLOWED: list[tuple[str, Any]] = [
    ("enable_lora", True),
    ("dp_size", 2),
    ("disable_radix_cache", True),
    ("disable_overlap_schedule", True),
    ("chunked_prefill_size", 64),
    ("kv_cache_dtype", "bf16"),
    ("kv_cache_dtype", "fp8_e4m3"),
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

    # A dataclass, or a msgspec Struct whose fields are descriptors.
    signature = inspect.signature(ServerArgs).parameters
    values = {name: given.default for name, given in signature.items()}
    phases = {
        "prefill": SimpleNamespace(backend="disabled"),
        "decode": SimpleNamespace(backend="full"),
    }
    return SimpleNamespace(**{**values, "cuda_graph_config": SimpleNamespace(**phases)})


def test_defaults_are_served(defaults: SimpleNamespace) -> None:
    refuse_unsupported(defaults)


def test_every_rule_has_a_case() -> None:
    cases = {name for name, _ in CASES}
    assert all(rule.path == f"server_args.{rule.name}" for rule in RULES)
    nested = {rule.name for rule in RULES if "." in rule.name}
    assert cases == {rule.name for rule in RULES} - nested
    assert nested == {
        "cuda_graph_config.prefill.backend",
        "cuda_graph_config.decode.backend",
    }


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_settings_of_other_releases_are_gone_there(
    defaults: SimpleNamespace, rule: Rule
) -> None:
    assert hasattr(defaults, rule.name.partition(".")[0]) == (rule in INSTALLED)


@pytest.mark.parametrize(
    ("version", "found"),
    [
        ("0.5.17", {"old"}),
        ("0.5.21", {"old"}),
        ("0.5.22", {"new"}),
        ("0.5.23", {"new", "newest"}),
    ],
)
def test_rules_of_another_release_are_skipped(
    monkeypatch: pytest.MonkeyPatch, version: str, found: set[str]
) -> None:
    monkeypatch.setattr(compat, "sglang_version", lambda: version)
    rules = [
        value_rule("server_args.old", off, "old", until="0.5.22"),
        value_rule("server_args.new", off, "new", since="0.5.22"),
        value_rule("server_args.newest", off, "newest", since="0.5.23"),
    ]
    # Not even looked at: the other fields do not exist.
    facts = Facts(SimpleNamespace(**dict.fromkeys(found, True)), on_gpu=False)
    assert complaints(rules, facts) == [f"{n} ({n}=True)" for n in sorted(found)]


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
    monkeypatch.setattr("sglang_kvc.config.rules.no_accelerator", lambda: False)
    defaults.device = "cpu"
    with pytest.raises(UnsupportedModeError, match="CUDA_VISIBLE_DEVICES"):
        refuse_unsupported(defaults)


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
    "name",
    [
        "attn_logit_softcapping",
        "dual_chunk_attention_config",
        "sparse_attention_config",
        "sparse_config",
    ],
)
def test_model_config_entry_refused(model: Any, name: str) -> None:
    setattr(model.hf_text_config, name, {"on": 1})
    with pytest.raises(UnsupportedModeError):
        refuse_unsupported_model(model, on_gpu=False)


def test_gpu_kernels_are_narrower_than_the_reference(model: Any) -> None:
    model.head_dim = model.v_head_dim = 32
    refuse_unsupported_model(model, on_gpu=False)
    with pytest.raises(UnsupportedModeError, match="head_dim=32"):
        refuse_unsupported_model(model, on_gpu=True)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_ring_holds_sixteen_query_heads_of_a_kv_head(
    model: Any, on_gpu: bool
) -> None:
    model.num_attention_heads, model.num_key_value_heads = 32, 2
    refuse_unsupported_model(model, on_gpu=on_gpu)
    model.num_attention_heads = 34
    with pytest.raises(UnsupportedModeError, match="num_key_value_heads=2"):
        refuse_unsupported_model(model, on_gpu=on_gpu)


def test_harmless_sliding_windows(model: Any) -> None:
    model.sliding_window_size = model.context_len
    refuse_unsupported_model(model, on_gpu=False)
    model.sliding_window_size = 128
    model.hf_text_config.use_sliding_window = False
    refuse_unsupported_model(model, on_gpu=False)


def test_heads_that_sglang_has_made_up_are_refused(model: Any) -> None:
    """On a CPU it adds heads of zeros until --tp-size divides their number."""
    own = model.num_key_value_heads
    model.hf_text_config.original_total_num_kv_heads = own
    refuse_unsupported_model(model, on_gpu=False)
    model.num_key_value_heads = model.num_attention_heads = own + 1
    with pytest.raises(UnsupportedModeError, match="--tp-size"):
        refuse_unsupported_model(model, on_gpu=False)


def test_state_space_layers(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.configs import hybrid_arch

    monkeypatch.setattr(hybrid_arch, "mambaish_config", lambda _model: object())
    with pytest.raises(UnsupportedModeError, match="state-space"):
        refuse_unsupported_model(model, on_gpu=False)


def test_renamed_model_attribute_is_an_error(model: Any) -> None:
    for rule in MODEL_RULES:
        partial = copy.copy(model)
        delattr(partial, rule.name)
        with pytest.raises(SeamDriftError, match=rule.name):
            refuse_unsupported_model(partial, on_gpu=False)


@pytest.mark.parametrize("section", Section, ids=lambda section: section.name)
def test_every_pointer_leads_into_the_guide(section: Section) -> None:
    assert section.value in anchors(GUIDE)
    message = pointed("x must be 1", section)
    assert message == f"x must be 1. See docs/guide.md#{section.value}"
    assert pointed(message, Section.FLAGS) == message, "one pointer is enough"


def test_refusals_end_with_a_pointer(defaults: SimpleNamespace, model: Any) -> None:
    defaults.pp_size, model.is_multimodal = 2, True
    with pytest.raises(UnsupportedModeError) as settings:
        refuse_unsupported(defaults)
    with pytest.raises(UnsupportedModeError) as of_model:
        refuse_unsupported_model(model, on_gpu=False)
    assert str(settings.value).endswith("\nSee docs/guide.md#works-refused-untested")
    assert str(of_model.value).endswith(
        "\nServe it without --kv-compress.\nSee docs/guide.md#models"
    )
    assert pickle.loads(pickle.dumps(settings.value)).args == settings.value.args
