"""Two LoRA adapters beside the model itself: whose answers, whose prefixes."""

from __future__ import annotations

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
    steps = in_common(one, other) + 1
    pairs = zip(one.tops[:steps], other.tops[:steps], strict=False)
    return sum(len(a & b) for a, b in pairs)


def nearest(answer: Reply, others: Answers) -> str | None:
    """Whose answer is most like this one."""
    return max(others, key=lambda work: nearness(answer, others[work]))


def expect_differ(answers: Answers) -> None:
    """Raise unless all works think otherwise of the first token.

    Their answers may still be alike: behind random words a model may repeat one word.
    """
    for one, other in combinations(answers, 2):
        shared = len(answers[one].tops[0] & answers[other].tops[0])
        wanted = f"{one} and {other} to share at most half of {TOPS} likely tokens"
        expect(shared <= TOPS // 2, wanted, shared)


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
    expect_differ(first)
    again = ask_each(asker, text, rate)
    found = {work: reply.cached for work, reply in again.items()}
    expect(all(found.values()), "each to find its own prefix", found)
    came = {work: nearest(reply, first) for work, reply in again.items()}
    expect(all(w == c for w, c in came.items()), "each its own answer again", came)
    if rate is not None:
        for reply in (*first.values(), *again.values()):
            expect_compressed(reply, rate)
    same = [in_common(first[work], again[work]) for work in WORKS]
    return (
        f"three answers; again {same} of {len(first[None].ids)} tokens the same, "
        f"{list(found.values())} tokens cached"
    )


def mixed(asker: Asker) -> str:
    """All works in one batch, compressed: four prompts to each; then each alone.

    The first token of an answer comes from the prefill, the second is decoded. Of every
    work at least half the answers have to have both in common with what comes alone.
    """
    texts = [asker.text(asker.sizes.short) for _ in range(BATCH // len(WORKS))]
    questions = [
        {"text": text, "adapter": work, "tops": TOPS, "ignore_eos": True}
        for text in texts
        for work in WORKS
    ]
    replies = asker.generate_all(questions)
    kept = {expect_compressed(reply, RATE) for reply in replies}
    same: dict[str | None, list[int]] = {work: [] for work in WORKS}
    for text in texts:
        together: Answers = {work: replies.pop(0) for work in WORKS}
        expect_differ(together)
        alone = ask_each(asker, text, RATE)
        came = {work: nearest(reply, alone) for work, reply in together.items()}
        expect(all(w == c for w, c in came.items()), "each its own answer", came)
        for work in WORKS:
            same[work].append(in_common(together[work], alone[work]))
    for work, counts in same.items():
        enough = 2 * sum(count >= 2 for count in counts) >= len(counts)
        expect(enough, f"two tokens of {work} to be those that come alone", counts)
    counted = ", ".join(f"{work or 'model'} {counts}" for work, counts in same.items())
    return f"{BATCH} answers, {', '.join(sorted(kept))}; as alone: {counted} tokens"


def beyond(asker: Asker, adapter: str) -> str:
    """A prompt longer than the pool: compressed between its chunks."""
    reply = asker.generate(
        asker.text(asker.sizes.beyond),
        rate=RATE_BEYOND,
        adapter=adapter,
        ignore_eos=True,
    )
    expect(reply.kv.get("chunk_passes", 0) > 0, "passes between chunks", reply.kv)
    kept = expect_compressed(reply, RATE_BEYOND)
    return f"{reply.prompt} tokens, {reply.kv['chunk_passes']} chunk passes, {kept}"


CHECKS = (
    Check("adapters and prefixes, whole", partial(prefixes, rate=None)),
    Check("adapters and prefixes, compressed", partial(prefixes, rate=RATE)),
    Check("adapters in one batch", mixed),
    Check("adapter one, a prompt beyond the pool", partial(beyond, adapter="one")),
    Check("adapter two, a prompt beyond the pool", partial(beyond, adapter="two")),
)
