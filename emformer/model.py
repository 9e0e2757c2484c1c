"""The model: tokens -> cloud -> flow -> logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from emformer import parts
from emformer.attention import Attention, Memory
from emformer.block import Block, SequentialBlock, Step
from emformer.parts import UserError
from emformer.settings import Model
from emformer.types import Cloud, Index, Logits, Tokens


class Emformer(nn.Module):
    """A transformer whose attention is a form M and a content operator F per head, in one space E.

        s_ij = x_i^T M_h x_j,   X <- X + eps (sum_h softmax(s) X F_h^T + g),   X <- X + eps FFN(X)

    `Emformer(vocab, dim=..., heads=..., form=LowRank(32), ...)` takes the fields of `emformer.settings.Model`. The initial
    weights come from the global torch generator: seed it for reproducible models.

    Args:
        vocab: number of token ids V.
        **fields: see `emformer.settings.Model`.

    Raises:
        UserError: for a combination that cannot be built.

    `surgery` says what was changed since it was built, one line a change (`emformer.surgery`); where it says anything, the
    settings do not describe the model wholly.
    """

    surgery: tuple[str, ...] = ()

    def __init__(self, vocab: int, **fields: Any):
        super().__init__()
        self.vocab = vocab
        self.settings = Model(**fields)
        settings = self.settings
        self.embedding = nn.Embedding(vocab, settings.dim)
        nn.init.normal_(self.embedding.weight, std=settings.embedding.std)
        learned = settings.embedding.positions
        self.positions = None if learned is None else nn.Parameter(learned.std * torch.randn(settings.context, settings.dim))
        norm = settings.embedding.norm
        self.embedding_norm = None if norm is None else norm.build(settings.dim)
        self.dropout = nn.Dropout(settings.dropout) if settings.dropout else nn.Identity()
        self.enter = settings.layer(0).placement.enter(settings.dim)
        maps: dict[Any, nn.Module] = {}
        self.blocks = nn.ModuleList(_block(settings.layer(k), maps) for k in range(1 if settings.shared else settings.depth))
        closing = settings.layer(settings.depth - 1)
        self.norm = closing.norm.build(settings.dim) if closing.norm and closing.placement.closes else nn.Identity()
        transform = settings.embedding.transform
        self.transform = None if transform is None else _Transform(transform.norm, settings.dim)
        self.unembedding = nn.Linear(settings.dim, vocab, bias=settings.embedding.bias)
        if settings.embedding.bias:
            nn.init.zeros_(self.unembedding.bias)
        if settings.embedding.tied:
            self.unembedding.weight = self.embedding.weight
        else:
            nn.init.normal_(self.unembedding.weight, std=settings.embedding.unembed_std)

    def layer(self, index: int) -> Block:
        """The block that acts as layer `index` (0 … depth-1; one object for all where blocks are shared)."""
        return cast(Block, self.blocks[0 if self.settings.shared else index])

    def embed(self, tokens: Tokens, i: Index) -> Cloud:
        """X^0: token vectors, with the learned positions of `i` and through the embedding's norm where the model has them."""
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + functional.embedding(i, self.positions)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = self.dropout(x)
        return x if self.enter is None else self.enter(x)

    def flow(self, tokens: Tokens, memory: list[Memory] | None = None) -> Iterator[Step]:
        """The steps X^0 -> X^{1/2} -> X^1 -> … -> X^L, one at a time; in parallel blocks X^0 -> X^1 -> ….

        `step.before` of the first is X^0, `step.after` of the last X^L. Updates per head: `head_updates(step)`. With a
        memory, `tokens` continue those remembered.
        """
        start = memory[0].length if memory else 0
        stop = start + tokens.shape[1]
        if self.positions is not None and stop > len(self.positions):
            raise ValueError(f"{stop} tokens, but the learned positions reach {len(self.positions)}")
        i = torch.arange(start, stop, device=tokens.device)
        x = self.embed(tokens, i)
        blocks = list(self.blocks) if not self.settings.shared else [self.blocks[0]] * self.settings.depth
        for index, block in enumerate(blocks):
            for step in cast(Block, block).flow(x, i, memory[index] if memory else None, index):
                x = step.after
                yield step

    def head_updates(self, step: Step) -> Tensor:
        """The updates D^h (B, H, T, d) of a step of attention, as they enter the stream: with the drift, and the FFN of a
        parallel block, they sum to `step.update`. Raises ValueError for a step without heads."""
        return self.layer(step.layer).pieces(step)[0]

    def unembed(self, x: Cloud) -> Logits:
        """Logits of the state x, through the closing norm and the head's transform: on an earlier state, the logit lens."""
        x = self.norm(x)
        return self.unembedding(x if self.transform is None else self.transform(x))

    def forward(self, tokens: Tokens) -> Logits:
        """Logits (B, T, V) of the next token at every position."""
        return self.unembed(self._last(tokens))

    def _last(self, tokens: Tokens, memory: list[Memory] | None = None) -> Cloud:
        for step in self.flow(tokens, memory):
            x = step.after
        return x

    def memory(self, capacity: int | None = None) -> list[Memory]:
        """An empty cache for decoding, one `Memory` a layer, with room for `capacity` tokens (default: the context)."""
        return [Memory(capacity or self.settings.context) for _ in range(self.settings.depth)]

    def stream(
        self,
        tokens: Tokens,
        count: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """Yield `count` new tokens (B,), one at a time. See `generate`."""
        for depth in range(self.settings.depth):
            attention = self.layer(depth).attention
            if not (attention.mask.causal and attention.kernel.rowwise):
                raise UserError(f"generate: layer {depth} is not causal, so this model cannot continue a text token by token.")
        if not 0 <= temperature < float("inf") or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
            raise UserError(
                f"generate: temperature {temperature}, top_k {top_k}, top_p {top_p}; "
                "choose temperature >= 0, top_k >= 1 and top_p in (0, 1]."
            )
        if tokens.shape[1] == 0:
            raise UserError("generate: the prompt is empty; give at least one token.")
        context = self.settings.context
        generator = torch.Generator(tokens.device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
        new = tokens[:, -context:]
        memory, seen = self.memory(), [new]
        for _ in range(count):
            if memory[0].length + new.shape[1] > context:  # full: start again from the later half
                memory, new = self.memory(), torch.cat(seen, 1)[:, -max(1, context // 2) :]
                seen = [new]
            token = self._next(new, memory, temperature, top_k, top_p, generator)
            new = token[:, None]
            seen.append(new)
            yield token

    @torch.inference_mode()
    def _next(self, tokens: Tokens, memory: list[Memory], *sampling: Any) -> Tensor:
        """The token (B,) after `tokens`, which continue those remembered; without dropout."""
        training = self.training
        if training:
            self.eval()
        try:
            return choose(self.unembed(self._last(tokens, memory)[:, -1:])[:, 0], *sampling)
        finally:
            if training:
                self.train()

    def generate(
        self,
        tokens: Tokens,
        count: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Continue `tokens` (B, T) by `count` tokens: (B, T + count). Decodes with a cache; dropout is off.

        A text longer than the context continues from its last half context, read anew.

        Args:
            temperature: of the sampling; 0 takes the most probable token.
            top_k: sample among the k most probable.
            top_p: sample among the most probable tokens that together have at least this probability.
            seed: of this call's own generator; null draws one.

        Raises:
            UserError: for an empty prompt, settings out of range, or a model that is not causal.
        """
        new = list(self.stream(tokens, count, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed))
        return torch.cat([tokens, torch.stack(new, 1)], 1) if new else tokens


class _Transform(nn.Module):
    """norm(gelu(W x + b)), with the exact gelu."""

    def __init__(self, norm: parts.Norm | None, dim: int):
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        nn.init.normal_(self.dense.weight, std=dim**-0.5)
        nn.init.zeros_(self.dense.bias)
        self.norm = None if norm is None else norm.build(dim)

    def forward(self, x: Cloud) -> Cloud:
        x = functional.gelu(self.dense(x))
        return x if self.norm is None else self.norm(x)


# IPython and editors complete the fields of the settings
setattr(  # noqa: B010
    Emformer,
    "__signature__",
    inspect.Signature(
        [inspect.Parameter("vocab", inspect.Parameter.POSITIONAL_OR_KEYWORD), *inspect.signature(Model).parameters.values()]
    ),
)


def choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator) -> Tensor:
    """One token (B,) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    index = None
    logits = logits.float()
    if top_k is not None and top_k < logits.shape[-1]:
        logits, index = logits.topk(top_k, sorted=top_p is not None)
    elif top_p is not None and top_p < 1:
        logits, index = logits.sort(-1, descending=True)
    probability = functional.softmax(logits if temperature == 1 else logits / temperature, -1)
    if index is not None and top_p is not None and top_p < 1:
        # columns are in descending order: keep those before which less than top_p lies
        before = probability.cumsum(-1) - probability
        probability = probability.masked_fill(before >= top_p, 0.0)
    # argmax p_i / E_i with E_i ~ Exp(1) is a draw from p, cheaper than torch.multinomial
    drawn = (probability / torch.empty_like(probability).exponential_(generator=generator)).argmax(-1)
    return drawn if index is None else index.gather(-1, drawn[:, None])[:, 0]


def _block(layer: Model, maps: dict[Any, nn.Module]) -> Block:
    form: Any = layer.form.build("form", layer.dim, layer.heads)
    content: Any = layer.content.build("content", layer.dim, layer.heads, form)
    kernel: Any = layer.kernel.build(layer.heads, layer.dim)
    attention = Attention(
        form,
        content,
        kernel,
        [_position(position, form.rank, maps) for position in layer.positions],
        layer.mask,
        layer.functional,
        layer.drift,
    )
    ffn = None if layer.ffn is None else layer.ffn.build(layer.dim)
    given = attention, ffn, layer.norm, layer.placement, layer.epsilon, layer.dropout
    return SequentialBlock(*given) if layer.arrangement is None else cast(Block, layer.arrangement.build(*given))


def _position(position: parts.Position, rank: int, maps: dict[Any, nn.Module]) -> Any:
    """The map of this setting; layers share the object unless it learns something, and with it the tables it makes."""
    key = repr(position), rank
    built = maps.get(key) or position.build(rank)
    if not any(True for _ in built.parameters()):
        maps[key] = built
    return built
