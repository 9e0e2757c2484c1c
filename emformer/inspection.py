"""What a configuration is, counted: operators, parameters, decode cache and arithmetic (math A.7). Nothing is run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from emformer.model import Emformer
from emformer.parts import Mask
from emformer.settings import Model

TABLE = 2**24  # pairs of a query and a key that are looked at in one go
FLASH_WIDTH = 256  # widest head that the flash kernels of GPUs take


@dataclass(frozen=True)
class LayerCost:
    """One layer. Multiply-adds are per token at the full context, forward only; FLOPs are twice as many.

    `cache` counts the numbers that decoding keeps per token; `visible` is the mean number of keys a query sees. `setup` and
    `setup_back` are multiply-adds once a forward and once a backward pass, to make M and F from their parameters.
    """

    form: str
    content: str
    path: str
    parameters: int
    cache: int
    projections: int
    setup: int
    setup_back: int
    attention: int
    ffn: int
    visible: float
    width: int


@dataclass(frozen=True)
class Costs:
    """A whole model. `parameters` counts shared tensors once; `unembedding` is multiply-adds per token."""

    layers: list[LayerCost]
    parameters: int
    embedding_parameters: int
    unembedding: int

    @property
    def cache(self) -> int:
        """Numbers kept per token, over all layers."""
        return sum(layer.cache for layer in self.layers)

    @property
    def forward_flops(self) -> int:
        """FLOPs of a forward pass, per token."""
        macs = sum(layer.projections + layer.attention + layer.ffn for layer in self.layers)
        return 2 * (macs + self.unembedding)

    @property
    def training_flops(self) -> int:
        """FLOPs of forward and backward pass, per token: three forward passes."""
        return 3 * self.forward_flops

    @property
    def setup_flops(self) -> int:
        """FLOPs once a forward pass, however many tokens: constrained operators made from their parameters."""
        return 2 * sum(layer.setup for layer in self.layers)

    def step_flops(self, tokens: int) -> int:
        """FLOPs of the forward and backward pass of a batch of so many tokens; the optimiser's are apart."""
        return self.training_flops * tokens + 2 * sum(layer.setup + layer.setup_back for layer in self.layers)


def costs(vocab: int, settings: Model) -> Costs:
    """Count what a model of these settings would hold and compute. Built without memory, on the meta device."""
    with torch.device("meta"):
        model = Emformer(vocab, **vars(settings))
    seen: dict[Mask, float] = {}
    layers = []
    for index in range(settings.depth):
        block, own = model.layer(index), settings.layer(index)
        attention = block.attention
        if own.mask not in seen:
            seen[own.mask] = _visible(own.mask, settings.context)
        visible = seen[own.mask]
        form, content = attention.form, attention.content
        extra = 0 if attention.whole else 1  # the mass of the weights goes through the kernel as one more content
        kernel = attention.kernel.macs(settings.context, visible, form.rank, content.rank + extra)
        width = max(form.rank, content.rank)
        ffn = 0 if block.ffn is None else sum(p.numel() for p in block.ffn.parameters() if p.ndim == 2)
        layers.append(
            LayerCost(
                form=str(own.form),
                content=str(own.content),
                path="absorbed" if attention.absorbs else "projected",
                parameters=sum(p.numel() for p in block.parameters()),
                cache=attention.cache_numbers,
                projections=form.macs + content.macs,
                setup=form.setup_macs + content.setup_macs,
                setup_back=form.setup_back + content.setup_back,
                attention=settings.heads * kernel,
                ffn=ffn,
                visible=visible,
                width=width,
            )
        )
    embedding = {id(p): p.numel() for p in (*model.embedding.parameters(), *model.unembedding.parameters())}
    return Costs(
        layers,
        parameters=sum(p.numel() for p in model.parameters()),
        embedding_parameters=sum(embedding.values()),
        unembedding=vocab * settings.dim + (0 if settings.embedding.transform is None else settings.dim**2),
    )


def _visible(mask: Mask, context: int) -> float:
    """Mean number of keys that a query sees."""
    if mask.shape == "full":
        return float(context)
    if mask.shape == "triangle":
        return (context + 1) / 2
    i = torch.arange(context)
    some = i.split(max(1, TABLE // context))  # contexts of 100,000 tokens and more are usual
    return sum(int(mask.visible(part[:, None], i[None, :]).sum()) for part in some) / context


def table(found: Costs, settings: Model) -> str:
    """The counts as text: one line for each run of equal layers, then totals and what to know about them."""
    lines = [f"{'layers':<8}{'form M':<34}{'content F':<34}{'decodes':<11}{'parameters':>11}{'cache/token':>13}"]
    start = 0
    for index, layer in enumerate(found.layers):
        if index + 1 < len(found.layers) and found.layers[index + 1] == layer:
            continue
        span = f"{start}" if start == index else f"{start}-{index}"
        lines.append(
            f"{span:<8}{_short(layer.form):<34}{_short(layer.content):<34}{layer.path:<11}"
            f"{layer.parameters:>11,}{layer.cache:>13,}"
        )
        start = index + 1
    total = found.layers
    lines += [
        "",
        f"parameters      {found.parameters:,} (embedding and unembedding {found.embedding_parameters:,}"
        + (", blocks shared by all layers)" if settings.shared else ")"),
        f"decode cache    {found.cache:,} numbers a token: {4 * found.cache:,} bytes in float32, {2 * found.cache:,} in bfloat16",
        f"FLOPs a token   {found.forward_flops:,} forward, {found.training_flops:,} in training, at context {settings.context}",
        f"  projections   {2 * sum(layer.projections for layer in total):,}",
        f"  attention     {2 * sum(layer.attention for layer in total):,}  ({total[0].visible:.1f} keys seen by the mean query)",
        *([f"  set-up        {found.setup_flops:,} once a pass, to make the operators"] if found.setup_flops else []),
        f"  FFN           {2 * sum(layer.ffn for layer in total):,}",
        f"  unembedding   {2 * found.unembedding:,}",
    ]
    widest = max(layer.width for layer in total)
    if widest > FLASH_WIDTH:
        lines.append(
            f"note            heads are {widest} wide, and flash attention on GPUs ends at {FLASH_WIDTH}: "
            "there the attention matrix is held in memory"
        )
    return "\n".join(lines)


def _short(part: str) -> str:
    """A part's name with the arguments that fit."""
    for default in ("groups=None", "balanced=False", "score_std=1.0", "update_std=1.0", "init='normal'"):
        part = part.replace(f"{default}, ", "").replace(f", {default}", "").replace(default, "")
    return part if len(part) <= 33 else part[:32] + "…"
