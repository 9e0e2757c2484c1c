"""Kernels: from scores to weights, one variant a file."""

from emformer.kernels.base import Kernel
from emformer.kernels.softmax import Softmax

__all__ = ["Kernel", "Softmax"]
