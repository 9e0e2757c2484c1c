"""What every observable, cadence and callback promises; a new one is found here by itself."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from builders import examples, model, told, variants, words

from emformer import parts
from emformer.block import Parallel
from emformer.ffn import GELU
from emformer.norms import LayerNorm
from emformer.observables import Look, Pass, Row, state
from emformer.observables.base import lacks
from emformer.parts import UserError
from emformer.positions import RoPE
from emformer.settings import Drift
from emformer.trajectory import Trajectory, capture

OBSERVABLES = examples(parts.Observable)
CADENCES = examples(parts.Cadence)
CALLBACKS = examples(parts.Callback)
# positions and none, for there are observables of either; a parallel block; everything that a norm and an update can have
NETS: list[dict[str, Any]] = [
    {"positions": [RoPE()], "ffn": GELU()},
    {"ffn": GELU(), "norm": LayerNorm(bias=True), "drift": Drift()},
    {"ffn": GELU(), "arrangement": Parallel()},
]
# float32 where there is all of it: the others differ in what is asked of, not in how it rounds
KINDS = [
    (NETS[0], torch.float64, 1e-9),
    (NETS[0], torch.float32, 2e-3),
    (NETS[1], torch.float64, 1e-9),
    (NETS[2], torch.float64, 1e-9),
]
DRAWN = ("random", "noise")  # rows of a draw for each lot of prompts


def seen(net: torch.nn.Module, tokens: torch.Tensor) -> Trajectory:
    return capture(net, tokens, tokens % 3, torch.arange(len(tokens)))  # type: ignore[arg-type]


def test_every_kind_has_variants():
    for kind in (parts.Observable, parts.Cadence, parts.Callback):
        assert len(variants(kind)) >= 3
    families = {cls.family for cls in variants(parts.Observable)}
    assert families >= {
        "flow",
        "clustering",
        "breathing",
        "energy",
        "foliation",
        "sinks",
        "spectrum",
        "operators",
        "signal",
        "lens",
        "gaussian",
        "wgf",
    }


@pytest.mark.parametrize("setting", OBSERVABLES)
def test_what_it_says_of_itself(setting):
    assert dataclasses.is_dataclass(setting) and hash(setting) == hash(dataclasses.replace(setting))
    assert (
        setting.family.isidentifier() and setting.keys and setting.needs <= {"model", "vocabulary", "reads", "labels", "tokens"}
    )
    for key, definition in setting.keys.items():
        assert key.count(".") == 1 and ";" in definition, f"{key}: definition; unit or range; null"
    assert setting.begin().rows() == [], "nothing seen, nothing told"


@pytest.mark.parametrize("setting", OBSERVABLES)
def test_it_gives_rows_and_the_same_again(setting):
    torch.manual_seed(0)
    counted = 0
    for fields, dtype, _ in KINDS:
        net, tokens = model(dtype=dtype, **fields), words(12, batch=6)
        trajectory = seen(net, tokens)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        states = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
        clouds = [x.clone() for x in trajectory.clouds]
        rows = told(setting, trajectory)
        assert rows == told(setting, seen(net, tokens)), "the same bits"
        assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]
        assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters()) and not net.training
        assert all(map(torch.equal, clouds, trajectory.clouds))
        counted += len(rows)
    assert counted, "it says something of some model"


@pytest.mark.parametrize("setting", OBSERVABLES)
def test_prompts_in_lots_are_the_same_prompts(setting):
    torch.manual_seed(0)
    for fields, dtype, tolerance in KINDS:
        net, tokens = model(dtype=dtype, **fields), words(12, batch=24)
        whole = told(setting, seen(net, tokens))
        lots = told(setting, [seen(net, some) for some in tokens.split([1, 15, 8])])
        assert [places(row) for row in whole] == [places(row) for row in lots]
        close = {"rel": tolerance, "abs": max(tolerance, 1e-6)}
        for one, two in zip(whole, lots, strict=True):
            assert (one.n_valid, one.n_dropped) == (two.n_valid, two.n_dropped), one
            # nor a p-value, which jumps where rounding decides between two neighbours of the few points here
            if not any(word in (one.param or "") for word in DRAWN) and ".p_" not in one.key:
                for first, second in zip((one.mean, one.sd, one.null), (two.mean, two.sd, two.null), strict=True):
                    assert (first is None) == (second is None), (one, two)
                    assert first is None or first == pytest.approx(second, **close), (
                        one,
                        two,
                    )


@pytest.mark.parametrize("setting", OBSERVABLES)
def test_stopped_saved_and_continued_it_tells_the_same(setting, tmp_path):
    """In the middle of a pass it goes to a file and from there into a fresh pass: the same rows, bit for bit."""
    torch.manual_seed(0)
    for fields in NETS:
        net, tokens = model(dtype=torch.float32, **fields), words(12, batch=24)
        lots = [seen(net, some) for some in tokens.split([1, 15, 3, 5])]
        whole = Pass([Look([setting])])
        for lot in lots:
            whole.update(lot)
        stopped, after = Pass([Look([setting])]), Pass([Look([setting])])
        for lot in lots[:2]:
            stopped.update(lot)
        state.save(tmp_path / "state", stopped, {"at": 2})
        saved = state.read(tmp_path / "state")
        assert saved.about == {"at": 2}
        state.restore(after, saved.dump)
        for lot in lots[2:]:
            after.update(lot)
        assert after.rows() == whole.rows() and after.skipped == whole.skipped
        assert whole.rows() or whole.skipped or setting.family == "wgf", "something was there to be lost"


def places(row: Row) -> tuple:
    return row[:3] + row[10:]


@pytest.mark.parametrize("setting", OBSERVABLES)
def test_degenerate_prompts_are_finite_or_undefined(setting):
    """One token, tokens that are all the same, an embedding of zeros; `told` asserts that numbers are finite."""
    torch.manual_seed(0)
    for fields in NETS:
        net = model(**fields)
        for tokens in (words(1), words(2, batch=1), torch.zeros(3, 9, dtype=torch.long)):
            told(setting, seen(net, tokens))
        with torch.no_grad():
            net.embedding.weight.zero_()
        told(setting, seen(net, words(9)))


@pytest.mark.parametrize("setting", OBSERVABLES)
def test_foreign_clouds_are_measured_or_skipped_with_the_reason(setting):
    torch.manual_seed(0)
    foreign = Trajectory.from_clouds(torch.randn(3, 5, 7, 8), points=[(0, "attn"), (0, "ffn")])
    once = Pass([Look([setting])])
    once.update(foreign)
    need = lacks(setting, foreign)
    if need is None:
        assert once.rows() == told(setting, foreign) and once.skipped == []
    else:
        assert once.rows() == [] and need in once.skipped[0]


@pytest.mark.parametrize("setting", CADENCES)
def test_a_cadence_has_the_last_step_and_no_step_beyond(setting):
    for last in (1, 2, 7, 300):
        due = [step for step in range(last + 1) if setting.due(step, last)]
        assert due[-1] == last and due == sorted(set(due))


@pytest.mark.parametrize("setting", CALLBACKS)
def test_a_callback_looks_when_its_cadence_says_and_most_at_the_end(setting):
    last = setting.looks(300, 300)
    assert last and all(isinstance(look, Look) and look.observables for look in last)
    counts = [sum(len(look.observables) for look in setting.looks(step, 300)) for step in range(301)]
    assert max(counts) == counts[-1] and 0 < sum(map(bool, counts)) < 300
    with pytest.raises(UserError, match="prompts"):
        dataclasses.replace(setting, prompts=0)


def test_the_contract_sees_what_breaks_it():
    """An observable that averages nan away, tells a key it does not declare, or remembers by lot is caught by `told`."""
    good = Row(0, "attn", "flow.speed", 1.0)

    class Broken(parts.Observable):
        family, keys = "broken", {"flow.speed": "length; >= 0"}

        def begin(self):
            return self

        def update(self, trajectory):
            pass

        def rows(self):
            return self.told

    for rows in ([good, good], [good._replace(key="flow.other")], [good._replace(mean=math.nan)], [good._replace(null=math.inf)]):
        broken = Broken()
        object.__setattr__(broken, "told", rows)
        with pytest.raises(AssertionError):
            told(broken, [])
