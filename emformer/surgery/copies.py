"""The copy that a surgery is done on: which layers, which heads, new parts in old places."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from emformer import parts
from emformer.attention import Attention
from emformer.geometry.spectra import wide
from emformer.kernels import Kernel
from emformer.model import Emformer
from emformer.operators import Operator
from emformer.operators.base import Bound
from emformer.operators.dense import DenseOperator
from emformer.operators.lowrank import LowRankOperator
from emformer.parts import UserError
from emformer.positions import PositionMap
from emformer.settings import Drift, Functional
from emformer.types import Cloud, HeadClouds, Keys, Matrices, Mixture, Queries, Rows

Which = int | Iterable[int] | None


def copied(
    model: Emformer, what: str, layers: Which, heads: Which = None, *, apart: bool = False
) -> tuple[Emformer, list[int], Tensor]:
    """(copy, layers, heads): a deep copy of the model, the indices to change it at, and the heads as a mask (H,).

    A block that all layers share stays one where all of them are changed alike, and is then named once, as layer 0; where
    only some are, or `apart`, the copy gets one block a layer. `copy.surgery` grows by one line.

    Raises:
        UserError: for a layer or a head that the model does not have.
    """
    settings = model.settings
    chosen = _indices("layer", layers, settings.depth)
    marked = _indices("head", heads, settings.heads)
    given = [("layer", layers, chosen), ("head", heads, marked)]
    places = [f"{name}s {', '.join(map(str, found))}" for name, which, found in given if which is not None]
    line = f"{what} ({'; '.join(places)})" if places else what
    copy = deepcopy(model)
    if settings.shared and chosen:
        if apart or len(chosen) < settings.depth:
            shared = copy.blocks
            copy.blocks = nn.ModuleList([shared[0], *(deepcopy(shared[0]) for _ in range(settings.depth - 1))])
            copy.blocks.training = shared.training
            copy.settings = replace(settings, shared=False)
        else:
            chosen = [0]
    copy.surgery = (*model.surgery, line)
    mask = torch.zeros(settings.heads, dtype=torch.bool, device=copy.embedding.weight.device)
    mask[marked] = True
    return copy, chosen, mask


def _indices(name: str, which: Which, count: int) -> list[int]:
    if which is None:
        return list(range(count))
    chosen = sorted({which} if isinstance(which, int) else set(which))
    for index in chosen:
        if not 0 <= index < count:
            raise UserError(f"surgery: there is no {name} {index}; choose from 0 … {count - 1}.")
    return chosen


def known(where: str, name: str, value: str, choices: Sequence[str]) -> None:
    """Raise `UserError` for a word that is none of the choices."""
    if value not in choices:
        raise UserError(f"{where}: {name} is '{value}'; choose from {', '.join(choices)}.")


def retold(model: Emformer, layers: Mapping[int, Mapping[str, Any]]) -> None:
    """Let the settings of a copy say what became of these layers (of the one block, where it is shared): fields by layer."""
    settings, told = model.settings, list(layers.values())
    if told and all(fields == told[0] for fields in told) and (settings.shared or len(told) == settings.depth):
        own = {k: {name: part for name, part in layer.items() if name not in told[0]} for k, layer in settings.layers.items()}
        model.settings = replace(settings, **told[0], layers={k: layer for k, layer in own.items() if layer})
    else:
        own = {k: {**settings.layers.get(k, {}), **fields} for k, fields in layers.items()}
        model.settings = replace(settings, layers={**settings.layers, **own})


def generator(*key: Any) -> torch.Generator:
    """A generator of its own for every key, independent of every other's and of the global one."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


# Operators ------------------------------------------------------------------------------------------------------------


