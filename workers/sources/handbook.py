"""A private handbook that nobody has read: invented services, four facts each, six ways to ask.

The names and facts are drawn from the seed, so no model knows them. A specialist learns `forms` of
the six phrasings of each fact; the others are asked. Seeds and pool show only phrasings 1 to
4, so what is asked in phrasings 5 and 6 (all of the evaluation) has a form that neither shows.
Seeds name one service after the other.

- ``private``, ``evaluation``: rows ``{"prompt", "response"}``.
- ``pool``, ``seeds``, ``truth``: as in `labelled`; of the learnt facts.
- ``lookalike``: the same phrasings about services that are in no handbook.
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from stillhouse.errors import ConfigError, SourceError
from stillhouse.workers.sources.labelled import Labelled, Row, Speciality

_FORMS: Mapping[str, Sequence[str]] = {
    "port": (
        "Which port does {service} listen on?",
        "What is the port of {service}?",
        "{service} port number?",
        "On which port can I reach {service}?",
        "Tell me the port that {service} uses.",
        "I want to connect to {service}, which port do I need?",
    ),
    "owner": (
        "Which team owns {service}?",
        "What is the owning team of {service}?",
        "{service} owner?",
        "By which team is {service} looked after?",
        "Tell me the team behind {service}.",
        "I have a question about {service}, which team do I ask?",
    ),
    "region": (
        "Which region does {service} run in?",
        "What is the region of {service}?",
        "{service} region?",
        "In which region is {service} hosted?",
        "Tell me the region where {service} runs.",
        "I want to be close to {service}, which region do I pick?",
    ),
    "backup": (
        "Which day is {service} backed up?",
        "What is the backup day of {service}?",
        "{service} backup day?",
        "On which day does the backup of {service} run?",
        "Tell me the day when {service} is backed up.",
        "I want to skip the backup of {service}, which day do I avoid?",
    ),
}
FORMS = 6
SHOWN = 4  # phrasings that seeds and pool show
_SYLLABLES = (
    *("bra", "cor", "dex", "fen", "gal", "hol", "jin", "kel", "lum", "mor"),
    *("nav", "ost", "pel", "quo", "rus", "sil", "tam", "ulm", "ver", "wex"),
)
_TEAMS = (
    *("Amber", "Birch", "Cobalt", "Dune", "Ember", "Fjord", "Garnet", "Harbor", "Indigo"),
    *("Juniper", "Kestrel", "Lagoon"),
)
_REGIONS = tuple(f"{place}-{n}" for place in ("north", "south", "east", "west") for n in (1, 2, 3))
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True, slots=True)
class HandbookConfig:
    """`services` in the handbook and `lookalikes` questions about others; `forms` are learnt."""

    services: int
    lookalikes: int
    forms: int = 4
    seeds: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        most = len(_SYLLABLES) ** 2 // 2
        if not 0 < self.services <= most:
            raise ConfigError(f"services: expected 1 to {most}, found {self.services}")
        if not 0 < self.forms < FORMS:
            raise ConfigError(f"forms: expected 1 to {FORMS - 1}, found {self.forms}")
        if not 0 <= self.lookalikes <= most:
            raise ConfigError(f"lookalikes: expected 0 to {most}, found {self.lookalikes}")


CONFIG = HandbookConfig


def build(split: str, config: HandbookConfig) -> Iterator[Row]:
    """Yield the rows of one split."""
    names = _names(config)
    private: list[Labelled] = []
    evaluation: list[Labelled] = []
    pool: list[Labelled] = []
    for service in names[: config.services]:
        for fact, forms in _FORMS.items():
            value = _value(config, service, fact)
            asked = [Labelled(form.format(service=service), value) for form in forms]
            learnt = random.Random(f"{config.seed}/forms/{service}/{fact}").sample(
                range(FORMS), config.forms
            )
            private += (asked[form] for form in learnt)
            evaluation += (asked[form] for form in range(SHOWN, FORMS) if form not in learnt)
            pool += (asked[form] for form in range(SHOWN) if form not in learnt)
    lookalike = _lookalike(config, names[config.services :])
    made = Speciality("handbook", private, evaluation, pool, lookalike, config.seeds, config.seed)
    if split == "seeds":
        return iter(_one_a_service(list(made.rows("pool")), names, config))
    return made.rows(split)


def _one_a_service(rows: Sequence[Row], names: Sequence[str], config: HandbookConfig) -> list[Row]:
    """Seeds as a user picks them: a question about each service before a second about any."""
    if config.seeds > len(rows):
        raise SourceError(f"seeds: asked for {config.seeds}, the pool has {len(rows)}")
    turns: Counter[str] = Counter()
    order = []
    for place, row in enumerate(rows):
        [service] = {name for name in names[: config.services] if name in row["prompt"]}
        order.append((turns[service], place))
        turns[service] += 1
    return [rows[place] for _, place in sorted(order)][: config.seeds]


def _names(config: HandbookConfig) -> list[str]:
    """Every two-syllable name, the handbook's first."""
    names = [f"{a}{b}".capitalize() for a in _SYLLABLES for b in _SYLLABLES if a != b]
    random.Random(f"{config.seed}/names").shuffle(names)
    return names


def _value(config: HandbookConfig, service: str, fact: str) -> str:
    source = random.Random(f"{config.seed}/{service}/{fact}")
    if fact == "port":
        return str(source.randrange(2000, 10000))
    return source.choice({"owner": _TEAMS, "region": _REGIONS, "backup": _DAYS}[fact])


def _lookalike(config: HandbookConfig, names: Sequence[str]) -> list[str]:
    source = random.Random(f"{config.seed}/lookalike")
    drawn = [source.choice(names) for _ in range(config.lookalikes)]
    forms = [form for fact in _FORMS.values() for form in fact[:SHOWN]]
    return list(dict.fromkeys(source.choice(forms).format(service=name) for name in drawn))
