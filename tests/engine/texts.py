"""English text for prompts without shipping any: docstrings of the standard library."""

from __future__ import annotations

import ast
import functools
import pathlib
import sysconfig

MODULES = (
    "argparse", "asyncio/events", "asyncio/tasks", "collections/__init__",
    "concurrent/futures/_base", "csv", "ctypes/util", "dataclasses", "datetime",
    "decimal", "difflib", "email/message", "enum", "fractions", "functools",
    "gettext", "heapq", "http/client", "http/cookiejar", "imaplib", "inspect",
    "ipaddress", "json/__init__", "locale", "logging/__init__", "mailbox",
    "mimetypes", "optparse", "pathlib", "pdb", "pickle", "pickletools", "platform",
    "plistlib", "poplib", "pprint", "profile", "random", "sched", "shelve", "shlex",
    "shutil", "smtplib", "socket", "socketserver", "ssl", "statistics", "string",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit",
    "tokenize", "trace", "traceback", "turtle", "typing", "unittest/case",
    "unittest/mock", "urllib/parse", "urllib/request", "uuid", "warnings",
    "weakref", "xml/dom/minidom", "xmlrpc/client", "zipfile",
)  # fmt: skip


@functools.cache
def corpus() -> str:
    """All docstrings of `MODULES`, in source order."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    parts = []
    for name in MODULES:
        path = root / f"{name}.py"
        if not path.exists():
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
                text := ast.get_docstring(node)
            ):
                parts.append(text)
    return "\n\n".join(parts)


@functools.cache
def corpus_ids(model_path: str) -> list[int]:
    """`corpus` as token ids of the model's tokenizer."""
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(model_path)(corpus())["input_ids"]
    return ids


def prompt(model_path: str, start: int, length: int) -> list[int]:
    """`length` consecutive token ids of the corpus."""
    ids = corpus_ids(model_path)
    if start + length > len(ids):
        raise ValueError(
            f"the corpus has {len(ids)} tokens, asked for {start + length}"
        )
    return ids[start : start + length]
