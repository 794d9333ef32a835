"""Batch normalization for NumPy: forward, analytic backward, a layer that keeps its state, and a course's pair."""

from .cache import Cache, Gradients
from .course import batchnorm_backward, batchnorm_forward
from .function import batch_norm, batch_norm_backward, batch_norm_forward
from .layer import BatchNorm

__all__ = [
    "BatchNorm",
    "Cache",
    "Gradients",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "batchnorm_backward",
    "batchnorm_forward",
]
