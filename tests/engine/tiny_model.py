"""A random Llama, big enough to be chunked, small enough to be stressed."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 512
LAYERS, HEADS, GROUP = 4, 2, 2
FEW_LAYERS = 2
"""Where nobody asks what the heads have kept."""
ONE_LAYER = 1
"""Where nobody asks what is answered: only who waits, ends, and owns which page."""


def write_tiny_model(folder: Path, layers: int = LAYERS, group: int = GROUP) -> str:
    """Write the model; weights are seeded randn / sqrt(fan_in), so logits differ.

    With a `group` of more query heads a KV head the last queries of a request take more
    pages of the pool.
    """
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=HEADS * group,
        num_key_value_heads=HEADS,
        head_dim=16,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return str(folder)
