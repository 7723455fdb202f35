"""A hook with `runtime_from`: stock without a runtime, and with one it gets it."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_kvc.upstream.patch import HookType, Patch
from sglang_kvc.upstream.when_on import stock_when_off


class Owner:
    """An object of SGLang's, with or without a runtime of ours behind it."""

    def __init__(self, runtime: Any = None) -> None:
        self.runtime = runtime


def make_patch(hook_type: HookType, *, asks: bool = True) -> Patch:
    """A patch that finds the runtime on its target's first argument."""
    return Patch(
        target="m:Owner.method",
        hook_type=hook_type,
        expected_params=None,
        reason="test",
        upstream_link="x.py:1",
        remove_when="never",
        runtime_from=(lambda owner, *_, **__: owner.runtime) if asks else None,
    )


def install(hook_type: HookType, hook: Any) -> Any:
    """SGLang's wrapper with the hook around a function that returns its arguments."""
    from sglang.srt.plugins.hook_registry import HookType as Upstream
    from sglang.srt.plugins.hook_registry import _wrap_fn

    def method(owner: Owner, a: int, *, b: int = 0) -> list[int]:
        del owner
        return [a, b]

    ready = stock_when_off(make_patch(hook_type), hook)
    return _wrap_fn(method, ready, Upstream(hook_type.value))


def before(runtime: str, owner: Owner, a: int, **kwargs: int) -> Any:
    assert runtime == owner.runtime
    return (owner, a + 1), kwargs


def after(result: list[int], runtime: str, owner: Owner, a: int, b: int = 0) -> Any:
    assert runtime == owner.runtime
    return [*result, a, b]


def around(original: Any, runtime: str, owner: Owner, a: int, b: int = 0) -> Any:
    assert runtime == owner.runtime
    return original(owner, -a, b=-b)


@pytest.mark.parametrize(
    ("hook_type", "hook", "changed"),
    [
        (HookType.BEFORE, before, [2, 2]),
        (HookType.AFTER, after, [1, 2, 1, 2]),
        (HookType.AROUND, around, [-1, -2]),
    ],
    ids=lambda value: value.name if isinstance(value, HookType) else "",
)
def test_hook_runs_only_with_a_runtime(
    hook_type: HookType, hook: Any, changed: list[int]
) -> None:
    method = install(hook_type, hook)
    assert method(Owner(), 1, b=2) == [1, 2]
    assert method(Owner("runtime"), 1, b=2) == changed


def test_hook_that_does_not_ask_stays_what_it_is() -> None:
    patch = make_patch(HookType.AROUND, asks=False)
    assert stock_when_off(patch, around) is around


def test_hook_that_returns_nothing_changes_nothing() -> None:
    for hook_type in (HookType.BEFORE, HookType.AFTER):
        method = install(hook_type, lambda *_args, **_kwargs: None)
        assert method(Owner("runtime"), 1, b=2) == [1, 2]


def test_attribute_has_no_runtime_to_ask_for() -> None:
    with pytest.raises(ValueError, match="leave it out"):
        stock_when_off(make_patch(HookType.ATTRIBUTE), around)
