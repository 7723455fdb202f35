"""One JSON line per run, with everything needed to repeat it."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def _git(*args: str) -> str:
    run = subprocess.run(
        ["git", *args], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return run.stdout.strip()


def environment() -> dict[str, Any]:
    """Command, commit, hardware and versions of this process."""
    import torch

    gpu = driver = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, check=False)
        driver = said.stdout.partition("\n")[0].strip()  # a line for each GPU
    versions = {}
    for name in ("sglang", "torch", "triton", "flashinfer-python", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command(sys.argv),
        "commit": commit(),
        "gpu": gpu,
        "driver": driver,
        "versions": versions,
    }


def _command(words: Sequence[str]) -> str:
    """Command line as one repeats it; a file of bench/ is named as a module."""
    program, *rest = map(_relative, words)
    if program.startswith("bench/"):
        module = program.removesuffix(".py").replace("/", ".")
        program = f"-m {module.removesuffix('.__main__')}"
    return " ".join(["python", program, *rest])


def _relative(word: str) -> str:
    """Paths inside the repository as they are, others by their last part."""
    word = word.replace(f"{ROOT}/", "")
    return Path(word).name if word.startswith(("/", ".")) else word


def commit() -> str:
    """Commit of the working tree; ``+dirty`` if it differs.

    A copy states it in the variable ``SGLANG_KVC_COMMIT`` (its own git metadata may be
    another commit's) or, if it has no git metadata, in the file ``.commit``.
    """
    if stated := os.environ.get("SGLANG_KVC_COMMIT"):
        return stated
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        stamp = ROOT / ".commit"
        return stamp.read_text().strip() if stamp.exists() else "unknown"
    return head + ("+dirty" if _git("status", "--porcelain", "-uno") else "")


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Append one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(json.dumps(record, separators=(",", ":")) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a file, none if there is none; a cut-off last line is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
