"""The file of prompts: one JSON object a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_kvc.errors import KVCError

_KEYS = {"prompt", "messages", "reference"}


class PromptsError(KVCError, ValueError):
    """A file of prompts cannot be used; the message names the line."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes
    ----------
    line : where it stands in the file, from 1.
    prompt : a text; None if it is a chat.
    messages : the chat; None if it is a text.
    references : right answers, any of which will do.
    """

    line: int
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    references: tuple[str, ...] = ()


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a file, empty lines left out.

    Raises
    ------
    PromptsError
        With the number of the line, what was expected and what came.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptsError(f"cannot read {path}: {error}") from None
    found = [
        _prompt(path, number, line)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise PromptsError(f"{path} has no prompts; give one JSON object a line")
    return found


def _prompt(path: Path, number: int, line: str) -> Prompt:
    where = f"{path}, line {number}"
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptsError(f"{where}: not JSON ({error.msg})") from None
    if not isinstance(given, dict):
        raise PromptsError(
            f"{where}: must be an object such as "
            f'{{"prompt": "..."}}, got {type(given).__name__}'
        )
    if unknown := sorted(set(given) - _KEYS):
        raise PromptsError(
            f"{where}: unknown key {unknown[0]!r}; valid: {', '.join(sorted(_KEYS))}"
        )
    if ("prompt" in given) == ("messages" in given):
        raise PromptsError(f'{where}: give "prompt" or "messages", one of them')
    text, chat = given.get("prompt"), given.get("messages")
    if "prompt" in given and not (isinstance(text, str) and text):
        raise PromptsError(f'{where}: "prompt" must be a text that is not empty')
    if "messages" in given:
        _check_chat(where, chat)
    return Prompt(number, text, chat, _references(where, given.get("reference")))


def _check_chat(where: str, chat: Any) -> None:
    good = isinstance(chat, list) and all(
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in chat
    )
    if not good or not chat:
        raise PromptsError(
            f'{where}: "messages" must be a list of objects with "role" and "content"'
        )


def _references(where: str, given: Any) -> tuple[str, ...]:
    if given is None:
        return ()
    texts = [given] if isinstance(given, str) else given
    good = isinstance(texts, list) and all(isinstance(t, str) and t for t in texts)
    if not good or not texts:
        raise PromptsError(
            f'{where}: "reference" must be a text or a list of them, none empty'
        )
    return tuple(texts)
