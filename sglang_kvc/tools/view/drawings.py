"""The drawings of the page: heads that hold much or little, and tokens over time."""

from __future__ import annotations

from html import escape

from sglang_kvc.tools.view.client import Answer

LEVELS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
"""Upper ends of the shares that have one colour; the first one is held by nobody."""
WIDTH, HEIGHT = 760, 280
LEFT, RIGHT, TOP, BOTTOM = 60, 130, 12, 34


def level(share: float) -> int:
    """Colour of a share: its place in `LEVELS`."""
    return next((i for i, end in enumerate(LEVELS) if share <= end), len(LEVELS) - 1)


def heat_map(answer: Answer) -> str:
    """Table of what every head keeps: a row a KV head, a column a layer."""
    packed = answer.summary.get("packed_tokens_per_head")
    if not packed:
        return "<p>Nothing was evicted: every head holds every token.</p>"
    layers = answer.summary["num_layers"]
    heads, most = len(packed) // layers, max(packed)
    columns = "".join(f'<th scope="col">{layer}</th>' for layer in range(layers))
    rows = []
    for head in range(heads):
        cells = "".join(
            f'<td class="l{level(tokens / most)}">{tokens}</td>'
            for tokens in packed[head::heads]
        )
        rows.append(f'<tr><th scope="row">head {head}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" '
        f'aria-label="Tokens per head, {escape(answer.name)}"><table class="heat">'
        f"<caption>{escape(answer.name)}: packed tokens of each KV head (rows) in each "
        f"layer (columns), {min(packed):,} to {most:,}</caption>"
        f"<tr><th>layer</th>{columns}</tr>{''.join(rows)}</table></div>"
    )


def ticks(top: float) -> range:
    """Round numbers from 0 to `top`, three to six."""
    power = 10 ** (len(str(int(top))) - 1)
    steps = (power * share // 10 or 1 for share in (2, 5, 10, 20, 50))
    return range(0, int(top) + 1, next(step for step in steps if top / step < 6))


def chart(answers: list[Answer]) -> str:
    """Lines of resident tokens along each answer, beside the logical length."""
    shown = [answer for answer in answers if answer.logical]
    longest = max(shown, key=lambda answer: answer.steps[-1])
    lines = [
        (answer.name, answer.steps, answer.resident, f"s{place % 6}")
        for place, answer in enumerate(shown)
        if answer.rate is not None
    ]
    lines.insert(0, ("logical", longest.steps, longest.logical, "logical"))
    most = longest.steps[-1]
    top = max(max(values) for _, _, values, _ in lines) * 1.05
    inner_x, inner_y = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(step: float) -> float:
        return LEFT + inner_x * (step - 1) / max(most - 1, 1)

    def y(tokens: float) -> float:
        return TOP + inner_y * (1 - tokens / top)

    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{LEFT + inner_x}" '
        f'y1="{y(tokens):.1f}" y2="{y(tokens):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y(tokens) + 4:.1f}" text-anchor="end">'
        f"{tokens:,}</text>"
        for tokens in ticks(top)
    ]
    parts += [
        f'<text x="{x(token):.1f}" y="{HEIGHT - 18}" text-anchor="middle">'
        f"{token:,}</text>"
        for token in ticks(most)
        if token
    ]
    parts.append(
        f'<text x="{LEFT + inner_x / 2}" y="{HEIGHT - 3}" text-anchor="middle">'
        "tokens of the answer</text>"
    )
    last = -100.0
    for name, steps, values, style in sorted(lines, key=lambda line: -line[2][-1]):
        pairs = zip(steps, values, strict=True)
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in pairs)
        # Labels stand one below the other where lines lie close together.
        last = max(y(values[-1]) + 4, last + 15)
        end = x(steps[-1])
        parts.append(
            f'<polyline class="{style}" points="{points}"/>'
            f'<circle class="{style}" cx="{end:.1f}" cy="{y(values[-1]):.1f}" r="3"/>'
            f'<text x="{LEFT + inner_x + 8}" y="{last:.1f}">'
            f"{escape(name)}: {values[-1]:,}</text>"
        )
    label = "; ".join(
        f"{name}: {v[0]:,} to {v[-1]:,} tokens" for name, _, v, _ in lines
    )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
