"""The trajectory of a token cloud: what a model's flow passes through, kept."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from emformer.block import Block, Point, Step
from emformer.files import replaced
from emformer.kernels.base import scores
from emformer.masks import Visible
from emformer.model import Emformer
from emformer.norms import Norm
from emformer.parts import UserError
from emformer.types import Cloud, HeadClouds, Table, Tokens, Weights

FORMAT = 1
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # of the closure; half precision has about three digits
HALF_TOLERANCE = 2e-2
BUDGET = 1 << 24  # numbers in one array over heads and pairs of tokens: 64 MiB in float32, 128 MiB in an observer's float64
CHECKED = 1 << 21  # numbers of the per-head updates of a step that `assert_closure` looks at; more would cost as much as the flow
AT_ONCE = 1 << 19  # numbers of the per-head updates that closure looks at in one go: they stay in the cache


class ClosureError(ArithmeticError):
    """The updates of a step do not add up to the step: the model computes something other than it shows."""


class State(NamedTuple):
    """A cloud X (B, T, d) of the raw stream, and the read cloud Y beside it: X as the sublayer that comes next sees it (after
    the last one, the unembedding); None where nobody knows it.

    `layer` and `point` are those of the step that led here; X^0 is layer 0 at point "embed".
    """

    layer: int
    point: str
    x: Cloud
    read: Cloud | None


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some queries of an attention step, before all of its keys: `queries` says which, `visible` (t, T) where they may look.

    `scores` and `pattern` (B, H, t, T) are those of `Trajectory`, made when asked for and kept as long as the chunk is.
    """

    queries: slice
    visible: Table
    _scores: Callable[[], Weights]
    _pattern: Callable[[], Weights]

    @functools.cached_property
    def scores(self) -> Weights:
        with torch.no_grad():
            return self._scores()

    @functools.cached_property
    def pattern(self) -> Weights:
        with torch.no_grad():
            return self._pattern()


