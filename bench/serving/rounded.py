"""A checkpoint with its linear layers rounded to nearest, in a format SGLang loads.

    python -m bench.serving.rounded --model FOLDER --to FOLDER --format awq

The GPU check of quantised weights needs real checkpoints, and the machine has no model
hub to fetch them from. So they are made from one in bf16. Nothing is calibrated:
answers are worse than those of a published checkpoint. Names, shapes, dtypes and config
keys are those that SGLang 0.5.17 reads. It serves all four formats in bf16 and float16,
and finds the format in config.json.

Only the seven projections of each block are rounded (q, k, v, o, gate, up, down).
Everything else is copied bit for bit: embeddings, ``lm_head``, norms and biases.

* ``fp8-tensor``: e4m3, one scale a layer; SGLang scales activations as it runs
* ``fp8-block``: e4m3, one scale for each 128 x 128 weights
* ``awq``: 4 bits, a scale and a zero point for each 128 inputs of an output
* ``gptq``: 4 bits, the zero point is always 8, inputs in their own order
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.serving.rounded_formats import FORMATS

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
KEY = "quantization_config"
BLOCK = re.compile(r"\.layers\.\d+\.")
LINEAR = re.compile(
    r"\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight$"
)
DTYPES = ("BF16", "F16", "F32")
OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".onnx"}


class RoundingError(ValueError):
    """The checkpoint cannot be rounded as asked; the message says why."""


def check(shards: Sequence[Path], name: str) -> None:
    """Whether all matrices of all blocks can be rounded; reads no weights."""
    found = 0
    for shard in shards:
        with safe_open(shard, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                layer = file.get_slice(key)
                shape, dtype = layer.get_shape(), layer.get_dtype()
                if LINEAR.search(key):
                    _check_layer(key, shape, dtype, name)
                    found += 1
                # SGLang would look for it in the format, too.
                elif BLOCK.search(key) and len(shape) > 1:
                    raise RoundingError(
                        f"{key}: expected only q, k, v, o, gate, up and down "
                        f"projections as matrices of a block, got {shape}"
                    )
    if not found:
        raise RoundingError(
            f"{shards[0].parent}: expected names such as "
            "model.layers.0.self_attn.q_proj.weight, got none"
        )


def _check_layer(key: str, shape: Sequence[int], dtype: str, name: str) -> None:
    outputs, inputs = FORMATS[name].multiples
    if len(shape) != 2 or shape[0] % outputs or shape[1] % inputs:
        raise RoundingError(
            f"{key}: {name} needs [out, in] divisible by [{outputs}, {inputs}], "
            f"got {list(shape)}"
        )
    if dtype not in DTYPES:
        raise RoundingError(f"{key}: expected one of {', '.join(DTYPES)}, got {dtype}")


def round_checkpoint(model: Path, to: Path, name: str) -> int:
    """Write the checkpoint of folder `model`, rounded, to the new folder `to`.

    Returns
    -------
    int
        Layers that were rounded.
    """
    shards = sorted(model.glob("*.safetensors"))
    if not shards or not (model / CONFIG).exists():
        held = ", ".join(sorted(p.name for p in model.glob("*"))) or "nothing"
        raise RoundingError(f"{model}: expected {CONFIG}, *.safetensors; got {held}")
    config = json.loads((model / CONFIG).read_text())
    if config.get(KEY):
        raise RoundingError(f"{model}: expected no {KEY}, got {config[KEY]}")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RoundingError(f"{to}: expected a new or empty folder, got a full one")
    check(shards, name)
    to.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        known = path.name in (CONFIG, INDEX) or path.suffix in OTHER_WEIGHTS
        if path.is_file() and not known:
            shutil.copy(path, to)
    where, size, rounded = {}, 0, 0
    for shard in shards:
        tensors: dict[str, torch.Tensor] = {}
        with safe_open(shard, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                if LINEAR.search(key):
                    made = FORMATS[name].round(tensor.float())
                    stem = key.removesuffix("weight")
                    tensors.update({stem + end: made[end] for end in made})
                    rounded += 1
                else:
                    tensors[key] = tensor
        save_file(tensors, to / shard.name, {"format": "pt"})
        where.update(dict.fromkeys(tensors, shard.name))
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (to / INDEX).write_text(json.dumps(index, indent=2))
    # Last, so that a folder written in part does not load.
    config[KEY] = FORMATS[name].config
    (to / CONFIG).write_text(json.dumps(config, indent=2))
    return rounded


def main(words: Sequence[str] | None = None) -> None:
    """Parse arguments, write the checkpoint, say what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True, help="new or empty")
    parser.add_argument("--format", choices=FORMATS, required=True)
    args = parser.parse_args(words)
    try:
        layers = round_checkpoint(args.model, args.to, args.format)
    except RoundingError as error:
        raise SystemExit(str(error)) from None
    print(f"{args.to}: {layers} layers in {args.format}")


if __name__ == "__main__":
    main()
