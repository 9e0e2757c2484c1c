"""What leaves for the architecture of another library: which models fit, and their layers in float64, whatever M and F are."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from emformer import parts
from emformer.block import Block
from emformer.kernels.softmax import SoftmaxKernel
from emformer.model import Emformer
from emformer.norms import Norm
from emformer.operators import Operator
from emformer.parts import UserError
from emformer.placements import PreNorm


class Truncation(NamedTuple):
    """What cutting the operators of a layer to the width of a head lost: the largest relative Frobenius error over the heads,
    |M - M_r|/|M| of the effective forms and |F - F_r|/|F| of the effective contents (math A.6); 0 where nothing was cut."""

    layer: int
    form: float
    content: float


def lossless(cuts: Sequence[Truncation]) -> bool:
    """Whether what was cut was rounding."""
    return all(max(cut.form, cut.content) < 1e-9 for cut in cuts)


class Written(NamedTuple):
    """config.json, the tensors by the names of `transformers`, the width of a head, and what to tell of them."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    width: int
    folded: list[str]
    truncation: list[Truncation]


@dataclass(frozen=True)
class Family:
    """What an architecture has: of a part, the class that fits, and of networks each with its name there."""

    name: str
    to: str
    norm: type[parts.Norm]
    ffns: Mapping[type[parts.FFN], str]

    def refuse(self, layer: int | None, what: str, has: str) -> NoReturn:
        """Raise the sentence for something that does not fit."""
        where = "the model" if layer is None else f"layer {layer}"
        raise UserError(f"export to {self.to}: {where} has {what}, and {self.name} has {has}; --to emformer keeps everything.")


@dataclass(frozen=True)
class Layer:
    """One layer in float64, on the CPU.

    `left`, `right` (H, r, d) and (G, r, d): rows of L^T, times beta, and of R^T of the form; `query` (H, r), times beta, and
    `key` (G, r): its biases, or None; `out`, `value` (H, c, d) and (K, c, d): rows of L^T and R^T of the content; `drift` (d,) or
    None; `norms`: those that attention and the FFN read through, the second None without FFN; `ffn`: its weights by name, empty
    without; `step`: epsilon, which is in none of them.
    """

    left: Tensor
    right: Tensor
    query: Tensor | None
    key: Tensor | None
    out: Tensor
    value: Tensor
    drift: Tensor | None
    norms: tuple[Norm, Norm | None]
    ffn: Mapping[str, Tensor]
    step: float


# every name that a fitting model may have in its state; any other has no place in the formats
_KNOWN = re.compile(
    r"(embedding|unembedding)\.weight|positions|norm\.(gain|bias)|blocks\.\d+\."
    r"((read_attn|read_ffn)\.(gain|bias)|attention\.((form|content)\.\w+|biases\.(left|right)|drift)"
    r"|ffn\.(up|down|gate)\.(weight|bias))"
)


def check(model: Emformer, family: Family) -> None:
    """Raise `UserError` for what both formats lack."""
    settings = model.settings
    if settings.dim % settings.heads:
        family.refuse(None, f"{settings.heads} heads in {settings.dim} dimensions", "a dimension that its heads divide")
    for k in range(settings.depth):
        own, block = settings.layer(k), model.layer(k)
        attention, kernel = block.attention, block.attention.kernel
        if not isinstance(own.placement, PreNorm):
            family.refuse(k, f"the placement {name_of(own.placement)}", "PreNorm alone")
        if own.arrangement is not None:
            family.refuse(k, f"the arrangement {name_of(own.arrangement)}", "the FFN after attention")
        if not isinstance(own.norm, family.norm):
            family.refuse(k, f"the norm {name_of(own.norm)}", f"{family.norm.__name__} alone")
        if not isinstance(kernel, SoftmaxKernel):
            family.refuse(k, f"the kernel {type(kernel).__name__.removesuffix('Kernel')}", "Softmax alone")
        if attention.mask.shape != "triangle":
            family.refuse(k, f"the mask {attention.mask}", "Causal alone")
        if has_network(block) and type(own.ffn) not in family.ffns:
            family.refuse(k, f"the FFN {name_of(own.ffn)}", f"{' or '.join(ffn.__name__ for ffn in family.ffns)} alone")
    for name in model.state_dict():
        if not _KNOWN.fullmatch(name):
            family.refuse(None, f"the weights '{name}'", "no place for them")


def blocks(model: Emformer) -> list[Block]:
    """A block for every layer; one that layers share comes once a layer."""
    return [model.layer(k) for k in range(model.settings.depth)]


def has_network(block: Block) -> bool:
    """Whether there is an FFN that does something: not where a surgery skips it."""
    return block.ffn is not None and bool(block.ffn.state_dict())


