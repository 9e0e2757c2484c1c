"""Another kernel, another mask."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from emformer import parts
from emformer.attention import Attention
from emformer.kernels import Kernel
from emformer.masks import Visible
from emformer.model import Emformer
from emformer.surgery.copies import Which, copied, rebuilt, retold
from emformer.types import Contents, Keys, Mixture, Queries, Weights


@torch.no_grad()
def swap_kernel(model: Emformer, kernel: parts.Kernel, layers: Which = None, heads: Which = None) -> Emformer:
    """The same scores under another kernel; M, F and biases stay, so that whole layers are a model built with that kernel.

    A sink keeps its score and vector where the new kernel has them too. b_K is dropped where the new kernel does not notice it,
    b_V goes into the drift where its rows sum to one; a value bias that only the new kernel has is 0. Some heads alone
    (`PerHead`) cost both kernels, and are not told by the copy's settings.

    Raises:
        UserError: for a combination that cannot be built, as Sinkhorn under a causal mask.
    """
    copy, chosen, marked = copied(model, f"swap the kernel for {kernel}", layers, heads)
    for layer in chosen:
        attention = copy.layer(layer).attention
        copy.layer(layer).attention = exchanged(attention, _built(kernel, attention), marked)
    if heads is None:
        retold(copy, {layer: {"kernel": kernel} for layer in chosen})
    return copy


@torch.no_grad()
def change_mask(model: Emformer, mask: parts.Mask, layers: Which = None) -> Emformer:
    """Other tokens are visible; everything else stays. The mask is the layer's, one for all of its heads.

    Raises:
        UserError: for a combination that cannot be built, as a causal mask with Sinkhorn.
    """
    copy, chosen, _ = copied(model, f"change the mask to {mask}", layers)
    for layer in chosen:
        copy.layer(layer).attention = rebuilt(copy.layer(layer).attention, mask=mask)
    retold(copy, {layer: {"mask": mask} for layer in chosen})
    return copy


def exchanged(attention: Attention, kernel: Kernel, marked: Tensor) -> Attention:
    """Attention with this kernel for the marked heads."""
    return rebuilt(attention, kernel=kernel if marked.all() else PerHead(marked, kernel, attention.kernel))


def _built(part: parts.Kernel, attention: Attention) -> Kernel:
    with torch.random.fork_rng(devices=[]):
        kernel = cast(Kernel, part.build(attention.form.heads, attention.form.dim))
    kernel = kernel.to(attention.content.left_rows()).train(attention.kernel.training)
    old, new = attention.kernel.state_dict(), kernel.state_dict()
    if {k: v.shape for k, v in old.items()} == {k: v.shape for k, v in new.items()}:
        kernel.load_state_dict(old)
    return kernel


def claim(kernel: Kernel, inner: Kernel, **own: bool) -> None:
    """Give a kernel that is made from another the other's capabilities, but for its `own`."""
    for name in CAPABILITIES:
        setattr(kernel, name, own.get(name, getattr(inner, name)))


ALL = ("normalised", "row_invariant", "column_invariant", "rowwise", "differentiable", "fused")  # hold if all parts do
CAPABILITIES = (*ALL, "reads_factors", "sparse", "signed")


class PerHead(Kernel):
    """The kernel `new` for the marked heads, `old` for the others. Both are computed for all."""

    marked: Tensor

    def __init__(self, marked: Tensor, new: Kernel, old: Kernel):
        super().__init__()
        self.new, self.old = new, old
        self.register_buffer("marked", marked, persistent=False)
        for name in CAPABILITIES:
            both = getattr(new, name), getattr(old, name)
            setattr(self, name, all(both) if name in ALL else any(both))
        values = [kernel.value for kernel in (new, old)]
        some = next((value for value in values if value is not None), None)
        if some is not None:  # a head without a vector for the mass that is left has the vector 0
            given, left = (torch.zeros_like(some) if value is None else value for value in values)
            self.value = nn.Parameter(torch.where(marked.unsqueeze(-1), given, left))

    def forward(self, u: Queries, v: Keys, c: Contents, visible: Visible) -> Mixture:
        return self._choose(self.new(u, v, c, visible), self.old(u, v, c, visible))

    def weights(self, u: Queries, v: Keys, visible: Visible) -> Weights:
        return self._choose(self.new.weights(u, v, visible), self.old.weights(u, v, visible))

    def macs(self, keys: int, visible: float, rank: int, width: int) -> int:
        return self.new.macs(keys, visible, rank, width) + self.old.macs(keys, visible, rank, width)

    def _choose(self, new: Tensor, old: Tensor) -> Tensor:
        return torch.where(self.marked.view(-1, 1, 1), new, old)
