"""Protocol buffers' wire format: fields by number, nothing of their meaning; for TensorFlow's few messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from ..errors import CheckpointError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_SIZES: Final = {FIXED64: 8, FIXED32: 4}


def varint(data: bytes, at: int, place: str) -> tuple[int, int]:
    """The number at `at`, and where it ends.

    Raises:
        CheckpointError: it is truncated, or longer than 64 bits.
    """
    number = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise CheckpointError(f"{place}: a number is damaged.")
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            if number >= 2**64:
                raise CheckpointError(f"{place}: a number is damaged.")
            return number, at


def fields(data: bytes, place: str) -> Iterator[tuple[int, Any]]:
    """Every field of a message in order: its number, and an integer or the bytes.

    Raises:
        CheckpointError: the message is damaged.
    """
    at = 0
    while at < len(data):
        tag, at = varint(data, at, place)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, at = varint(data, at, place)
            yield number, value
            continue
        if wire == BYTES:
            length, at = varint(data, at, place)
        elif wire in _SIZES:
            length = _SIZES[wire]
        else:
            raise CheckpointError(f"{place}: a field has the unknown wire type {wire}.")
        if length > len(data) - at:
            raise CheckpointError(f"{place}: a field of {length} bytes reaches past the end.")
        piece = data[at : at + length]
        at += length
        yield number, piece if wire == BYTES else int.from_bytes(piece, "little")


def integer(value: Any, place: str) -> int:
    """A field that must be a number.

    Raises:
        CheckpointError: it is not.
    """
    if not isinstance(value, int):
        raise CheckpointError(f"{place}: a number was expected, got bytes.")
    return value


def signed(value: Any, place: str) -> int:
    """A field that must be a number, of 64 bits with a sign."""
    number = integer(value, place)
    return number - 2**64 if number >= 2**63 else number


def message(value: Any, place: str) -> bytes:
    """A field that must be bytes.

    Raises:
        CheckpointError: it is not.
    """
    if not isinstance(value, bytes):
        raise CheckpointError(f"{place}: bytes were expected, got a number.")
    return value


def text(value: Any, place: str) -> str:
    """A field that must be text.

    Raises:
        CheckpointError: it is not.
    """
    try:
        return message(value, place).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{place}: a text is not UTF-8.") from error


def encode_varint(number: int) -> bytes:
    """A number that is not negative."""
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def encode(entries: Iterable[tuple[int, int, Any]]) -> bytes:
    """A message of (number, wire type, value)."""
    out = b""
    for number, wire, value in entries:
        out += encode_varint(number << 3 | wire)
        if wire == VARINT:
            out += encode_varint(value)
        elif wire == BYTES:
            out += encode_varint(len(value)) + value
        else:
            out += value.to_bytes(_SIZES[wire], "little")
    return out
