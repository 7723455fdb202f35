"""The catalogue: complete, documented, and true of the installed SGLang."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_kvc.patches import catalogue, readme
from sglang_kvc.upstream import compat
from sglang_kvc.upstream.hooks import load_patches
from sglang_kvc.upstream.patch import HookType, LoadedPatch

FOLDER = Path(__file__).parents[2] / "patches"
NAMES = (*catalogue.PARENT, *catalogue.SCHEDULER)
NEEDED = load_patches(NAMES)
"""By the installed SGLang."""


def test_every_file_is_catalogued_once() -> None:
    files = {path.stem for path in FOLDER.glob("*__*.py")}
    assert sorted(NAMES) == sorted(files)


def test_readme_is_fresh() -> None:
    assert readme.PATH.read_text(encoding="utf-8") == readme.render(), (
        "run: python -m sglang_kvc.patches.readme --write"
    )


@pytest.mark.parametrize("name", NAMES)
def test_hook_is_short_and_documented(name: str) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    hook = next(n for n in tree.body if getattr(n, "name", "") == "hook")
    assert isinstance(hook, ast.FunctionDef)
    assert ast.get_docstring(hook)
    assert ast.get_docstring(tree)
    assert hook.end_lineno is not None
    assert hook.end_lineno - hook.lineno + 1 < 20


def test_parent_patches_import_nothing_heavy() -> None:
    """Every SGLang process imports them, `launch_server --help` included."""
    code = f"""
import sys
from sglang_kvc.upstream.hooks import load_patches
import sglang_kvc.plugin
load_patches({catalogue.PARENT!r})
print([name for name in ("sglang", "torch", "triton") if name in sys.modules])
"""
    run = [sys.executable, "-c", code]
    assert subprocess.check_output(run, text=True).strip() == "[]"


def test_targets_are_distinct() -> None:
    targets = [loaded.patch.target for loaded in NEEDED]
    assert len(set(targets)) == len(targets)


@pytest.mark.parametrize("loaded", NEEDED, ids=lambda loaded: loaded.name)
def test_target_has_the_expected_parameters(loaded: LoadedPatch) -> None:
    patch = loaded.patch
    params = patch.params_in(compat.sglang_version())
    compat.check_seam(patch.target, params, loaded.name)
    if patch.hook_type is HookType.ATTRIBUTE:
        assert patch.expected_params is None


LINKED = [
    loaded
    for loaded in NEEDED
    if readme.linked_version(loaded.patch) == compat.sglang_version()
]
"""Patches whose links name lines of the installed SGLang."""


def test_every_link_is_checked_on_the_newest_or_the_oldest_release() -> None:
    """These two have an environment; a link to another release would rot."""
    ends = {compat.SUPPORTED_SGLANG[0], compat.SUPPORTED_SGLANG[-1]}
    loaded = [each for version in ends for each in load_patches(NAMES, version)]
    assert {readme.linked_version(each.patch) for each in loaded} == ends


@pytest.mark.parametrize("loaded", LINKED, ids=lambda loaded: loaded.name)
def test_upstream_link_points_at_the_target(loaded: LoadedPatch) -> None:
    """The file and, within a few lines, the line."""
    path, _, line = loaded.patch.upstream_link.partition(":")
    assert loaded.patch.module == f"sglang.srt.{path[:-3].replace('/', '.')}"
    source = inspect.getsource(sys.modules[loaded.patch.module]).splitlines()
    near = "\n".join(source[max(0, int(line) - 4) : int(line) + 3])
    symbol = loaded.patch.target.rpartition(":")[2].split(".")[-1]
    assert symbol in near


@pytest.mark.parametrize("seam", compat.SEAMS, ids=lambda seam: seam.target)
def test_seam(seam: compat.Seam) -> None:
    seam.check()
