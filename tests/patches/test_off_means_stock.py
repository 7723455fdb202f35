"""The plugin is loaded and --kv-compress is off: SGLang's own functions do the work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

from sglang_kvc.config.server_args import _BACKEND_FIELDS
from sglang_kvc.memory import pools
from sglang_kvc.memory.kv_pool import ArenaKVPool
from sglang_kvc.patches import catalogue
from sglang_kvc.scheduling.attached import attach_runtime
from sglang_kvc.upstream import compat
from sglang_kvc.upstream.hooks import load_patches
from sglang_kvc.upstream.patch import HookType, LoadedPatch
from sglang_kvc.upstream.when_on import stock_when_off

NAMES = (*catalogue.PARENT, *catalogue.SCHEDULER)
FUNCTIONS = [
    loaded
    for loaded in load_patches(NAMES)
    # An attribute is set on import, and the flags are what turns the feature on.
    if loaded.patch.hook_type is not HookType.ATTRIBUTE
    and loaded.name != "server_args__add_cli_args"
]
WITH_RUNTIME = [loaded for loaded in FUNCTIONS if loaded.patch.runtime_from]

Call = tuple[tuple[Any, ...], dict[str, Any]]


def calls(pool: object) -> dict[str, Call]:
    """How SGLang calls each target, in a server with this KV pool."""
    allocator = SimpleNamespace(get_kvcache=lambda: pool)
    holder = SimpleNamespace(token_to_kv_pool_allocator=allocator)
    worker = SimpleNamespace(model_runner=holder)
    checker = SimpleNamespace(tree_cache=holder)
    req, batch, result = (SimpleNamespace() for _ in range(3))
    stock = SimpleNamespace(device="cuda", **dict.fromkeys(_BACKEND_FIELDS))
    owner = SimpleNamespace(server_args=stock)
    serving = SimpleNamespace(tokenizer_manager=owner)
    collector = SimpleNamespace()
    if runtime := getattr(pool, "runtime", None):
        attach_runtime(collector, runtime)
    obj = SimpleNamespace(rid="a", sampling_params={})
    cuda = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    cli = argparse.Namespace(model_path="m", attention_backend="triton")
    return {
        "server_args__from_cli_args": ((type(owner), cli), {}),
        "server_args__check_server_args": ((stock,), {}),
        "engine__launch_subprocesses": ((type(owner), stock), {"port_args": None}),
        "utils_common__support_triton": (("triton",), {}),
        "pynccl__init": ((owner, None, "cuda:0"), {}),
        "api_contract__generate_contract_error": (({},), {}),
        "serving_base__handle_request": ((serving, obj, None), {}),
        "serving_responses__create_responses": ((serving, obj, None), {}),
        "tokenizer_manager__generate_request": ((owner, obj, None), {}),
        "tokenizer_manager__validate_one_request": ((owner, obj, []), {}),
        "tokenizer_manager__init_req_state": ((owner, obj, None), {}),
        "tokenizer_manager__accumulate_request_meta_info": (
            ({}, owner, "another", []),
            {},
        ),
        "kv_cache_configurator__configure": ((owner, 1.0), {}),
        "kv_cache_configurator__profile_available_bytes": ((owner, 1), {}),
        "kv_cache_configurator__resolve_max_num_reqs": ((owner, 1 << 20), {}),
        "kv_cache_configurator__build_mha_kv_pool": (
            (owner,),
            {"max_total_num_tokens": 1, "mha_pool_class": int, "quant_method": None},
        ),
        "kv_cache_configurator__build_token_to_kv_pool_allocator": (
            (owner,),
            {"sizes": 1, "token_to_kv_pool": pool},
        ),
        "models_utils__enable_fused_set_kv_buffer": ((batch,), {}),
        "tp_worker__get_worker_info": ((worker,), {}),
        "scheduler__init_req_max_new_tokens": ((holder, req), {}),
        "scheduler__add_request_to_queue": ((holder, req), {"is_retracted": True}),
        "schedule_batch__compute_max_prefix_len": ((req, 7), {}),
        "schedule_policy__running_request_offset": ((holder, req), {}),
        "schedule_policy__add_one_req": (
            (holder, req),
            {"has_chunked_req": False, "truncation_align_size": None},
        ),
        "schedule_policy__add_chunked_req": ((holder, req), {}),
        "schedule_policy__preempt_to_schedule": ((holder, req), {}),
        "scheduler__get_prefill_adder_class": ((holder,), {}),
        "scheduler__get_new_batch_prefill": ((holder, batch), {}),
        "scheduler__get_new_batch_prefill_raw": ((holder, None, batch), {}),
        "scheduler__should_defer_prefill": ((holder, batch), {}),
        "schedule_batch__retract_decode": ((holder,), {}),
        "schedule_batch__get_decode_retraction_order": (([req, req],), {}),
        "xgrammar_backend__allocate_token_bitmask": ((100, 2), {}),
        "xgrammar_backend__apply_vocab_mask": (
            (owner,),
            {"logits": cuda, "vocab_mask": None},
        ),
        "scheduler__init_metrics_reporter": ((holder,), {}),
        "scheduler__get_init_info": ((holder,), {}),
        "schedule_batch__prepare_for_extend": ((holder,), {}),
        "schedule_batch__prepare_for_decode": ((holder,), {}),
        "tp_worker__forward_batch_generation": ((worker, batch), {"is_verify": True}),
        "scheduler__get_next_batch_to_run": ((holder, batch, None), {}),
        "scheduler__process_batch_result": ((holder, batch, result), {}),
        "invariant_checker__get_total_uncached_sizes": ((checker,), {}),
        "metrics_collector__log_stats": ((collector, owner), {}),
    }


@pytest.fixture(autouse=True)
def _a_stock_server_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt import runtime_context
    from sglang.srt.model_executor import forward_context

    monkeypatch.setattr(compat, "no_accelerator", lambda: False)
    monkeypatch.setattr(forward_context, "get_token_to_kv_pool", object)
    monkeypatch.setattr(runtime_context, "get_server_args", SimpleNamespace)
    given = SimpleNamespace(max_running_requests=None)
    monkeypatch.setattr(pools, "get_schedule", lambda: given)


@contextmanager
def scheduling_watched(ran: list[str]) -> Iterator[None]:
    """Note what runs in ``sglang_kvc.scheduling``."""

    def note(frame: FrameType, event: str, _: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith("sglang_kvc.scheduling"):
            ran.append(f"{module}.{frame.f_code.co_name}")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)


def test_every_function_is_called_here() -> None:
    """Also those of other releases of SGLang."""
    called = set(calls(object()))
    assert {loaded.name for loaded in FUNCTIONS} <= called <= set(NAMES)


@pytest.mark.parametrize("loaded", FUNCTIONS, ids=lambda loaded: loaded.name)
def test_stock_function_gets_the_same_arguments(loaded: LoadedPatch) -> None:
    from sglang.srt.plugins.hook_registry import HookType as Upstream
    from sglang.srt.plugins.hook_registry import _wrap_fn

    args, kwargs = calls(object())[loaded.name]
    before = [dict(vars(arg)) for arg in args if isinstance(arg, SimpleNamespace)]
    answer = object()
    seen: list[Call] = []

    def stock(*args: Any, **kwargs: Any) -> object:
        seen.append((args, kwargs))
        return answer

    hook = stock_when_off(loaded.patch, loaded.hook)
    hooked = _wrap_fn(stock, hook, Upstream(loaded.patch.hook_type.value))
    ran: list[str] = []
    with scheduling_watched(ran):
        assert hooked(*args, **kwargs) is answer
    assert seen == [(args, kwargs)]
    # A request is asked for its policy, a collector for its runtime: nothing else
    # tells whose it is.
    allowed = {"policy_of", "runtime_of_collector"}
    assert set(ran) <= {f"sglang_kvc.scheduling.attached.{name}" for name in allowed}
    after = [dict(vars(arg)) for arg in args if isinstance(arg, SimpleNamespace)]
    assert after == before, "something was hung on an object of SGLang's"


@pytest.mark.parametrize("loaded", WITH_RUNTIME, ids=lambda loaded: loaded.name)
def test_runtime_is_found_when_on(loaded: LoadedPatch) -> None:
    pool = object.__new__(ArenaKVPool)
    pool.runtime = runtime = object()
    args, kwargs = calls(pool)[loaded.name]
    assert loaded.patch.runtime_from is not None
    assert loaded.patch.runtime_from(*args, **kwargs) is runtime


def test_watching_sees_what_runs() -> None:
    from sglang_kvc.scheduling.reporting import Accumulator

    ran: list[str] = []
    with scheduling_watched(ran):
        Accumulator()["key"] = 1
    assert ran == ["sglang_kvc.scheduling.reporting.__setitem__"]
