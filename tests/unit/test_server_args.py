"""From raw arguments to checked settings, for records that are resolved late too."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kvc.config import server_args as ours
from sglang_kvc.config.options import BACKEND
from sglang_kvc.config.pages import PAGE_SIZE
from sglang_kvc.errors import ConfigError, UnsupportedModeError
from tests.doubles import LLAMA

GRAPHS = "cuda_graph_config"


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    """Raw arguments of a server for a small Llama on a CPU."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return {"model_path": str(tmp_path), "device": "cpu", "skip_tokenizer_init": True}


@pytest.fixture
def hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hooks are asked for, and SGLang knows our backend."""
    from sglang_kvc.plugin import _register_backend_choice

    monkeypatch.setattr(ours, "verify_hooks_installed", lambda: None)
    monkeypatch.setenv("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "0")
    _register_backend_choice()


def build(raw: dict[str, Any]) -> Any:
    """SGLang's record, not resolved where that comes later."""
    from sglang.srt.server_args import ServerArgs

    return ours.construct(ServerArgs, {**raw, "kv_compress": True})


def resolve(server_args: Any, **results: Any) -> None:
    """What SGLang does before it checks; `results` stand for its decisions."""
    if hasattr(server_args, "resolve_once"):
        from sglang.srt.arg_groups.overrides import declare_resolution

        server_args.resolve_once()
        declare_resolution(server_args, "test", **results)
    else:
        for name, value in results.items():
            object.__setattr__(server_args, name, value)


def graphs(prefill: str = "disabled", decode: str = "disabled") -> SimpleNamespace:
    """A resolved configuration of the CUDA graphs."""
    phases = {"prefill": prefill, "decode": decode}
    return SimpleNamespace(
        **{name: SimpleNamespace(backend=backend) for name, backend in phases.items()}
    )


@pytest.mark.usefixtures("hooked")
def test_what_a_plain_server_resolves_to_is_served(raw: dict[str, Any]) -> None:
    server_args = build(raw)
    resolve(server_args)
    ours.check_server_args(server_args)
    assert ours.options_of(server_args) is not None


@pytest.mark.usefixtures("hooked")
@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"page_size": 1}, r"page_size=1\)"),
        ({"pp_size": 2}, r"pp_size=2\)"),
        ({GRAPHS: graphs(prefill="full")}, "prefill.backend='full'"),
        ({GRAPHS: graphs(decode="breakable")}, "decode.backend='breakable'"),
    ],
    ids=str,
)
def test_resolved_settings_are_checked(
    raw: dict[str, Any], results: dict[str, Any], message: str
) -> None:
    server_args = build(raw)
    resolve(server_args, **results)
    with pytest.raises(UnsupportedModeError, match=message):
        ours.check_server_args(server_args)


@pytest.mark.usefixtures("hooked")
def test_sessions_need_the_prefix_cache(raw: dict[str, Any]) -> None:
    server_args = build({**raw, "kv_compress_sessions": True})
    resolve(server_args)
    ours.check_server_args(server_args)
    server_args = build({**raw, "kv_compress_sessions": True})
    resolve(server_args, disable_radix_cache=True)
    with pytest.raises(ConfigError, match=r"--disable-radix-cache switches off.*guide"):
        ours.check_server_args(server_args)
    without = build(raw)
    resolve(without, disable_radix_cache=True)
    ours.check_server_args(without)


class Late:
    """A record as later releases have it: fields in slots, a view of the results."""

    __slots__ = ("__dict__", "page_size", *ours._BACKEND_FIELDS)

    def __init__(self, **fields: Any) -> None:
        for name in self.__slots__[1:]:
            setattr(self, name, fields.get(name))


@pytest.mark.parametrize("name", ours._BACKEND_FIELDS)
def test_bare_backend_is_refused_in_any_record(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    late = SimpleNamespace(resolved=lambda record: record)
    monkeypatch.setattr(ours, "UPSTREAM", late)
    ours.check_server_args(Late())
    with pytest.raises(ConfigError, match="works only with --kv-compress"):
        ours.check_server_args(Late(**{name: BACKEND}))
    with pytest.raises(ConfigError, match="works only with --kv-compress"):
        ours.construct(Late, {name: BACKEND})


@pytest.mark.parametrize("early", [True, False])
def test_results_are_checked_once_they_are_there(
    monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    """Before, an unresolved record has nothing to read."""
    checked: list[Any] = []
    view = SimpleNamespace(page_size=PAGE_SIZE)
    upstream = SimpleNamespace(
        resolved=lambda record: record if early else view,
        model_config=lambda record: "model",
    )
    monkeypatch.setattr(ours, "UPSTREAM", upstream)
    monkeypatch.setattr(ours, "verify_hooks_installed", lambda: None)
    monkeypatch.setattr(ours, "refuse_unsupported", checked.append)
    monkeypatch.setattr(ours, "refuse_unsupported_model", checked.append)
    monkeypatch.setenv("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "0")
    record = ours.construct(Late, {"kv_compress": True})
    assert checked == ([record] if early else [])
    ours.check_server_args(record)
    assert checked[-2:] == [record if early else view, "model"]


@pytest.mark.parametrize(
    "name", ["SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "SGLANG_RUST_SERVER"]
)
def test_variables_that_must_be_off(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "0")
    for value in ("0", "False"):
        monkeypatch.setenv(name, value)
        assert ours.contradictions({}, {}) == []
    monkeypatch.setenv(name, "1")
    with pytest.raises(UnsupportedModeError, match=f"{name}=1: unset it"):
        ours.construct(Late, {"kv_compress": True})
    assert ours.construct(Late, {}) is not None, "off means stock"
