"""Attention from its five parts: form M, content F, kernel, positions, mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from emformer import parts
from emformer.kernels import Kernel
from emformer.kernels.base import mix
from emformer.masks import Visible, visible
from emformer.operators import Operator
from emformer.operators.base import full_rate
from emformer.parts import UserError
from emformer.positions import PositionMap
from emformer.settings import Drift, Functional
from emformer.types import Cloud, Contents, Index, KeyCloud, KeyIndex, Keys, Matrices, Mixture, Queries, Weights

# Up to here (1 MiB in float32) one product with all M_h, or F_h, multiplied out takes less time than starting the several
# products with their factors; beyond, decoding is bound by the weights that it reads.
SMALL = 2**18


class Memory:
    """What one layer remembers of the tokens it has seen: tensors (..., S, width) that grow along S.

    `folded` may hold M, u and F multiplied out, for as long as the memory lives: weights do not change while they decode.

    Args:
        capacity: tokens to make room for. Appending beyond it raises ValueError.
    """

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self.folded: tuple[Tensor, Tensor | None, Tensor] | None = None
        self._rows: list[Tensor] = []

    def append(self, *new: Tensor) -> list[Tensor]:
        """Store T further rows of each tensor and return all rows so far, as views."""
        count = new[0].shape[-2]
        if self.length + count > self.capacity:
            raise ValueError(f"memory for {self.capacity} tokens holds {self.length} and is given {count} more")
        if not self._rows:
            self._rows = [x.new_empty(*x.shape[:-2], self.capacity, x.shape[-1]) for x in new]
        for rows, x in zip(self._rows, new, strict=True):
            rows.narrow(-2, self.length, count).copy_(x)
        self.length += count
        return [rows.narrow(-2, 0, self.length) for rows in self._rows]

    @property
    def numbers(self) -> int:
        """Numbers stored per token and sequence."""
        return sum(rows[0].numel() // self.capacity for rows in self._rows)


class Biases(nn.Module):
    """b_Q (H, r) and, where it is not gauge, b_K (G, r): added to the factors before any position acts.

    `rates`: a bias learns at the rate of the factor that it stands beside.
    """

    def __init__(self, form: Operator, key: bool):
        super().__init__()
        shared = form.rates.get("factor", 1.0)
        full = full_rate("form", form.dim, form.heads)
        self.rates = {
            "left": full if form.identity_right else form.rates.get("left_factor", shared),
            "right": form.rates.get("right_factor", shared),
        }
        self.left = nn.Parameter(torch.zeros(form.heads, form.rank))
        self.right = nn.Parameter(torch.zeros(form.groups, form.rank)) if key else None


class Attention(nn.Module):
    """D_i = sum_h F_h m_i^h + g,  m_i^h = sum_j a_ij^h y_j,  a = kernel(y^T M_h y) under the mask.

    A kernel with a sink adds (1 - sum_j a_ij^h) y_0^h to the mean m_i^h. Which biases there are depends on what the kernel would
    not notice (math A.2): b_K only where a constant on a row of scores counts, b_V only where rows do not sum to one.

    Two paths compute the same mixture z = R_F^T m (math A.5, A.7). *Projected*: queries, keys and contents are the factors'
    images, r wide. *Absorbed*: the relevance gradients R_M left(y) meet the cloud itself, K = V = Y, shared by all heads;
    the content is projected after mixing. Training takes the projected path, which never costs more; decoding takes the
    absorbed one where its cache of d numbers a token is smaller and no position acts on the keys.

    Cost per token in multiply-adds, Nbar visible tokens: projected 4 d H r + 2 Nbar H r; dense 2 H d^2 + 2 Nbar H d.
    """

    def __init__(
        self,
        form: Operator,
        content: Operator,
        kernel: Kernel,
        positions: Sequence[PositionMap],
        mask: parts.Mask,
        functional: Functional | None,
        drift: Drift | None,
    ):
        super().__init__()
        if form.heads != content.heads:
            raise UserError(f"attention: the form has {form.heads} heads and the content {content.heads}.")
        name = type(kernel).__name__.removesuffix("Kernel")
        if mask.causal and not kernel.rowwise:
            raise UserError(
                f"the kernel {name} with the causal mask {type(mask).__name__}: weights that sum to one over queries as well as "
                "over keys can only be the identity there; use the mask Full, with the objective MaskedToken."
            )
        self.form, self.content, self.kernel, self.mask = form, content, kernel, mask
        self.positions = nn.ModuleList(positions)
        on_keys = any(position.acts_on_keys for position in positions)
        if functional is not None and kernel.column_invariant and not (on_keys or any(p.reads_factors for p in positions)):
            raise UserError(f"the kernel {name} does not notice a functional of the key: leave out model.functional.")
        key_bias = functional is not None and (on_keys or not kernel.row_invariant)
        self.biases = None if functional is None else Biases(form, key_bias)
        self.drift = None if drift is None else nn.Parameter(torch.zeros(form.dim))
        value_bias = drift is not None and not kernel.normalised
        self.value_bias = nn.Parameter(torch.zeros(content.groups, content.rank)) if value_bias else None
        self.whole = self.value_bias is None and kernel.value is None  # the mixture is the kernel's, and nothing else
        self.absorbable = form.identity_right or not (on_keys or key_bias or kernel.reads_factors)
        projected = form.groups * form.rank + content.groups * content.rank
        self.absorbs = self.absorbable and form.dim < projected
        plain = not (positions or kernel.reads_factors)
        self.folds = self.absorbs and plain and self.whole and form.heads * form.dim**2 <= SMALL
        self.cache_numbers = form.dim if self.absorbs else projected

    def update(self, y: Cloud, i: Index, memory: Memory | None = None) -> tuple[Mixture | None, Cloud]:
        """Mixture z and update D. Decoding a small model does without the mixture: z is None."""
        # a key bias may also come later, by surgery; M, u and F do not know it
        keyed = self.biases is not None and self.biases.right is not None
        if memory is not None and memory.length and self.folds and not keyed:
            return None, self._folded(y, i, memory)
        z = self(y, i, memory)
        return z, self.lift(z)

    def forward(self, y: Cloud, i: Index, memory: Memory | None = None) -> Mixture:
        """The mixtures z (B, H, T, r_F) for the read cloud y at positions i; `lift` turns them into the update.

        With a memory, y are the tokens after those remembered, and i continues their positions.
        """
        if memory is None or not self.absorbs:
            return self.projected(y, i, memory)
        if memory.length == 0 and len(i) > 1:  # a prompt is cheaper projected; only what is remembered differs
            memory.append(y)
            return self.projected(y, i)
        return self.absorbed(y, i, memory)

    def projected(self, y: Cloud, i: Index, memory: Memory | None = None) -> Mixture:
        """Keys and contents as r-vectors, G (2 r) numbers a token when remembered."""
        u, v = self.factors(y, i)
        c = self.content.right(y)
        if memory is not None:
            v, c = memory.append(v, c)
        z, mass = self._mix(u, v, c, self._visible(i, v.shape[-2]))
        return self._whole(z, mass)

    def absorbed(self, y: Cloud, i: Index, memory: Memory | None = None) -> Mixture:
        """The cloud itself as key and content of every head, d numbers a token when remembered."""
        if not self.absorbable:
            raise ValueError("a position, a key bias or the kernel acts on the keys: M cannot be absorbed into the query")
        cloud = y if memory is None else memory.append(y)[0]
        keys = cloud.unsqueeze(1)
        if self.form.identity_right:
            u, v = self.place(self.queries(y), self.keys(cloud), i, torch.arange(keys.shape[-2], device=i.device))
        else:
            u, v = self.queries(y), keys
            u = self.form.pull(self.place(u, u, i, i)[0])  # no position acts on keys here: any will do
        mean, mass = self._mix(u, v, keys, self._visible(i, keys.shape[-2]))
        return self._whole(self.content.project(mean), mass)

    def _mix(self, u: Queries, v: Keys, c: Contents, seen: Visible) -> tuple[Mixture, Tensor | None]:
        """The kernel's mixture, and the mass sum_j a_ij (B, H, T, 1) where anything depends on it: of a content that is 1."""
        if self.whole:
            return self.kernel(u, v, c, seen), None
        z = self.kernel(u, v, nn.functional.pad(c, (0, 1), value=1.0), seen)
        return z[..., :-1], z[..., -1:]

    def _whole(self, z: Mixture, mass: Tensor | None) -> Mixture:
        """With the value bias, and with what the sink gives."""
        if mass is None:
            return z
        if self.value_bias is not None:
            z = z + mass * self.value_bias.repeat_interleave(self.content.heads // self.content.groups, 0).unsqueeze(1)
        if self.kernel.value is not None:
            z = z + (1 - mass) * self.content.project(self.kernel.value[None, :, None].to(z.dtype))
        return z

    def mix(self, a: Weights, y: KeyCloud) -> Mixture:
        """The mixture z of the pattern a (B, H, T, S) on the read cloud y: what the flow computed, if a are its `weights`."""
        return self._whole(mix(a, self.content.right(y)), None if self.whole else a.sum(-1, keepdim=True))

    def lift(self, z: Mixture) -> Cloud:
        """The update D = sum_h L_h z_h + g."""
        update = self.content.lift(z)
        return update if self.drift is None else update + self.drift

    def factors(self, y: Cloud, i: Index) -> tuple[Queries, Keys]:
        """(u, v) with s_ij = u_i . v_j: biases added and positions applied."""
        return self.place(self.queries(y), self.keys(y), i, i)

    def weights(self, y: Cloud, i: Index) -> Weights:
        """The attention pattern a (B, H, T, T) of the read cloud y: the reference, memory B H T^2, differentiable."""
        u, v = self.factors(y, i)
        return self.kernel.weights(u, v, self._visible(i, v.shape[-2]))

    def functional(self) -> Tensor | None:
        """u (H, d), the affine key functional u_h = R_{g(h)} b_h; None if absent. Undefined where positions rotate it."""
        return None if self.biases is None else self.form.pull(self.biases.left[None, :, None])[0, :, 0]

    def matrices(self) -> tuple[Matrices, Matrices]:
        """(M, F), each (H, d, d)."""
        return self.form.matrix(), self.content.matrix()

    def _folded(self, y: Cloud, i: Index, memory: Memory) -> Cloud:
        """The update of the absorbed path with M_h and F_h multiplied out: one product before the kernel, one after it."""
        if memory.folded is None:
            u = self.functional()
            forms, contents = self.matrices()
            memory.folded = forms.mT.flatten(0, 1), None if u is None else u.flatten(), contents.transpose(0, 1).flatten(1)
        form, u, content = memory.folded
        keys = memory.append(y)[0].unsqueeze(1)
        gradients = functional.linear(y, form, u).view(*y.shape[:-1], -1, y.shape[-1]).transpose(1, 2)
        mean = self.kernel(gradients, keys, keys, self._visible(i, keys.shape[-2]))
        return functional.linear(mean.transpose(1, 2).flatten(2), content, self.drift)

    def queries(self, y: Cloud) -> Queries:
        """u (B, H, T, r) of the read cloud y, with its bias, before any position acts."""
        u = self.form.left(y)
        return u if self.biases is None else u + self.biases.left.unsqueeze(1)

    def keys(self, y: Cloud) -> Keys:
        """v (B, G, T, r), with its bias, before any position acts."""
        v = self.form.right(y)
        return v if self.biases is None or self.biases.right is None else v + self.biases.right.unsqueeze(1)

    def place(self, u: Queries, v: Keys, i: Index, j: KeyIndex) -> tuple[Queries, Keys]:
        """(u, v) after every position, queries standing at i and keys at j."""
        for position in self.positions:
            u, v = position(u, v, i, j)
        return u, v

    def _visible(self, i: Index, keys: int) -> Visible:
        return visible(self.mask, i, keys)
