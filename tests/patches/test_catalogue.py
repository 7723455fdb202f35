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
from sglang_kvc.upstream.hooks import HookType, load_patches

FOLDER = Path(__file__).parents[2] / "patches"
NAMES = (*catalogue.PARENT, *catalogue.SCHEDULER)


def test_every_file_is_catalogued_once() -> None:
    files = {path.stem for path in FOLDER.glob("*__*.py")}
    assert sorted(NAMES) == sorted(files)


def test_readme_is_fresh() -> None:
    assert readme.PATH.read_text(encoding="utf-8") == readme.render(), (
        "run: python -m sglang_kvc.upstream.hooks --write-readme"
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
    targets = [loaded.patch.target for loaded in load_patches(NAMES)]
    assert len(set(targets)) == len(targets)


@pytest.mark.parametrize("name", NAMES)
def test_target_has_the_expected_parameters(name: str) -> None:
    (loaded,) = load_patches([name])
    patch = loaded.patch
    compat.check_seam(patch.target, patch.expected_params, name)
    if patch.hook_type is HookType.ATTRIBUTE:
        assert patch.expected_params is None


@pytest.mark.parametrize("name", NAMES)
def test_upstream_link_points_at_the_target(name: str) -> None:
    """The file and, within a few lines, the line."""
    (loaded,) = load_patches([name])
    path, _, line = loaded.patch.upstream_link.partition(":")
    assert loaded.patch.module == f"sglang.srt.{path[:-3].replace('/', '.')}"
    source = inspect.getsource(sys.modules[loaded.patch.module]).splitlines()
    near = "\n".join(source[max(0, int(line) - 4) : int(line) + 3])
    symbol = loaded.patch.target.rpartition(":")[2].split(".")[-1]
    # The __init__ of a dataclass is written nowhere.
    assert symbol in near or symbol == "__init__"


@pytest.mark.parametrize("seam", compat.SEAMS, ids=lambda seam: seam.target)
def test_seam(seam: compat.Seam) -> None:
    compat.check_seam(seam.target, seam.params, seam.needed_by)
