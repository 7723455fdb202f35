"""A field of the options is described once: default, flag, placeholder and help.

The command line, the guide's table and the docstring of the record are made of it.
Imports neither torch nor SGLang.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

_KEY = "flag"
_Class = TypeVar("_Class", bound=type)


@dataclass(frozen=True)
class Flag:
    """What the command line says of a field.

    Parameters
    ----------
    parse : callable
        From the word on the command line to the value.
    help : str
        What the field is; the default is added if there is one.
    metavar : str
        Placeholder of the value; with `choices` they are listed instead.
    choices : tuple of str
        The only values, if not empty.
    expert : bool
        Whether users are told to leave it alone.
    """

    parse: Callable[[str], Any]
    help: str
    metavar: str = ""
    choices: tuple[str, ...] = ()
    expert: bool = True

    @property
    def is_switch(self) -> bool:
        """Whether the flag alone says yes, without a value."""
        return self.parse is bool

    @property
    def placeholder(self) -> str:
        """What stands for the value in the help."""
        return "{" + ",".join(self.choices) + "}" if self.choices else self.metavar


def option(default: Any, flag: Flag) -> Any:
    """A field of the options with its flag."""
    return dataclasses.field(default=default, metadata={_KEY: flag})


def integer(
    default: int | None, metavar: str, text: str, *, expert: bool = True
) -> Any:
    """A field that takes an int."""
    return option(default, Flag(int, text, metavar, expert=expert))


def number(default: float | None, text: str, *, expert: bool = True) -> Any:
    """A field that takes a float."""
    return option(default, Flag(float, text, "X", expert=expert))


def choice(
    default: str, choices: tuple[str, ...], text: str, *, expert: bool = True
) -> Any:
    """A field that takes one of a few words."""
    return option(default, Flag(str, text, choices=choices, expert=expert))


def switch(text: str, *, expert: bool = True) -> Any:
    """A field that is off unless its flag is given."""
    return option(False, Flag(bool, text, expert=expert))


def flags_of(record: type) -> dict[str, Flag]:
    """The flags of a record's fields, by name and in their order."""
    return {one.name: one.metadata[_KEY] for one in dataclasses.fields(record)}


def help_of(record: type, name: str) -> str:
    """What a field is, with its default."""
    flag, default = flags_of(record)[name], getattr(record, name)
    text = flag.help
    return text if default is None or flag.is_switch else f"{text} Default: {default}."


def documented(record: _Class) -> _Class:
    """Add the fields to the docstring of a record, from their flags."""
    rows = []
    for one in dataclasses.fields(record):
        text = textwrap.indent(textwrap.fill(help_of(record, one.name), 80), " " * 8)
        rows.append(f"    {one.name} : {one.type}\n{text}\n")
    purpose = (record.__doc__ or "").rstrip()
    record.__doc__ = f"{purpose}\n\n    Parameters\n    ----------\n{''.join(rows)}    "
    return record
