"""Verdicts: when a claim is supported, when it is refuted, and when there is nothing to say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from emformer.intervals import Interval, over_models
from emformer.parts import UserError
from emformer.studies.examination import frame, read_verdicts
from emformer.studies.outputs import save
from emformer.studies.subjects import scale, subjects
from emformer.verdicts import Verdict
from tests.studies import tiny

NOTHING = Interval(0.0, 0.0, 0.0, 8, "seeds")


def word(low: float, high: float, n: int = 8, **range_: float) -> str:
    return Verdict("it is so", "S0", "x", Interval((low + high) / 2, low, high, n, "seeds"), **range_).word


def test_the_whole_interval_decides():
    assert [word(0.1, 0.2, least=0), word(-0.2, -0.1, least=0), word(-0.1, 0.1, least=0)] == ["supported", "refuted", "undecided"]
    assert [word(0.1, 0.2, most=0.15), word(0.3, 0.4, least=0.1, most=0.2)] == ["undecided", "refuted"]
    assert word(0.1, 0.2, n=5, least=0) == "undecided" and word(math.nan, math.nan, least=0) == "undecided"


@pytest.mark.parametrize("range_", [{"least": 0.0}, {"most": 0.0}], ids=["least", "most"])
def test_no_difference_at_all_supports_nothing(range_: dict[str, float]):
    same = Verdict("it is more", "S0", "x", NOTHING, **range_, null=0.0, against="the baseline")
    assert same.word == "undecided" and "no difference at all" in same.reason
    # where no side of the null is claimed, or there is no null, 0 is a number like others
    assert Verdict("it is none", "S0", "x", NOTHING, most=1e-5, null=0.0).word == "supported"
    assert Verdict("it is none", "S0", "x", NOTHING, **range_).word == "supported"


def test_a_check_is_no_claim(tmp_path):
    checks = [
        Verdict("it adds up", "math J 13", "x", Interval(1.0, one, one, 9, "prompts"), most=0.5, null=1.0, check=True)
        for one in (0.1, 0.9)
    ]
    assert [one.word for one in checks] == ["holds", "broken"]
    save(frame(checks, "a toy"), tmp_path / "verdicts.csv")
    assert read_verdicts(tmp_path) == checks


def test_prompts_that_several_models_share_are_drawn_once():
    """Five models whose values are one thing, that of the prompt: no fewer prompts stand behind their mean than behind one's."""
    values = np.random.default_rng(0).normal(size=64)
    one, five = over_models([values]), over_models([values] * 5)
    assert (one.low, one.high) == pytest.approx((five.low, five.high), abs=1e-12)


def test_what_may_be_looked_at_together(tmp_path):
    run = tiny.trained(tmp_path).path
    (one,) = subjects([run], prompts=4, length=8)
    assert "1 layers" in scale([one]) and "Grammar" in scale([one])
    seed = torch.initial_seed()
    twin = one.untrained()
    assert torch.initial_seed() == seed and twin is one.untrained()
    begun = subjects([run / "checkpoints" / "step-0000000.ckpt"], prompts=4, length=8)[0].model
    for name, value in begun.state_dict().items():  # the twin is the run before its first step
        assert torch.equal(value, twin.state_dict()[name]), name
    for other in (run, run / "checkpoints" / "step-0000002.ckpt"):
        with pytest.raises(UserError, match=r"one model|another step|one seed"):
            subjects([run, other], prompts=4, length=8)
