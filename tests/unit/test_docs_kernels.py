"""`kernels/README.md` names every file of `kernels/`, and no file that is gone."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "kernels" / "README.md"


def named() -> set[Path]:
    """The files that the page links to."""
    links = re.findall(r"\]\(([^)#]+)", PAGE.read_text())
    return {(PAGE.parent / link).resolve() for link in links}


def test_page_names_every_file() -> None:
    files = {path.resolve() for path in PAGE.parent.glob("*.py")}
    assert files - named() == set()


def test_every_named_file_exists() -> None:
    assert [path for path in named() if not path.exists()] == []


def test_every_named_function_exists() -> None:
    """Ops, references and kernels: code in backticks that is a name."""
    code = "\n".join(path.read_text() for path in PAGE.parent.glob("*.py"))
    names = set(re.findall(r"`([a-z_]+)`", PAGE.read_text()))
    defined = set(re.findall(r"^def (\w+)", code, flags=re.MULTILINE))
    assert names - defined == set()


def test_every_test_of_a_kernel_is_named() -> None:
    tests = {path.resolve() for path in (ROOT / "tests/kernels").glob("test_*.py")}
    assert tests - named() == set()
