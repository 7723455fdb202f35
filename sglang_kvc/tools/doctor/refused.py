"""What would be refused: SGLang's ServerArgs of the flags, and our rules on them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sglang_kvc.errors import KVCError
from sglang_kvc.tools.doctor.findings import BAD, GOOD, Finding

_SWITCH = "--kv-compress"


def refused(flags: Sequence[str]) -> Iterator[Finding]:
    """Findings of a server with these flags and ``--kv-compress``.

    Parameters
    ----------
    flags : sequence of str
        As for ``sglang.launch_server``, with ``--model-path``.
    """
    from sglang_kvc.config.refusals import refuse_unsupported
    from sglang_kvc.config.refusals_model import refuse_unsupported_model
    from sglang_kvc.upstream.generation import UPSTREAM
    from sglang_kvc.upstream.hooks import verify_hooks_installed

    made: list[Any] = []
    finding = _asked("flags", lambda: made.append(_server_args(flags)))
    yield finding
    if not made:
        return
    server_args = made[0]
    for subject, ask in (
        ("hooks", verify_hooks_installed),
        ("settings", lambda: refuse_unsupported(UPSTREAM.resolved(server_args))),
        ("model", lambda: refuse_unsupported_model(UPSTREAM.model_config(server_args))),
    ):
        finding = _asked(subject, ask)
        yield finding
        if finding.state == BAD and subject == "hooks":
            return
    if finding.state != BAD:
        yield _asked("SGLang's own checks", server_args.check_server_args)


def _server_args(flags: Sequence[str]) -> Any:
    """What the launcher makes of the flags; later releases resolve it in a second step.

    Raises
    ------
    KVCError
        If our rules refuse the flags as they are typed.
    """
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    given = list(flags) if _SWITCH in flags else [*flags, _SWITCH]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            server_args = prepare_server_args(given)
    except SystemExit:
        # argparse has printed how it is used, and at the end what is wrong.
        last = said.getvalue().strip().splitlines()[-1:]
        raise ValueError("".join(last) or "SGLang ended the program") from None
    if hasattr(server_args, "resolve_once"):
        server_args.resolve_once()
    return server_args


def _asked(subject: str, ask: Callable[[], Any]) -> Finding:
    """Ask once; whatever is raised is the reason."""
    try:
        ask()
    except KVCError as error:
        return Finding(subject, BAD, str(error))
    except Exception as error:  # SGLang's own complaint, of any type
        return Finding(subject, BAD, f"SGLang refuses: {_first_line(error)}")
    return Finding(subject, GOOD, "served")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
