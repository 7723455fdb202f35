"""Which SGLang we run on, and the symbols of it that we depend on.

A patch states the parameters of its target in its own file (``patches/``), and the
installer compares them with the installed SGLang by :func:`check_seam`. What we use
without hooking stands in :data:`SEAMS`. So a renamed parameter stops the server with
the name of the symbol instead of corrupting a cache.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from sglang_kvc.errors import SeamDriftError, UnsupportedSGLangError

SUPPORTED_SGLANG = ("0.5.17", "0.5.22", "0.5.23")

Parameters = tuple[str, ...]


@dataclass(frozen=True)
class Seam:
    """A symbol of SGLang that we depend on.

    ``python -m sglang_kvc.tools.check_upstream`` reads `SEAMS` without importing this
    file, so they are written as plain values.

    Parameters
    ----------
    target : str
        ``module:qualified.name``.
    params : tuple of str, or mapping of str to tuple of str, optional
        Parameter names in order, with ``self`` but without stars; None if it is not
        called, or no function. A mapping has one for each release that changed them.
    needed_by : str
        Our module that breaks when the symbol changes.
    since : str
        First release that we need the symbol of; empty: all.
    until : str
        First release that we no longer need it of; empty: none.
    """

    target: str
    params: Parameters | Mapping[str, Parameters | None] | None
    needed_by: str
    since: str = ""
    until: str = ""

    @property
    def module(self) -> str:
        """Module that defines the symbol."""
        return self.target.partition(":")[0]

    def check(self) -> None:
        """Call `check_seam` with the parameters of the installed release, if needed."""
        if not in_force(self.since, self.until):
            return
        params = params_in(self.target, self.params)
        check_seam(self.target, params, self.needed_by)


SEAMS = (
    Seam("sglang.srt.server_args:ATTENTION_BACKEND_CHOICES", None, "plugin"),
    Seam(
        "sglang.srt.server_args:add_attention_backend_choices",
        # Then the method of a list.
        {"0.5.17": ("choices",), "0.5.19": None},
        "plugin",
    ),
    Seam(
        "sglang.srt.server_args:ServerArgs.get_model_config",
        ("self",),
        "generation",
        until="0.5.19",
    ),
    Seam(
        "sglang.srt.arg_groups.model_override_base:model_config_of",
        ("server_args",),
        "generation",
        since="0.5.19",
    ),
    Seam(
        "sglang.srt.arg_groups.model_override_base:resolving_view",
        ("server_args",),
        "generation",
        since="0.5.19",
    ),
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
        "hook_registry",
    ),
    Seam(
        "sglang.srt.plugins.hook_registry:HookRegistry._apply_target",
        ("cls", "target", "hooks"),
        "hook_registry",
    ),
    Seam(
        "sglang.srt.plugins.hook_registry:HookRegistry._patched", None, "hook_registry"
    ),
    Seam("sglang.srt.plugins.hook_registry:HookRegistry._hooks", None, "hook_registry"),
    Seam(
        "sglang.srt.plugins.hook_registry:_current_plugin_source", None, "hook_registry"
    ),
    Seam(
        "sglang.srt.model_executor.forward_context:ForwardContext",
        {
            "0.5.17": ("attn_backend",),
            "0.5.23": ("attn_backend", "moe_num_token_non_padded"),
        },
        "step_context",
    ),
    Seam(
        "sglang.srt.model_executor.forward_context:forward_context",
        {"0.5.17": ("ctx",), "0.5.23": ("ctx", "forward_batch")},
        "step_context",
    ),
    Seam(
        "sglang.srt.environ:envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING",
        None,
        "server_args",
    ),
    Seam("sglang.srt.environ:envs.SGLANG_RUST_SERVER", None, "server_args"),
    Seam(
        "sglang.srt.runtime_context:get_server_args",
        (),
        "patches/api_contract__generate_contract_error.py",
        since="0.5.22",
    ),
    Seam(
        "sglang.srt.entrypoints.http_server:get_global_state",
        (),
        "patches/http_server__app.py",
    ),
    Seam(
        "sglang.srt.mem_cache.registry:create_unified_radix_cache",
        ("ctx", "cache_class"),
        "radix_cache",
        since="0.5.22",
    ),
    # Snapshots are branches of the tree: what is overridden tells when one is evicted.
    Seam(
        "sglang.srt.mem_cache.radix_cache:RadixCache._delete_leaf",
        ("self", "node"),
        "radix_cache_17",
        until="0.5.22",
    ),
    Seam(
        "sglang.srt.mem_cache.radix_cache:RadixCache.evict",
        ("self", "params"),
        "radix_cache_17",
        until="0.5.22",
    ),
    Seam(
        "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache._evict_device_leaf",
        ("self", "node_id", "tracker"),
        "radix_cache_22",
        since="0.5.22",
    ),
    Seam(
        "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache.evict",
        ("self", "params"),
        "radix_cache_22",
        since="0.5.22",
    ),
    Seam(
        "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache.evict_for_alloc",
        {
            "0.5.22": ("self", "params"),
            "0.5.23": ("self", "params", "allocation_reclaim_satisfied"),
        },
        "radix_cache_22",
        since="0.5.22",
    ),
    Seam(
        "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache.prefix_device_indices",
        ("self", "req"),
        "radix_cache_22",
        since="0.5.22",
    ),
    Seam(
        "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache.path_device_indices",
        ("self", "node"),
        "radix_cache_22",
        since="0.5.22",
    ),
    Seam(
        "sglang.srt.mem_cache.unified_cache.unified_tree_core_interface:UnifiedTreeCoreInterface.collect_path_info",
        ("self", "end_node_ids"),
        "radix_cache_22",
        since="0.5.22",
    ),
    # The class that admits is derived from SGLang's: a method that it overrides in
    # vain would not be noticed.
    Seam(
        "sglang.srt.managers.schedule_policy:PrefillAdder._get_running_request_total_token_offset",
        ("self", "req"),
        "prefill_adder",
        since="0.5.22",
    ),
    Seam(
        "sglang.srt.managers.schedule_policy:PrefillAdder.add_one_req",
        ("self", "req", "has_chunked_req", "truncation_align_size"),
        "prefill_adder",
        since="0.5.22",
    ),
    Seam(
        "sglang.srt.managers.schedule_policy:PrefillAdder.add_chunked_req",
        ("self", "req"),
        "prefill_adder",
        since="0.5.22",
    ),
    Seam(
        "sglang.srt.managers.schedule_policy:PrefillAdder.preempt_to_schedule",
        ("self", "req"),
        "prefill_adder",
        since="0.5.22",
    ),
    # The base class would let the request table change under a decode graph.
    Seam(
        "sglang.srt.layers.attention.base_attn_backend:AttentionBackend.shared_read_ends",
        ("self", "fm"),
        "backend",
        since="0.5.22",
    ),
    Seam(
        "sglang.srt.observability.metrics_collector:_StatLoggerDIMixin._counter_cls",
        None,
        "collectors",
    ),
    Seam(
        "sglang.srt.observability.metrics_collector:_StatLoggerDIMixin._gauge_cls",
        None,
        "collectors",
    ),
    Seam(
        "sglang.srt.observability.metrics_collector:SchedulerMetricsCollectorContext.current_scheduler_metrics_enabled",
        None,
        "runtime",
    ),
    Seam("sglang.srt.configs.model_config:AttentionArch.MHA", None, "refusals"),
    Seam(
        "sglang.srt.configs.hybrid_arch:mambaish_config", ("model_config",), "refusals"
    ),
)


@functools.cache
def sglang_version() -> str:
    """Version of the installed SGLang, for example ``0.5.17``; "none" without one."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "none"


