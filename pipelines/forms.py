"""Question forms and what fills their slots, mined from prompts: `What is the port of {}?`.

Two prompts that differ in one run of words show a form and two of its fillers. Forms that share a
filler have slots of one kind, so each takes the fillers of all. Names (words with a capital or a
digit within a prompt) are one kind, and give a form wherever one stands, however rare the form.
No model is asked, and of the language only that it has words and capitals.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

LONGEST = 3  # words of a filler
NAMES = 0  # the kind of names
_RARE = 2  # texts that a name begins, where no other one shows that it is a name
_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_INNER = re.compile(r"(?<=[\w,;:)] )\w+(?:['’-]\w+)*|(?<=[(\[/])\w+(?:['’-]\w+)*")
_SHORTENED = re.compile(r"['’]")  # I'm, It's


@dataclass(frozen=True, slots=True)
class Form:
    """A prompt with one slot, the kind of what fills it, and the place of the text it is from.

    support: how many fillers it was seen with.
    """

    head: str
    tail: str
    kind: int
    place: int
    support: int

    def filled(self, filler: str) -> str:
        """The prompt with this filler."""
        return f"{self.head}{filler}{self.tail}"


@dataclass(frozen=True, slots=True)
class Forms:
    """Forms, and fillers by kind; both in the order in which they were seen."""

    forms: tuple[Form, ...]
    fillers: tuple[Mapping[str, int], ...]  # each with the number of forms it was seen in

    @property
    def entities(self) -> int:
        """How many different fillers there are."""
        return len(set().union(*self.fillers))

    def of_kind(self, form: Form) -> Mapping[str, int]:
        """What may fill a form's slot, and its support."""
        return self.fillers[form.kind]


def strong(support: Sequence[int]) -> float:
    """The support from which one is no accident: a third of what the average sighting has."""
    total = sum(support)
    return sum(value * value for value in support) / total / 3 if total else 0.0


_Slot = tuple[str, str]  # what stands before it, and after
_Fillers = dict[str, int]  # each with the place of the text that it was first seen in


def mine(texts: Sequence[str], further: Sequence[str] = ()) -> Forms:
    """Mine texts; `further` texts add fillers to the forms, and no forms."""
    seen: dict[_Slot, _Fillers] = {}
    for place, text in enumerate(texts):
        for slot, filler in _cuts(text):
            seen.setdefault(slot, {}).setdefault(filler, place)
    names = _names(texts, seen)
    slots = {slot: found for slot, found in seen.items() if _is_form(slot, found, names)}
    lent: dict[_Slot, set[str]] = {}
    for text in further:
        for slot, filler in _cuts(text):
            if slot in slots and filler not in slots[slot]:
                lent.setdefault(slot, set()).add(filler)
    return _sorted_out(slots, names, lent)


def _cuts(text: str) -> Iterator[tuple[_Slot, str]]:
    """Every way to take one to three words out of a text that leaves one."""
    spans = [match.span() for match in _WORD.finditer(text)]
    for first in range(len(spans)):
        for last in range(first, min(first + LONGEST, len(spans))):
            if last - first + 1 < len(spans):
                begin, end = spans[first][0], spans[last][1]
                yield (text[:begin], text[end:]), text[begin:end]


def _names(texts: Sequence[str], seen: Mapping[_Slot, _Fillers]) -> set[str]:
    """Words that look like names: within a sentence, or first in one where a name could stand."""
    words = {word for text in texts for word in _WORD.findall(text)}
    able = {word for word in words if _looks_like_a_name(word) and word.lower() not in words}
    inner = {match[0] for text in texts for match in _INNER.finditer(text)}
    names = able & inner
    begins = Counter(match[0] for text in texts if (match := _WORD.match(text)))
    for (head, _), fillers in seen.items():
        first = able.intersection(fillers) if not head else set()
        rare = {word for word in first if begins[word] <= _RARE}
        if not names.isdisjoint(first):
            names |= first
        elif len(rare) > 1:  # Which and What begin many texts
            names |= rare
    return names


def _looks_like_a_name(word: str) -> bool:
    return len(word) > 1 and not word.islower() and not _SHORTENED.search(word)


def _is_form(slot: _Slot, fillers: _Fillers, names: set[str]) -> bool:
    """Whether what stands in the slot varies, at both its ends: else it is wider than needed.

    A name needs no second one beside it; what leaves a single word takes names only.
    """
    if not names.isdisjoint(fillers):
        return True
    rows = [_WORD.findall(filler) for filler in fillers]
    varies = len({row[0] for row in rows}) > 1 and len({row[-1] for row in rows}) > 1
    return varies and len(_WORD.findall("".join(slot))) > 1


def _sorted_out(
    slots: Mapping[_Slot, _Fillers], names: set[str], lent: Mapping[_Slot, set[str]]
) -> Forms:
    """Number the kinds: forms that share a filler have one, and all that take names the first."""
    parent = list(range(1 + len(slots)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    owner = dict.fromkeys(names, NAMES)
    for place, fillers in enumerate(slots.values(), start=1):
        for filler in fillers:
            one, other = root(place), root(owner.setdefault(filler, place))
            parent[max(one, other)] = min(one, other)
    roots = [root(place) for place in range(len(parent))]
    number = {kind: index for index, kind in enumerate(sorted(set(roots)))}
    of_kind: list[Counter[str]] = [Counter() for _ in number]
    forms = []
    for place, (slot, fillers) in enumerate(slots.items(), start=1):
        kind = number[roots[place]]
        of_kind[kind].update(list(fillers))
        of_kind[kind].update(dict.fromkeys(sorted(lent.get(slot, ())), 0))
        forms.append(Form(*slot, kind, min(fillers.values()), len(fillers)))
    return Forms(tuple(forms), tuple(of_kind))
