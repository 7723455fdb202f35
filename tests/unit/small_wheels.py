"""Wheels that look like SGLang's and hold a handful of lines."""

from __future__ import annotations

import zipfile
from pathlib import Path

from sglang_kvc.tools.upstream_diff.release import Release

PINS = "Requires-Python: >=3.10\nRequires-Dist: torch==1.0\n"


def make_wheel(
    folder: Path, files: dict[str, str], version: str = "1.0", pins: str = PINS
) -> Path:
    """A wheel with these files and nothing to run."""
    path = folder / f"sglang-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {"sglang/srt/server_args.py": "", **files}.items():
            archive.writestr(name, text)
        if pins:
            head = f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n"
            archive.writestr(f"sglang-{version}.dist-info/METADATA", f"{head}{pins}\n")
    return path


def two(tmp_path: Path, old: dict[str, str], new: dict[str, str]) -> list[Release]:
    """Both releases; files of `old` are in the second too unless given."""
    wheels = (make_wheel(tmp_path, old), make_wheel(tmp_path, {**old, **new}, "2.0"))
    return [Release(wheel) for wheel in wheels]
