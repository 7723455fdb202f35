"""Exceptions of ``sglang_kvc``, and the sections of the guide that explain them.

Every message says what is wrong, what was expected, what was found and what to do. What
refuses a setting or a request ends with a pointer to the guide.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator

_PAGE = "docs/guide.md"


class KVCError(Exception):
    """Base class of everything this package raises on purpose."""


class ConfigError(KVCError, ValueError):
    """A setting of the server or of one request is not acceptable."""


class UnsupportedModeError(ConfigError):
    """A feature of SGLang or of the model that KV-Compress does not serve."""


class UnsupportedSGLangError(KVCError):
    """The installed SGLang is not the version this package was tested with."""


class RanksDivergedError(KVCError):
    """Two ranks of one server have planned different steps; never a user's mistake."""


class SeamDriftError(KVCError):
    """A symbol of SGLang that we depend on is missing, changed or not hooked."""


class Section(enum.Enum):
    """Sections of the guide that messages point to; values are anchors."""

    FLAGS = "flags"
    START_UP = "start-up"
    SETTINGS = "works-refused-untested"
    MODELS = "models"
    MEMORY = "how-much-fits"
    OPTIONS = "one-request"
    REQUESTS = "requests"
    LONG_PROMPTS = "long-prompts"


def pointed(message: str, section: Section) -> str:
    """The message with a pointer to the guide behind it, unless it has one already."""
    if f"{_PAGE}#" in message:
        return message
    end = "" if message.endswith((".", "!", "?")) else "."
    gap = "\n" if "\n" in message else " "
    return f"{message}{end}{gap}See {_PAGE}#{section.value}"


@contextlib.contextmanager
def points_to(section: Section) -> Iterator[None]:
    """What is refused inside points to a section; also a decorator.

    A refusal that points elsewhere already keeps its pointer.
    """
    try:
        yield
    except ConfigError as error:
        error.args = (pointed(str(error), section), *error.args[1:])
        raise
