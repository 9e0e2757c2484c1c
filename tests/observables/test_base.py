"""Online moments against the whole, reservoirs, and one pass for several observers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from builders import model, words

from emformer import parts
from emformer.observables import Look, Moments, Observation, Pass, Reservoir, Row
from emformer.trajectory import Trajectory, capture


def test_moments_in_batches_are_those_of_the_whole(seed):
    values = 1e6 + torch.randn(50, 7, dtype=torch.float64)
    values[torch.rand(50, 7) < 0.3] = math.nan
    values[3] = math.nan
    moments = Moments()
    for part in values.split([1, 20, 0, 29]):
        moments.add(part, 2, "attn", "flow.speed", null=1.0, null_sd=0.5)
    row, undefined = moments.rows()
    means = values.nanmean(1)
    known = means[~means.isnan()]
    assert row[:3] == (2, "attn", "flow.speed") and (row.null, row.null_sd) == (1.0, 0.5)
    assert row.n_valid == len(known) == 49 and row.n_dropped == 1
    assert row.mean == pytest.approx(float(known.mean()), rel=1e-14)
    assert row.sd == pytest.approx(float(known.std()), rel=1e-6)
    assert row.se == pytest.approx(row.sd / 7)
    assert undefined.key == "flow.speed.undefined" and undefined.mean == pytest.approx(float(values.isnan().double().mean()))


def test_heads_have_a_row_each_and_nothing_undefined_hides():
    values = torch.arange(12.0).reshape(2, 3, 2)
    values[:, 1] = math.nan
    moments = Moments()
    moments.add(values, 0, "attn", "attn.entropy_norm", heads=True, cloud="read", param="k=1")
    rows = {(row.head, row.key): row for row in moments.rows()}
    assert rows[0, "attn.entropy_norm"].mean == 3.5 and rows[2, "attn.entropy_norm"].mean == 7.5
    assert rows[1, "attn.entropy_norm"][3:8] == (None, None, None, 0, 2)
    assert rows[1, "attn.entropy_norm.undefined"].mean == 1.0 and (0, "attn.entropy_norm.undefined") not in rows
    assert all(row.cloud == "read" and row.param == "k=1" for row in rows.values())
    one = Moments()
    one.add(torch.ones(1), None, None, "flow.tortuosity")
    assert one.rows() == [Row(None, None, "flow.tortuosity", 1.0, None, None, 1)], "one prompt has no spread"


def test_infinite_values_stay_visible():
    moments = Moments()
    moments.add(torch.tensor([[1.0, math.inf], [1.0, 2.0]]), 0, "ffn", "flow.tortuosity")
    assert moments.rows()[0].mean == math.inf


def test_a_reservoir_is_a_fair_sample_that_keeps_rows_together():
    counts = torch.zeros(40)
    for seed in range(400):
        reservoir = Reservoir(8, seed)
        for start in range(0, 40, 5):
            index = torch.arange(start, start + 5)
            reservoir.offer(x=index.double(), y=torch.stack([index, -index], 1))
        assert len(reservoir) == 8 and torch.equal(reservoir["x"], reservoir["y"][:, 0].double())
        counts[reservoir["x"].long()] += 1
    # 400 draws of 8 in 40: 80 each, sd sqrt(400 * .2 * .8) = 8
    assert (counts - 80).abs().max() < 4 * 8 and abs(float(counts[:8].mean() - 80)) < 3 * 8 / math.sqrt(8)
    few = Reservoir(8)
    few.offer(x=torch.ones(3))
    assert len(few) == 3 and few["x"].shape == (3,)


def test_a_reservoir_is_the_same_for_the_same_seed_and_no_other_generator():
    def draw() -> torch.Tensor:
        reservoir = Reservoir(4, 7)
        for part in torch.arange(100.0).split(9):
            reservoir.offer(x=part)
        return reservoir["x"].clone()

    state = torch.get_rng_state()
    assert torch.equal(draw(), draw()) and torch.equal(torch.get_rng_state(), state)


@dataclass(frozen=True)
class Count(parts.Observable):
    """How many prompts it was shown."""

    family: ClassVar[str] = "counting"
    keys: ClassVar[Mapping[str, str]] = {"counting.prompts": "prompts seen"}
    needs: ClassVar[frozenset[str]] = frozenset({"model"})

    def begin(self) -> Counting:
        return Counting()


class Counting(Observation):
    def __init__(self) -> None:
        self.seen = 0

    def update(self, trajectory: Trajectory) -> None:
        trajectory.pattern(0)
        self.seen += trajectory.prompts

    def rows(self) -> list[Row]:
        return [Row(None, None, "counting.prompts", float(self.seen), param="k=1")]


def test_one_pass_serves_all_and_stops_for_those_who_have_enough():
    some, all_of_them = Look([Count(), Count()], 4), Look([Count()], None, "shuffled")
    once = Pass([some, all_of_them])
    for size in (2, 2, 3):
        found = capture(model(), words(5, batch=size))
        once.update(found)
        assert not found._patterns, "patterns live as long as their chunk"
    assert [row.mean for row in once.rows()] == [4, 4, 7] and once.skipped == []
    assert [row.param for row in once.rows()] == ["k=1", "k=1", "k=1 shuffled"]


def test_what_a_trajectory_lacks_is_said():
    once = Pass([Look([Count()])])
    once.update(Trajectory.from_clouds(torch.ones(2, 1, 3, 4)))
    assert once.rows() == [] and once.skipped == ["counting: skipped, for the trajectory has no model"]
