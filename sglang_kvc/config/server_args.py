"""From the user's arguments to a checked ``ServerArgs`` with our options attached.

SGLang resolves all settings while ``ServerArgs`` is constructed; from 0.5.19 on, later.
So what KV-Compress needs is written into the raw arguments before, and what it cannot
serve is refused by name: in the raw arguments, for a clear message, and in the resolved
ones.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

from sglang_kvc.config.flags import options_from_mapping
from sglang_kvc.config.options import BACKEND, KVCompressOptions
from sglang_kvc.config.pages import PAGE_SIZE
from sglang_kvc.config.refusals import (
    refuse_settings,
    refuse_unsupported,
    unsupported_values,
)
from sglang_kvc.config.refusals_model import refuse_unsupported_model
from sglang_kvc.errors import ConfigError, Section, pointed, points_to
from sglang_kvc.upstream.compat import no_accelerator
from sglang_kvc.upstream.generation import UPSTREAM
from sglang_kvc.upstream.hooks import verify_hooks_installed

OPTIONS_ATTRIBUTE = "_kv_compress_options"
"""Underscore attribute of ServerArgs: it rides along when the object is pickled."""

_BACKEND_FIELDS = (
    "attention_backend",
    "prefill_attention_backend",
    "decode_attention_backend",
    "radix_cache_backend",
)
_POST_CAPTURE_SIZING = "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"
_VARIABLES_OFF = {
    _POST_CAPTURE_SIZING: "our pool is fixed",
    "SGLANG_RUST_SERVER": "it takes requests past our checks",
}
_FALSE = ("0", "false", "no", "n")


def chunk_tokens(settings: Any) -> int:
    """Tokens of a prefill chunk by these resolved settings; 0: prompts are whole."""
    return max(settings.chunked_prefill_size or 0, 0)


@points_to(Section.FLAGS)
def construct(build: Callable[..., Any], raw: Mapping[str, Any]) -> Any:
    """Build a ServerArgs from raw arguments that may contain ours.

    Parameters
    ----------
    build : callable
        SGLang's constructor; called with the raw arguments without ours.
    raw : Mapping
        Keyword arguments of ``Engine``, or the attributes of an argparse Namespace.

    Returns
    -------
    sglang.srt.server_args.ServerArgs
        With ``_kv_compress_options`` attached if the feature is on.

    Raises
    ------
    ConfigError
        If our settings are wrong, contradict others, or meet a feature that
        KV-Compress does not serve.
    """
    values = dict(raw)
    options = options_from_mapping(values)
    if options is None:
        _refuse_bare_backend(values)
        return build(**values)
    forced = forced_settings(values)
    given = {name: value for name, value in values.items() if value is not None}
    free = {name: value for name, value in given.items() if name not in forced}
    refuse_settings([*contradictions(given, forced), *unsupported_values(free)])
    os.environ[_POST_CAPTURE_SIZING] = "0"
    server_args = build(**{**values, **forced})
    setattr(server_args, OPTIONS_ATTRIBUTE, options)
    if UPSTREAM.resolved(server_args) is server_args:
        # Of a later release the check_server_args hook is the first to see results.
        refuse_unsupported(server_args)
    return server_args


def build_server_args(**kwargs: Any) -> Any:
    """Build a ServerArgs for ``Engine(server_args=...)`` or an own ``Scheduler``.

    Parameters
    ----------
    **kwargs
        Fields of ServerArgs and our keywords: ``kv_compress=True``,
        ``kv_compress_rate=8`` and so on.

    Returns
    -------
    sglang.srt.server_args.ServerArgs
    """
    importlib.import_module("sglang.srt.plugins").load_plugins()
    server_args = importlib.import_module("sglang.srt.server_args")
    return construct(server_args.ServerArgs, kwargs)


def options_of(server_args: Any) -> KVCompressOptions | None:
    """Options attached to a ServerArgs, or None if KV-Compress is off."""
    options: KVCompressOptions | None = getattr(server_args, OPTIONS_ATTRIBUTE, None)
    return options


def forced_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Raw arguments that KV-Compress cannot do without.

    Parameters
    ----------
    values : Mapping
        Raw arguments; they tell whether the server will run on a CPU.
    """
    forced: dict[str, Any] = {
        "attention_backend": BACKEND,
        "radix_cache_backend": BACKEND,
        "page_size": PAGE_SIZE,
    }
    if values.get("device") == "cpu" or no_accelerator():
        forced["cuda_graph_backend_prefill"] = "disabled"
        forced["cuda_graph_backend_decode"] = "disabled"
    return forced


def contradictions(values: Mapping[str, Any], forced: Mapping[str, Any]) -> list[str]:
    """One sentence for each given argument or variable that has another value."""
    wrong = [
        f"{name}={values[name]!r}: leave it out, --kv-compress sets {value!r}"
        for name, value in forced.items()
        if values.get(name, value) != value
    ]
    for name, why in _VARIABLES_OFF.items():
        value = os.environ.get(name, "0")
        if value.lower() not in _FALSE:
            wrong.append(f"{name}={value}: unset it, {why}")
    return wrong


def check_server_args(server_args: Any, model_config: Any = None) -> None:
    """Check resolved settings, the model and our hooks.

    Called in the parent before processes are started, and in the scheduler process
    when the attention backend is built.

    Parameters
    ----------
    server_args : sglang.srt.server_args.ServerArgs
    model_config : sglang.srt.configs.model_config.ModelConfig, optional
        Taken from `server_args` if not given.

    Raises
    ------
    KVCError
        Naming what is wrong.
    """
    resolved = UPSTREAM.resolved(server_args)
    if options_of(server_args) is None:
        fields = {name: getattr(resolved, name) for name in _BACKEND_FIELDS}
        _refuse_bare_backend(fields)
        return
    verify_hooks_installed()
    refuse_unsupported(resolved)
    options = options_of(server_args)
    if options is not None and options.sessions and resolved.disable_radix_cache:
        message = (
            "--kv-compress-sessions keeps what it holds in the prefix cache, which "
            "--disable-radix-cache switches off; drop one of them."
        )
        raise ConfigError(pointed(message, Section.SETTINGS))
    refuse_unsupported_model(model_config or UPSTREAM.model_config(server_args))


def _refuse_bare_backend(values: Mapping[str, Any]) -> None:
    for name in _BACKEND_FIELDS:
        if values.get(name) == BACKEND:
            message = (
                f"--{name.replace('_', '-')} {BACKEND} works only with --kv-compress. "
                "Give --kv-compress, which chooses the backends itself; in Python "
                "Engine(kv_compress=True) or build_server_args of "
                "sglang_kvc.config.server_args."
            )
            raise ConfigError(pointed(message, Section.START_UP))
