"""A context that is compressed before its question is known."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.quality.tasks.sample import Build, Draw, Sample


@dataclass(frozen=True)
class Reuse:
    """The question of another task, asked after the context.

    Attributes
    ----------
    build : callable
        Builds the question.
    mode : str
        ``TURNS``: in a second request, as a chat client does; ``DICTATED``: decoded
        over the compressed context, the hard case.
    """

    build: Build
    mode: str

    def __call__(self, draw: Draw) -> Sample:
        """The other task's sample in the mode."""
        sample = self.build(draw)
        if not sample.question:
            raise ValueError(f"{draw.task}: the question has no beginning")
        return replace(sample, mode=self.mode)
