"""How much of a prompt an evaluation question has: ROUGE-L (Lin 2004), over words.

F = 2 · LCS / (m + n) of texts of m and n words, LCS their longest common subsequence.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """In lower case, without punctuation."""
    return _WORD.findall(text.casefold())


@dataclass(frozen=True, slots=True)
class Questions:
    """The evaluation's, as word lists."""

    ids: Sequence[str]
    words: Sequence[Sequence[str]]

    @classmethod
    def of(cls, texts: Sequence[tuple[str, str]]) -> "Questions":
        """From (id, text)."""
        return cls([name for name, _ in texts], [words(text) for _, text in texts])

    def nearest(self, text: str) -> tuple[str | None, float | None]:
        """The question of the greatest ROUGE-L, the first of several, and that; Nones for none."""
        from rapidfuzz import process
        from rapidfuzz.distance import Indel

        # Insertions and deletions alone: 1 - (m + n - 2 · LCS) / (m + n) is ROUGE-L.
        if not self.ids:
            return None, None
        score = Indel.normalized_similarity
        _, similarity, index = process.extractOne(words(text), self.words, scorer=score)
        return self.ids[index], float(similarity)
