"""Protobuf's wire format, as far as answers are written without building a message first."""

from __future__ import annotations

import functools

_LENGTH_DELIMITED = 2


def field(number: int, content: bytes) -> bytes:
    """Returns a field of bytes, a string, packed numbers or a serialized message, ready to be joined."""
    return prefix(number, len(content)) + content


@functools.lru_cache(maxsize=4096)
def prefix(number: int, size: int) -> bytes:
    """Returns what stands before `size` bytes of a field: tag and length."""
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(size)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit tells that more follow."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)
