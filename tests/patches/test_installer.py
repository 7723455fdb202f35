"""Installing hooks: absent, present, twice, late, drifted, beside other plugins."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_kvc.errors import SeamDriftError
from sglang_kvc.upstream.hook_registry import is_applied
from sglang_kvc.upstream.installer import Installer
from sglang_kvc.upstream.patch import HookType, LoadedPatch, Patch

UPSTREAM = "fake_upstream_for_hooks"
SOURCE = """
LIMIT = 1
class Owner:
    factory = int
    def method(self, a):
        return [a]
    @classmethod
    def build(cls, a):
        return [cls.__name__, a]
    @staticmethod
    def add(a):
        return [a]
"""


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's HookRegistry, empty."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    return HookRegistry


@pytest.fixture
def installer(
    registry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Installer]:
    """A new installer; the upstream module exists as a file and is not imported."""
    (tmp_path / f"{UPSTREAM}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    finders = list(sys.meta_path)
    yield Installer()
    sys.meta_path[:] = finders
    sys.modules.pop(UPSTREAM, None)


def append_b(result: list[Any], *_args: Any) -> list[Any]:
    """Hook of type AFTER."""
    return [*result, "b"]


def make_patch(
    symbol: str = "Owner.method",
    params: tuple[str, ...] | None = ("self", "a"),
    hook: Callable[..., Any] = append_b,
    hook_type: HookType = HookType.AFTER,
) -> LoadedPatch:
    """A patch of the upstream module."""
    patch = Patch(
        target=f"{UPSTREAM}:{symbol}",
        hook_type=hook_type,
        expected_params=params,
        reason="test",
        upstream_link="x.py:1",
        remove_when="never",
    )
    return LoadedPatch(symbol, patch, hook)


def owner() -> Any:
    """Import the upstream module."""
    return __import__(UPSTREAM).Owner


def test_module_loaded_before_installation(installer: Installer) -> None:
    assert owner()().method(1) == [1]
    installer.install([make_patch()])
    assert owner()().method(1) == [1, "b"]
    installer.verify(["Owner.method"])


def test_module_loaded_after_installation(installer: Installer) -> None:
    installer.install([make_patch()])
    installer.verify(["Owner.method"])
    assert UPSTREAM not in sys.modules
    assert owner()().method(1) == [1, "b"]
    installer.verify(["Owner.method"])


@pytest.mark.parametrize("late", [False, True])
def test_installed_twice_is_installed_once(installer: Installer, late: bool) -> None:
    if not late:
        owner()
    installer.install([make_patch()])
    installer.install([make_patch()])
    assert owner()().method(1) == [1, "b"]


def test_class_and_static_methods_stay_what_they_are(installer: Installer) -> None:
    installer.install(
        [make_patch("Owner.build", ("cls", "a")), make_patch("Owner.add", ("a",))]
    )
    assert owner().build(1) == ["Owner", 1, "b"]
    assert owner().add(1) == [1, "b"]
    installer.verify(["Owner.build", "Owner.add"])


def test_attribute(installer: Installer) -> None:
    installer.install(
        [
            make_patch("LIMIT", None, lambda old: old + 1, HookType.ATTRIBUTE),
            make_patch(
                "Owner.factory",
                None,
                lambda old: staticmethod(lambda text: -old(text)),
                HookType.ATTRIBUTE,
            ),
        ]
    )
    assert owner()().factory("3") == -3
    assert sys.modules[UPSTREAM].LIMIT == 2  # type: ignore[attr-defined]
    installer.verify(["LIMIT"])
    owner().factory = int
    with pytest.raises(SeamDriftError, match="Owner.factory"):
        installer.verify(["LIMIT"])


def test_not_installed_is_an_error(installer: Installer) -> None:
    with pytest.raises(SeamDriftError, match="Owner.method not installed"):
        installer.verify(["Owner.method"])


def test_hook_that_was_undone_is_an_error(installer: Installer) -> None:
    owner()
    installer.install([make_patch()])
    owner().method = lambda self, a: [a]
    with pytest.raises(SeamDriftError, match=f"{UPSTREAM}:Owner.method"):
        installer.verify(["Owner.method"])


def test_watcher_that_was_removed_is_an_error(installer: Installer) -> None:
    installer.install([make_patch()])
    sys.meta_path.pop(0)
    with pytest.raises(SeamDriftError, match="Owner.method"):
        installer.verify(["Owner.method"])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "patch", [make_patch(params=("self", "a", "b")), make_patch("Owner.gone")]
)
def test_drift_disturbs_only_who_asks(
    installer: Installer, patch: LoadedPatch, late: bool
) -> None:
    if not late:
        owner()
    installer.install([patch])
    assert owner()().method(1) == [1], "a stock server goes on unhooked"
    with pytest.raises(SeamDriftError, match=patch.patch.target):
        installer.verify([patch.name])


def test_failing_import_is_hooked_when_it_succeeds(
    installer: Installer, tmp_path: Path
) -> None:
    source = tmp_path / f"{UPSTREAM}.py"
    installer.install([make_patch()])
    source.write_text("raise RuntimeError('not today')")
    with pytest.raises(RuntimeError, match="not today"):
        owner()
    source.write_text(SOURCE + "# of another length than the first")
    assert owner()().method(1) == [1, "b"]


class TestBesideAnotherPlugin:
    """Both hooks act, each once, whoever comes first."""

    @staticmethod
    def other(result: list[Any], *_args: Any) -> list[Any]:
        """Hook of the other plugin."""
        return [*result, "other"]

    def register_other(self, registry: Any) -> None:
        """Register the other plugin's hook."""
        from sglang.srt.plugins.hook_registry import HookType as Upstream

        registry.register(f"{UPSTREAM}.Owner.method", self.other, Upstream.AFTER)

    def test_applying_imports_the_module(
        self, installer: Installer, registry: Any
    ) -> None:
        """apply_hooks() imports the module while it works on its target."""
        self.register_other(registry)
        installer.install([make_patch(), make_patch("Owner.add", ("a",))])
        registry.apply_hooks()
        assert owner()().method(1) == [1, "other", "b"]
        assert owner().add(1) == [1, "b"]
        installer.verify(["Owner.method", "Owner.add"])

    def test_other_was_applied_before(
        self, installer: Installer, registry: Any
    ) -> None:
        self.register_other(registry)
        registry.apply_hooks()
        installer.install([make_patch()])
        registry.apply_hooks()
        assert owner()().method(1) == [1, "other", "b"]
        installer.verify(["Owner.method"])

    def test_other_registers_after_us(
        self, installer: Installer, registry: Any
    ) -> None:
        """Inside load_plugins() we leave applying to SGLang."""
        from sglang.srt.plugins import hook_registry

        owner()
        token = hook_registry._current_plugin_source.set(
            hook_registry.HookSource("kvcompress", "sglang_kvc")
        )
        installer.install([make_patch()])
        hook_registry._current_plugin_source.reset(token)
        self.register_other(registry)
        registry.apply_hooks()
        assert owner()().method(1) == [1, "b", "other"]
        installer.verify(["Owner.method"])


def test_is_applied_looks_through_all_layers() -> None:
    from sglang.srt.plugins.hook_registry import HookType as Upstream
    from sglang.srt.plugins.hook_registry import _wrap_fn

    def plain() -> list[Any]:
        return []

    once = _wrap_fn(plain, append_b, Upstream.AFTER)
    twice = _wrap_fn(once, lambda original: original(), Upstream.AROUND)
    assert is_applied(once, append_b)
    assert is_applied(twice, append_b)
    assert not is_applied(plain, append_b)
    assert not is_applied(int, append_b)
