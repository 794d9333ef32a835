"""Keras on torch, whose models need no compiling; said before anything imports Keras."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "torch")
