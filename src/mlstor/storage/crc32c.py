"""CRC32C of bytes that were summed in pieces, and the texts in which object stores send it."""

from __future__ import annotations

import base64
from functools import lru_cache

# Castagnoli's polynomial, bits reversed: a polynomial's coefficient of x^k is bit 31 - k.
_POLYNOMIAL = 0x82F63B78
_ONE = 1 << 31
_X = 1 << 30


def _product(a: int, b: int) -> int:
    """a * b modulo the polynomial, over GF(2)."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@lru_cache(maxsize=64)
def _shift(nbytes: int) -> int:
    """x^(8 nbytes) modulo the polynomial: what `nbytes` more bytes multiply a CRC by."""
    power, square, bits = _ONE, _X, 8 * nbytes
    while bits:
        if bits & 1:
            power = _product(power, square)
        square = _product(square, square)
        bits >>= 1
    return power


def combine(first: int, second: int, second_nbytes: int) -> int:
    """CRC32C of A||B from that of A, that of B and the length of B in bytes."""
    return _product(_shift(second_nbytes), first) ^ second


def to_base64(crc: int) -> str:
    """As S3's headers and XML have it: big-endian, base64."""
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def from_base64(text: str) -> int | None:
    """The inverse; None if `text` is no such thing."""
    try:
        crc = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return int.from_bytes(crc, "big") if len(crc) == 4 else None