class Trajectory:
    """The clouds X^0, X^{1/2}, X^1 … X^L of some prompts, with what leads from each to the next.

    `capture` makes one from a model, `Trajectory.from_clouds` from anybody's clouds, `Trajectory.load` from a file. Clouds are
    the raw stream, never the normed one.

    Attributes:
        steps: `emformer.block.Step`, in order: `before`, `read`, `mixture`, `update`, `after`, `ffn`.
        tokens: ids (B, T), or None.
        labels: a class for each token (B, T), -1 where there is none; or None.
        groups: a number for each prompt (B,), the same for prompts that are not independent (they share text); or None.
        model: whose flow it is; None for foreign clouds, and what asks for operators, heads or patterns is then not there.
        epsilon: step size of each step.
        budget: most numbers in an array over heads and pairs of tokens that `chunks` and `matrices` make, and in what observers
            make of one lot of prompts; may be set. A longer context costs time, not memory.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        model: Emformer | None = None,
        tokens: Tensor | None = None,
        labels: Tensor | None = None,
        groups: Tensor | None = None,
        closing: Tensor | None = None,
        epsilon: Sequence[float] | None = None,
        reads: bool = True,
    ):
        if not steps:
            raise ValueError("a trajectory has at least one step")
        self.steps, self.model, self.tokens, self.labels, self.groups = tuple(steps), model, tokens, labels, groups
        self.epsilon = tuple(epsilon) if epsilon is not None else (1.0,) * len(self.steps)
        self.budget = BUDGET
        self._closing, self._reads = closing, reads
        self._patterns: dict[int, Weights] = {}

    @classmethod
    def from_clouds(
        cls,
        clouds: Sequence[Cloud] | Tensor,
        *,
        points: Sequence[tuple[int, str]] | None = None,
        reads: Sequence[Cloud] | None = None,
        tokens: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Trajectory:
        """A trajectory of clouds (B, T, d) in order, X^0 first: another model's, a simulation's.

        Args:
            clouds: at least two, all of one shape; or one tensor (S, B, T, d).
            points: (layer, "attn" | "ffn" | "block") of each step, one fewer than clouds; default (0, "block"), (1, "block") ….
            reads: what a sublayer sees of each cloud, as many as clouds.
            tokens: ids (B, T). labels: classes (B, T), -1 for none.

        Raises:
            ValueError: for fewer than two clouds, or shapes and numbers that do not agree.
        """
        clouds = list(clouds)
        if len(clouds) < 2 or len({tuple(x.shape) for x in clouds}) != 1 or clouds[0].ndim != 3:
            raise ValueError("from_clouds takes at least two clouds of one shape (B, T, d)")
        points = [(k, "block") for k in range(len(clouds) - 1)] if points is None else list(points)
        if len(points) != len(clouds) - 1 or (reads is not None and len(reads) != len(clouds)):
            raise ValueError(f"{len(clouds)} clouds take {len(clouds) - 1} points, and as many reads as clouds")
        steps = [
            Step(layer, cast(Point, point), x, x if reads is None else reads[k], None, after - x, after)
            for k, ((layer, point), x, after) in enumerate(zip(points, clouds, clouds[1:], strict=False))
        ]
        closing = None if reads is None else reads[-1]
        return cls(steps, tokens=tokens, labels=labels, closing=closing, reads=reads is not None)

    @property
    def prompts(self) -> int:
        """B."""
        return self.steps[0].before.shape[0]

    @property
    def states(self) -> list[State]:
        """X^0 and what each step led to, one more than there are steps."""
        reads = [step.read if self._reads else None for step in self.steps] + [self._closing]
        first = State(0, "embed", self.steps[0].before, reads[0])
        return [first, *(State(s.layer, s.point, s.after, y) for s, y in zip(self.steps, reads[1:], strict=True))]

    @property
    def clouds(self) -> list[Cloud]:
        """X^0, X^{1/2}, X^1 … X^L."""
        return [state.x for state in self.states]

    @property
    def attentions(self) -> list[int]:
        """Indices of the steps in which tokens look at each other, of a trajectory with a model."""
        return [] if self.model is None else [k for k, step in enumerate(self.steps) if step.mixture is not None]

    def block(self, k: int) -> Block:
        """The block that made step k. Raises ValueError without a model."""
        if self.model is None:
            raise ValueError("this trajectory has no model: its operators, heads and patterns are not known")
        return self.model.layer(self.steps[k].layer)

    def halves(self, k: int) -> tuple[Cloud, Cloud]:
        """(X + eps D^attn, X + eps D^ffn) of the parallel step k: either share alone (math 0). Raises ValueError for another."""
        step = self.steps[k]
        if step.ffn is None:
            raise ValueError(f"step {k} is no parallel block")
        return step.before + self.epsilon[k] * (step.update - step.ffn), step.before + self.epsilon[k] * step.ffn

    @torch.no_grad()
    def heads(self, k: int) -> tuple[HeadClouds, Tensor | float]:
        """(D^h (B, H, T, d), g) of attention step k, as they enter the stream. Made anew each time: H times a cloud."""
        return self.block(k).pieces(self.steps[k])

    @torch.no_grad()
    def scores(self, k: int) -> Weights:
        """s_ij (B, H, T, T) of attention step k, positions and biases included, beta not; masked entries are scores too.

        All at once, as is `pattern`: what must not hold them goes through `chunks`."""
        step = self.steps[k]
        return scores(*self.block(k).attention.factors(step.read, self._index(step)))

    @torch.no_grad()
    def pattern(self, k: int) -> Weights:
        """a_ij (B, H, T, T) of attention step k, recomputed from the read cloud; kept until `forget`."""
        if k not in self._patterns:
            step = self.steps[k]
            self._patterns[k] = self.block(k).attention.weights(step.read, self._index(step))
        return self._patterns[k]

    def chunks(self, k: int) -> Iterator[Chunk]:
        """Attention step k in pieces of queries, in order, whose scores (B, H, t, T) are within the budget; at least one a piece.

        All queries are one piece, with the `pattern` that is kept, where they fit, and of a kernel that balances columns and so
        has no rows by themselves: its flow has held the whole already.
        """
        step, attention = self.steps[k], self.block(k).attention
        tokens = step.before.shape[1]
        rows = tokens
        if attention.kernel.rowwise:
            rows = min(tokens, max(1, self.budget // (self.prompts * attention.form.heads * tokens)))
        if rows == tokens:
            yield Chunk(slice(0, tokens), self.visible(k), functools.partial(self.scores, k), functools.partial(self.pattern, k))
            return
        with torch.no_grad():
            u, v = attention.factors(step.read, self._index(step))
        for queries in _slices(tokens, rows):
            table = self.visible(k, queries)
            some, seen = u[:, :, queries], Visible(table, first=queries.start)
            yield Chunk(
                queries, table, functools.partial(scores, some, v), functools.partial(attention.kernel.weights, some, v, seen)
            )

    def matrices(self, k: int) -> Iterator[tuple[slice, Weights]]:
        """Whole patterns (B, h, T, T) of step k, of as many heads at a time as the budget holds; none if it does not hold one.

        Rows of all heads are made again for each lot of heads.
        """
        heads, tokens = self.block(k).attention.form.heads, self.steps[k].before.shape[1]
        some = min(heads, self.budget // (self.prompts * tokens**2))
        if some == heads:
            yield slice(0, heads), self.pattern(k)
        elif some:
            for lot in _slices(heads, some):
                yield lot, torch.cat([chunk.pattern[:, lot] for chunk in self.chunks(k)], 2)

    def lots(self) -> Iterator[Trajectory]:
        """The same trajectory in parts of so many prompts that arrays (b, H, T, T) and (b, H, T, d) are within the budget, at
        least one prompt each; itself where all fit. Views: nothing is copied."""
        tokens, dim = self.steps[0].before.shape[1:]
        heads = max((self.block(k).attention.form.heads for k in self.attentions), default=0)
        some = max(1, self.budget // max(1, heads * tokens * max(tokens, dim)))
        if some >= self.prompts:
            yield self
            return
        for lot in _slices(self.prompts, some):
            yield self._part(lot)

    @torch.no_grad()
    def fold(self, k: int) -> tuple[Tensor | None, Tensor | None]:
        """(A, b) with y = A yhat + b: what step k reads, of the bare normed cloud yhat (math A.6), in the clouds' type. None for
        what is not there: A without a norm, b without a bias. A linear functional w of y is A^T w on yhat."""
        step, norm = self.steps[k], self.block(k).read_attn
        if not isinstance(norm, Norm):
            return None, None
        a, b = norm.affine(step.read.shape[-1])
        return a.to(step.read), None if norm.bias is None else b.to(step.read)

    def visible(self, k: int, queries: slice = slice(None)) -> Table:
        """(T, T), true where the query i may look at the key j in step k; of some queries (t, T)."""
        i = self._index(self.steps[k])
        return self.block(k).attention.mask.visible(i[queries, None], i[None, :])

    def counts(self, k: int) -> tuple[Tensor, Tensor]:
        """How many keys each query of step k sees (T,), and how many queries see each key (T,)."""
        tokens = self.steps[k].before.shape[1]
        tables = (self.visible(k, some) for some in _slices(tokens, min(tokens, max(1, self.budget // tokens))))
        by_query, by_key = zip(*((table.sum(1), table.sum(0)) for table in tables), strict=True)
        return torch.cat(by_query), torch.stack(by_key).sum(0)

    def forget(self) -> None:
        """Drop the patterns kept so far."""
        self._patterns.clear()

    @torch.no_grad()
    def closure(self) -> list[tuple[float, float]]:
        """Per step, the relative errors of x + eps (sum_h D^h + g [+ D^ffn]) against the raw sum x + eps D, and of place(raw)
        against the next state. Frobenius norms, in the clouds' own precision. Source: math D.1. Needs a model."""
        return [_closure(step, self.block(k), self.epsilon[k]) for k, step in enumerate(self.steps)]

    def assert_closure(self) -> None:
        """Raise `ClosureError` where `closure` exceeds 1e-5 in float32, 1e-10 in float64, or a cloud is not finite.

        How steps close is looked at in as many prompts as have 2^21 numbers of per-head updates a step, at least one, evenly
        spaced: what a head adds is a function of its token, and a head that does not add up shows in any of them. A number that
        is not finite stays in the stream to its end, which is looked at in all.
        """
        limit = TOLERANCE.get(self.steps[0].before.dtype, HALF_TOLERANCE)
        heads = max((self.block(k).attention.form.heads for k in self.attentions), default=1)
        some = self._part(slice(None, None, max(1, math.ceil(self.prompts * heads * self.steps[0].before[0].numel() / CHECKED))))
        end = self.steps[-1]
        finite = bool(end.after.isfinite().all())
        for step, errors in zip(self.steps, some.closure(), strict=True):
            if not max(errors) <= limit or (step is end and not finite):
                raise ClosureError(
                    f"layer {step.layer} at '{step.point}': the updates miss the step by "
                    f"{max(errors) if finite else math.nan:.1e} of its size "
                    f"(allowed: {limit:g}); weights that are not finite, or a part whose pieces do not sum to its whole."
                )

    def save(self, path: str | Path) -> None:
        """Write every cloud, read cloud, update and mixture, tokens and labels to one safetensors file, atomically.

        Raises `UserError` if it cannot be written.
        """
        path = Path(path)
        kept: dict[str, Tensor] = {}
        for k, state in enumerate(self.states):
            kept[f"clouds.{k}"] = state.x
            if state.read is not None:
                kept[f"reads.{k}"] = state.read
        for k, step in enumerate(self.steps):
            kept |= {f"updates.{k}": step.update}
            kept |= {f"{name}.{k}": x for name, x in (("mixtures", step.mixture), ("ffn", step.ffn)) if x is not None}
        whole = ("tokens", self.tokens), ("labels", self.labels), ("groups", self.groups)
        kept |= {name: x for name, x in whole if x is not None}
        meta = {
            "format": FORMAT,
            "points": [(step.layer, step.point) for step in self.steps],
            "epsilon": self.epsilon,
        }
        try:
            # a clone each: views of one storage cannot be written twice
            whole = {name: x.detach().cpu().contiguous().clone() for name, x in kept.items()}
            with replaced(path) as partial:
                save_file(whole, partial, {"emformer": json.dumps(meta)})
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write the trajectory {path}: {error}.") from error

    @classmethod
    def load(cls, path: str | Path, model: Emformer | None = None) -> Trajectory:
        """What `save` wrote; `model` gives its operators back to it.

        Raises:
            UserError: for a file that is missing, damaged or no trajectory.
        """
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {})["emformer"])
                if meta["format"] != FORMAT:
                    raise UserError(f"{path} has the trajectory format {meta['format']}; this version reads {FORMAT}.")
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
            reads = "reads.0" in found
            steps = [
                Step(
                    layer,
                    point,
                    found[f"clouds.{k}"],
                    found[f"reads.{k}" if reads else f"clouds.{k}"],
                    found.get(f"mixtures.{k}"),
                    found[f"updates.{k}"],
                    found[f"clouds.{k + 1}"],
                    found.get(f"ffn.{k}"),
                )
                for k, (layer, point) in enumerate(meta["points"])
            ]
            return cls(
                steps,
                model=model,
                tokens=found.get("tokens"),
                labels=found.get("labels"),
                groups=found.get("groups"),
                closing=found.get(f"reads.{len(steps)}"),
                epsilon=[float(one) for one in meta["epsilon"]],
                reads=reads,
            )
        except FileNotFoundError:
            raise UserError(f"{path} does not exist.") from None
        except UserError:
            raise
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path} cannot be read as a trajectory: it is damaged, or something else.") from error

    def _index(self, step: Step) -> Tensor:
        return torch.arange(step.before.shape[1], device=step.before.device)

    def _part(self, prompts: slice) -> Trajectory:
        """Some of the prompts."""
        marks = {name: getattr(self, name) for name in ("tokens", "labels", "groups")}
        found = Trajectory(
            [step._replace(**{k: x[prompts] for k, x in step._asdict().items() if isinstance(x, Tensor)}) for step in self.steps],
            model=self.model,
            **{name: None if x is None else x[prompts] for name, x in marks.items()},
            closing=None if self._closing is None else self._closing[prompts],
            epsilon=self.epsilon,
            reads=self._reads,
        )
        found.budget = self.budget
        return found


