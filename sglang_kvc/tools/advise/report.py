"""The table of rates."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_kvc.tools.advise.asking import FULL
from sglang_kvc.tools.advise.scores import REFERENCE_SCORERS
from sglang_kvc.tools.advise.summary import AGREEMENT, LIKELIHOOD, Row


def table(rows: Sequence[Row], dictated: bool) -> str:
    """Figures by rate, with a legend.

    Parameters
    ----------
    rows : one for each rate.
    dictated : whether log-probabilities are of whole answers.
    """
    scores = [name for name in REFERENCE_SCORERS if name in rows[0].means]
    head = [
        "rate",
        "tokens kept",
        "equal",
        "equal start %",
        "log-prob.",
        "likelihood %",
    ]
    head += [f"{name.replace('_', '-')} %" for name in scores] + ["tokens/s"]
    body = [_cells(row, scores) for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in (head, *body)
    ]
    means = ", ".join(
        f"{name.replace('_', '-')} {100 * rows[0].means[name]:.1f}" for name in scores
    )
    of = "the full cache's answers"
    if not dictated:
        of += (
            " up to the first other token (exact with --enable-custom-logit-processor)"
        )
    lines += [
        "",
        "tokens kept: mean of prompt and answer at its end. equal: answers that are "
        "the full cache's.",
        "equal start: share of the full cache's tokens before the first other one.",
        f"log-prob.: mean of a token of {of}.",
        "likelihood and scores: percent of the full cache's, with 95 % intervals.",
    ]
    if means:
        lines.append(f"The full cache itself, of 100: {means}.")
    return "\n".join(lines)


def _cells(row: Row, scores: Sequence[str]) -> list[str]:
    full = row.rate == FULL
    estimates = [
        "100" if full and row.kept[name] else str(row.kept[name] or "-")
        for name in (AGREEMENT, LIKELIHOOD, *scores)
    ]
    return [
        "full" if full else f"{row.rate:g}",
        f"{row.resident:.0f} of {row.logical:.0f}",
        f"{100 * row.equal:.0f} %",
        estimates[0],
        f"{row.logprob:.3f}",
        *estimates[1:],
        "-" if row.speed is None else f"{row.speed:.1f}",
    ]