def layer_of(block: Block) -> Layer:
    """A copy of the layer. Its kernel is one with a beta."""
    attention = block.attention
    # copied together, because a tied content refers to its form
    form, content = copy.deepcopy(nn.ModuleList([attention.form, attention.content])).cpu().double()
    assert isinstance(form, Operator) and isinstance(content, Operator)
    biases, beta = attention.biases, cast(float, attention.kernel.beta)
    norms = (twin(block.read_attn), None if block.ffn is None else twin(block.read_ffn))  # of a skipped FFN too: it stays
    return Layer(
        left=beta * form.left_rows(),
        right=_right(form),
        query=None if biases is None else beta * _wide(biases.left),
        key=None if biases is None or biases.right is None else _wide(biases.right),
        out=content.left_rows(),
        value=_right(content),
        drift=None if attention.drift is None else _wide(attention.drift),
        norms=norms,
        ffn={} if block.ffn is None else {name: _wide(value) for name, value in block.ffn.state_dict().items()},
        step=block.epsilon,
    )


def _right(operator: Operator) -> Tensor:
    rows = operator.right_rows()
    return torch.eye(operator.dim, dtype=torch.float64)[None] if rows is None else rows


def _wide(value: Tensor) -> Tensor:
    return value.detach().cpu().double()


def twin(norm: nn.Module | None) -> Norm:
    """A copy in float64, on the CPU."""
    assert isinstance(norm, Norm)
    return copy.deepcopy(norm).cpu().double()


def name_of(part: parts.Part | None) -> str:
    """The class of a part, as people write it."""
    return "None" if part is None else type(part).__name__


def eps_of(family: Family, model: Emformer) -> float:
    """The one epsilon that all norms share."""
    norms = [model.norm, *(norm for block in blocks(model) for norm in (block.read_attn, block.ffn and block.read_ffn))]
    found = sorted({cast(float, norm.eps) for norm in norms if norm is not None})
    if len(found) > 1:
        family.refuse(None, f"norms with eps {' and '.join(map(str, found))}", "one eps for all")
    return found[0]


def inner_width(model: Emformer) -> int:
    """Width of the widest FFN; 1 where there is none."""
    networks = [block.ffn for block in blocks(model) if block.ffn is not None and has_network(block)]
    return max((network.get_parameter("up.weight").shape[0] for network in networks), default=1)


def network_of(family: Family, model: Emformer) -> str:
    """The one activation that all networks have, as the architecture calls it; its usual one where there is no network."""
    layers = [model.settings.layer(k).ffn for k, block in enumerate(blocks(model)) if has_network(block)]
    found = sorted({family.ffns[type(ffn)] for ffn in layers if ffn is not None})
    if len(found) > 1:
        family.refuse(None, f"networks of different kinds ({', '.join(found)})", "one kind for all layers")
    return found[0] if found else next(iter(family.ffns.values()))


def gain(norm: Norm | None, dim: int) -> Tensor:
    """(d,); ones where there is none."""
    return torch.ones(dim, dtype=torch.float64) if norm is None or norm.gain is None else norm.gain.detach()


def offset(norm: Norm | None, dim: int) -> Tensor:
    """(d,); zeros where there is none."""
    return torch.zeros(dim, dtype=torch.float64) if norm is None or norm.bias is None else norm.bias.detach()


def typed(dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As they are written."""
    return {name: value.detach().cpu().to(dtype).contiguous() for name, value in tensors.items()}


def padded(x: Tensor, size: int, axis: int) -> Tensor:
    """Zeros behind, up to `size` along `axis` (counted from the end: -1, -2)."""
    missing = size - x.shape[axis]
    return functional.pad(x, [0, 0] * (-axis - 1) + [0, missing])


def is_tied(model: Emformer) -> bool:
    """Whether the unembedding is the embedding."""
    return model.unembedding.weight is model.embedding.weight


def notes(model: Emformer) -> list[str]:
    """What both formats take in the same way, a line each."""
    settings, layers = model.settings, blocks(model)
    betas, steps = {cast(float, block.attention.kernel.beta) for block in layers}, {block.epsilon for block in layers}
    without = sum(not has_network(block) for block in layers)
    found = []
    if betas != {1.0}:
        found.append(f"beta {_values(betas)} into the query weights")
    if steps != {1.0}:
        found.append(f"the step size {_values(steps)} into F, drift and FFN")
    if any(block.attention.biases is not None for block in layers):
        found.append("b of the functional u into the query bias")
    if any(block.attention.drift is not None for block in layers):
        found.append("the drift g into the output bias")
    if without:
        found.append(f"{without} of {len(layers)} layers have no FFN: its output matrix is 0")
    if settings.shared and settings.depth > 1:
        found.append(f"the shared block {settings.depth} times")
    return found


def _values(numbers: set[float]) -> str:
    return ", ".join(f"{number:g}" for number in sorted(numbers))
