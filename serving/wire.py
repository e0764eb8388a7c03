"""Protobuf's wire format, as far as messages are read and written without protobuf.

TensorFlow's protos have no generated C++ behind them in Python: each field goes through reflection, whose
code and data a processor that has just searched an index no longer has in its caches.
"""

from __future__ import annotations

import functools
from typing import Any, Final

VARINT: Final = 0
LENGTH_DELIMITED: Final = 2
_ONE_BYTE: Final = 0x7F  # the largest number that takes one
# What protobuf allows a length.
_MAX_LENGTH: Final = 2**31 - 1
_MAX_LENGTH_BYTES: Final = 5


def tag(number: int, wire_type: int) -> int:
    """Returns what a field of this number and type begins with, as `fields` gives it."""
    return number << 3 | wire_type


def fields(message: bytes) -> dict[int, list[Any]]:
    """Splits a message: by tag the contents of its fields, in their order, bytes or 64 bits without sign.

    Raises:
      ValueError: damaged, or with a field of another wire type or a number outside 1 to 15, which protobuf
        may know.
    """
    contents: dict[int, list[Any]] = {}
    place, end, last = 0, len(message), -1
    try:
        while place < end:
            key, content = message[place], message[place + 1]
            place += 2
            if content > _ONE_BYTE:
                start = place - 1
                content, place = _read_varint(message, start)
                is_length = key & 7 == LENGTH_DELIMITED
                if is_length and (place - start > _MAX_LENGTH_BYTES or content > _MAX_LENGTH):
                    raise ValueError("the length of a field is too large")
            if key != last:
                if key & 7 not in (LENGTH_DELIMITED, VARINT) or not tag(1, 0) <= key <= _ONE_BYTE:
                    raise ValueError(f"a field with the tag {key}")
                add, last = contents.setdefault(key, []).append, key
            if key & 7 == VARINT:
                add(content)
            else:
                place += content
                add(message[place - content : place])
    except IndexError as error:
        raise ValueError("a number ends beyond its message") from error
    if place > end:
        raise ValueError("a field ends beyond its message")
    return contents


def varints(content: bytes) -> list[int]:
    """Reads packed numbers, 64 bits without sign.

    Raises:
      ValueError: damaged.
    """
    numbers, place = [], 0
    try:
        while place < len(content):
            number, place = _read_varint(content, place)
            numbers.append(number)
    except IndexError as error:
        raise ValueError("a number ends beyond its message") from error
    return numbers


def signed(number: int) -> int:
    """Reads a number of 64 bits as one with sign."""
    return number - (number >> 63 << 64)


def field(number: int, content: bytes) -> bytes:
    """Returns a field of bytes, a string, packed numbers or a serialized message, ready to be joined."""
    return prefix(number, len(content)) + content


@functools.lru_cache(maxsize=4096)
def prefix(number: int, size: int) -> bytes:
    """Returns what stands before `size` bytes of a field: tag and length."""
    return _varint(tag(number, LENGTH_DELIMITED)) + _varint(size)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit tells that more follow."""
    groups = bytearray()
    while value > _ONE_BYTE:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def _read_varint(message: bytes, place: int) -> tuple[int, int]:
    """Returns the number that begins at a place, and where it ends."""
    number = 0
    for shift in range(0, 64, 7):
        byte = message[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte <= _ONE_BYTE:
            return number & 0xFFFF_FFFF_FFFF_FFFF, place
    raise ValueError("a number of more than 64 bits")
