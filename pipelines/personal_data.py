"""Texts that look as if they held personal data: by pattern, and by check digits."""

import ipaddress
import re
from collections.abc import Callable

_PATTERNS = {
    "email": re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    "phone": re.compile(r"(?<![\w.])(?:\+\d{1,3}[ .-]?|\(\d{2,5}\) ?)(?:\d[ .-]?){6,12}\d(?!\w)"),
    "card": re.compile(r"(?<!\d)\d(?:[ -]?\d){12,18}(?!\d)"),
    "iban": re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"),
    "us_ssn": re.compile(r"\b(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}\b"),
    "ip": re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])"),
}


def personal_data(text: str) -> list[str]:
    """Kinds of it that a text looks to have, sorted: card, email, iban, ip, phone, us_ssn."""
    return sorted(
        kind
        for kind, pattern in _PATTERNS.items()
        if any(_CHECKS.get(kind, bool)(found[0]) for found in pattern.finditer(text))
    )


def _is_card(text: str) -> bool:
    """By Luhn's check digit (ISO/IEC 7812-1)."""
    digits = [int(letter) for letter in text if letter.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return any(digits) and (sum(digits[::-2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    """By its check digits (ISO 13616)."""
    letters = text.replace(" ", "")
    number = "".join(str(int(letter, 36)) for letter in letters[4:] + letters[:4])
    return len(letters) >= 15 and int(number) % 97 == 1


def _is_ip(text: str) -> bool:
    """An address that others may reach: versions such as 1.2.3.4 are one, 10.0.0.1 is not."""
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


_CHECKS: dict[str, Callable[[str], bool]] = {"card": _is_card, "iban": _is_iban, "ip": _is_ip}
