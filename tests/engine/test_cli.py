"""From the command line and from Engine keywords to a checked ServerArgs."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_kvc.config.metrics import METRICS
from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.errors import ConfigError, SeamDriftError, UnsupportedModeError
from sglang_kvc.upstream.compat import in_force
from sglang_kvc.upstream.generation import UPSTREAM

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
}

PLUGIN_FIRST = """
import runpy, sys
sys.argv = ["launch_server", "--help"]
try:
    runpy.run_module("sglang.launch_server", run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
assert "sglang.srt.managers.scheduler" not in sys.modules, "--help is slow"
assert "sglang_kvc.scheduling.passes" not in sys.modules, "--help is slow"
import sglang
from sglang_kvc.errors import ConfigError
try:
    sglang.Engine(model_path="none", kv_compress=True, kv_compress_rate=0.5)
except ConfigError as error:
    print("REFUSED", error)
"""

ENGINE_FIRST = """
import sglang
from sglang_kvc.errors import ConfigError
Engine = sglang.Engine
Engine.__init__
try:
    Engine(model_path="none", kv_compress=True, kv_compress_rate=0.5)
except ConfigError as error:
    print("REFUSED", error)
from sglang_kvc.upstream.hooks import verify_hooks_installed
verify_hooks_installed()
print("VERIFIED")
"""


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Scripts in fresh interpreters, running beside the other tests."""
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, code in (("plugin", PLUGIN_FIRST), ("engine", ENGINE_FIRST))
    }
    yield running
    for process in running.values():
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the config of a two-layer Llama."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


@pytest.fixture
def parse(model_path: str) -> Callable[..., Any]:
    """ServerArgs from a command line, as SGLang's launchers make it."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    base = ["--model-path", model_path, "--load-format", "dummy", "--device", "cpu"]
    return lambda *argv: prepare_server_args([*base, *argv])


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # Restored afterwards: turning the feature on writes it.
    monkeypatch.setenv("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "0")


def resolve(server_args: Any) -> Any:
    """The settings that will be in force, resolved as SGLang's launcher does it."""
    if hasattr(server_args, "resolve_once"):
        server_args.resolve_once()
    return UPSTREAM.resolved(server_args)


def decide(server_args: Any, **values: Any) -> None:
    """Let SGLang decide otherwise than the arguments say, as its own rules do."""
    if hasattr(server_args, "resolve_once"):
        from sglang.srt.arg_groups.overrides import declare_resolution

        resolve(server_args)
        declare_resolution(server_args, "test", **values)
    else:
        for name, value in values.items():
            object.__setattr__(server_args, name, value)


def test_flag_sets_what_it_needs(parse: Callable[..., Any]) -> None:
    from sglang_kvc.config.server_args import options_of

    server_args = parse("--kv-compress", "--kv-compress-rate", "8")
    resolved = resolve(server_args)
    server_args.check_server_args()
    assert options_of(server_args) == KVCompressOptions(rate=8)
    assert resolved.attention_backend == "kvcompress"
    assert resolved.radix_cache_backend == "kvcompress"
    assert resolved.page_size == 16
    assert resolved.cuda_graph_config.prefill.backend == "disabled"
    assert resolved.cuda_graph_config.decode.backend == "disabled"
    assert os.environ["SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"] == "0"


def test_options_reach_a_child_process(parse: Callable[..., Any]) -> None:
    from sglang_kvc.config.server_args import options_of

    server_args = parse("--kv-compress", "--kv-compress-budget", "256")
    travelled = pickle.loads(pickle.dumps(server_args))
    assert options_of(travelled) == KVCompressOptions(budget=256)


def test_own_choices_are_kept(parse: Callable[..., Any]) -> None:
    argv = "--kv-compress --max-running-requests 7 --attention-backend kvcompress"
    server_args = parse(*argv.split(), "--page-size", "16")
    assert server_args.max_running_requests == 7


def test_without_the_flag_nothing_changes(parse: Callable[..., Any]) -> None:
    from sglang_kvc.config.server_args import options_of

    server_args = parse("--attention-backend", "torch_native")
    resolved = resolve(server_args)
    server_args.check_server_args()
    assert options_of(server_args) is None
    assert resolved.radix_cache_backend is None
    assert resolved.page_size == 1


def test_config_file(parse: Callable[..., Any], tmp_path: Path) -> None:
    from sglang_kvc.config.server_args import options_of

    config = tmp_path / "server.yaml"
    config.write_text("kv-compress: true\nkv-compress-rate: 8\n")
    server_args = parse("--config", str(config))
    assert options_of(server_args) == KVCompressOptions(rate=8)
    server_args = parse("--config", str(config), "--kv-compress-rate", "2")
    assert options_of(server_args) == KVCompressOptions(rate=2), "the flag wins"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--kv-compress-rate 8", "KV-Compress is off"),
        ("--kv-compress --kv-compress-rate 0.5", "rate must be"),
        (
            "--kv-compress --kv-compress-rate 4 --kv-compress-budget 512",
            "exclude each other",
        ),
        ("--kv-compress --kv-compress-budget 16", "needs at least 48"),
        ("--kv-compress --attention-backend triton", "attention_backend='triton'"),
        ("--kv-compress --radix-cache-backend x", "radix_cache_backend='x'"),
        ("--kv-compress --page-size 64", "page_size=64"),
        ("--kv-compress --cuda-graph-backend-decode full", "graph_backend_decode"),
        ("--kv-compress --pp-size 2", "pipeline parallelism"),
        ("--kv-compress --kv-cache-dtype fp8_e5m2", "use auto or .* fp8_e4m3"),
        ("--kv-compress --enable-hierarchical-cache", "hierarchical cache"),
        ("--attention-backend kvcompress", "only with --kv-compress"),
        ("--radix-cache-backend kvcompress", "only with --kv-compress"),
    ],
)
def test_refused(parse: Callable[..., Any], argv: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*argv.split())


