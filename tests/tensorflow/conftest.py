"""Four virtual CPUs, of which TensorFlow has to hear before it starts; the tests of replicas need three."""

from __future__ import annotations

import pytest

DEVICES = 4

tf = pytest.importorskip("tensorflow")

[_cpu] = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(_cpu, [tf.config.LogicalDeviceConfiguration()] * DEVICES)
