"""One question to a model, and what its builder is given."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench.quality.tasks.corpus import Corpus

ASK = "ask"
"""One request, the question at the end of its prompt."""
TURNS = "turns"
"""Two requests: the context alone, then the conversation so far and the question."""
DICTATED = "dictated"
"""One request: the context is the prompt, the question is decoded token by token."""
LIKELIHOOD = "likelihood"
"""One request that decodes a given text: log-probabilities instead of an answer."""
CONVERSATION = "conversation"
"""A request a turn; replies of earlier turns are dictated."""
MODES = (ASK, TURNS, DICTATED, LIKELIHOOD, CONVERSATION)


class SampleKey(NamedTuple):
    """What determines a sample; `number` is its `index` (tuples have one already)."""

    task: str
    length: int
    seed: int
    number: int


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes
    ----------
    task, group : str
        Names in `bench.quality.tasks`.
    index, length, seed : int
        With the task, they determine everything else; `length` is the token length
        that the prompt was built for (its template and `prefix` included).
    prompt : str
        What the user writes; ends with `question`.
    answers : tuple of str
        What a good answer contains.
    max_new_tokens : int
    scorer : str
        Name in `bench.quality.metrics`.
    question : str
        The end of `prompt`, from where the context is over.
    prefix : str
        Beginning of the answer, put into the model's mouth (as RULER does).
    mode : str
        One of `MODES`.
    stop : tuple of str
        Strings that end the answer.
    tokens, targets : tuple of int
        A prompt given as tokens and the text to be decoded (mode `LIKELIHOOD`).
    from_full : bool
        The full cache's answer is the text to be decoded, or the reference answer.
    said : tuple of (str, str)
        What user and model have said in the turns before `prompt` (`CONVERSATION`).
    """

    task: str
    group: str
    index: int
    length: int
    seed: int
    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    scorer: str
    question: str = ""
    prefix: str = ""
    mode: str = ASK
    stop: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()
    from_full: bool = False
    said: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}: {self.mode!r}")
        if not self.prompt.endswith(self.question):
            raise ValueError(f"{self.task}: the question is not the prompt's end")

    @property
    def key(self) -> SampleKey:
        """What determines the rest."""
        return SampleKey(self.task, self.length, self.seed, self.index)


@dataclass(frozen=True)
class Draw:
    """What a sample is built from."""

    task: str
    length: int
    seed: int
    index: int
    tokenizer: Any
    corpus: Corpus

    def rng(self, purpose: str = "") -> random.Random:
        """Generator that depends on the sample and the purpose alone."""
        words = (self.task, self.length, self.seed, self.index, purpose)
        return random.Random("/".join(map(str, words)))

    def sample(self, **rest: Any) -> Sample:
        """Make a sample of what is drawn here; its task knows the group."""
        return Sample(self.task, "", self.index, self.length, self.seed, **rest)


Build = Callable[[Draw], Sample]


def chat_text(tokenizer: Any, prompt: str, prefix: str = "") -> str:
    """The prompt in the model's chat template, up to where the model goes on."""
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        tokenize=False,
    )
    return text + prefix


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that has its special tokens already."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def chat_ids(tokenizer: Any, prompt: str, prefix: str = "") -> list[int]:
    """Tokens of `chat_text`."""
    return text_ids(tokenizer, chat_text(tokenizer, prompt, prefix))


def encode(tokenizer: Any, sample: Sample) -> list[int]:
    """Tokens of the whole prompt, the question included."""
    if sample.tokens:
        return list(sample.tokens)
    if sample.said:
        return [token for piece in encode_said(tokenizer, sample) for token in piece]
    return chat_ids(tokenizer, sample.prompt, sample.prefix)


def cut_at(text: str, stops: Iterable[str]) -> str:
    """Text before the first of the stops."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def encode_parts(tokenizer: Any, sample: Sample) -> tuple[list[int], list[int]]:
    """Tokens of the context, and of all from the question to where the model goes on.

    The cut is made in the text, so a token never spans it.
    """
    text = chat_text(tokenizer, sample.prompt, sample.prefix)
    cut = text.rindex(sample.question)
    return text_ids(tokenizer, text[:cut]), text_ids(tokenizer, text[cut:])


def encode_turns(
    tokenizer: Any, sample: Sample, reply: str
) -> tuple[list[int], list[int]]:
    """Tokens of a first turn with the context, and of the conversation after it.

    Parameters
    ----------
    reply : str
        What the model is taken to have answered in the first turn.
    """
    context = sample.prompt.removesuffix(sample.question).rstrip()
    messages = [
        {"role": "user", "content": context},
        {"role": "assistant", "content": reply},
        {"role": "user", "content": sample.question.lstrip()},
    ]
    text = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    return chat_ids(tokenizer, context), text_ids(tokenizer, text + sample.prefix)


def encode_said(tokenizer: Any, sample: Sample) -> list[list[int]]:
    """Tokens of a conversation: what is read, what is replied, and so on.

    The last piece is read, up to where the model goes on. Pieces are tokenized apart,
    so a turn's prompt is exactly what was read and replied before, and more.

    Raises
    ------
    ValueError
        If the chat template changes what was said before.
    """
    messages: list[dict[str, str]] = []
    pieces: list[list[int]] = []
    before = ""
    for user, reply in (*sample.said, (sample.prompt, None)):
        messages.append({"role": "user", "content": user})
        text: str = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        if not text.startswith(before):
            raise ValueError("the chat template changes what was said before")
        read = text[len(before) :]
        if reply is None:
            pieces.append(text_ids(tokenizer, read + sample.prefix))
            break
        pieces += [text_ids(tokenizer, read), text_ids(tokenizer, reply)]
        messages.append({"role": "assistant", "content": reply})
        before = text + reply
    return pieces