class Wrapper(Operator):
    """An operator that does as the one inside it, but for what a subclass makes of it."""

    def __init__(self, inner: Operator):
        super().__init__(inner.dim, inner.heads, inner.groups, inner.rank, {})
        self.identity_right = inner.identity_right
        self.setup_macs, self.setup_back = inner.setup_macs, inner.setup_back
        self.inner = inner

    @property
    def macs(self) -> int:
        return self.inner.macs

    def left_rows(self) -> Rows:
        return self.inner.left_rows()

    def right_rows(self) -> Rows | None:
        return self.inner.right_rows()

    def left(self, x: Cloud) -> Queries:
        return self.inner.left(x)

    def right(self, x: Cloud) -> Keys:
        return self.inner.right(x)

    def pull(self, u: Queries) -> HeadClouds:
        return self.inner.pull(u)

    def project(self, m: HeadClouds) -> Mixture:
        return self.inner.project(m)

    def lift_heads(self, z: Mixture) -> HeadClouds:
        return self.inner.lift_heads(z)

    def lift(self, z: Mixture) -> Cloud:
        return self.inner.lift(z)

    def matrix(self) -> Matrices:
        return self.inner.matrix()


class Shifted(Wrapper):
    """D^h_i = F_h m_i^h + mean^h_i: a content with a constant (H, T, d) for each head and position, counted from position 0.

    Its `matrix` is F, without the constant.
    """

    mean: Tensor

    def __init__(self, inner: Operator, mean: Tensor):
        super().__init__(inner)
        self.register_buffer("mean", mean)

    def lift_heads(self, z: Mixture) -> HeadClouds:
        return self.inner.lift_heads(z) + self.mean[:, : z.shape[2]]

    def lift(self, z: Mixture) -> Cloud:
        return self.inner.lift(z) + self.mean[:, : z.shape[2]].sum(0)


class FromTheStart(PositionMap):
    """Changes nothing, and refuses every sequence but one that is whole: constants by position do not know where they are."""

    acts_on_keys = False
    reads_factors = False

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def forward(self, u: Queries, v: Keys, i: Tensor, j: Tensor) -> tuple[Queries, Keys]:
        if len(i) and (len(i) > self.length or int(i[0]) != 0):
            raise UserError(
                f"a mean-ablated model takes whole sequences of at most {self.length} tokens, and got {len(i)} from position "
                f"{int(i[0])}: decode without a memory, by a forward pass for each token."
            )
        return u, v


def plain(left: Tensor, right: Tensor | None, like: Operator) -> Operator:
    """A free operator of these factors, in the type and on the device of the operator that it replaces."""
    old = like.left_rows()
    rates = {name: rate for name, rate in like.rates.items() if name in ("left_factor", "right_factor")}
    left = left.detach().to(old, copy=True).contiguous()
    if right is None:
        return DenseOperator(left, rates)
    return LowRankOperator(left, right.detach().to(old, copy=True).contiguous(), rates)


def bare(content: Operator) -> Operator:
    """The content without its constants by position."""
    return content.inner if isinstance(content, Shifted) else content


def free(content: Operator) -> Operator:
    """The same content on its own: what is tied to a form becomes a plain operator, so that the form can change alone."""
    inner = bare(content)
    if not isinstance(inner, Bound):
        return content
    return shifted(plain(inner.left_rows(), inner.right_rows(), inner), content)


def shifted(content: Operator, like: Operator, keep: Tensor | None = None) -> Operator:
    """The content with the constants that `like` has, of the heads in `keep` (H,) only."""
    if not isinstance(like, Shifted):
        return content
    mean = like.mean if keep is None else keep.view(-1, 1, 1) * like.mean
    return Shifted(content, mean.clone()) if mean.any() else content


