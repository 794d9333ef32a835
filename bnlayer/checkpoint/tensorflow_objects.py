"""TensorFlow's graph of objects (tensorflow/core/protobuf/trackable_object_graph.proto), kept in each TF2 checkpoint.

It says which object holds which under what name, and which tensor is whose; `tf.train.Checkpoint.restore` follows it.
The names of the tensors tell the same: `model/layer/gamma/.ATTRIBUTES/VARIABLE_VALUE`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from . import protobuf
from .protobuf import BYTES, VARINT

_ATTRIBUTES: Final = "/.ATTRIBUTES/"
_SLOT: Final = "/.OPTIMIZER_SLOT/"
_ESCAPED: Final = {".S": "/", "..": "."}


@dataclass(frozen=True)
class _Node:
    children: dict[str, int] = field(default_factory=dict)
    attributes: list[tuple[str, str]] = field(default_factory=list)  # name, the tensor's name
    slots: list[tuple[int, str, int]] = field(default_factory=list)  # a variable, the slot's name, the slot's variable


def full_names(graph: bytes, place: str) -> dict[str, str]:
    """Tensor's name to variable's name.

    Raises:
        CheckpointError: the graph is damaged.
    """
    names: dict[str, str] = {}
    for number, node in protobuf.fields(graph, place):
        if number != 1:
            continue
        for part, attribute in protobuf.fields(protobuf.message(node, place), place):
            if part == 2:
                found = {n: v for n, v in protobuf.fields(protobuf.message(attribute, place), place) if n in (2, 3)}
                if 2 in found and 3 in found:
                    names[protobuf.text(found[3], place)] = protobuf.text(found[2], place)
    return names


def object_graph(names: Iterable[str], full: Mapping[str, str]) -> bytes:
    """The graph that tensors' names tell; empty where none is named by objects, as in TensorFlow 1.

    Args:
        names: the tensors'.
        full: tensor's name to variable's name, where there is one.
    """
    nodes = [_Node()]

    def reached(path: str) -> int:
        at = 0
        for part in path.split("/"):
            local = re.sub(r"\.[.S]", lambda match: _ESCAPED[match[0]], part)
            if local not in nodes[at].children:
                nodes[at].children[local] = len(nodes)
                nodes.append(_Node())
            at = nodes[at].children[local]
        return at

    for name in names:
        owner, sign, attribute = name.rpartition(_ATTRIBUTES)
        if not sign:
            continue
        variable, slotted, rest = owner.partition(_SLOT)
        if slotted:  # a slot belongs to a variable and an optimizer, and is no child of either
            optimizer, _, slot = rest.rpartition("/")
            at = len(nodes)
            nodes.append(_Node())
            nodes[reached(optimizer)].slots.append((reached(variable), slot, at))
        else:
            at = reached(owner)
        nodes[at].attributes.append((attribute, name))
    if len(nodes) == 1:
        return b""
    return protobuf.encode((1, BYTES, _encoded(node, full)) for node in nodes)


def _encoded(node: _Node, full: Mapping[str, str]) -> bytes:
    children = [[(1, VARINT, at), (2, BYTES, name.encode())] for name, at in node.children.items()]
    attributes = [
        [(1, BYTES, name.encode()), (2, BYTES, full.get(key, "").encode()), (3, BYTES, key.encode())]
        for name, key in node.attributes
    ]
    slots = [[(1, VARINT, of), (2, BYTES, name.encode()), (3, VARINT, at)] for of, name, at in node.slots]
    return b"".join(
        protobuf.encode((number, BYTES, protobuf.encode(entry)) for entry in entries)
        for number, entries in ((1, children), (2, attributes), (3, slots))
    )
