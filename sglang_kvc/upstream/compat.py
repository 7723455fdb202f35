"""Which SGLang we run on, and the symbols of it that we depend on.

A patch states the parameters of its target in its own file (``patches/``), and the
installer compares them with the installed SGLang by :func:`check_seam`. What we use
without hooking stands in :data:`SEAMS`. So a renamed parameter stops the server with
the name of the symbol instead of corrupting a cache.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from sglang_kvc.errors import SeamDriftError, UnsupportedSGLangError

SUPPORTED_SGLANG = ("0.5.17",)


@dataclass(frozen=True)
class Seam:
    """A symbol of SGLang that we depend on.

    Parameters
    ----------
    target : str
        ``module:qualified.name``.
    params : tuple of str, optional
        Parameter names in order, with ``self`` but without stars; None if the
        symbol is not called.
    needed_by : str
        Our module that breaks when the symbol changes.
    """

    target: str
    params: tuple[str, ...] | None
    needed_by: str

    @property
    def module(self) -> str:
        """Module that defines the symbol."""
        return self.target.partition(":")[0]


SEAMS = (
    Seam("sglang.srt.server_args:ATTENTION_BACKEND_CHOICES", None, "plugin"),
    Seam(
        "sglang.srt.server_args:add_attention_backend_choices", ("choices",), "plugin"
    ),
    Seam("sglang.srt.server_args:ServerArgs.get_model_config", ("self",), "refusals"),
    Seam(
        "sglang.srt.layers.attention.attention_registry:register_attention_backend",
        ("name",),
        "plugin",
    ),
    Seam(
        "sglang.srt.mem_cache.registry:register_radix_cache_backend",
        ("name", "factory"),
        "plugin",
    ),
    Seam("sglang.srt.mem_cache.registry:TreeCacheBuildContext", None, "radix_cache"),
    Seam(
        "sglang.srt.plugins.hook_registry:HookRegistry.register",
        ("cls", "target", "hook", "hook_type", "source"),
        "hooks",
    ),
    Seam(
        "sglang.srt.plugins.hook_registry:HookRegistry._apply_target",
        ("cls", "target", "hooks"),
        "hooks",
    ),
    Seam("sglang.srt.plugins.hook_registry:HookRegistry._patched", None, "hooks"),
    Seam("sglang.srt.plugins.hook_registry:HookRegistry._hooks", None, "hooks"),
    Seam("sglang.srt.plugins.hook_registry:_current_plugin_source", None, "hooks"),
    Seam(
        "sglang.srt.environ:envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING",
        None,
        "server_args",
    ),
    Seam("sglang.srt.configs.model_config:AttentionArch.MHA", None, "refusals"),
    Seam(
        "sglang.srt.configs.hybrid_arch:mambaish_config", ("model_config",), "refusals"
    ),
)


def sglang_version() -> str:
    """Version of the installed SGLang, for example ``0.5.17``; "none" without one."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "none"


def check_sglang_version(version: str | None = None) -> None:
    """Raise unless the installed SGLang is one we were tested with.

    Parameters
    ----------
    version : str, optional
        Version to judge; the installed one if not given.

    Raises
    ------
    UnsupportedSGLangError
        Naming the version found and those supported.
    """
    found = sglang_version() if version is None else version
    if found not in SUPPORTED_SGLANG:
        raise UnsupportedSGLangError(
            f"sglang_kvc works with SGLang {', '.join(SUPPORTED_SGLANG)}, found "
            f"{found}: the functions it hooks differ between releases. Install "
            f"sglang=={SUPPORTED_SGLANG[-1]}, or a sglang_kvc made for {found}."
        )


def resolve(target: str) -> tuple[Any, str, Any]:
    """Find a symbol without going through descriptors.

    Parameters
    ----------
    target : str
        ``module:qualified.name``; the module is imported if it is not yet.

    Returns
    -------
    owner : module or class
        The object that holds the attribute.
    name : str
        Name of the attribute.
    value : object
        The raw attribute: a ``staticmethod`` or ``classmethod`` stays one.

    Raises
    ------
    SeamDriftError
        If a part of the path does not exist.
    """
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    try:
        owner: Any = importlib.import_module(module)
        for parent in parents:
            owner = getattr(owner, parent)
        value = inspect.getattr_static(owner, name)
    except (ImportError, AttributeError) as error:
        raise SeamDriftError(
            f"{target} does not exist in SGLang {sglang_version()} ({error}). It was "
            f"there in {SUPPORTED_SGLANG[-1]}; upstream probably renamed it. Install "
            "a supported SGLang, or adapt the patch and its expected parameters."
        ) from error
    return owner, name, value


def parameter_names(function: Callable[..., Any] | Any) -> tuple[str, ...]:
    """Names of all parameters in order, without the stars of ``*args, **kwargs``.

    Parameters
    ----------
    function : callable
        A function, or the raw ``staticmethod`` or ``classmethod`` around one; the
        first parameter of a class method (``cls``) counts.
    """
    function = inspect.unwrap(getattr(function, "__func__", function))
    return tuple(inspect.signature(function).parameters)


def check_seam(target: str, params: tuple[str, ...] | None, needed_by: str) -> None:
    """Raise unless `target` exists and takes exactly `params`.

    Raises
    ------
    SeamDriftError
        Naming the symbol, what was expected, what was found and who needs it.
    """
    _, _, value = resolve(target)
    if params is None:
        return
    found = parameter_names(value)
    if found != params:
        raise SeamDriftError(
            f"{target} takes ({', '.join(found)}) in SGLang {sglang_version()}; "
            f"{needed_by} was written for ({', '.join(params)}). Install SGLang "
            f"{SUPPORTED_SGLANG[-1]}, or adapt {needed_by}."
        )


def verify_seams(seams: Iterable[Seam] = SEAMS) -> None:
    """Check every seam whose module this process has already imported.

    Modules are not imported for the sake of the check: the parent process stays
    light, and a module that is never imported cannot do harm. The scheduler process
    has imported all of them when the attention backend is built.

    Parameters
    ----------
    seams : iterable of Seam
        Seams to check. Those of the patches are checked where they are installed.

    Raises
    ------
    SeamDriftError
        Naming the first symbol that is missing or takes other parameters.
    """
    for seam in seams:
        if seam.module in sys.modules:
            check_seam(seam.target, seam.params, seam.needed_by)


def no_accelerator() -> bool:
    """Whether this machine has none of the devices that SGLang knows."""
    common = importlib.import_module("sglang.srt.utils.common")
    kinds = ("cuda", "hip", "xpu", "npu", "musa", "mps")
    return not any(getattr(common, f"is_{kind}")() for kind in kinds)
