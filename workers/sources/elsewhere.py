"""Prompts from elsewhere: arithmetic and everyday requests, made from seeded templates.

They stand for everything a speciality is not, so that selection has something to reject.
"""

import random
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from stillhouse.errors import ConfigError, SourceError

# A draw that repeats an earlier text is drawn again; past this many in a row the slots are used up.
MAX_REPEATS = 1000

_NAMES = (
    "Ada",
    "Bruno",
    "Chen",
    "Dalia",
    "Emeka",
    "Farah",
    "Goran",
    "Hana",
    "Ivo",
    "Jun",
    "Kofi",
    "Lena",
)
_THINGS = (
    "apples",
    "pencils",
    "tickets",
    "marbles",
    "books",
    "coins",
    "stickers",
    "eggs",
    "stamps",
    "cards",
)
_PLACES = (
    "Lisbon",
    "Kyoto",
    "Nairobi",
    "Oslo",
    "Lima",
    "Hanoi",
    "Quebec",
    "Tbilisi",
    "Cork",
    "Perth",
)
_DISHES = (
    "lentil soup",
    "pancakes",
    "fried rice",
    "tomato sauce",
    "flat bread",
    "apple pie",
    "potato salad",
)
_TOPICS = (
    "the sea",
    "an old bicycle",
    "a night train",
    "the first snow",
    "a lost key",
    "a busy market",
    "a quiet library",
)
_CHORES = (
    "clean a cast iron pan",
    "fold a fitted sheet",
    "repot a cactus",
    "sharpen a knife",
    "patch a tyre",
    "dry fresh herbs",
    "remove a wine stain",
)
_PEOPLE = (
    "my landlord",
    "a new colleague",
    "my neighbour",
    "a former teacher",
    "the librarian",
    "our team",
)
_OCCASIONS = (
    "a birthday",
    "a farewell",
    "a late delivery",
    "a missed call",
    "a picnic",
    "a house move",
)
_WORDS = (
    "river",
    "lantern",
    "garden",
    "pocket",
    "window",
    "thunder",
    "ladder",
    "honey",
    "mirror",
    "saddle",
)
_LANGUAGES = ("French", "Polish", "Swahili", "Japanese", "Turkish", "Welsh", "Spanish")
_STYLES = ("short", "funny", "polite", "cheerful", "formal", "simple")

_SLOTS: Mapping[str, Sequence[str]] = {
    "name": _NAMES,
    "thing": _THINGS,
    "place": _PLACES,
    "dish": _DISHES,
    "topic": _TOPICS,
    "chore": _CHORES,
    "person": _PEOPLE,
    "occasion": _OCCASIONS,
    "word": _WORDS,
    "language": _LANGUAGES,
    "style": _STYLES,
    "small": tuple(str(n) for n in range(2, 13)),
    "number": tuple(str(n) for n in range(14, 100)),
    "large": tuple(str(n) for n in range(100, 1000)),
}

_TEMPLATES: Mapping[str, Sequence[str]] = {
    "arithmetic": (
        "What is {large} plus {number}?",
        "Subtract {number} from {large}.",
        "Compute {number} times {small}.",
        "{name} has {number} {thing} and buys {small} more. How many {thing} does {name} have now?",
        "{name} shares {large} {thing} among {small} friends. How many are left over?",
        "A train to {place} goes {number} km an hour. How far does it go in {small} hours?",
        "Each box holds {small} {thing}. How many boxes are needed for {large} {thing}?",
        "{name} reads {number} pages a day. How many days does a book of {large} pages take?",
        "What is {small} percent of {large}?",
        "Is {large} divisible by {small}?",
    ),
    "everyday": (
        "How do I {chore} without special tools?",
        "Write a {style} poem about {topic}.",
        "Give me a {style} recipe for {dish} for {small} people.",
        "What should I see in {place} in {small} days?",
        "Write a {style} message to {person} about {occasion}.",
        "How do you say {word} in {language}?",
        "Suggest {small} names for a cafe in {place}.",
        "Tell a {style} story about {topic} and a {word}.",
        "What can I cook with {small} {thing} and some {word} tea?",
        "Which month is best for a trip to {place} with {person}?",
        "Use the words {word} and {thing} in one {style} sentence.",
    ),
}


@dataclass(frozen=True, slots=True)
class ElsewhereConfig:
    """How many prompts, half of them arithmetic."""

    count: int
    seed: int = 0


CONFIG = ElsewhereConfig


def build(split: str, config: ElsewhereConfig) -> Iterator[dict[str, str]]:
    """Yield rows ``{"prompt", "origin"}``; there is one split, `pool`."""
    if split != "pool":
        raise ConfigError(f"unknown split {split!r}: expected pool")
    prompts = elsewhere_prompts(config.count, random.Random(f"{config.seed}/elsewhere"))
    return ({"prompt": text, "origin": origin} for origin, text in prompts)


def elsewhere_prompts(count: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield ``count`` pairs (origin, text), the origins in turn, no text twice.

    Raises SourceError when the templates cannot make that many texts.
    """
    origins = tuple(_TEMPLATES)
    seen: set[str] = set()
    for index in range(count):
        origin = origins[index % len(origins)]
        text = _unseen(origin, seen, rng)
        seen.add(text)
        yield origin, text


def _unseen(origin: str, seen: set[str], rng: random.Random) -> str:
    for _ in range(MAX_REPEATS):
        text = _fill(rng.choice(_TEMPLATES[origin]), rng)
        if text not in seen:
            return text
    raise SourceError(f"elsewhere: no new {origin} prompt after {len(seen)} prompts, ask for fewer")


def _fill(template: str, rng: random.Random) -> str:
    """Draw each slot once: a name that comes twice in a template is the same person."""
    names = sorted({name for _, name, _, _ in string.Formatter().parse(template) if name})
    return template.format(**{name: rng.choice(_SLOTS[name]) for name in names})
