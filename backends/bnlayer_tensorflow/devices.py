"""TensorFlow's devices by name."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from bnlayer.errors import UnsupportedError


def existing(device: Any, backend: str) -> str:
    """TensorFlow's full name of a device.

    Its soft placement would put variables elsewhere without a word, so what is not there is refused here.

    Args:
        device: in TensorFlow's words, such as "gpu:0".
        backend: who asks, for the message.

    Raises:
        UnsupportedError: there is no such device; the message lists those that are there.
    """
    present = [d.name for d in tf.config.list_logical_devices()]
    absent = f"backend {backend!r} has no device {device!r}; it has {', '.join(present)}."
    try:
        wanted = tf.DeviceSpec.from_string(str(device))
    except ValueError as error:
        raise UnsupportedError(absent) from error
    for name in present:
        found = tf.DeviceSpec.from_string(name)
        if wanted.device_type == found.device_type and wanted.device_index in (None, found.device_index):
            return str(name)
    raise UnsupportedError(absent)
