"""Shapes in signatures, and their legend.

    B  batch            T  queries          S  keys (T plus what a cache holds)
    d  embedding space  H  heads            G  groups of heads that share a right factor (divides H)
    r  width of a factor                    V  vocabulary

Rows are vectors: a cloud is (B, T, d). Annotations are checked in the test run only
(`pytest --jaxtyping-packages=emformer,beartype.beartype`); at any other time they cost nothing.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Tokens = Int[Tensor, "B T"]
Index = Int[Tensor, " T"]
KeyIndex = Int[Tensor, " S"]
Cloud = Float[Tensor, "B T d"]
KeyCloud = Float[Tensor, "B S d"]
Logits = Float[Tensor, "B T V"]
Queries = Float[Tensor, "B H T r"]
Keys = Float[Tensor, "B G S r"]
Contents = Float[Tensor, "B K S c"]
Mixture = Float[Tensor, "B H T c"]
Weights = Float[Tensor, "B H T S"]
HeadClouds = Float[Tensor, "B H T d"]
Matrices = Float[Tensor, "H d d"]
Rows = Float[Tensor, "H r d"]
Table = Bool[Tensor, "T S"]
