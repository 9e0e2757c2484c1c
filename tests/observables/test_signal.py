"""Family "signal": moments of the stream written out, and predictions that untrained models meet."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from builders import model, told, words
from torch import Tensor

from emformer.block import Parallel
from emformer.ffn import GELU
from emformer.kernels import Sigmoid, Softmax
from emformer.masks import Full
from emformer.norms import LayerNorm, RMSNorm
from emformer.observables import Row
from emformer.observables.signal import Signal
from emformer.operators import Dense, Identity
from emformer.placements import PostNorm
from emformer.positions import RoPE
from emformer.trajectory import Trajectory, capture


def found(trajectories: Trajectory | Sequence[Trajectory]) -> list[Row]:
    return told(Signal(), trajectories)


def only(rows: list[Row], key: str, at: tuple[int, str] = (0, "attn"), head: int | None = None, param: str | None = None) -> Row:
    place = (*at, f"signal.{key}", head, param)
    (row,) = [r for r in rows if (r.layer, r.point, r.key, r.head, r.param) == place]
    return row


def near(row: Row, values: Tensor, tolerance: float = 1e-9) -> None:
    """Mean and sd over prompts of the values (B,)."""
    assert row.mean == pytest.approx(float(values.mean()), rel=tolerance)
    assert row.sd == pytest.approx(float(values.std()), rel=tolerance) and row.n_valid == len(values)


def test_states_and_updates_against_their_definitions():
    torch.manual_seed(0)
    count, dim = 7, 8
    seen = capture(model(ffn=GELU(), epsilon=0.5), words(count, batch=4))
    rows = found(seen)
    pairs = ~torch.eye(count, dtype=torch.bool)
    for state in seen.states:
        at, x = (state.layer, state.point), state.x
        near(only(rows, "variance", at), x.var(-1, correction=0).mean(-1))
        near(only(rows, "norm", at), x.norm(dim=-1).median(-1).values)  # seven tokens have a middle one
        y = x - x.mean(-1, keepdim=True)
        cosines = torch.nn.functional.cosine_similarity(y.unsqueeze(1), y.unsqueeze(2), dim=-1)
        row = only(rows, "correlation", at)
        near(row, cosines[:, pairs].mean(-1), 1e-6)
        assert row.null == 0 and row.null_sd == pytest.approx(math.sqrt(2 / (count * (count - 1) * (dim - 1))))
        row = only(rows, "rank_resid", at)
        near(row, (x - x.mean(1, keepdim=True)).norm(dim=(1, 2)) / x.norm(dim=(1, 2)))
        assert row.null == math.sqrt(1 - 1 / count)
    for step in seen.steps:
        ratio = (step.after - step.before).norm(dim=(1, 2)) / step.before.norm(dim=(1, 2))
        near(only(rows, "update_ratio", (step.layer, step.point)), ratio)


def test_scores_and_contexts_against_their_definitions():
    torch.manual_seed(0)
    beta = 0.7
    for norm in (LayerNorm(bias=True), RMSNorm(), None):
        seen = capture(model(kernel=Softmax(beta=beta), norm=norm, positions=[RoPE()]), words(10, batch=3))
        rows = found(seen)
        s, a, x = beta * seen.scores(0), seen.pattern(0), seen.steps[0].before
        total, within = torch.empty(3, 2), torch.empty(3, 2)
        for b in range(3):
            for h in range(2):
                visible = [s[b, h, i, : i + 1] for i in range(10)]
                total[b, h] = torch.cat(visible).std()
                within[b, h] = torch.stack([row.var() for row in visible[1:]]).mean().sqrt()
        y = x - x.mean(-1, keepdim=True) if isinstance(norm, LayerNorm) else x
        y = y / y.square().mean(-1, keepdim=True).sqrt()
        variance = (a @ y.unsqueeze(1)).var(-1, correction=0)[:, :, 7:].mean(-1)  # queries of eight keys and more
        for head in (0, 1):
            near(only(rows, "score_std", head=head), total[:, head], 1e-6)
            near(only(rows, "score_std_within", head=head), within[:, head], 1e-6)
            near(only(rows, "context_variance", head=head), variance[:, head], 1e-4)
        near(only(rows, "score_std"), total.mean(1), 1e-6)
        near(only(rows, "context_variance"), variance.mean(1), 1e-4)


def test_an_untrained_model_is_as_predicted():
    """Score std sqrt(1 - r^2), within rows sqrt(1 - r), and Var(m) of math I, of tokens of two correlations r."""
    torch.manual_seed(0)
    for mask in ({"mask": Full()}, {}):
        for common in (0.0, 1.0):
            net = model(
                vocab=400,
                dtype=torch.float32,
                dim=64,
                depth=1,
                heads=8,
                context=96,
                form=Dense(),
                norm=LayerNorm(gain=False),
                **mask,
            )
            with torch.no_grad():
                net.embedding.weight.normal_().add_(common * torch.randn(64))
            rows = found(capture(net, words(96, batch=4, vocab=400)))
            r = only(rows, "correlation", (0, "embed")).mean
            assert r == pytest.approx(common / (1 + common), abs=0.12)
            assert only(rows, "score_std").mean == pytest.approx(math.sqrt(1 - r**2), abs=0.1)
            within = only(rows, "score_std_within")
            assert within.mean == pytest.approx(within.null, rel=0.05) == pytest.approx(math.sqrt(1 - r), rel=0.1)
            variance = only(rows, "context_variance")
            assert variance.mean == pytest.approx(variance.null, rel=0.2), (mask, common)
            heads = [only(rows, "context_variance", head=head) for head in range(8)]
            assert variance.null == pytest.approx(sum(row.null for row in heads) / 8)
            assert only(rows, "rank_resid", (0, "embed")).mean == pytest.approx(math.sqrt(1 - r), abs=0.05)
    rows = found(capture(model(kernel=Sigmoid()), words(10)))
    assert only(rows, "context_variance").null is None and only(rows, "score_std_within").null is not None


def test_parallel_blocks_tell_either_share():
    torch.manual_seed(0)
    seen = capture(model(arrangement=Parallel(), ffn=GELU(), epsilon=0.5), words(9))
    rows, x = found(seen), seen.steps[0].before
    for point, share in zip(("attn", "ffn"), seen.halves(0), strict=True):
        near(only(rows, "update_ratio", (0, point), param="parallel"), (share - x).norm(dim=(1, 2)) / x.norm(dim=(1, 2)))
    assert only(rows, "update_ratio", (0, "block")).mean > 0 and only(rows, "score_std", (0, "block")).n_valid == 2


def test_clouds_of_anybody_have_their_states_told():
    torch.manual_seed(0)
    rows = found(Trajectory.from_clouds(torch.randn(3, 2, 5, 8)))
    assert {row.key for row in rows} == {
        f"signal.{key}" for key in ("variance", "norm", "correlation", "rank_resid", "update_ratio")
    }
    known = found(Trajectory.from_clouds(torch.ones(2, 2, 5, 8)))
    assert only(known, "variance", (0, "embed")).mean == 0 and only(known, "rank_resid", (0, "embed")).mean == 0
    assert only(known, "correlation", (0, "embed")).mean is None, "equal features have no direction"
    nothing = found(Trajectory.from_clouds(torch.zeros(2, 2, 1, 8)))
    assert only(nothing, "update_ratio", (0, "block")).n_dropped == 2
    assert only(nothing, "norm", (0, "embed")).mean == 0


def test_degenerate_prompts_are_finite_or_undefined():
    torch.manual_seed(0)
    for net in (model(norm=LayerNorm()), model(placement=PostNorm()), model(norm=None, form=Identity())):
        for zero in (False, True):
            if zero:
                with torch.no_grad():
                    net.embedding.weight.zero_()
            for tokens in (words(1), torch.zeros(2, 9, dtype=torch.long), words(9, batch=1)):
                for row in found(capture(net, tokens)):
                    assert all(value is None or math.isfinite(value) for value in (row.mean, row.sd, row.null, row.null_sd)), row
