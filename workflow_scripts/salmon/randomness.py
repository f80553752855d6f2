"""Random draws and ids that depend only on a key.

The draw for a row comes from a generator that is seeded by a hash of the row's identity (purpose, seed, id). The order
of rows, sharding, ranks and earlier draws therefore do not affect it.
"""

import hashlib
import json
from collections.abc import Callable

import numpy as np


def seed_of(*key: object) -> int:
    """A seed from a key: 63 bits of the SHA-256 of its parts' repr, equal on every machine.

    Args:
        key: strings, numbers, booleans or None; numpy scalars count as the Python values they hold.

    Raises:
        TypeError: for parts of other types, whose repr may hold an address.
    """
    parts = [part.item() if isinstance(part, np.generic) else part for part in key]
    for part in parts:
        if not isinstance(part, str | int | float | None):
            raise TypeError(f"a key may hold strings, numbers, booleans or None, not {type(part).__name__}")
    # A repr never holds a raw NUL character, so different keys give different texts.
    digest = hashlib.sha256("\0".join(map(repr, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def ranks(*key: object) -> Callable[[str], int]:
    """`seed_of(*key, text)` as a function of the text, with the key hashed once: for draws of millions of texts."""
    parts = "\0".join(map(repr, key))
    begun = hashlib.sha256(f"{parts}\0".encode())

    def rank(text: str) -> int:
        whole = begun.copy()
        whole.update(repr(text).encode())
        return int.from_bytes(whole.digest()[:8], "big") >> 1

    return rank


def rng(*key: object) -> np.random.Generator:
    """The generator for a key, such as `rng("purpose", seed, row_id)`: start the key with the purpose of the draws."""
    return np.random.default_rng(seed_of(*key))


def digest(*parts: str | float | list[tuple[str, int]] | None) -> str:
    """An id from strings: 20 hexadecimal digits, equal on every machine."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]
