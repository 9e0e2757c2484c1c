"""Kernels: from scores to weights, one variant a file."""

from emformer.kernels.base import Kernel
from emformer.kernels.hardmax import Hardmax
from emformer.kernels.l2 import L2
from emformer.kernels.linear import Linear
from emformer.kernels.sigmoid import Sigmoid
from emformer.kernels.sink import SinkSoftmax
from emformer.kernels.sinkhorn import Sinkhorn
from emformer.kernels.softmax import Softmax
from emformer.kernels.topk import TopK
from emformer.kernels.unnormalised import Unnormalised

__all__ = ["L2", "Hardmax", "Kernel", "Linear", "Sigmoid", "SinkSoftmax", "Sinkhorn", "Softmax", "TopK", "Unnormalised"]
