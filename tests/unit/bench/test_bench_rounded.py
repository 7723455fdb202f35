"""bench.serving.rounded: what it wrote, read bit by bit, is the nearest there is.

`words` and `bytes_e4m3` unpack with Python's integers and share nothing with the
module. SGLang's own helpers, where they run on a CPU, read the same.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.serving.rounded import RoundingError, main, round_checkpoint
from bench.serving.rounded_formats import FORMATS, half_at_least, packed

HIDDEN, INNER = 256, 384
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (128, HIDDEN),
    "self_attn.v_proj": (128, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
"""[out, in] of the one block's layers."""
NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)
"""AWQ: which nibble holds output 0, 1, ... of eight."""


def layer_name(layer: str) -> str:
    return f"model.layers.0.{layer}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of one block in bf16, in several files."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    made = Qwen2ForCausalLM(config).bfloat16()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.02)
        block = made.model.layers[0]
        # What rounding trips over: nothing but zeros, one sign, an outlier, tiny.
        block.self_attn.q_proj.weight[:128, :128] = 0
        block.self_attn.k_proj.weight.abs_()
        block.mlp.up_proj.weight[7, 200] = 3.0
        block.mlp.gate_proj.weight[9] *= 1e-6
    folder = tmp_path_factory.mktemp("model")
    made.save_pretrained(folder, max_shard_size="500KB")
    (folder / "merges.txt").write_text("a b\n")
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found.update(load_file(path))
    return found


@pytest.fixture(scope="module")
def original(model: Path) -> dict[str, torch.Tensor]:
    return tensors_of(model)


@pytest.fixture(scope="module", params=list(FORMATS))
def written(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: Any
) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "new"
    assert round_checkpoint(model, folder, request.param) == len(SHAPES)
    return request.param, folder


def words(tensor: torch.Tensor) -> list[list[list[int]]]:
    """Nibbles of each word of an int32 matrix, lowest first."""
    assert tensor.dtype == torch.int32
    return [
        [[(word >> 4 * i) & 15 for i in range(8)] for word in row]
        for row in tensor.tolist()
    ]


def bytes_e4m3(tensor: torch.Tensor) -> torch.Tensor:
    """Float64 of the bits: a sign, 4 bits of exponent less 7, 3 of mantissa."""
    assert tensor.dtype == torch.float8_e4m3fn
    values = []
    for byte in range(256):
        exponent, mantissa = byte >> 3 & 15, byte & 7
        size = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa / 512
        values.append(math.nan if byte & 127 == 127 else size * (-1) ** (byte >> 7))
    table = torch.tensor(values, dtype=torch.float64)
    return table[tensor.view(torch.uint8).long()]


def assert_nearest_e4m3(
    weight: torch.Tensor, made: torch.Tensor, scale: torch.Tensor
) -> None:
    """A step is an eighth of the power of two below, from 2 ** -9 on."""
    wanted, found = weight.double() / scale, bytes_e4m3(made)
    power = wanted.abs().clamp(min=2.0**-6).log2().floor()
    half = 2.0 ** (power - 3) / 2
    assert ((found - wanted).abs() <= half * (1 + 1e-5)).all()


def unpack(
    part: dict[str, torch.Tensor], form: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels [out, in], zero points and scales [out, in / 128], of four bits."""
    rows, zero_rows = words(part["qweight"]), words(part["qzeros"])
    if form == "awq":
        order, less = NIBBLE_OF_OUTPUT, 0
        columns = [[word[i] for word in row for i in order] for row in rows]
        levels = torch.tensor(columns).t()
    else:
        order, less = tuple(range(8)), 1
        # A column of words goes down the inputs.
        levels = torch.tensor(
            [[n for word in column for n in word] for column in zip(*rows, strict=True)]
        )
    zeros = torch.tensor([[w[i] for w in row for i in order] for row in zero_rows])
    return levels, zeros.t() + less, part["scales"].double().t()


def part_of(made: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    stem = layer_name(layer) + "."
    ends = {key.removeprefix(stem): key for key in made if key.startswith(stem)}
    return {end: made[key] for end, key in ends.items() if end != "bias"}


def test_weights_are_within_half_a_step(
    written: tuple[str, Path], original: dict[str, torch.Tensor]
) -> None:
    form, folder = written
    made = tensors_of(folder)
    for layer, (outputs, inputs) in SHAPES.items():
        weight = original[f"{layer_name(layer)}.weight"].double()
        part = part_of(made, layer)
        if form == "fp8-tensor":
            assert set(part) == {"weight", "weight_scale"}
            scale = part["weight_scale"]
            assert scale.shape == () and scale.dtype == torch.float32
            assert scale.item() == pytest.approx(weight.abs().max().item() / 448)
            assert_nearest_e4m3(weight, part["weight"], scale.double())
        elif form == "fp8-block":
            assert set(part) == {"weight", "weight_scale_inv"}
            scale = part["weight_scale_inv"]
            assert scale.shape == (outputs // 128, inputs // 128)
            assert scale.dtype == torch.float32
            for i in range(outputs // 128):
                for j in range(inputs // 128):
                    area = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                    block, number = weight[area], scale[i, j].double()
                    assert number.item() == pytest.approx(block.abs().max() / 448)
                    assert_nearest_e4m3(block, part["weight"][area], number)
        else:
            extra = {"g_idx"} if form == "gptq" else set()
            assert set(part) == {"qweight", "qzeros", "scales", *extra}
            assert part["scales"].dtype == torch.float16
            assert part["scales"].shape == (inputs // 128, outputs)
            levels, zeros, scales = unpack(part, form)
            assert levels.shape == (outputs, inputs)
            if form == "gptq":
                assert (zeros == 8).all()
                assert part["g_idx"].tolist() == [i // 128 for i in range(inputs)]
                assert part["g_idx"].dtype == torch.int32
            groups = weight.unflatten(1, (-1, 128))
            # No coarser than the range needs, float16 aside.
            ends = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
            wide = 2 * groups.abs().amax(-1) if form == "gptq" else ends[1] - ends[0]
            assert (scales <= wide / 15 * (1 + 2.0**-10) + 2.0**-24).all()
            steps = levels.unflatten(1, (-1, 128)) - zeros[..., None]
            away = (steps - groups / scales[..., None]).abs()
            assert (away <= 0.5 + 1e-5).all(), (layer, away.max())


def test_the_rest_is_copied_bit_for_bit(
    written: tuple[str, Path], model: Path, original: dict[str, torch.Tensor]
) -> None:
    form, folder = written
    made = tensors_of(folder)
    rounded = {f"{layer_name(layer)}.weight" for layer in SHAPES}
    kept = set(original) - rounded
    assert {"lm_head.weight", "model.embed_tokens.weight"} < kept
    assert "model.layers.0.self_attn.q_proj.bias" in kept
    for key in kept:
        assert made[key].dtype == original[key].dtype == torch.bfloat16
        assert torch.equal(made[key], original[key]), key
    assert (folder / "merges.txt").read_text() == "a b\n"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    for key, file in index["weight_map"].items():
        assert key in load_file(folder / file)
    assert set(index["weight_map"]) == set(made)
    size = sum(tensor.numel() * tensor.element_size() for tensor in made.values())
    assert index["metadata"]["total_size"] == size


def test_config_says_the_format(written: tuple[str, Path], model: Path) -> None:
    form, folder = written
    config = json.loads((folder / "config.json").read_text())
    said = config.pop("quantization_config")
    assert config == json.loads((model / "config.json").read_text())
    assert (
        said
        == {
            "fp8-tensor": {"quant_method": "fp8", "activation_scheme": "dynamic"},
            "fp8-block": {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
            },
            "awq": {
                "quant_method": "awq",
                "bits": 4,
                "group_size": 128,
                "zero_point": True,
                "version": "gemm",
            },
            "gptq": {
                "quant_method": "gptq",
                "bits": 4,
                "group_size": 128,
                "sym": True,
                "desc_act": False,
                "checkpoint_format": "gptq",
            },
        }[form]
    )


@pytest.mark.filterwarnings("ignore")
def test_sglang_reads_the_same(
    written: tuple[str, Path], original: dict[str, torch.Tensor]
) -> None:
    form, folder = written
    made = tensors_of(folder)
    part = part_of(made, "mlp.down_proj")
    if form == "fp8-tensor":
        from sglang.srt.layers.quantization.utils import per_tensor_dequantize

        found = per_tensor_dequantize(part["weight"], part["weight_scale"].half())
        wanted = original["model.layers.0.mlp.down_proj.weight"].half()
        # A step is at most an eighth of the number.
        torch.testing.assert_close(found, wanted, rtol=1 / 15, atol=1e-5)
    elif form == "fp8-block":
        from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant

        scale = part["weight_scale_inv"]
        found = block_quant_dequant(part["weight"], scale, [128, 128], torch.float32)
        wanted = original["model.layers.0.mlp.down_proj.weight"].float()
        torch.testing.assert_close(found, wanted, rtol=1 / 15, atol=1e-6)
    elif form == "awq":
        from sglang.kernels.ops.quantization.awq_triton import (
            awq_dequantize_decomposition,
        )

        found = awq_dequantize_decomposition(
            part["qweight"], part["scales"].float(), part["qzeros"]
        )
        levels, zeros, scales = unpack(part, form)
        steps = levels.unflatten(1, (-1, 128)) - zeros[..., None]
        wanted = (steps * scales[..., None]).flatten(1).t()
        torch.testing.assert_close(found.double(), wanted)
    else:
        from sglang.srt.layers.quantization.utils import pack_rows, unpack_cols

        levels, zeros, scales = unpack(part, form)
        again = pack_rows(levels.t().contiguous().int(), 4, INNER, HIDDEN)
        assert torch.equal(again, part["qweight"])
        stored = unpack_cols(part["qzeros"], 4, INNER // 128, HIDDEN)
        assert torch.equal(stored.t() + 1, zeros.int())


def test_every_nibble_survives_packing() -> None:
    levels = torch.arange(16).repeat(3).reshape(2, 24)
    plain = words(packed(levels, range(8)))
    assert [[n for w in row for n in w] for row in plain] == levels.tolist()


def test_a_half_is_never_below() -> None:
    steps = torch.cat([torch.rand(2000) * 10.0**-p for p in range(9)])
    halves = half_at_least(steps)
    assert (halves.float() >= steps).all() and (halves > 0).all()
    below = (halves.view(torch.int16) - 1).view(torch.float16).float()
    assert ((below < steps) | (halves == 2.0**-24)).all()
    assert half_at_least(torch.tensor([0.25])).item() == 0.25


def tiny(folder: Path, shape: tuple[int, int] = (128, 128), **more: Any) -> Path:
    """One layer in one file."""
    folder.mkdir()
    key = f"{layer_name('mlp.up_proj')}.weight"
    tensors = {key: torch.ones(shape, dtype=more.pop("dtype", torch.bfloat16))}
    save_file({**tensors, **more.pop("tensors", {})}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(more))
    return folder


def test_one_file_needs_no_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "new"
    source = tiny(tmp_path / "a", torch_dtype="bfloat16")
    main(["--model", str(source), "--to", str(to), "--format", "gptq"])
    assert {p.name for p in to.iterdir()} == {"config.json", "model.safetensors"}
    assert capsys.readouterr().out == f"{to}: 1 layers in gptq\n"


@pytest.mark.parametrize(
    ("form", "shape", "needs"),
    [
        ("awq", (64, 192), "[64, 128]"),
        ("gptq", (64, 192), "[64, 128]"),
        ("gptq", (72, 128), "[64, 128]"),
        ("fp8-block", (128, 192), "[128, 128]"),
        ("fp8-block", (64, 128), "[128, 128]"),
        ("fp8-tensor", (16, 24), "[16, 16]"),
    ],
)
def test_a_shape_that_does_not_divide(
    form: str, shape: tuple[int, int], needs: str, tmp_path: Path
) -> None:
    to = tmp_path / "new"
    with pytest.raises(RoundingError) as error:
        round_checkpoint(tiny(tmp_path / "a", shape), to, form)
    assert f"{form} needs [out, in] divisible by {needs}" in str(error.value)
    assert f"got {list(shape)}" in str(error.value)
    assert not to.exists()


def test_wrong_folders(tmp_path: Path) -> None:
    def refused(folder: Path, to: Path = tmp_path / "new") -> str:
        with pytest.raises(RoundingError) as error:
            round_checkpoint(folder, to, "awq")
        assert not (tmp_path / "new").exists()
        return str(error.value)

    empty = tmp_path / "empty"
    assert "expected config.json, *.safetensors; got nothing" in refused(empty)
    empty.mkdir()
    (empty / "pytorch_model.bin").touch()
    assert "got pytorch_model.bin" in refused(empty)
    with pytest.raises(SystemExit, match="got pytorch_model.bin"):
        main(["--model", str(empty), "--to", str(tmp_path / "b"), "--format", "awq"])
    fine = tiny(tmp_path / "fine")
    assert "new or empty folder" in refused(fine, fine)
    done = tiny(tmp_path / "done", quantization_config={"quant_method": "fp8"})
    assert "expected no quantization_config, got {'quant" in refused(done)
    eight = tiny(tmp_path / "eight", dtype=torch.float8_e4m3fn)
    assert "expected one of BF16, F16, F32, got F8_E4M3" in refused(eight)
    expert = {"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(128, 128)}
    moe = tiny(tmp_path / "moe", tensors=expert)
    assert "experts.0.up_proj.weight: expected only q, k, v" in refused(moe)
    other = tmp_path / "other"
    other.mkdir()
    save_file({"transformer.h.0.w": torch.ones(128, 128)}, other / "a.safetensors")
    (other / "config.json").write_text("{}")
    assert "q_proj.weight, got none" in refused(other)
