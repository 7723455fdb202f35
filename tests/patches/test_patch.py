"""The record of a patch: which SGLang versions need it, with which parameters."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kvc.errors import SeamDriftError
from sglang_kvc.patches import readme
from sglang_kvc.upstream.hooks import load_patches
from sglang_kvc.upstream.patch import HookType, Patch

OLD, NEW = ("self", "a"), ("self", "a", "b")


def make_patch(params: Any = OLD, **versions: str) -> Patch:
    """A patch for some versions."""
    return Patch(
        target="m:Owner.method",
        hook_type=HookType.AFTER,
        expected_params=params,
        reason="test",
        upstream_link="x.py:1",
        remove_when="never",
        **versions,
    )


@pytest.mark.parametrize(
    ("versions", "needed"),
    [
        ({}, ["0.5.9", "0.5.17", "0.5.22", "0.5.23"]),
        ({"since": "0.5.17"}, ["0.5.17", "0.5.22", "0.5.23"]),
        ({"until": "0.5.22"}, ["0.5.9", "0.5.17"]),
        ({"since": "0.5.17", "until": "0.5.23"}, ["0.5.17", "0.5.22"]),
    ],
)
def test_versions_that_need_a_patch(
    versions: dict[str, str], needed: list[str]
) -> None:
    """The first of them is one, the one that no longer needs it is not."""
    patch = make_patch(**versions)
    known = ["0.5.9", "0.5.17", "0.5.22", "0.5.23"]
    assert [version for version in known if patch.applies_to(version)] == needed


def test_catalogue_leaves_out_what_is_not_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patches = {
        "always": make_patch(),
        "earlier": make_patch(until="0.5.22"),
        "later": make_patch(since="0.5.22"),
    }
    for name, patch in patches.items():
        file = SimpleNamespace(PATCH=patch, hook=print)
        monkeypatch.setitem(sys.modules, f"sglang_kvc.patches.{name}", file)

    def names(version: str) -> list[str]:
        return [loaded.name for loaded in load_patches(patches, version)]

    assert names("0.5.17") == ["always", "earlier"]
    assert names("0.5.22") == ["always", "later"]


def test_parameters_by_version() -> None:
    patch = make_patch({"0.5.22": NEW, "0.5.9": OLD})
    assert patch.params_in("0.5.17") == OLD
    assert patch.params_in("0.5.22") == NEW
    assert patch.params_in("0.5.23") == NEW
    with pytest.raises(SeamDriftError, match=r"m:Owner\.method .*0\.5\.9 on.*0\.5\.8"):
        patch.params_in("0.5.8")
    assert make_patch(OLD).params_in("0.5.8") == OLD
    assert make_patch(None).params_in("0.5.8") is None


def test_page_says_which_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    file = SimpleNamespace(PATCH=make_patch(since="0.5.17", until="0.5.22"))
    monkeypatch.setitem(sys.modules, "sglang_kvc.patches.both", file)
    monkeypatch.setattr(readme.catalogue, "PARENT", ("both",))
    monkeypatch.setattr(readme.catalogue, "SCHEDULER", ())
    assert "* **SGLang:** from 0.5.17 on, before 0.5.22\n" in readme.render()