def in_force(since: str = "", until: str = "", version: str | None = None) -> bool:
    """Whether a release is one of those that something holds for.

    Parameters
    ----------
    since : str
        First release that it holds for; empty: all.
    until : str
        First release that it no longer holds for; empty: none.
    version : str, optional
        The release, the installed one if not given; older than all if it is none.
    """
    found = _numbers(sglang_version() if version is None else version)
    return _numbers(since) <= found and not (until and found >= _numbers(until))


def params_in(
    target: str,
    params: Parameters | Mapping[str, Parameters | None] | None,
    version: str | None = None,
) -> Parameters | None:
    """Parameters of a symbol in a release, the installed one if not given.

    Parameters
    ----------
    target : str
        The symbol, for the message.
    params : tuple of str, or mapping of str to tuple of str, optional
        A mapping has those of each release that changed them.

    Raises
    ------
    SeamDriftError
        If the release is older than all that parameters are given for.
    """
    if not isinstance(params, Mapping):
        return params
    reached = [first for first in params if in_force(first, version=version)]
    if not reached:
        found = sglang_version() if version is None else version
        raise SeamDriftError(
            f"The parameters of {target} are known from SGLang "
            f"{min(params, key=_numbers)} on, found {found}. Add those of {found} to "
            "`expected_params` of its patch, or to its seam."
        )
    return params[max(reached, key=_numbers)]


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


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
            f"{target} does not exist in SGLang {sglang_version()} ({error}): upstream "
            f"probably renamed it. Install SGLang {' or '.join(SUPPORTED_SGLANG)}, or "
            "adapt the patch and its expected parameters."
        ) from error
    return owner, name, value


def parameter_names(function: Callable[..., Any] | Any) -> Parameters:
    """Names of all parameters in order, without the stars of ``*args, **kwargs``.

    Parameters
    ----------
    function : callable
        A function, or the raw ``staticmethod`` or ``classmethod`` around one; the
        first parameter of a class method (``cls``) counts.
    """
    function = inspect.unwrap(getattr(function, "__func__", function))
    return tuple(inspect.signature(function).parameters)


def check_seam(target: str, params: Parameters | None, needed_by: str) -> None:
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
            f"{' or '.join(SUPPORTED_SGLANG)}, or adapt {needed_by}."
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
            seam.check()


def no_accelerator() -> bool:
    """Whether this machine has none of the devices that SGLang knows."""
    common = importlib.import_module("sglang.srt.utils.common")
    kinds = ("cuda", "hip", "xpu", "npu", "musa", "mps")
    return not any(getattr(common, f"is_{kind}")() for kind in kinds)
