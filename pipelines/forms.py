"""Question forms and what fills their slots, mined from prompts: `What is the port of {}?`.

Two prompts that differ in one run of words show a form and two of its fillers. Forms that share a
filler have slots of one kind, so each takes the fillers of all. Names (words with a capital or a
digit within a prompt) are one kind, and give a form wherever one stands, however rare the form.
No model is asked, and of the language only that it has words and capitals.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

LONGEST = 3  # words of a filler
NAMES = 0  # the kind of names
_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_INNER = re.compile(r"(?<=[\w,;:)] )\w+(?:['’-]\w+)*|(?<=[(\[/])\w+(?:['’-]\w+)*")
_SHORTENED = re.compile(r"['’]")  # I'm, It's


@dataclass(frozen=True, slots=True)
class Form:
    """A prompt with one slot, the kind of what fills it, and the place of the text it is from."""

    head: str
    tail: str
    kind: int
    place: int

    def filled(self, filler: str) -> str:
        """The prompt with this filler."""
        return f"{self.head}{filler}{self.tail}"


@dataclass(frozen=True, slots=True)
class Forms:
    """Forms, and fillers by kind; both in the order in which they were seen."""

    forms: tuple[Form, ...]
    fillers: tuple[tuple[str, ...], ...]

    @property
    def entities(self) -> int:
        """How many different fillers there are."""
        return len(set().union(*self.fillers))

    def of_kind(self, form: Form) -> tuple[str, ...]:
        """What may fill a form's slot."""
        return self.fillers[form.kind]


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
    for text in further:
        for slot, filler in _cuts(text):
            if slot in slots:
                slots[slot].setdefault(filler, len(texts))
    return _sorted_out(slots, names)


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
    for (head, _), fillers in seen.items():
        if not head and not names.isdisjoint(fillers):
            names.update(able.intersection(fillers))
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


def _sorted_out(slots: Mapping[_Slot, _Fillers], names: set[str]) -> Forms:
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
    of_kind: list[dict[str, None]] = [{} for _ in number]
    forms = []
    for place, (slot, fillers) in enumerate(slots.items(), start=1):
        kind = number[roots[place]]
        of_kind[kind].update(dict.fromkeys(fillers))
        forms.append(Form(*slot, kind, min(fillers.values())))
    return Forms(tuple(forms), tuple(map(tuple, of_kind)))
