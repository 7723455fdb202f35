"""Configs of real models, as SGLang reads them: which are refused, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from sglang_kvc.config.refusals_model import refuse_unsupported_model
from sglang_kvc.errors import UnsupportedModeError

WINDOW = "sliding-window attention"
LATENT = ["multi-head latent attention", "values of another width than keys"]

REFUSED: list[tuple[str, str, dict[str, Any], list[str]]] = [
    ("Gemma2ForCausalLM", "Gemma2Config", {}, ["soft-capped attention logits", WINDOW]),
    ("Gemma3ForCausalLM", "Gemma3TextConfig", {}, [WINDOW]),
    ("Gemma3ForConditionalGeneration", "Gemma3Config", {}, [WINDOW]),
    ("Gemma3nForCausalLM", "Gemma3nTextConfig", {}, [WINDOW]),
    (
        "Gemma3nForConditionalGeneration",
        "Gemma3nConfig",
        {},
        ["image, audio or video input", WINDOW],
    ),
    # SGLang 0.5.23 reads no config of Gemma4ForCausalLM, which has no checkpoint.
    *(
        (
            f"{name}ForConditionalGeneration",
            f"{name}Config",
            {},
            ["image, audio or video input", "sliding-window layers", WINDOW],
        )
        for name in ("Gemma4", "Gemma4Unified")
    ),
    (
        "GptOssForCausalLM",
        "GptOssConfig",
        {},
        ["sliding-window layers", "learned attention sinks", WINDOW],
    ),
    ("DeepseekV2ForCausalLM", "DeepseekV2Config", {}, LATENT),
    ("DeepseekV3ForCausalLM", "DeepseekV3Config", {}, LATENT),
    (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {},
        ["state-space or linear-attention layers"],
    ),
    (
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        {},
        ["sliding-window layers", *["chunked local attention"] * 2],
    ),
    ("Cohere2ForCausalLM", "Cohere2Config", {}, [WINDOW]),
    ("Olmo3ForCausalLM", "Olmo3Config", {"max_position_embeddings": 65536}, [WINDOW]),
    ("MistralForCausalLM", "MistralConfig", {"sliding_window": 4096}, [WINDOW]),
    (
        "Phi3ForCausalLM",
        "Phi3Config",
        {"sliding_window": 2047, "max_position_embeddings": 4096},
        [WINDOW],
    ),
]
"""Architecture, class of its config, fields besides the defaults, all reasons."""

SERVED: list[tuple[str, str, tuple[int, int, int]]] = [
    ("Llama-3.1-8B", "Llama", (32, 8, 128)),
    ("Llama-3.1-70B", "Llama", (64, 8, 128)),
    ("Llama-3.2-1B", "Llama", (32, 8, 64)),
    ("Mistral-Nemo", "Mistral", (32, 8, 128)),
    ("Qwen2.5-0.5B", "Qwen2", (14, 2, 64)),
    ("Qwen2.5-7B", "Qwen2", (28, 4, 128)),
    ("Qwen3-8B", "Qwen3", (32, 8, 128)),
    ("Qwen3-30B-A3B", "Qwen3Moe", (32, 4, 128)),
    ("Qwen3-235B-A22B", "Qwen3Moe", (64, 4, 128)),
    ("Phi-3-mini-128k", "Phi3", (32, 32, 96)),
    ("Phi-4-mini", "Phi3", (24, 8, 128)),
    ("GLM-4-9B", "Glm4", (32, 2, 128)),
    ("Gemma-2B", "Gemma", (8, 1, 256)),
    ("Gemma-7B", "Gemma", (16, 16, 256)),
    ("OLMo-2-7B", "Olmo2", (32, 32, 128)),
    ("OLMo-2-32B", "Olmo2", (40, 8, 128)),
    ("Granite-3.1-2B", "Granite", (32, 8, 64)),
    ("Granite-3.1-8B", "Granite", (32, 8, 128)),
    ("MiniMax-M2", "MiniMaxM2", (48, 8, 128)),
]
"""Checkpoint, architecture, query heads, KV heads and head_dim."""


def model_config(folder: Path, architecture: str, config: Any, override: str) -> Any:
    """SGLang's ModelConfig of a checkpoint with this config."""
    from sglang.srt.configs.model_config import ModelConfig

    config.architectures = [architecture]
    config.save_pretrained(folder)
    return ModelConfig(str(folder), model_override_args=override)


@pytest.mark.parametrize(
    ("architecture", "config", "fields", "reasons"),
    REFUSED,
    ids=[architecture for architecture, *_ in REFUSED],
)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_refused_with_every_reason(
    tmp_path: Path,
    architecture: str,
    config: str,
    fields: dict[str, Any],
    reasons: list[str],
    on_gpu: bool,
) -> None:
    made = getattr(transformers, config)(**fields)
    model = model_config(tmp_path, architecture, made, "{}")
    with pytest.raises(UnsupportedModeError) as error:
        refuse_unsupported_model(model, on_gpu)
    told = [line.strip() for line in str(error.value).splitlines()[1:-2]]
    assert [line.partition(" (")[0] for line in told][: len(reasons)] == reasons
    # A GPU may have more against the shape of its heads.
    assert on_gpu or len(told) == len(reasons)


@pytest.mark.parametrize(
    ("name", "heads"),
    [(name, heads) for _, name, heads in SERVED],
    ids=[checkpoint for checkpoint, *_ in SERVED],
)
def test_served_on_a_gpu(
    tmp_path: Path, name: str, heads: tuple[int, int, int]
) -> None:
    query, kv, head_dim = heads
    config = getattr(transformers, f"{name}Config")(
        num_attention_heads=query,
        num_key_value_heads=kv,
        head_dim=head_dim,
        hidden_size=query * head_dim,
        sliding_window=None,
    )
    model = model_config(tmp_path, f"{name}ForCausalLM", config, "{}")
    assert (model.num_attention_heads, model.num_key_value_heads) == (query, kv)
    assert model.head_dim == head_dim
    refuse_unsupported_model(model, on_gpu=True)


def test_a_window_that_sglang_does_not_use_can_be_taken_out(tmp_path: Path) -> None:
    """SGLang attends fully in Mistral and Phi-3, whatever their config says."""
    config = transformers.MistralConfig(sliding_window=4096)
    override = '{"sliding_window": null}'
    model = model_config(tmp_path, "MistralForCausalLM", config, override)
    refuse_unsupported_model(model, on_gpu=True)
