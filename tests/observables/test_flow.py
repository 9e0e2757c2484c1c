"""Family "flow": planted paths whose numbers are known, and the model's own."""

from __future__ import annotations

import math

import builders
import pytest
import torch
from builders import model, words

from emformer.ffn import GELU
from emformer.norms import LayerNorm
from emformer.observables import Row
from emformer.observables.flow import Bures, Flow, Transport
from emformer.parts import UserError
from emformer.settings import Drift
from emformer.trajectory import Trajectory, capture

FAMILY = [Flow(), Transport(), Transport(skip=1), Bures()]


def told(observable, *trajectories: Trajectory) -> dict[tuple, Row]:
    return {
        (row.key, row.layer, row.point, row.head, row.cloud, row.param): row for row in builders.told(observable, trajectories)
    }


def whole(found: dict[tuple, Row], key: str, cloud: str = "raw", param: str | None = None) -> Row:
    return found[key, None, None, None, cloud, param]


def test_a_straight_path_at_constant_speed(seed):
    start, heading = torch.randn(3, 6, 10, dtype=torch.float64), torch.randn(3, 6, 10, dtype=torch.float64)
    heading = heading / heading.norm(dim=-1, keepdim=True)
    line = Trajectory.from_clouds([start + 0.5 * k * heading for k in range(5)])
    found = told(Flow(), line)
    assert whole(found, "flow.tortuosity").mean == pytest.approx(1, abs=1e-12)
    assert whole(found, "flow.turning").mean == pytest.approx(0, abs=1e-7)
    assert whole(found, "flow.path_length").mean == pytest.approx(2)
    assert found["flow.speed", 2, "block", None, "raw", None].mean == pytest.approx(0.5)
    assert whole(found, "flow.tortuosity", param="random").mean == pytest.approx(2, abs=0.3), "sqrt of four steps"
    assert whole(found, "flow.tortuosity").n_valid == 3, "n counts prompts"


def test_a_cloud_that_is_carried_away_whole():
    cloud, shift = torch.randn(2, 16, 4, dtype=torch.float64), torch.tensor([3.0, 0, 4, 0], dtype=torch.float64)
    moved = Trajectory.from_clouds([cloud, cloud + shift, cloud + 2 * shift])
    found = told(Transport(projections=4000), moved) | told(Bures(), moved)
    at = 1, "block", None, "raw"
    for key in ("flow.w2", "flow.w2_ident", "flow.bures"):
        assert found[key, *at, None].mean == pytest.approx(5, abs=1e-9)
    assert found["flow.w2_fixed", *at, None].mean == 1 and found["flow.w2_fixed", *at, None].null == 1 / 16
    assert found["flow.w2_shape", *at, None].mean == pytest.approx(0, abs=1e-9)
    assert found["flow.sw2", *at, None].mean == pytest.approx(2.5, rel=0.05)
    assert whole(found, "flow.geodesic").mean == pytest.approx(1, abs=1e-12)


def test_a_massive_first_token_is_told_apart():
    cloud = torch.randn(1, 9, 4, dtype=torch.float64)
    after = cloud + 0.1 * torch.randn(1, 9, 4, dtype=torch.float64)
    after[:, 0] += 1000
    trajectory = Trajectory.from_clouds([cloud, after])
    assert told(Transport(), trajectory)["flow.w2", 0, "block", None, "raw", None].mean > 300
    found = told(Transport(skip=1), trajectory)
    assert found["flow.w2", 0, "block", None, "raw", "skip=1"].mean < 0.5
    assert found["flow.w2_fixed", 0, "block", None, "raw", "skip=1"].null == 1 / 8
    assert told(Transport(skip=9), trajectory) == {}, "nothing is left"


def test_a_model_moves_as_an_independent_computation_says(seed):
    net = model(ffn=GELU(), drift=Drift(), norm=LayerNorm(bias=True))
    tokens = words(7, batch=4)
    trajectory = capture(net, tokens)
    found = told(Flow(), trajectory)
    step = trajectory.steps[2]
    at = step.layer, step.point, None, "raw", None
    size = step.update.norm(dim=-1)
    assert found["flow.speed", *at].mean == pytest.approx(float(size.mean()))
    assert found["flow.speed", *at].sd == pytest.approx(float(size.mean(1).std()))
    assert found["flow.speed_rel", *at].mean == pytest.approx(float((size / step.before.norm(dim=-1)).mean()))
    c = torch.cosine_similarity(step.before, step.update, -1)
    assert found["flow.interference", *at].mean == pytest.approx(float(c.mean()))
    assert found["flow.interference", *at].null_sd == pytest.approx(1 / math.sqrt(8 * 7))
    e = step.before - step.before.mean(-1, keepdim=True)
    e = e / e.norm(dim=-1, keepdim=True)
    hidden = (step.update.mean(-1) ** 2 * 8 + ((step.update - step.update.mean(-1, keepdim=True)) * e).sum(-1) ** 2) / size**2
    assert (
        found["flow.radial_frac", *at].mean == pytest.approx(float(hidden.mean()))
        and found["flow.radial_frac", *at].null == 2 / 8
    )
    heads, drift = trajectory.heads(2)
    cancel = 1 - heads.sum(1).norm(dim=-1) / heads.norm(dim=-1).sum(1)
    assert found["flow.head_cancel", *at].mean == pytest.approx(float(cancel.mean()))
    shares = [found["flow.head_share", 1, "attn", head, "raw", None].mean for head in range(2)]
    constant = found["flow.head_share", 1, "attn", None, "raw", "constant"].mean
    assert sum(shares) + constant == pytest.approx(1) and abs(constant) > 1e-3
    mine = (heads[:, 0] * step.update).sum(-1) / size**2
    assert shares[0] == pytest.approx(float(mine.mean())) and drift.shape == (8,)


def test_what_does_not_move_has_no_direction():
    still = torch.randn(2, 5, 4, dtype=torch.float64).expand(3, 2, 5, 4)
    found = told(Flow(), Trajectory.from_clouds(still))
    assert found["flow.speed", 0, "block", None, "raw", None].mean == 0
    for key, layer in (("flow.interference", 0), ("flow.turning", 1), ("flow.constructive", 0), ("flow.radial_frac", 1)):
        row = found[key, layer, "block", None, "raw", None]
        assert row.mean is None and (row.n_valid, row.n_dropped) == (0, 2), key
    assert whole(found, "flow.tortuosity").mean is None
    assert whole(told(Transport(), Trajectory.from_clouds(still)), "flow.geodesic").mean is None


@pytest.mark.parametrize("observable", FAMILY, ids=lambda one: type(one).__name__)
def test_degenerate_clouds_are_finite_or_undefined(observable):
    zero, one = torch.zeros(1, 4, 6), torch.ones(1, 1, 6)
    same = torch.ones(1, 4, 6)
    for clouds in ([zero, zero, same], [same, 2 * same, same], [one, 3 * one, one - 1], [same, zero, same]):
        for row in told(observable, Trajectory.from_clouds(clouds)).values():
            assert row.mean is None or math.isfinite(row.mean), row


def test_too_few_directions_are_refused():
    for bad in ({"projections": 1}, {"skip": -1}):
        with pytest.raises(UserError, match="cannot be measured"):
            Transport(**bad)
