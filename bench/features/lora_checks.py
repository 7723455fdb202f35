"""Two LoRA adapters beside the model itself: whose answers, whose prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import combinations, takewhile

from bench.features.asking import RATE, Asker, Reply
from bench.features.compressed import expect_compressed
from bench.features.verdicts import Check, expect

NAMES = ("one", "two")
WORKS = (None, *NAMES)
"""Of whom an answer may be; None is the model itself."""
Answers = dict[str | None, Reply]
BATCH = 12
TOPS = 20
RATE_BEYOND = 8


def in_common(one: Reply, other: Reply) -> int:
    """Tokens at the beginning of both."""
    pairs = zip(one.ids, other.ids, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def nearness(one: Reply, other: Reply) -> int:
    """Likely tokens that both have, at every step up to the first other token.

    Sums round differently with the size of a batch and behind a cached prefix, and a
    token that is only just the likeliest may then be another one. The twenty likeliest
    are hardly others.
    """
    return sum(len(a & b) for a, b in _steps(one, other))


def nearest(answer: Reply, others: Answers) -> str | None:
    """Whose answer is most like this one."""
    return max(others, key=lambda work: nearness(answer, others[work]))


def shared(came: Sequence[Answers], alone: Sequence[Answers]) -> str:
    """Of each work, how near its answers came to its own and to the other works'.

    As `nearness` counts them, and of how many: 20 for each step that was compared.
    """
    said = []
    for work in WORKS:
        others = (work, *(other for other in WORKS if other != work))
        counts = [
            f"{_name(other) if other != work else 'own'} "
            + " ".join(
                f"{nearness(a[work], b[other])}/"
                f"{sum(len(step) for step, _ in _steps(a[work], b[other]))}"
                for a, b in zip(came, alone, strict=True)
            )
            for other in others
        ]
        said.append(f"{_name(work)}: {', '.join(counts)}")
    return f"likely tokens shared: {'; '.join(said)}"


def expect_differ(answers: Answers, more: str = "") -> None:
    """Raise unless all works think otherwise of the first token; `more` is said then.

    Their answers may still be alike: behind random words a model may repeat one word.
    """
    found = {
        f"{_name(one)} and {_name(other)}": len(
            answers[one].tops[0] & answers[other].tops[0]
        )
        for one, other in combinations(answers, 2)
    }
    wanted = f"works to share at most half of {TOPS} likely tokens"
    expect(max(found.values()) <= TOPS // 2, wanted, f"{found}; {more}")


def ask_each(asker: Asker, text: str, rate: float | None) -> Answers:
    """The same prompt to all works, one after the other."""
    return {
        work: asker.generate(text, rate=rate, adapter=work, tops=TOPS, ignore_eos=True)
        for work in WORKS
    }


def prefixes(asker: Asker, rate: float | None) -> str:
    """The same prompt to all works, twice.

    A prefix was computed with an adapter, so nobody but this adapter may start from it.
    """
    text = asker.text(asker.sizes.short)
    first = ask_each(asker, text, rate)
    found = {work: reply.cached for work, reply in first.items()}
    expect(not any(found.values()), "no prefix of somebody else's", found)
    again = ask_each(asker, text, rate)
    found = {work: reply.cached for work, reply in again.items()}
    same = [in_common(first[work], again[work]) for work in WORKS]
    seen = (
        f"again {same} of {len(first[None].ids)} tokens the same, "
        f"{list(found.values())} tokens cached; {shared([again], [first])}"
    )
    expect_differ(first, seen)
    expect(all(found.values()), "each to find its own prefix", seen)
    came = {work: nearest(reply, first) for work, reply in again.items()}
    right = all(w == c for w, c in came.items())
    expect(right, "each its own answer again", f"{came}; {seen}")
    if rate is not None:
        for reply in (*first.values(), *again.values()):
            expect_compressed(asker, reply, rate)
    return f"three answers; {seen}"


def mixed(asker: Asker) -> str:
    """All works in one batch, compressed: four prompts to each; then each alone.

    The first token of an answer comes from the prefill, the second is decoded. Of every
    work at least half the answers have to have both in common with what comes alone,
    behind the prefix that the batch left in the cache.
    """
    texts = [asker.text(asker.sizes.short) for _ in range(BATCH // len(WORKS))]
    questions = [
        {"text": text, "adapter": work, "tops": TOPS, "ignore_eos": True}
        for text in texts
        for work in WORKS
    ]
    replies = asker.generate_all(questions)
    kept = {expect_compressed(asker, reply, RATE) for reply in replies}
    together: list[Answers] = [{w: replies.pop(0) for w in WORKS} for _ in texts]
    alone = [ask_each(asker, text, RATE) for text in texts]
    pairs = list(zip(together, alone, strict=True))
    same = {work: [in_common(a[work], b[work]) for a, b in pairs] for work in WORKS}
    counted = ", ".join(f"{_name(work)} {counts}" for work, counts in same.items())
    cached = [reply.cached for answers in alone for reply in answers.values()]
    seen = (
        f"as alone: {counted} tokens; alone {min(cached)} to {max(cached)} tokens "
        f"cached; {shared(together, alone)}"
    )
    for answers in together:
        expect_differ(answers, seen)
    came = [{work: nearest(a[work], b) for work in WORKS} for a, b in pairs]
    strange = [one for one in came if any(w != c for w, c in one.items())]
    expect(not strange, "each its own answer", f"{strange}; {seen}")
    for work, counts in same.items():
        enough = 2 * sum(count >= 2 for count in counts) >= len(counts)
        expect(enough, f"two tokens of {_name(work)} to be those that come alone", seen)
    return f"{BATCH} answers, {', '.join(sorted(kept))}; {seen}"


def beyond(asker: Asker, adapter: str) -> str:
    """A prompt longer than the pool: compressed between its chunks."""
    reply = asker.generate(
        asker.text(asker.sizes.beyond),
        rate=RATE_BEYOND,
        adapter=adapter,
        ignore_eos=True,
    )
    expect(reply.kv.get("chunk_passes", 0) > 0, "passes between chunks", reply.kv)
    kept = expect_compressed(asker, reply, RATE_BEYOND)
    return f"{reply.prompt} tokens, {reply.kv['chunk_passes']} chunk passes, {kept}"


def _name(work: str | None) -> str:
    return work or "model"


def _steps(one: Reply, other: Reply) -> list[tuple[frozenset[int], frozenset[int]]]:
    """The likely tokens of both at the steps that `nearness` compares."""
    steps = in_common(one, other) + 1
    return list(zip(one.tops[:steps], other.tops[:steps], strict=False))


CHECKS = (
    Check("adapters and prefixes, whole", partial(prefixes, rate=None)),
    Check("adapters and prefixes, compressed", partial(prefixes, rate=RATE)),
    Check("adapters in one batch", mixed),
    *(
        Check(
            f"adapter {n}, a prompt beyond the pool", partial(beyond, adapter=n), True
        )
        for n in NAMES
    ),
)
