"""A copy of what is packed into a wheel, so that no build folder is left."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")


def copy_packed(tree: Path) -> Path:
    """Copy it to a folder; return that."""
    for folder in ("sglang_kvc", "kernels", "patches", "docs"):
        shutil.copytree(
            ROOT / folder,
            tree / folder,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in ("pyproject.toml", "MANIFEST.in", "LICENSE", *PAGES):
        shutil.copy(ROOT / name, tree)
    return tree
