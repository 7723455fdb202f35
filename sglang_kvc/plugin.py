"""Entry point that SGLang calls in every process (``sglang.srt.plugins``).

SGLang logs an exception raised here and goes on without us. That is safe: the flag,
the keyword and the backend name then do not exist, so nothing can ask for them.
"""

from __future__ import annotations

from typing import Any

from sglang_kvc.config.options import BACKEND
from sglang_kvc.errors import Section, points_to
from sglang_kvc.upstream.compat import check_sglang_version, verify_seams
from sglang_kvc.upstream.hooks import INSTALLER, install_hooks, verify_hooks_installed


def register() -> None:
    """Install hooks and register our names; safe to call again.

    Nothing of SGLang is imported: what belongs to a module that is not loaded yet is
    done right after its import.

    Raises
    ------
    UnsupportedSGLangError
        If the installed SGLang is not a supported version.
    """
    check_sglang_version()
    install_hooks()
    for module, action in (
        ("sglang.srt.server_args", _register_backend_choice),
        ("sglang.srt.layers.attention.attention_registry", _register_attention),
        ("sglang.srt.mem_cache.registry", _register_radix_cache),
    ):
        INSTALLER.when_imported(module, action)


@points_to(Section.START_UP)
def build_attention_backend(model_runner: Any) -> Any:
    """Build the attention backend, after the last checks in the scheduler process.

    Parameters
    ----------
    model_runner : sglang.srt.model_executor.model_runner.ModelRunner

    Raises
    ------
    KVCError
        If a hook is missing, SGLang changed, or the mode is not supported. Raised
        here it stops the server.
    """
    from sglang_kvc.attention.backend import build
    from sglang_kvc.config.server_args import check_server_args

    verify_seams()
    verify_hooks_installed()
    check_server_args(model_runner.server_args, model_runner.model_config)
    return build(model_runner)


def build_radix_cache(context: Any) -> Any:
    """Build the prefix cache from SGLang's ``TreeCacheBuildContext``."""
    from sglang_kvc.scheduling.radix_cache import build

    return build(context)


def _register_backend_choice() -> None:
    from sglang.srt import server_args

    if BACKEND not in server_args.ATTENTION_BACKEND_CHOICES:
        server_args.add_attention_backend_choices([BACKEND])


def _register_attention() -> None:
    from sglang.srt.layers.attention.attention_registry import (
        register_attention_backend,
    )

    register_attention_backend(BACKEND)(build_attention_backend)


def _register_radix_cache() -> None:
    from sglang.srt.mem_cache import registry

    if BACKEND not in registry.registered_radix_cache_backends():
        registry.register_radix_cache_backend(BACKEND, build_radix_cache)
