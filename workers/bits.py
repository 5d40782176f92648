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
    """The keys or the values of one layer: `copies` vectors a token share each choice.

    stored: share of a sequence's tokens that the layer keeps, below 1 where its attention slides.
    """

    copies: int
    curve: Sequence[GroupChoice]
    stored: float = 1.0

    def bits(self, place: int) -> float:
        """Bits kept for a token, on average over the sequence, of the choice at a place."""
        return self.stored * self.copies * self.curve[place].bits


def allocate(parts: Sequence[Part], bits: float) -> list[GroupChoice]:
    """The choice of each part, at most `bits` a token in all.

    What no longer fits is passed over, and the rest goes to steps that do.

    ValueError when the cheapest choices are more than that.
    """
    places = [0] * len(parts)
    spent = sum(part.bits(0) for part in parts)
    if spent > bits:
        raise ValueError(f"expected a budget of at least {spent:g} bits a token, found {bits:g}")
    full: set[int] = set()
    for index in _steps(parts):
        more = parts[index].bits(places[index] + 1) - parts[index].bits(places[index])
        if index in full or spent + more > bits:
            full.add(index)  # its later steps would skip one
            continue
        places[index] += 1
        spent += more
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