def each(operator: Operator) -> tuple[Tensor, Tensor]:
    """The rows of L_h^T and of R_h^T for every head, (H, r, d) both, in float64; the identity written out."""
    left, right = wide(operator.left_rows()), operator.right_rows()
    if right is None:
        return left, torch.eye(operator.dim, dtype=left.dtype, device=left.device).expand_as(left)
    return left, wide(right).repeat_interleave(operator.heads // operator.groups, 0)


def multiplied(attention: Attention, role: parts.Role, a: Tensor | None, b: Tensor | None, chosen: Tensor) -> Attention:
    """W_h -> A_h W_h B_h for the chosen heads, done on the factors: L -> A L and R -> B^T R, or W whole where R is the identity.

    a and b are (H, d, d) in float64. Heads that share a right factor share the B of the first of them; where only some of a
    group are chosen, every head gets a right factor of its own. The space of the factors is left as it is, and with it b_Q,
    b_K and b_V; the functional u = R b_Q goes to B^T u, as the key y goes to B y. What is tied to the form is set free first.
    """
    operator = getattr(attention, role)
    left, right = wide(operator.left_rows()), operator.right_rows()
    chosen, share = chosen.to(left.device), operator.heads // operator.groups
    pick = chosen.view(-1, 1, 1)
    a, b = (None if x is None else x.to(left) for x in (a, b))
    if a is not None:
        left = torch.where(pick, left @ a.mT, left)
    if b is not None and right is None:
        left = torch.where(pick, b.mT @ left, left)
    elif b is not None and right is not None:
        right = wide(right)
        group = chosen.view(-1, share)
        if bool((group.any(1) == group.all(1)).all()):
            right = torch.where(pick[::share], right @ b[::share], right)
        else:
            right = right.repeat_interleave(share, 0)
            right = torch.where(pick, right @ b[::share].repeat_interleave(share, 0), right)
    new = plain(left, right, operator)
    if role == "content":
        return rebuilt(attention, content=shifted(new, operator))
    after = rebuilt(attention, form=new, content=free(attention.content))
    if b is not None and operator.identity_right and after.biases is not None:
        bias = after.biases.left
        turned = (wide(bias).unsqueeze(1) @ b).squeeze(1)
        set_to(bias, torch.where(chosen.unsqueeze(-1), turned, wide(bias)))
    return after


# Attention ------------------------------------------------------------------------------------------------------------


def maps(attention: Attention) -> list[PositionMap]:
    """The positions, in order."""
    return [cast(PositionMap, position) for position in attention.positions]


@torch.no_grad()
def set_to(parameter: nn.Parameter, value: Tensor) -> None:
    """Write a value of the very same shape."""
    assert parameter.shape == value.shape, (parameter.shape, value.shape)
    parameter.copy_(value)


def rebuilt(
    old: Attention,
    *,
    form: Operator | None = None,
    content: Operator | None = None,
    kernel: Kernel | None = None,
    positions: Sequence[PositionMap] | None = None,
    mask: parts.Mask | None = None,
    drift: bool = True,
) -> Attention:
    """Attention with some parts exchanged, made by its constructor, which refuses what does not go together.

    Biases go along. b_K is dropped where nothing would notice it; b_V becomes part of the drift where rows sum to one. A bias
    that is new, or whose space is (factors of another width), is 0.
    """
    new = Attention(
        form or old.form,
        content or old.content,
        kernel or old.kernel,
        maps(old) if positions is None else positions,
        mask or old.mask,
        None if old.biases is None else Functional(),
        None if old.drift is None or not drift else Drift(),
    )
    new.to(old.content.left_rows()).train(old.training)
    if old.biases is not None and new.biases is not None:
        new.biases.left = _carried(old.biases.left, new.biases.left)
        room = new.biases.right
        if room is None and new.kernel.reads_factors:  # L2 sees b_K, though a constant on a row of scores is nothing to it
            room = nn.Parameter(torch.zeros_like(new.biases.left[: new.form.groups]))
        if old.biases.right is not None and room is not None:
            new.biases.right = _carried(old.biases.right, room)
    if old.drift is not None and new.drift is not None:
        new.drift = old.drift
        if old.value_bias is not None and new.value_bias is not None:
            new.value_bias = _carried(old.value_bias, new.value_bias)
        elif old.value_bias is not None:
            bias = old.value_bias.repeat_interleave(old.content.heads // old.content.groups, 0)
            set_to(new.drift, new.drift + bare(old.content).lift(bias[None, :, None])[0, 0])
    return new


def _carried(old: nn.Parameter, new: nn.Parameter) -> nn.Parameter:
    """The old bias where the space is the same, repeated where heads that shared it do so no more; else the new one."""
    if old.shape == new.shape:
        return old
    if old.shape[-1] == new.shape[-1] and len(new) % len(old) == 0:
        return nn.Parameter(old.detach().repeat_interleave(len(new) // len(old), 0))
    return new
