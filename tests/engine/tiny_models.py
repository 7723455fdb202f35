"""A tiny random model of every architecture that the guide's table "Models" names.

Each has what is its own about attention: query heads per KV head, a norm of queries and
keys, biases, partial rotary embeddings, a softmax scale, experts in between.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.engine.tiny_model import LAYERS, VOCAB


@dataclass(frozen=True)
class TinyModel:
    """A row of the table.

    Attributes
    ----------
    architecture : what a checkpoint's ``architectures`` says.
    heads : query heads, KV heads.
    fields : of the config, besides those that all have.
    """

    architecture: str
    heads: tuple[int, int]
    head_dim: int
    fields: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> str:
        """Write it in float32; weights are seeded randn / sqrt(fan_in)."""
        query, kv = self.heads
        name = self.architecture.removesuffix("ForCausalLM") + "Config"
        config = getattr(transformers, name)(
            **{
                "vocab_size": VOCAB,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": query,
                "num_key_value_heads": kv,
                "head_dim": self.head_dim,
                "max_position_embeddings": 4096,
                "tie_word_embeddings": False,
                "bos_token_id": 0,
                "eos_token_id": 1,
                "pad_token_id": 0,
                **self.fields,
            }
        )
        torch.manual_seed(0)
        model = getattr(transformers, self.architecture)(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    # Norms stay near 1, biases near 0, and none is without effect.
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
                else:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
            # Looked up, not summed; a small one would leave the last token no say.
            model.get_input_embeddings().weight.normal_()
            if config.tie_word_embeddings:
                # Gemma multiplies them by sqrt(hidden_size). And with signs of its own,
                # or every token would be followed by itself.
                model.get_input_embeddings().weight.mul_(config.hidden_size**-0.5)
                model.model.norm.weight.normal_(std=3)
        model.save_pretrained(folder)
        return str(folder)


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}

MODELS = {
    model.architecture: model
    for model in (
        TinyModel("LlamaForCausalLM", (8, 2), 16),
        # As Mistral-Nemo: its heads are not hidden_size / heads wide.
        TinyModel("MistralForCausalLM", (4, 1), 32, {"sliding_window": None}),
        TinyModel("Qwen2ForCausalLM", (14, 2), 16, {"hidden_size": 224}),
        TinyModel("Qwen3ForCausalLM", (4, 2), 32),
        TinyModel(
            "Qwen3MoeForCausalLM",
            (16, 2),
            16,
            {"num_experts": 8, "norm_topk_prob": True, **EXPERTS},
        ),
        # The head_dim of Phi-3-mini, the rotary part of Phi-4-mini.
        TinyModel(
            "Phi3ForCausalLM",
            (2, 2),
            96,
            {
                "hidden_size": 192,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 4096,
            },
        ),
        TinyModel(
            "Glm4ForCausalLM",
            (32, 2),
            16,
            {"attention_bias": True, "partial_rotary_factor": 0.5},
        ),
        # One KV head, wide heads, norms that multiply by 1 + w.
        TinyModel("GemmaForCausalLM", (8, 1), 32, {"tie_word_embeddings": True}),
        TinyModel("Olmo2ForCausalLM", (10, 2), 16, {"hidden_size": 160}),
        # The usual scale would be 0.177.
        TinyModel(
            "GraniteForCausalLM",
            (8, 2),
            32,
            {
                "hidden_size": 128,
                "attention_multiplier": 0.25,
                "embedding_multiplier": 12.0,
                "residual_multiplier": 0.22,
                "logits_scaling": 8.0,
            },
        ),
        # On a CPU SGLang has its norm of queries and keys only for those with AMX.
        TinyModel(
            "MiniMaxM2ForCausalLM",
            (12, 2),
            32,
            {
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                # All of a head: not every transformers turns a part of it.
                "rotary_dim": 32,
                "use_qk_norm": False,
                "use_routing_bias": True,
                "scoring_func": "sigmoid",
            },
        ),
    )
}
