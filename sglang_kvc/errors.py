"""Exceptions of ``sglang_kvc``.

Every message says what is wrong, what was expected, what was found and what to do.
"""

from __future__ import annotations


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
