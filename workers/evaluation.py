"""How good an answer is: exact match. No torch."""


def exact_match(prediction: str, reference: str) -> bool:
    """Whether both say the same, up to case, white space and a full stop at the end."""
    return _plain(prediction) == _plain(reference)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()
