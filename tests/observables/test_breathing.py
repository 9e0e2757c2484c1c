"""Family "breathing": a planted sawtooth is found, a cloud that keeps its dimension is not told to breathe."""

from __future__ import annotations

import math

import builders
import pytest
import torch
from builders import model, words

from emformer.block import Parallel
from emformer.ffn import GELU
from emformer.masks import Window
from emformer.observables import Row
from emformer.observables.breathing import Breathing, Controls, uniform
from emformer.parts import UserError
from emformer.placements import SandwichNorm
from emformer.positions import RoPE
from emformer.settings import Drift
from emformer.trajectory import Trajectory, capture

N = 500


def told(observable, *trajectories: Trajectory) -> dict[tuple, Row]:
    return {(row.key, row.layer, row.point, row.cloud, row.param): row for row in builders.told(observable, trajectories)}


def whole(found: dict[tuple, Row], key: str, cloud: str = "raw") -> Row:
    return found[key, None, None, cloud, None]


def planted(seed: int, dimensions: list[int], space: int = 24) -> Trajectory:
    """N prompts whose last token fills so many dimensions of the space, state by state; what stays in use stays where it is."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(space, space, dtype=torch.float64, generator=generator))[0]
    points = torch.randn(N, 1, space, dtype=torch.float64, generator=generator)
    clouds = [points[..., :k] @ basis[:k] for k in dimensions]
    first = torch.zeros(N, 1, space, dtype=torch.float64)
    clouds = [torch.cat([first, cloud], 1) for cloud in clouds]  # a first token, all alike, that nobody shall look at
    points_of = [(layer, point) for layer in range(len(dimensions) // 2) for point in ("attn", "ffn")]
    return Trajectory.from_clouds(clouds, points=points_of, reads=[3 * cloud for cloud in clouds])


def test_a_planted_sawtooth_is_found(seed):
    found = told(Breathing(), planted(seed, [4, 6, 4, 7, 5]))
    for layer, (up, down) in enumerate(((6 / 4, 4 / 6), (7 / 4, 5 / 7))):
        for cloud in ("raw", "read"):
            rise, fall = found["breath.b_attn", layer, "attn", cloud, None], found["breath.b_mlp", layer, "ffn", cloud, None]
            assert rise.mean == pytest.approx(math.log(up), abs=4 * rise.se + 0.05) and rise.null == 0
            assert fall.mean == pytest.approx(math.log(down), abs=4 * fall.se + 0.05) and fall.n_valid == N
            assert found["breath.p_attn", layer, "attn", cloud, None].mean < 0.01
            assert found["breath.counts_attn", layer, "attn", cloud, None].mean == 1
            assert found["breath.counts_mlp", layer, "ffn", cloud, None].mean == 1
    for cloud in ("raw", "read"):
        assert whole(found, "breath.sawtooth", cloud).mean == 1 and whole(found, "breath.sawtooth", cloud).null == 0.25
        assert whole(found, "breath.p_value", cloud).mean < 0.01 and whole(found, "breath.amplitude", cloud).mean > 0.3
    estimate = found["geo.id_twonn", 0, "attn", "raw", None]
    assert estimate.mean == pytest.approx(6, abs=4 * estimate.se + 0.4) and (estimate.n_valid, estimate.n_dropped) == (N, 0)
    for k in (1, 2, 4, 8, 16, 32):
        assert 4.5 < found["geo.id_gride", 0, "attn", "raw", f"k={k}"].mean < 7
    assert found["geo.pr", 0, "embed", "raw", None].mean == pytest.approx(4, abs=0.1)


def test_what_rises_and_stays_up_does_not_breathe(seed):
    found = told(Breathing(), planted(seed, [4, 6, 6, 9, 9]))
    assert whole(found, "breath.p_value").mean > 0.05 and whole(found, "breath.drift").mean > 0.3
    assert found["breath.counts_attn", 1, "attn", "raw", None].mean == 1
    assert found["breath.counts_mlp", 1, "ffn", "raw", None].mean == 0


def test_a_cloud_that_only_turns_and_grows_does_not_change(seed):
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=generator))[0]
    x = torch.randn(N, 1, 8, dtype=torch.float64, generator=generator)
    still = Trajectory.from_clouds([x, 2 * x @ turn, x], points=[(0, "attn"), (0, "ffn")])
    found = told(Breathing(), still)
    assert abs(found["breath.b_attn", 0, "attn", "raw", None].mean) < 1e-9
    assert whole(found, "breath.sawtooth").mean in (0, 1) and whole(found, "breath.amplitude").mean == pytest.approx(0, abs=1e-9)
    assert found["breath.counts_attn", 0, "attn", "raw", None].mean == 0
    assert not [place for place in found if place[3] == "read"], "nobody knows what is read of foreign clouds"


def test_repeated_tokens_have_no_dimension_and_spoil_no_other_block():
    clouds = planted(0, [4, 6, 4, 7, 5]).clouds
    clouds[0] = clouds[0][torch.arange(N) // 2]  # every point twice
    repeated = Trajectory.from_clouds(clouds, points=[(0, "attn"), (0, "ffn"), (1, "attn"), (1, "ffn")])
    found = told(Breathing(), repeated)
    assert found["geo.duplicates", 0, "embed", "raw", None].mean == 0.5
    state, change = found["geo.id_twonn", 0, "embed", "raw", None], found["breath.b_attn", 0, "attn", "raw", None]
    assert state.mean is None and (state.n_valid, state.n_dropped) == (N // 2, N // 2)
    assert change.mean is None and (change.n_valid, change.n_dropped) == (0, N)
    total = whole(found, "breath.sawtooth")
    assert total.mean == 1 and (total.n_valid, total.n_dropped) == (1, 1)
    assert found["breath.b_mlp", 0, "ffn", "raw", None].mean < 0


def test_a_parallel_block_breathes_by_either_share_alone():
    net = model(arrangement=Parallel(), ffn=GELU(), dim=8, context=12)
    trajectory = capture(net, words(10, batch=200))
    found = told(Breathing(), trajectory)
    from emformer.geometry.dimension import twonn
    from emformer.geometry.neighbours import nearest

    for layer in (0, 1):
        attended, fed = trajectory.halves(layer)
        ids = [twonn(nearest(cloud[:, -1], 64)).value for cloud in (trajectory.steps[layer].before, attended, fed)]
        if layer == 1:
            assert found["breath.b_attn", 1, "attn", "raw", "parallel"].mean == pytest.approx(math.log(ids[1] / ids[0]))
            assert found["breath.b_mlp", 1, "ffn", "raw", "parallel"].mean == pytest.approx(math.log(ids[2] / ids[0]))
    assert ("breath.b_attn", 1, "attn", "raw", None) not in found
    controls = told(Controls(), trajectory)
    assert {place[1:3] + place[4:] for place in controls if place[0] == "breath.b_attn"} == {
        (layer, "attn", param) for layer in (0, 1) for param in ("noise", "uniform")
    }


def test_layers_without_an_ffn_are_told_alone():
    net = model(dim=8, context=12, layers={1: {"ffn": GELU()}})
    found = told(Breathing(), capture(net, words(10, batch=150)))
    assert ("breath.b_attn", 1, "attn", "raw", None) in found and ("breath.b_mlp", 1, "ffn", "raw", None) in found
    assert ("breath.sawtooth", None, None, "raw", None) not in found, "not every block has both"


def test_isotropic_updates_add_dimensions_and_uniform_attention_is_what_it_says():
    net = model(ffn=GELU(), drift=Drift(), positions=[RoPE()], placement=SandwichNorm(), mask=Window(4))
    trajectory = capture(net, words(9, batch=5))
    for k in trajectory.attentions:
        step, block = trajectory.steps[k], trajectory.block(k)
        mean = step.read[:, -4:].mean(1, keepdim=True)
        by_hand = sum(mean @ f.T for f in block.attention.content.matrix()) + block.attention.drift
        by_hand = block.shape_attn(step.before[:, -1:], by_hand)
        assert (uniform(trajectory, k) - by_hand).abs().max() < 1e-12
    line = torch.rand(N, 1, 1, dtype=torch.float64) * torch.ones(10, dtype=torch.float64)
    moved = Trajectory.from_clouds([line, 1.5 * line, 1.6 * line], points=[(0, "attn"), (0, "ffn")])
    found = told(Controls(), moved)
    for key, point in (("breath.b_attn", "attn"), ("breath.b_mlp", "ffn")):
        assert found[key, 0, point, "raw", "noise"].mean > 0.5
    assert ("breath.b_attn", 0, "attn", "raw", "uniform") not in found, "foreign clouds have no attention"


def test_prompts_in_two_lots_are_the_same_points_and_bits():
    net = model(ffn=GELU(), dtype=torch.float32)
    tokens = words(6, batch=80)
    for observable in (Breathing(points=60), Controls(points=60)):
        once = told(observable, capture(net, tokens))
        assert once == told(observable, capture(net, tokens))
        twice = told(observable, capture(net, tokens[:31]), capture(net, tokens[31:]))
        assert once.keys() == twice.keys()
        for place, row in once.items():
            assert (row.mean is None) == (twice[place].mean is None) and row.n_valid == twice[place].n_valid
    few, many = (Breathing(points=30).begin() for _ in range(2))
    few.update(capture(net, tokens[:40]))
    many.update(capture(net, tokens))
    assert len(few._reservoir) == len(many._reservoir) == 30


def test_prompts_of_one_group_are_one_draw():
    from emformer.geometry.breathing import contrasts
    from emformer.geometry.neighbours import nearest

    trajectory = planted(0, [4, 6, 4])
    own = told(Breathing(), trajectory)
    trajectory.groups = 7 + torch.arange(N) // 25
    found = told(Breathing(), trajectory)
    near = [nearest(x[:, -1], 64) for x in trajectory.clouds]
    change = contrasts(near, torch.tensor([[-1.0, 1, 0], [0, -1, 1]]), prompts=torch.arange(N) // 25)
    rise = found["breath.b_attn", 0, "attn", "raw", None]
    assert rise.mean == pytest.approx(float(change.value[0])) and rise.se == pytest.approx(float(change.se[0]), rel=0.15)
    assert rise.mean == own["breath.b_attn", 0, "attn", "raw", None].mean
    assert rise.se != own["breath.b_attn", 0, "attn", "raw", None].se and rise.n_valid == N
    noise = told(Controls(), trajectory)["breath.b_attn", 0, "attn", "raw", "noise"]
    assert noise.se is not None and noise.mean > 0


@pytest.mark.parametrize("observable", [Breathing(), Controls()], ids=lambda one: type(one).__name__)
def test_degenerate_clouds_are_finite_or_undefined(observable):
    zero, same = torch.zeros(40, 2, 6), torch.ones(40, 2, 6)
    few, nan = torch.randn(2, 2, 6), torch.randn(40, 2, 6)
    nan[3, 1] = math.nan
    for clouds in ([zero, same, zero], [same, same, 2 * same], [few, 2 * few, few], [nan, nan, nan], [torch.randn(40, 2, 6)] * 3):
        trajectory = Trajectory.from_clouds(clouds, points=[(0, "attn"), (0, "ffn")])
        for row in told(observable, trajectory).values():
            assert row.mean is None or math.isfinite(row.mean), row
    assert observable.begin().rows() == []
    with pytest.raises(UserError, match="points"):
        type(observable)(points=2)
