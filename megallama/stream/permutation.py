"""A seeded permutation of any size with random access and without a table.

A Feistel network on the cells of a rectangle just large enough, walked until it ends below `count`
(J. Black and P. Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

from __future__ import annotations

import hashlib
import math

ROUNDS = 6
"""Twice as many as a network with a perfect mixing function needs to be indistinguishable from chance."""


class Permutation:
    """A permutation of 0 .. count - 1 that depends on nothing but `count` and `key`."""

    def __init__(self, count: int, *, key: str) -> None:
        assert count > 0, count
        self._count = count
        # rows x columns exceeds count by less than a row, so hardly any walk takes a second turn.
        self._columns = math.isqrt(count - 1) + 1
        self._rows = -(-count // self._columns)
        digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=32).digest()
        self._keys = [digest + bytes([number]) for number in range(ROUNDS)]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> int:
        """The number at `place`, both in [0, count)."""
        if not 0 <= place < self._count:
            raise IndexError(f"place {place} of a permutation of {self._count}")
        while True:
            place = self._turn(place)
            if place < self._count:
                return place

    def _turn(self, place: int) -> int:
        row, column = divmod(place, self._columns)
        for even, odd in zip(self._keys[::2], self._keys[1::2], strict=True):
            row = (row + _mix(even, column)) % self._rows
            column = (column + _mix(odd, row)) % self._columns
        return row * self._columns + column


def _mix(key: bytes, half: int) -> int:
    # 16 bytes: what is left over when they are folded into a row does not show.
    return int.from_bytes(hashlib.blake2b(b"%b%d" % (key, half), digest_size=16).digest(), "little")