@torch.no_grad()
def capture(model: Emformer, tokens: Tokens, labels: Tensor | None = None, groups: Tensor | None = None) -> Trajectory:
    """The trajectory of the prompts `tokens` (B, T): no dropout, no autocast, no gradient; closure is asserted.

    The model is left as it was. Cost: a forward pass without unembedding, and the per-head updates of a few prompts; memory about
    5 clouds a step. Of many prompts, `captures` keeps a few at a time.

    Raises:
        ClosureError: if the updates do not sum to the steps, relative 1e-5 in float32, 1e-10 in float64 (math D.1).
    """
    with evaluating(model), torch.autocast(tokens.device.type, enabled=False):
        steps = list(model.flow(tokens))
        closing = model.norm(steps[-1].after)
    epsilon = [model.layer(step.layer).epsilon for step in steps]
    found = Trajectory(steps, model=model, tokens=tokens, labels=labels, groups=groups, closing=closing, epsilon=epsilon)
    found.assert_closure()
    return found


def captures(
    model: Emformer,
    tokens: Tokens,
    labels: Tensor | None = None,
    groups: Tensor | None = None,
    *,
    chunk: int = 64,
    cuts: Sequence[int] = (),
) -> Iterator[Trajectory]:
    """`capture`, at most `chunk` prompts at a time: the memory of one chunk, whatever the number of prompts. No trajectory goes
    across `cuts`, numbers of prompts after which someone has seen enough."""
    start = 0
    for end in sorted({*cuts, len(tokens)}):
        while start < end:
            some = slice(start, min(start + chunk, end))
            marks, together = (None if x is None else x[some] for x in (labels, groups))
            yield capture(model, tokens[some], marks, together)
            start = some.stop


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Eval mode inside, and afterwards every submodule as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _slices(count: int, size: int) -> list[slice]:
    """0 … count in pieces of this size."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _closure(step: Step, block: Block, epsilon: float) -> tuple[float, float]:
    raw = step.before + epsilon * step.update
    place: Any = block.place_ffn if step.point == "ffn" else block.place_attn
    placed = _relative(step.after - (raw if place is None else place(raw)), step.after)
    if step.mixture is None:
        return 0.0, placed
    count = max(1, AT_ONCE // (step.mixture.shape[1] * step.before[0].numel()))
    summed = []
    for start in range(0, len(raw), count):
        some = slice(start, start + count)
        part = step._replace(
            **{name: value[some] for name in ("before", "mixture", "update") if (value := getattr(step, name)) is not None}
        )
        heads, drift = block.pieces(part)
        summed.append(heads.sum(1) + drift)
    update = torch.cat(summed)
    if step.ffn is not None:
        update = update + step.ffn
    return _relative(raw - (step.before + epsilon * update), raw), placed


def _relative(error: Tensor, whole: Tensor) -> float:
    size = float(whole.norm())
    return float(error.norm()) / size if size else float(error.norm())
