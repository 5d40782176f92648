"""English without a file."""

import random

NAMES = ("Ada", "Ben", "Chloe", "David", "Eva", "Frank", "Grace", "Henry")
PLACES = ("the harbour", "a small village", "the old library", "the market", "a quiet street")
DEEDS = ("met a friend", "found a letter", "bought some bread", "lost the keys", "heard a song")


def story(draw: random.Random, sentences: int) -> str:
    """Of about 12 tokens a sentence."""
    return " ".join(
        f"In {draw.choice(PLACES)}, {draw.choice(NAMES)} {draw.choice(DEEDS)}."
        for _ in range(sentences)
    )
