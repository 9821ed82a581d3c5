"""Numbers of bytes and of tokens as people write them: 12GB, 3GiB, 128k."""

import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def read_bytes(text: str) -> float:
    """A number of bytes: 400, 8GB (powers of 1,000) or 8GiB (of 1,024), in any case of letters; 0 for other words."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\+?\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    return float(found[1]) * _UNITS[found[2] or ""] if found else 0.0


def read_tokens(text: str) -> int:
    """A number of tokens: 8192, 128k or 1M (1,024 and its square); 0 for other words, and for what is no whole number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(k|m)?", text.strip().lower())
    number = float(found[1]) * {None: 1, "k": 1 << 10, "m": 1 << 20}[found[2]] if found else 0.0
    return int(number) if number < 2**31 and number == int(number) else 0
