"""Convert a GGUF file of a llama or qwen2 model to a Hugging Face folder.

Config and tokenizer come from transformers' GGUF reader. The weights are dequantised
here one tensor at a time, because building the model twice in fp32, as transformers
does, needs four times the memory of the result.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from sglang_kvc.errors import KVCError

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NO_LIMIT = 1 << 62
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def hf_name(name: str) -> str:
    """Return the Hugging Face name of GGUF tensor ``name``.

    Raises
    ------
    KVCError
        The tensor does not belong to a llama or qwen2 model.
    """
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = _BLOCK.fullmatch(name)
    if match and match[2] in _BLOCK_NAMES:
        return f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}"
    raise KVCError(f"GGUF tensor {name!r} is not part of a llama or qwen2 model")


def unpermute(weights: Any, num_heads: int) -> Any:
    """Undo llama.cpp's row order of a llama query or key projection.

    llama.cpp interleaves the two halves of each head, which is how its RoPE reads
    them; Hugging Face keeps the halves apart.

    Parameters
    ----------
    weights : ndarray, shape (num_heads * head_dim, ...)
    num_heads : int
        Query heads for ``q_proj``, KV heads for ``k_proj``.

    Returns
    -------
    ndarray
        Same shape; a copy.
    """
    half = weights.shape[0] // num_heads // 2
    split = weights.reshape(num_heads, half, 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


def convert(source: Path, target: Path) -> None:
    """Write ``source`` to folder ``target`` as bf16 safetensors with tokenizer.

    Input and output embeddings are tied in every model supported here. Where the
    file holds them separately, the output matrix is kept for both: llama.cpp
    quantises it finer than the input matrix.

    Parameters
    ----------
    source : Path
        GGUF file.
    target : Path
        Existing folder.
    """
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )

    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.tie_word_embeddings = True
    config.dtype = "bfloat16"
    tensors = _read_tensors(source, config)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(target)
    GenerationConfig.from_model_config(config).save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The reader mislabels them: SmolLM2 would end on the token that starts a turn.
    for role in ("bos", "eos", "pad", "unk"):
        token_id = getattr(config, f"{role}_token_id", None)
        token = None if token_id is None else tokenizer.convert_ids_to_tokens(token_id)
        setattr(tokenizer, f"{role}_token", token)
    # It would drop spaces before punctuation, which byte-level BPE must keep.
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(target)
    limit_tokenizer(target)


def limit_tokenizer(folder: Path) -> None:
    """Give a model's tokenizer the length of its context, if it has none of its own.

    transformers writes 10 ** 30 for none, and with such a number SGLang 0.5.17 answers
    ``/tokenize`` with HTTP 500. What was converted before this was known is mended.

    Parameters
    ----------
    folder : Path
        Hugging Face folder; without a tokenizer nothing is done.
    """
    target = folder / "tokenizer_config.json"
    if not target.is_file():
        return
    tokenizer = json.loads(target.read_text())
    if tokenizer.get("model_max_length", 0) < _NO_LIMIT:
        return
    config = json.loads((folder / "config.json").read_text())
    tokenizer["model_max_length"] = config["max_position_embeddings"]
    # Others may be reading it.
    new = target.with_name(f".{target.name}-{os.getpid()}")
    new.write_text(json.dumps(tokenizer, indent=2) + "\n")
    new.replace(target)


def _read_tensors(source: Path, config: Any) -> dict[str, Any]:
    import numpy as np
    import torch
    from gguf import GGUFReader, dequantize
    from tqdm import tqdm

    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
    }
    found = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    if "output.weight" in found:
        found["token_embd.weight"] = found.pop("output.weight")
    tensors = {}
    bar = tqdm(found.items(), unit="tensor", desc="[fetch_model] converting")
    for gguf_name, tensor in bar:
        name = hf_name(gguf_name)
        weights = dequantize(tensor.data, tensor.tensor_type)
        projection = name.split(".")[-2]
        if config.model_type == "llama" and projection in heads:
            weights = unpermute(weights, heads[projection])
        tensors[name] = torch.from_numpy(np.array(weights)).bfloat16()
    return tensors
