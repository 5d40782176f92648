"""What a prompt's text is: normal form, template, split."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

from stillhouse.storage.records import Split

T = TypeVar("T")


def normalise(text: str) -> str:
    """Collapse white space; two prompts are the same when this is the same."""
    return " ".join(text.split())


def render(template: str, text: str) -> str:
    """Put a text where the template says `{text}`."""
    return template.replace("{text}", text)


def split_of(text: str, heldout_percent: int) -> Split:
    """Assign a text to a split by its hash, so it stays there whatever else is in the pool."""
    digest = hashlib.sha256(f"split\x1f{text}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:4], "big") % 100 < heldout_percent else "train"


def chunked(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of up to `size` items."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
