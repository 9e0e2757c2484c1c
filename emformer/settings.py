"""The settings of a run, as typed frozen dataclasses: what a YAML file says and a checkpoint carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, TypedDict

from emformer import parts
from emformer.parts import UserError


@dataclass(frozen=True)
class Functional:
    """The affine key functional u: s_ij = y_i^T M y_j + u^T y_j with u_h = R_g b_h (math A.2).

    Its parameter is b (H, r), added to `left`: the query bias of QKV attention, over sqrt(r) where the form is low-rank.
    Where a constant added to a row of scores is not gauge
    (RoPE, a normalised key, a kernel that is not invariant under it), the key bias b_K (G, r) is learned too.
    """


@dataclass(frozen=True)
class Drift:
    """The constant drift g (d,) of a layer's update: value and output biases merged (math A.2).

    Where a kernel's weights do not sum to one the value bias b_V (G, r) is no constant, and is learned beside g.
    """


@dataclass(frozen=True)
class Learned:
    """Learned absolute positions: a vector of E for each position, added to the token's.

    Args:
        std: of the initial entries.
    """

    std: float = 0.02


@dataclass(frozen=True)
class Transform:
    """What a state passes before it is unembedded, norm(gelu(W x + b)) with W (d, d): the head of BERT.

    Args:
        norm: per-token normalisation, or null.
    """

    norm: parts.Norm | None = None


@dataclass(frozen=True)
class Embedding:
    """How tokens enter E and are read off it.

    Args:
        std: standard deviation of the token vectors at initialisation (tied: 1/sqrt(dim) keeps logits of order one).
        unembed_std: of the unembedding's rows; small, so that training starts near the uniform prediction. Unused if tied.
        tied: unembed with the token vectors themselves.
        positions: learned absolute positions, or null for none.
        norm: per-token normalisation of X^0, or null.
        transform: what a state passes before it is unembedded, or null.
        bias: learn a constant on the logits.
    """

    std: float = 1.0
    unembed_std: float = 0.02
    tied: bool = False
    positions: Learned | None = None
    norm: parts.Norm | None = None
    transform: Transform | None = None
    bias: bool = False


class Layer(TypedDict, total=False):
    """What one layer may have of its own; what is not named is as in the rest of the model."""

    form: parts.Operator
    content: parts.Operator
    kernel: parts.Kernel
    positions: Sequence[parts.Position]
    mask: parts.Mask
    functional: Functional | None
    drift: Drift | None
    norm: parts.Norm | None
    ffn: parts.FFN | None
    arrangement: parts.Arrangement | None
    placement: parts.Placement
    epsilon: float
    dropout: float


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model: every part is passed in, and what is absent (null) is not in the composition.

    Args:
        dim: dimension d of the embedding space E.
        depth: number of layers L.
        heads: number of heads H.
        context: length of the training windows; learned positions and generation reach this far.
        form: the form M of every head (QK circuit): score = q^T M t.
        content: the content operator F of every head (OV circuit): update = sum alpha F x.
        kernel: how scores become weights.
        mask: which positions a token may look at.
        placement: where the norm stands around a sublayer, and on what space the stream lives.
        positions: ordered maps on queries and keys; empty for none.
        norm: per-token normalisation, or null.
        ffn: feed-forward network, or null.
        arrangement: null for the FFN after attention; Parallel for both from the same state.
        functional: affine key functional u, or null.
        drift: constant drift g, or null.
        embedding: token vectors, unembedding, learned positions, and what stands around them.
        epsilon: step size: x + epsilon * update.
        shared: one block for all layers (an autonomous flow) instead of one a layer.
        dropout: on the embedding and on the updates, while training only.
        layers: per-layer overrides, {layer: {field: part}}, counted from 0.
    """

    dim: int
    depth: int
    heads: int
    form: parts.Operator
    content: parts.Operator
    kernel: parts.Kernel
    mask: parts.Mask
    placement: parts.Placement
    context: int = 128
    positions: Sequence[parts.Position] = ()
    norm: parts.Norm | None = None
    ffn: parts.FFN | None = None
    arrangement: parts.Arrangement | None = None
    functional: Functional | None = None
    drift: Drift | None = None
    embedding: Embedding = field(default_factory=Embedding)
    epsilon: float = 1.0
    shared: bool = False
    dropout: float = 0.0
    layers: dict[int, Layer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", tuple(self.positions))  # YAML gives a list
        for name in ("dim", "depth", "heads", "context"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; choose at least 1.")
        if not abs(self.epsilon) < float("inf"):
            raise UserError(f"model.epsilon is {self.epsilon}; choose a finite step size such as 1.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout is {self.dropout}; choose a share in [0, 1).")
        own = {f.name for f in fields(self)} & set(Layer.__annotations__)
        for index, layer in self.layers.items():
            if not 0 <= index < self.depth:
                raise UserError(f"model.layers names layer {index}, but layers run from 0 to {self.depth - 1}.")
            for key in layer:
                if key not in own:
                    raise UserError(f"model.layers[{index}] has no field '{key}'; it may set {', '.join(sorted(own))}.")
        if self.shared and self.layers:
            raise UserError("model.shared and model.layers exclude each other: a shared block has no layers of its own.")

    def layer(self, index: int) -> Model:
        """The settings as layer `index` sees them, its overrides applied."""
        return replace(self, layers={}, **self.layers.get(index, {}))


@dataclass(frozen=True, kw_only=True)
class Data:
    """The text and how it is cut into tokens.

    Args:
        corpus: where the text comes from.
        tokenizer: how it becomes tokens.
        path: text file or glob; shorthand that replaces the corpus by File(path).
        validation: share of the text, at its end, kept for validation, in (0, 1).
        max_tokens: stop reading the corpus here; null reads all of it.
        cache: folder of the tokenised corpora.
        workers: processes that prepare batches; 0 prepares them in the training process (fastest for small models).
    """

    corpus: parts.Corpus
    tokenizer: parts.Tokenizer
    path: str | None = None
    validation: float = 0.1
    max_tokens: int | None = None
    cache: str = "data/cache"
    workers: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.validation < 1:
            raise UserError(f"data.validation is {self.validation}; choose a share strictly between 0 and 1.")
        if self.workers < 0:
            raise UserError(f"data.workers is {self.workers}; choose 0 or more processes.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"data.max_tokens is {self.max_tokens}; choose at least 1, or null for all of the text.")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning-rate factor by step: linear warm-up, plateau, linear cool-down to `final`.

        f(s) = min((s+1)/warmup, 1, final + (1-final) (max_steps - s)/(cooldown * max_steps))

    The factor is a function of s and max_steps alone. A run that is continued to a larger max_steps follows the new
    schedule from where it is: the rate may rise back to the plateau.

    Args:
        warmup: steps of warm-up.
        cooldown: share of the run, at its end, that cools down.
        final: factor at the end.
    """

    warmup: int = 20
    cooldown: float = 0.6
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise UserError(f"training.schedule.warmup is {self.warmup}; choose 0 or more steps.")
        for name in ("cooldown", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"training.schedule.{name} is {getattr(self, name)}; choose a share in [0, 1].")

    def factor(self, step: int, max_steps: int) -> float:
        """The factor for step `step` (from 0) of `max_steps`, in (0, 1]."""
        rise = (step + 1) / self.warmup if self.warmup else 1.0
        if self.cooldown == 0:
            return min(rise, 1.0)
        left = (max_steps - step) / (self.cooldown * max_steps)
        return min(rise, 1.0, self.final + (1 - self.final) * left)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the model learns.

    Args:
        objective: what it is trained for.
        optimizer: the optimiser.
        penalties: what shrinks M or F after every step (Nuclear, Frobenius).
        schedule: learning-rate factor by step.
        max_steps: optimiser steps.
        batch: sequences per optimiser step, over all processes and accumulated micro-batches.
        accumulate: micro-batches an optimiser step is made of; divides the batch.
        clip: largest global norm of the gradient; null for no clipping.
        seed: of initialisation, batch order, masks and dropout.
        validate_every: steps between validations (each reads the whole validation split, up to `validation_windows`).
        validation_windows: at most this many windows, evenly spread over the validation split; null for all of them.
        save_every: steps between writings of `last.ckpt`.
        sample: tokens of text shown at every validation; 0 for none.
        precision: "auto" (bf16 autocast where the device has it, else 32), "32", "64" or "bf16".
        accelerator: "auto", "cpu", "gpu", "mps" …, as Lightning names them.
        devices: how many, or "auto" (on CPU: one process).
        nodes: machines of a cluster job.
        strategy: "auto", "ddp" …, as Lightning names them.
    """

    objective: parts.Objective
    optimizer: parts.Optimizer
    penalties: Sequence[parts.Penalty] = ()
    schedule: Schedule = field(default_factory=Schedule)
    max_steps: int = 1000
    batch: int = 32
    accumulate: int = 1
    clip: float | None = 1.0
    seed: int = 0
    validate_every: int = 100
    validation_windows: int | None = None
    save_every: int = 100
    sample: int = 120
    precision: Literal["auto", "32", "64", "bf16"] = "auto"
    accelerator: str = "auto"
    devices: int | Literal["auto"] = "auto"
    nodes: int = 1
    strategy: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "penalties", tuple(self.penalties))  # YAML gives a list
        for name in ("max_steps", "batch", "accumulate", "validate_every", "save_every", "nodes", "validation_windows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"training.{name} is {getattr(self, name)}; choose at least 1.")
        if self.seed < 0 or self.sample < 0:
            raise UserError(f"training.seed is {self.seed} and training.sample {self.sample}; neither may be negative.")
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"training.clip is {self.clip}; choose a positive norm, or null for no clipping.")
        if self.batch % self.accumulate:
            raise UserError(
                f"training.accumulate is {self.accumulate}, which does not divide the batch of {self.batch} sequences."
            )


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The held-out prompts on which everything is recorded: the same at every step, all from the validation part.

    Args:
        prompts: how many; as many as there are different ones where the validation part is too short for that.
        length: tokens of a prompt, of which the last one stands for it where a cloud has one point a prompt. A model of
            shorter context is shown prompts of that length.
        seed: of the places where they begin and of the order in which they come.
    """

    prompts: int = 1024
    length: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("length", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"probe.{name} is {getattr(self, name)}; choose at least {least}.")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything a run is determined by.

    Args:
        model: the transformer.
        data: the text.
        training: how it learns.
        probe: the prompts on which is recorded how tokens flow.
        callbacks: what is recorded on them while the model learns, and when.
        figures: when figures are drawn from the records; after the last step they always are, and null is then alone.
        loggers: mirrors of the metrics beside the run folder's own files.
    """

    model: Model
    data: Data
    training: Training
    probe: Probe = field(default_factory=Probe)
    callbacks: list[parts.Callback] = field(default_factory=list)
    figures: parts.Cadence | None = None
    loggers: list[parts.Logger] = field(default_factory=list)
