"""Batch normalization for NumPy: forward, analytic backward, and a layer that keeps its state."""

from .function import Cache, Gradients, batch_norm, batch_norm_backward, batch_norm_forward
from .layer import BatchNorm

__all__ = ["BatchNorm", "Cache", "Gradients", "batch_norm", "batch_norm_backward", "batch_norm_forward"]
