"""Surgery: a model in, a changed copy out. The original keeps its weights, its outputs and the global generator its state.

    skip, mean_ablate (with means)       a sublayer or a head left out, or replaced by its mean
    noise                                on M from the left or the right, on queries, on keys
    remove_sink, replace_sink            the sink of a kernel, or a token that serves as one
    symmetrise, retie, shuffle           M made symmetric, F tied to M, singular vectors drawn anew
    swap_kernel, change_mask             another kernel, another mask
    canonical                            the same function in the canonical gauge

Each takes `layers` and, where it makes sense, `heads`: an index, several, or null for all. Changes add up; `copy.surgery` tells
them, one line each. A copy's settings say what settings can say, its kernel and its mask; the rest only `surgery` knows.

Operators change on their factors, W -> A W B as L -> A L and R -> B^T R: the space between the factors, which RoPE, key norms,
L2 attention and biases read, is never turned or rebalanced. A surgery on M changes M alone: a content that is tied to it is set
free with the F that it has, and `retie` ties.
"""

from emformer.surgery.ablation import Means, mean_ablate, means, skip
from emformer.surgery.matrices import canonical, retie, shuffle, symmetrise
from emformer.surgery.noise import noise
from emformer.surgery.sinks import Hidden, remove_sink, replace_sink
from emformer.surgery.swaps import change_mask, swap_kernel

__all__ = [
    "Hidden",
    "Means",
    "canonical",
    "change_mask",
    "mean_ablate",
    "means",
    "noise",
    "remove_sink",
    "replace_sink",
    "retie",
    "shuffle",
    "skip",
    "swap_kernel",
    "symmetrise",
]
