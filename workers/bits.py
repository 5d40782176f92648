"""Bits where they matter: a budget shared out over layers, keys and values.

Each part offers a convex curve of choices, bits rising and cost falling. Taking always the step
that saves most cost a bit is optimal for every budget that it meets on the way (the greedy
solution of the Lagrangian; Shoham and Gersho, 1988, "Efficient bit allocation for an arbitrary set
of quantizers", §IV).
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stillhouse.kernels.turboquant import GroupChoice


@dataclass(frozen=True, slots=True)
class Part:
    """The keys or the values of one layer: `copies` vectors a token share each choice."""

    copies: int
    curve: Sequence[GroupChoice]

    def bits(self, place: int) -> int:
        """Bits a token of the choice at a place of the curve."""
        return self.copies * self.curve[place].bits


def allocate(parts: Sequence[Part], bits: int) -> list[GroupChoice]:
    """The choice of each part, at most `bits` a token in all.

    ValueError when the cheapest choices are more than that.
    """
    places = [0] * len(parts)
    spent = sum(part.bits(0) for part in parts)
    if spent > bits:
        raise ValueError(f"expected a budget of at least {spent} bits a token, found {bits}")
    for index in _steps(parts):
        more = parts[index].bits(places[index] + 1) - parts[index].bits(places[index])
        if spent + more > bits:
            break
        places[index] += 1
        spent += more
    return [part.curve[place] for part, place in zip(parts, places, strict=True)]


def reach(parts: Sequence[Part], cost: float) -> list[GroupChoice]:
    """The fewest bits whose expected cost is at most `cost`; all bits when none is."""
    places = [0] * len(parts)
    total = sum(part.curve[0].cost for part in parts)
    for index in _steps(parts):
        if total <= cost:
            break
        curve, place = parts[index].curve, places[index]
        total += curve[place + 1].cost - curve[place].cost
        places[index] += 1
    return [part.curve[place] for part, place in zip(parts, places, strict=True)]


def _steps(parts: Sequence[Part]) -> Iterator[int]:
    """Parts in the order in which they should take their next choice."""
    heap: list[tuple[float, int, int]] = []

    def offer(index: int, place: int) -> None:
        part = parts[index]
        if place + 1 < len(part.curve):
            saved = part.curve[place].cost - part.curve[place + 1].cost
            heapq.heappush(heap, (-saved / (part.bits(place + 1) - part.bits(place)), index, place))

    for index in range(len(parts)):
        offer(index, 0)
    while heap:
        _, index, place = heapq.heappop(heap)
        yield index
        offer(index, place + 1)
