"""Made-up keys, values and word lists."""

from __future__ import annotations

import random
import re
import string
import uuid
from collections import Counter
from collections.abc import Sequence

_ADJECTIVES = (
    "able ample ancient autumn bitter black blue bold brave brief bright broad calm "
    "careful cheap clean clever cloudy cold crisp curious damp dark deep dry eager "
    "early empty faint fair famous fast fierce fine firm flat fresh gentle giant "
    "glad golden grand gray green happy heavy hidden hollow honest humble idle "
    "jolly keen kind large late lazy lively lonely loud lucky mellow merry mild "
    "misty modern narrow neat noble odd old pale patient plain polite proud quick "
    "quiet rapid rare rough round royal rustic sharp shiny short silent silver "
    "simple sleepy slow small smooth soft solid sour steady steep strong sudden "
    "sunny sweet swift tall tender thick thin tidy tiny tough vast vivid warm weary "
    "wide wild windy wise witty young"
)
ADJECTIVES = _ADJECTIVES.split()
_NOUNS = (
    "acorn anchor apple apron arrow badge bakery balloon barn basket beach bell "
    "bench bottle bridge bucket butter cabin camel candle canoe canyon carpet "
    "castle cave cellar chair chimney circle clock cloud coast comet copper corner "
    "cotton cradle crystal curtain desert drum eagle engine falcon farmer feather "
    "fence ferry field flute forest fountain garden glacier guitar hammer harbor "
    "hat helmet hill island jacket jungle kettle kitchen ladder lake lamp lantern "
    "leaf lemon library lizard magnet maple market meadow mirror monkey mountain "
    "museum needle oasis ocean olive orchard paddle palace paper parrot pencil "
    "piano pillow pirate planet pocket pond prairie quarry rabbit ribbon river "
    "rocket saddle sailor school shadow shelter signal spider spoon station storm "
    "summit teapot temple thunder ticket tiger tower tractor tunnel turtle valley "
    "village violin wagon walnut whistle window winter"
)
NOUNS = _NOUNS.split()
COMMON_SKIPPED = 200
"""Most frequent words of a text, which carry no content."""


def random_word_key(rng: random.Random) -> str:
    """A pair of words, as RULER's keys."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def random_number(rng: random.Random) -> str:
    """Seven digits."""
    return str(rng.randint(1_000_000, 9_999_999))


def random_pin(rng: random.Random) -> str:
    """Four digits, for models that are too small for seven."""
    return str(rng.randint(1_000, 9_999))


def random_uuid(rng: random.Random) -> str:
    """A version-4 UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def random_code_word(rng: random.Random, letters: int = 6) -> str:
    """Letters without a meaning."""
    return "".join(rng.choices(string.ascii_lowercase, k=letters))


MAKERS = {
    "words": random_word_key,
    "numbers": random_number,
    "pins": random_pin,
    "uuids": random_uuid,
}


def distinct(kind: str, count: int, rng: random.Random) -> list[str]:
    """So many different keys or values of a kind of `MAKERS`."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[MAKERS[kind](rng)] = None
    return list(found)


def vocabulary(text_words: Sequence[str]) -> list[str]:
    """Lower-case content words of a text in alphabetical order."""
    counts = Counter(w for w in text_words if re.fullmatch(r"[a-z]{4,10}", w))
    frequent = {word for word, _ in counts.most_common(COMMON_SKIPPED)}
    return sorted(w for w, n in counts.items() if n >= 3 and w not in frequent)
