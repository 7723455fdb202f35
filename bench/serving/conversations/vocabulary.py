"""A tokenizer for a shape that has none: OpenAI's routes need one.

Prompts are token ids and ids come back, so all it must do is to turn any id into some
text.
"""

from __future__ import annotations

import json
from pathlib import Path


def vocabulary_size(model: Path) -> int:
    """What a model's ``config.json`` says."""
    size: int = json.loads((model / "config.json").read_text())["vocab_size"]
    return size


def write_tokenizer(folder: Path, size: int) -> Path:
    """Write a tokenizer whose words are ``t0``, ``t1``, ...; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {f"t{index}": index for index in range(size)},
            "unk_token": "t0",
        },
    }
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t1"}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder
