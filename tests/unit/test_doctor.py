"""`tools.doctor` on the real ServerArgs: what it says before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_kvc.attention import prefill_kernels
from sglang_kvc.tools.doctor import __main__ as doctor
from sglang_kvc.tools.doctor import device, installed
from sglang_kvc.tools.doctor.findings import BAD, GOOD, NOTE, Finding, as_table, starts
from sglang_kvc.upstream import compat
from tests.doubles import LLAMA


@pytest.fixture
def examine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Exit status and findings by subject, of a small Llama on the CPU."""
    # Restored afterwards: turning the feature on writes it.
    monkeypatch.setenv("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "0")

    def run(*flags: str, **config: Any) -> tuple[int, dict[str, Any]]:
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **config}))
        base = ["--model-path", str(tmp_path), "--device", "cpu"]
        status = doctor.main(["--json", *base, *flags])
        said = json.loads(capsys.readouterr().out)
        assert said["starts"] == (status == 0)
        return status, {each["subject"]: each for each in said["findings"]}

    return run


def test_a_server_that_would_start(examine: Callable[..., Any]) -> None:
    status, found = examine("--kv-compress-rate", "8")
    assert status == 0, found
    assert found["SGLang"]["found"] == f"{compat.sglang_version()}, supported"
    assert "registered as kvcompress" in found["plugin"]["found"]
    served = ("flags", "hooks", "settings", "model", "SGLang's own checks")
    assert [found[name]["state"] for name in served] == [GOOD] * 5


@pytest.mark.parametrize(
    ("flags", "subject", "words"),
    [
        (
            "--pp-size 2 --enable-mixed-chunk",
            "flags",
            ("pp_size=2): use 1", "enable_mixed_chunk=True", "See docs/guide.md#"),
        ),
        (
            "--kv-compress-rate 0.5",
            "flags",
            ("rate must be", "guide.md#flags"),
        ),
        ("--bogus", "flags", ("unrecognized arguments: --bogus",)),
    ],
)
def test_flags_that_are_refused(
    examine: Callable[..., Any], flags: str, subject: str, words: tuple[str, ...]
) -> None:
    status, found = examine(*flags.split())
    assert status == 1
    assert found[subject]["state"] == BAD
    assert all(word in found[subject]["found"] for word in words), found[subject]


def test_a_model_that_is_refused(examine: Callable[..., Any]) -> None:
    """The settings are judged apart from it."""
    status, found = examine(attn_logit_softcapping=50.0)
    assert status == 1
    assert found["settings"]["state"] == GOOD
    assert found["model"]["state"] == BAD
    assert "soft-capped attention logits" in found["model"]["found"]
    assert "SGLang's own checks" not in found


def test_a_release_that_is_not_supported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compat, "sglang_version", lambda: "0.5.16")
    assert doctor.main(["--model-path", "none"]) == 1
    said = capsys.readouterr().out
    assert "works with SGLang 0.5.17" in said
    assert "It would not start: 1 reason(s)." in said


def test_a_plugin_that_sglang_would_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "other, another")
    *_, plugin = installed.installed()
    assert plugin.state == BAD
    assert "leaves kvcompress out" in plugin.found
    monkeypatch.setenv("SGLANG_PLUGINS", "other, kvcompress")
    *_, plugin = installed.installed()
    assert plugin.state == GOOD
    monkeypatch.setattr(installed.metadata, "entry_points", lambda group: ())
    *_, plugin = installed.installed()
    assert "no entry point kvcompress" in plugin.found


@pytest.mark.parametrize(
    ("capability", "prefill", "packed"),
    [
        ((9, 0), "FlashAttention-3", "FlashAttention-3, per head"),
        ((8, 9), "FlashInfer", "Triton, per head"),
    ],
)
def test_the_kernels_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: Any, prefill: str, packed: str
) -> None:
    import torch

    monkeypatch.setattr(compat, "no_accelerator", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(prefill_kernels, "get_device_capability", lambda: capability)
    found = {each.subject: each for each in device.device()}
    sm = "".join(map(str, capability))
    assert found["device"].found == f"A GPU, sm_{sm}, the first of 2"
    assert found["prefill"] == Finding("prefill", GOOD, prefill)
    assert found["prompts over the pool"] == Finding(
        "prompts over the pool", GOOD, packed
    )
    monkeypatch.setattr(device, "version_of", lambda *names: None)
    found = {each.subject: each for each in device.device()}
    assert found["prefill"].state == BAD


@pytest.mark.skipif(not compat.no_accelerator(), reason="this machine has a GPU")
def test_the_cpu() -> None:
    found = {each.subject: each for each in device.device()}
    assert found["device"].state == NOTE
    assert found["prefill"].found == "torch SDPA"


def test_long_findings_stay_in_their_column() -> None:
    text = as_table(
        [Finding("a", GOOD, "x"), Finding("long", BAD, "word " * 60 + "\ny")]
    )
    lines = text.splitlines()
    assert max(map(len, lines)) <= 96
    assert lines[0] == "a     ok    x"
    assert lines[-3].strip() == "y"
    assert not starts([Finding("a", BAD, "")])
    assert starts([Finding("a", NOTE, "")])