def test_everything_wrong_is_named_at_once(parse: Callable[..., Any]) -> None:
    argv = "--kv-compress --page-size 1 --enable-mixed-chunk --pp-size 2"
    with pytest.raises(UnsupportedModeError) as error:
        parse(*argv.split())
    assert all(n in str(error.value) for n in ("page_size=1", "mixed", "pp_size=2"))


def test_sizing_after_capture_is_refused(
    parse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "1")
    with pytest.raises(UnsupportedModeError, match="POST_CAPTURE_KV_SIZING"):
        parse("--kv-compress")


def test_argparse_refuses_nonsense(
    parse: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse("--kv-compress", "--kv-compress-metric", "l3")
    assert "--kv-compress-metric" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"), [("enable_lmcache", True), ("page_size", 1), ("pp_size", 2)]
)
def test_what_sglang_has_decided_is_checked(
    parse: Callable[..., Any], field: str, value: Any
) -> None:
    """Later releases keep it apart from the arguments, which look harmless."""
    server_args = parse("--kv-compress")
    decide(server_args, **{field: value})
    if in_force("0.5.19"):
        assert getattr(server_args, field) != value
    from sglang_kvc.config.server_args import check_server_args

    with pytest.raises(UnsupportedModeError, match=field):
        check_server_args(server_args)


@pytest.mark.parametrize("typed", [True, False])
def test_hand_made_server_args_are_refused(model_path: str, typed: bool) -> None:
    """The backend name alone must not give a server that compresses nothing."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    name = {"attention_backend": "kvcompress"}
    given = name if typed else {"attention_backend": "torch_native"}
    server_args = ServerArgs(model_path=model_path, device="cpu", **given)
    decide(server_args, **({} if typed else name))
    with pytest.raises(ConfigError, match="only with --kv-compress"):
        server_args.check_server_args()


def test_unsupported_model_is_refused_in_the_parent(
    parse: Callable[..., Any], model_path: str
) -> None:
    server_args = parse("--kv-compress")
    resolve(server_args)
    UPSTREAM.model_config(server_args).sliding_window_size = 128
    with pytest.raises(UnsupportedModeError, match="sliding-window attention"):
        server_args.check_server_args()


def test_missing_hook_is_refused(
    parse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever took our hook off, the server does not start without it."""
    from sglang.srt.server_args import ServerArgs

    server_args = parse("--kv-compress")
    resolve(server_args)
    # Other plugins may hook the same method, outside ours or inside.
    stock = staticmethod(inspect.unwrap(ServerArgs.add_cli_args))
    monkeypatch.setattr(ServerArgs, "add_cli_args", stock)
    with pytest.raises(SeamDriftError, match="ServerArgs.add_cli_args"):
        server_args.check_server_args()


def test_sglang_alone_refuses_our_keywords(model_path: str) -> None:
    """So a server whose plugin was not loaded does not start."""
    from sglang.srt.server_args import ServerArgs

    with pytest.raises(TypeError, match="kv_compress"):
        ServerArgs(model_path=model_path, kv_compress=True)


def test_build_server_args(model_path: str) -> None:
    from sglang_kvc.config.server_args import build_server_args, options_of

    common = {"model_path": model_path, "device": "cpu"}
    server_args = build_server_args(**common, kv_compress=True, kv_compress_budget=64)
    assert options_of(server_args) == KVCompressOptions(budget=64)
    assert options_of(build_server_args(**common)) is None
    with pytest.raises(ConfigError, match="Did you mean kv_compress_rate"):
        build_server_args(**common, kv_compress=True, kv_compress_rte=8)


def test_names_are_registered(parse: Callable[..., Any]) -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.mem_cache.registry import get_radix_cache_factory
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES

    from sglang_kvc import plugin

    plugin.register()
    assert ATTENTION_BACKEND_CHOICES.count("kvcompress") == 1
    assert ATTENTION_BACKENDS["kvcompress"] is plugin.build_attention_backend
    assert get_radix_cache_factory("kvcompress") is plugin.build_radix_cache


def test_stock_backends_keep_triton(parse: Callable[..., Any]) -> None:
    """Later releases ask the platform, by themselves; before, our hook does."""
    from sglang.srt.layers.rotary_embedding import base
    from sglang.srt.utils import common

    from sglang_kvc.upstream.compat import no_accelerator

    alone = in_force("0.5.22")
    assert hasattr(common.support_triton, "__wrapped__") != alone
    assert common.support_triton("triton") != (alone and no_accelerator())
    assert not common.support_triton("torch_native")
    assert common.support_triton("kvcompress") != no_accelerator()
    assert base._is_cpu == no_accelerator()


def output_of(process: subprocess.Popen[str]) -> str:
    """Output of a script that must succeed."""
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-3000:]
    return out


def test_help_then_engine(scripts: dict[str, subprocess.Popen[str]]) -> None:
    """`launch_server --help` lists the flags and stays light; Engine comes later."""
    text = output_of(scripts["plugin"])
    metrics = "-metric {" + ",".join(METRICS) + "}"
    for flag in ("", "-rate X", "-budget TOKENS", metrics, "-head-floor TOKENS"):
        assert re.search(rf"^  --kv-compress{re.escape(flag)}\s", text, re.MULTILINE)
    assert "REFUSED rate must be" in text


def test_engine_loads_the_plugin(scripts: dict[str, subprocess.Popen[str]]) -> None:
    text = output_of(scripts["engine"])
    assert "REFUSED rate must be" in text
    assert "VERIFIED" in text
