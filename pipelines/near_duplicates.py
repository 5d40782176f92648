"""MinHash sketches of texts, so that DuckDB can find near-duplicates out of core.

Word 5-grams (fewer words: the whole text), `permutations` hashes in bands; texts that agree in a
band are candidates and their exact Jaccard index decides (Broder 1997; Leskovec et al., ch. 3).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stillhouse.pipelines.evaluation_overlap import Questions
from stillhouse.storage.records import SketchRecord

if TYPE_CHECKING:
    from datasketch import MinHash

WORDS = 5
ROWS = 4  # hashes in a band


def shingles(text: str) -> list[str]:
    """The text's word 5-grams, in order, without repetition; the whole text where it is shorter."""
    words = text.casefold().split()
    if len(words) <= WORDS:
        return [" ".join(words)]
    grams = (" ".join(words[at : at + WORDS]) for at in range(len(words) - WORDS + 1))
    return list(dict.fromkeys(grams))


def sketch(
    kind: str,
    texts: Sequence[tuple[str, str]],
    permutations: int,
    questions: Questions | None = None,
) -> list[SketchRecord]:
    """Sketch (id, text) pairs. questions: to say which one each is most like."""
    from datasketch import MinHash

    grams = [shingles(text) for _, text in texts]
    hashed = MinHash.bulk(
        [[gram.encode() for gram in found] for found in grams], num_perm=permutations, seed=1
    )
    nearest = [questions.nearest(text) if questions else (None, None) for _, text in texts]
    return [
        SketchRecord(text_id, kind, _bands(minhash), sorted(_hash64(gram) for gram in found), *near)
        for (text_id, _), found, minhash, near in zip(texts, grams, hashed, nearest, strict=True)
    ]


def _bands(minhash: "MinHash") -> list[int]:
    values = [int(value) for value in minhash.hashvalues]
    bands = [values[at : at + ROWS] for at in range(0, len(values), ROWS)]
    return [_hash64(f"{index}:{band}") for index, band in enumerate(bands)]


def _hash64(text: str) -> int:
    from datasketch.hashfunc import sha1_hash64

    return int(sha1_hash64(text.encode())) >> 1  # 63 bits: a signed column holds it
