"""LevelDB's sorted table, in which TensorFlow keeps a checkpoint's index: blocks of keys that share prefixes.

Read whole, as an index is small; blocks are uncompressed in every file that TensorFlow writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from .crc32c import crc32c, masked
from .protobuf import encode_varint, varint
from .source import Source

MAGIC: Final = 0xDB4775248B80FB57
_FOOTER: Final = 48
_TRAILER: Final = 5  # a type and a checksum after each block
_LARGEST: Final = 2**28  # bytes of an index; the largest models have a few megabytes
_LONGEST_KEY: Final = 2**14  # keys share their beginnings, so that a small file could hold any number of long ones
_RESTART: Final = 16  # keys between two that are stored whole


def read(source: Source) -> Iterator[tuple[bytes, bytes]]:
    """Every key and value, in order.

    Raises:
        CheckpointError: the table is damaged, or compressed.
    """
    if source.size < _FOOTER or source.size > _LARGEST:
        source.refuse("", f"an index has from {_FOOTER} to {_LARGEST} bytes; it has {source.size}")
    data = source.read(0, source.size, "index")
    footer = data[-_FOOTER:]
    if int.from_bytes(footer[-8:], "little") != MAGIC:
        source.refuse("footer", "it is no TensorFlow index")
    place = f"{source.path}: footer"
    at = 0
    for _ in range(2):  # the meta index, which is not needed
        _, at = varint(footer, at, place)
    offset, at = varint(footer, at, place)
    size, at = varint(footer, at, place)
    last = b""
    for _, handle in _entries(_block(source, data, offset, size), source):
        offset, at = varint(handle, 0, place)
        size, _ = varint(handle, at, place)
        for key, value in _entries(_block(source, data, offset, size), source):
            if last and key <= last:
                source.refuse(f"key {key[:80]!r}", "keys are not in order, or one is there twice")
            last = key
            yield key, value


def write(entries: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A table of one block.

    Args:
        entries: keys and values, sorted by key.
    """
    body = _made_block(entries)
    index = _made_block([(entries[-1][0] if entries else b"", encode_varint(0) + encode_varint(len(body) - _TRAILER))])
    meta = _made_block([])
    handles = (
        encode_varint(len(body)) + encode_varint(len(meta) - _TRAILER)
        + encode_varint(len(body) + len(meta)) + encode_varint(len(index) - _TRAILER)
    )  # fmt: skip
    return body + meta + index + handles.ljust(_FOOTER - 8, b"\0") + MAGIC.to_bytes(8, "little")


def _block(source: Source, data: bytes, offset: int, size: int) -> bytes:
    if offset + size + _TRAILER > len(data):
        source.refuse("index", f"a block of {size} bytes at {offset} reaches past the end")
    block, kind = data[offset : offset + size], data[offset + size]
    if kind != 0:
        source.refuse("index", "a block is compressed, which TensorFlow does not do")
    stored = int.from_bytes(data[offset + size + 1 : offset + size + _TRAILER], "little")
    if stored != masked(crc32c(data[offset : offset + size + 1])):
        source.refuse("index", f"the checksum of the block at {offset} is wrong")
    return block


def _entries(block: bytes, source: Source) -> Iterator[tuple[bytes, bytes]]:
    restarts = int.from_bytes(block[-4:], "little") if len(block) >= 4 else -1
    end = len(block) - 4 - 4 * restarts
    if restarts < 0 or end < 0:
        source.refuse("index", "a block's restarts do not fit it")
    at, key, place = 0, b"", f"{source.path}: index"
    while at < end:
        shared, at = varint(block, at, place)
        fresh, at = varint(block, at, place)
        length, at = varint(block, at, place)
        if shared > len(key) or at + fresh + length > end:
            source.refuse("index", "an entry reaches past its block")
        if shared + fresh > _LONGEST_KEY:
            source.refuse("index", f"a key has {shared + fresh} bytes")
        key = key[:shared] + block[at : at + fresh]
        yield key, block[at + fresh : at + fresh + length]
        at += fresh + length


def _made_block(entries: Sequence[tuple[bytes, bytes]]) -> bytes:
    out, restarts, last = bytearray(), [0], b""
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % _RESTART:
            while shared < min(len(last), len(key)) and last[shared] == key[shared]:
                shared += 1
        elif i:
            restarts.append(len(out))
        out += (
            encode_varint(shared) + encode_varint(len(key) - shared) + encode_varint(len(value)) + key[shared:] + value
        )
        last = key
    for restart in restarts:
        out += restart.to_bytes(4, "little")
    out += len(restarts).to_bytes(4, "little") + b"\0"
    return bytes(out) + masked(crc32c(bytes(out))).to_bytes(4, "little")
