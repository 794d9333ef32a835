"""The errors of bnlayer: one base class, one subclass per thing that can be wrong.

Every message says what was expected, what came, and what to do.
"""

from __future__ import annotations


class BatchNormError(Exception):
    """Base of every error that bnlayer raises on purpose."""


class SpecError(BatchNormError, ValueError):
    """A `BatchNormSpec` field is out of range, or two fields contradict each other."""


class StateError(BatchNormError, ValueError):
    """A `BatchNormState` does not fit its spec: a missing, extra, misshapen or mistyped array, a negative variance."""


class InputError(BatchNormError, ValueError):
    """A call's input does not fit the layer: rank, channel count, dtype, weights, one value per channel."""


class DialectError(BatchNormError, ValueError):
    """A framework's arguments cannot be said as a spec, or a spec cannot be said in a framework's arguments."""


class UnsupportedError(BatchNormError, NotImplementedError):
    """The backend is there, but does not do this; the message names the spec field or the call argument."""


class BackendUnavailable(BatchNormError, ImportError):
    """The backend is known, but its framework cannot be imported; the message has the install command."""


class UnknownBackend(BatchNormError, LookupError):
    """No backend has this name, or none owns this layer; the message lists the known ones."""


class FileError(BatchNormError, ValueError):
    """A file is damaged, hostile or not what its reader expects; the message names the file and the place."""


class CheckpointError(FileError):
    """A checkpoint cannot be read or written; the message names the file, the place in it, and the cause."""


class PortError(BatchNormError, ValueError):
    """A port was refused: what could not be decided or has no place is listed, and nothing was written."""
