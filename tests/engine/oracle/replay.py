"""A served request once more, pass by pass."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass

from sglang_kvc.config.metrics import METRICS
from sglang_kvc.config.options import KVCompressOptions
from tests.engine.oracle.choice import BLOCK, Rule, choose
from tests.engine.oracle.differences import count_differences, explain_differences
from tests.engine.oracle.model import MaskedModel, MaskedTokens
from tests.engine.oracle.scores import EntryScores


@dataclass(frozen=True)
class Policy:
    """What a KV is worth and who shares a budget, named as the server's options."""

    metric: str = KVCompressOptions.metric
    distinct: float | None = None
    allocation: str = "joint"
    head_floor: int = 0
    layer_share: float | None = None
    aging: float = 1.0

    @property
    def options(self) -> KVCompressOptions:
        """A server's."""
        return KVCompressOptions(**asdict(self))


@dataclass(frozen=True)
class Step:
    """One pass of a request.

    Attributes
    ----------
    length : logical length at it.
    probe : the last queries of the prompt, not yet run, observe what is there.
    repeated : the queries are those of earlier passes.
    allocation : default, the policy's.
    level : layers hold equally much; not what comes of a snapshot.
    budget : tokens that a head keeps on average; default, that of the replay.
    protected : last tokens that stay; default, the server's.
    first : the first pass of the request, which has waited for its answer: all that it
        looks at counts as prompt.
    """

    length: int
    probe: bool = False
    repeated: bool = False
    allocation: str = ""
    level: bool = True
    budget: int = 0
    protected: int = 0
    first: bool = False


class Oracle:
    """Says what a server must keep.

    Parameters
    ----------
    model_path : Hugging Face folder.
    options : the server's; window, protected, sinks and pooling are read.
    ranks : of the server; each deals out its own budget among its own heads.

    Attributes
    ----------
    layers, heads : number of layers, and of KV heads in each.
    """

    def __init__(
        self, model_path: str, options: KVCompressOptions, ranks: int = 1
    ) -> None:
        self.model, self.options = MaskedModel(model_path, ranks), options
        self.layers, self.heads = self.model.layers, self.model.heads

    def request(
        self, prompt: list[int], policy: Policy | None = None, slot: int = 0
    ) -> OracleRequest:
        """One that nothing has been run of; `slot`: the server's row of it."""
        options = dataclasses.replace(self.options, **asdict(policy or Policy()))
        return OracleRequest(self.model, options, prompt, slot)


class OracleRequest:
    """One request, run with masked attention.

    Parameters
    ----------
    model : runs it.
    options : the server's, with the policy of the request.
    prompt : its tokens.
    slot : the server's row of the request.

    Attributes
    ----------
    predicted : the most likely token at each position, as far as it was followed.
    """

    def __init__(
        self,
        model: MaskedModel,
        options: KVCompressOptions,
        prompt: list[int],
        slot: int,
    ) -> None:
        self.model, self.options, self.prompt = model, options, prompt
        power = METRICS[options.metric].power or 2
        self.tokens = MaskedTokens(model, options.window, power)
        self.scores = EntryScores(self.tokens, options, slot, len(prompt))
        self.predicted: dict[int, int] = {}

    def resume(self, prompt: list[int], length: int) -> None:
        """Go on with the next turn, from the first `length` tokens as they are held."""
        self.prompt = prompt
        self.tokens.crop(length)
        self.scores.crop(length)
        self.scores.prompt_len = len(prompt)

    def extend_to(self, ids: list[int], length: int) -> None:
        """Run the first `length` of `ids`, as far as they have not been run."""
        start = self.tokens.length
        if length > start:
            logits = self.tokens.extend(ids[start:length])
            tokens = logits.argmax(-1).tolist()
            self.predicted |= zip(range(start + 1, length + 1), tokens, strict=True)

    def replay(
        self,
        output: list[int],
        steps: list[Step],
        passes: list[list[list[int]]],
        budget: int,
        tie: float,
    ) -> int:
        """Follow the request through its served passes.

        Parameters
        ----------
        output : tokens that the server decoded.
        steps : one for each pass.
        passes : kept positions of each, per head.
        budget : tokens that each keeps per head on average.
        tie : scores closer than this (relative) may go either way; 0 for none.

        Returns
        -------
        int
            Positions on which server and oracle differ, over all passes and heads.

        Raises
        ------
        AssertionError
            A pass keeps another number of KVs, or differs by more than near-ties.
        """
        differing, ids = 0, self.prompt + output
        for step, kept in zip(steps, passes, strict=True):
            self.extend_to(ids, step.length)
            assert self.tokens.length == step.length
            if step.probe:
                first = max(step.length, len(self.prompt) - self.options.window)
                self.tokens.probe(self.prompt[first:], first)
            prompt = step.first or step.length <= len(self.prompt)
            scores = self.scores.update(prompt, step.repeated)
            rule = self._rule(step, step.budget or budget, prompt)
            visible = self.tokens.visible[:, : _fold(step.length)]
            competing = [seen.nonzero().flatten().tolist() for seen in visible]
            for rank in range(self.model.ranks):
                own = self.model.heads_of(rank)
                choice = choose(scores[own], [competing[head] for head in own], rule)
                held = [kept[head] for head in own]
                assert sum(map(len, held)) == rule.budget * len(held)
                problems = explain_differences(choice, held, tie)
                assert not problems, (step, rank, len(problems), problems[:5])
                differing += count_differences(choice, held)
            # A near-tie that went the other way must not hide a later difference.
            self.tokens.keep_only(kept, _fold(step.length))
        return differing

    def _rule(self, step: Step, budget: int, prompt: bool) -> Rule:
        """Down to `budget` tokens per head on average; `prompt`: no later pass."""
        allocation = step.allocation or self.options.allocation
        share = self.options.least_layer_share
        if share and allocation == "joint" and not (prompt and step.level):
            # After the prompt each layer loses as much as it has gained.
            allocation, share = "layer", 0
        return Rule(
            budget=budget,
            layers=self.model.layers,
            allocation=allocation,
            layer_share=share,
            floor_blocks=-(-self.options.head_floor // BLOCK),
            sinks=self.options.sinks,
            protected=step.protected or self.options.protected,
        )


def _fold(length: int) -> int:
    return length // BLOCK * BLOCK
