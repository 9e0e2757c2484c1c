"""Penalties are exact proximal steps on W, whatever parameterises it, once after every step of the optimiser (math I)."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
from builders import examples, model
from small import same, settings, weights
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from emformer import parts
from emformer.kernels import Hardmax
from emformer.masks import Full
from emformer.model import Emformer
from emformer.operators import (
    PSD,
    Dense,
    Identity,
    LowRank,
    Operator,
    Preconditioned,
    ScaledOrthogonal,
    Skew,
    Split,
    Symmetric,
    Tied,
)
from emformer.parts import UserError
from emformer.records import Run, load
from emformer.settings import Settings
from emformer.training import AdamW, Frobenius, MaskedToken, Muon, Nuclear, fit
from emformer.training.data import read_text
from emformer.training.fit import assemble
from emformer.training.learner import nll
from emformer.training.penalties import thresholded

D, H = 8, 4
AMOUNT = 0.11
FREE = [Dense(), LowRank(rank=3), LowRank(rank=3, groups=2), LowRank(rank=3, groups=1), LowRank(rank=11)]
CONSTRAINED = [Symmetric(), Skew(), Split(), Split(theta=0.0), Split(theta=-0.4, learned=True), PSD(rank=3), PSD(rank=11)]
PENALISED = pytest.mark.parametrize("part", [*FREE, *CONSTRAINED], ids=repr)
PENALTIES = pytest.mark.parametrize("penalty", [Nuclear(0.1), Frobenius(0.1)], ids=repr)


def net(form: parts.Operator, content: parts.Operator | None = None, dtype=torch.float64, **overrides: Any) -> Emformer:
    return model(dim=D, heads=H, depth=1, form=form, content=content or form, dtype=dtype, **overrides)


def operators(found: Emformer, layer: int = 0) -> tuple[Operator, Operator]:
    attention = found.layer(layer).attention
    return attention.form, attention.content


def prox(w: Tensor, penalty: parts.Part, amount: float) -> Tensor:
    """The closed forms, on the whole d x d matrix."""
    if isinstance(penalty, Frobenius):
        return w / (1 + amount)
    u, s, vh = torch.linalg.svd(w.double())
    return u @ torch.diag_embed((s - amount).clamp(min=0)) @ vh


def without(plan: Settings) -> Settings:
    return dataclasses.replace(plan, training=dataclasses.replace(plan.training, penalties=()))


# One step -------------------------------------------------------------------------------------------------------------


@PENALISED
@PENALTIES
def test_the_step_is_the_proximal_map_of_w(seed, part, penalty):
    found = net(part)
    before = [operator.matrix().detach().clone() for operator in operators(found)]
    penalty.shrink(found, AMOUNT / penalty.weight)
    for operator, w in zip(operators(found), before, strict=True):
        assert (operator.matrix() - prox(w, penalty, AMOUNT)).abs().max() < 1e-12
        assert (operator.matrix() - w).abs().max() > 1e-3


@PENALISED
def test_singular_values_fall_and_stop_at_zero(seed, part):
    found = net(part)
    form = operators(found)[0]
    u, s, vh = torch.linalg.svd(form.matrix().detach().clone())
    cut = float(s[:, 1].min())  # every head loses all but one at least
    Nuclear(cut).shrink(found, 1.0)
    w = form.matrix()
    after = torch.linalg.svdvals(w)
    assert (after - (s - cut).clamp(min=0)).abs().max() < 1e-12
    told = u.mT @ w @ vh.mT  # the singular vectors are those of before
    assert (told - torch.diag_embed(told.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-12
    assert ((after > 1e-12).sum(-1) == (s > cut + 1e-12).sum(-1)).all()


@pytest.mark.parametrize("part", [Dense(), Symmetric(), Skew(), Split(theta=0.5)], ids=repr)
def test_no_other_matrix_of_the_kind_is_better(seed, part):
    """A minimiser that knows nothing of singular vectors finds the same W: min t |W|_* + |W - W0|^2/2 over the parameter."""
    found = net(part)
    form = operators(found)[0]
    start = form.matrix().detach().clone()
    free = copy.deepcopy(form)

    def objective() -> Tensor:
        w = free.matrix()
        smooth = (torch.linalg.svdvals(w).square() + 1e-10).sqrt()
        return AMOUNT * smooth.sum() + (w - start).square().sum() / 2

    named = dict(free.named_parameters())
    parameter = named["left_factor" if "left_factor" in named else "weight"]
    search = torch.optim.LBFGS([parameter], max_iter=2000, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        value = objective()
        value.backward()
        return value

    search.step(closure)
    Nuclear(AMOUNT).shrink(found, 1.0)
    best = objective().item()
    with torch.no_grad():
        assert (free.matrix() - form.matrix()).norm() < 0.01 * start.norm()
        for ours, theirs in zip(form.parameters(), free.parameters(), strict=True):
            theirs.copy_(ours)
        assert float(objective()) <= best + 1e-4
        # and optimal it is: W0 - W lies in t times the subdifferential of the norm
        gap, w = start - form.matrix(), form.matrix()
        assert (torch.linalg.matrix_norm(gap, 2) <= AMOUNT + 1e-12).all()
        touch = (gap * w).sum((-2, -1)) - AMOUNT * torch.linalg.matrix_norm(w, "nuc")
        assert touch.abs().max() < 1e-12


@PENALTIES
def test_the_right_factor_stays(seed, penalty):
    for groups in (1, 2, 4):
        found = net(LowRank(rank=3, groups=groups))
        form = operators(found)[0]
        right, w = form.right_factor.detach().clone(), form.matrix().detach().clone()
        penalty.shrink(found, AMOUNT / penalty.weight)
        assert torch.equal(form.right_factor, right)
        # of all left factors that give this W the only one, R being of full rank
        rows = right.repeat_interleave(H // groups, 0)
        only = torch.linalg.solve(rows @ rows.mT, rows @ prox(w, penalty, AMOUNT).mT)
        assert (form.left_factor - only).abs().max() < 1e-11


def test_a_right_factor_without_full_rank_is_no_trouble(seed):
    left, right = torch.randn(2, 3, D, dtype=torch.float64), torch.randn(2, 3, D, dtype=torch.float64)
    right[:, 2] = right[:, 0] - right[:, 1]
    right[1] = 0
    w = left.mT @ right
    assert (thresholded(left, right, AMOUNT).mT @ right - prox(w, Nuclear(1.0), AMOUNT)).abs().max() < 1e-12
    zero = thresholded(torch.zeros_like(left), right, AMOUNT)
    assert torch.equal(zero, torch.zeros_like(left)) and not thresholded(w.mT, None, 1e3).any()


@pytest.mark.parametrize("part", CONSTRAINED, ids=repr)
def test_constraints_hold(seed, part):
    found = net(part)
    for _ in range(5):
        Nuclear(0.02).shrink(found, 1.0)
        Frobenius(0.02).shrink(found, 1.0)
    for operator in operators(found):
        w = operator.matrix()
        if "symmetric" in operator.claims:
            assert (w - w.mT).abs().max() < 1e-15
        if "skew" in operator.claims:
            assert (w + w.mT).abs().max() < 1e-15
        if "psd" in operator.claims:
            assert torch.linalg.eigvalsh(w).min() > -1e-14


def test_the_dial_of_a_split_stays_and_what_is_hidden_too(seed):
    found = net(Split(theta=0.0), Split(theta=-0.4, learned=True))
    form, content = operators(found)
    hidden, theta = (form.weight - form.weight.mT).detach(), content.theta.detach().clone()
    Nuclear(0.05).shrink(found, 1.0)
    assert (form.weight - form.weight.mT - hidden).abs().max() < 1e-15 and torch.equal(content.theta, theta)


def test_a_small_dial_magnifies_nothing(seed):
    """In float32: the skew part of B, seen through theta = 1e-5, is not drowned by the rounding of the symmetric one."""
    found = net(Split(theta=1e-5), dtype=torch.float32)
    form = operators(found)[0]
    twin = net(Split(theta=1e-5))
    exact = operators(twin)[0]
    with torch.no_grad():
        exact.weight.copy_(form.weight)
    Nuclear(1e-3).shrink(found, 1.0)
    Nuclear(1e-3).shrink(twin, 1.0)
    skew = [(w.double() - w.double().mT) / 2 for w in (form.weight, exact.weight)]
    assert (skew[0] - skew[1]).norm() < 1e-3 * skew[1].norm()


@PENALISED
@PENALTIES
def test_nothing_but_w_changes(seed, part, penalty):
    """No other parameter, no type, no gradient; nor is anything else than the named role touched."""
    for dtype in (torch.float32, torch.float64):
        found = net(part, dtype=dtype)
        for p in found.parameters():
            p.grad = torch.ones_like(p)
        before = copy.deepcopy(found.state_dict())
        dataclasses.replace(penalty, which="content").shrink(found, 1.0)
        changed = {name for name, p in found.state_dict().items() if not torch.equal(p, before[name])}
        assert changed and all(".content." in name for name in changed), changed
        assert len(changed) == 1 and not next(iter(changed)).endswith(("right_factor", "theta"))
        assert all(p.dtype == dtype and p.requires_grad and bool((p.grad == 1).all()) for p in found.parameters())
        dataclasses.replace(penalty, which="form").shrink(found, 1.0)
        now = {name for name, p in found.state_dict().items() if not torch.equal(p, before[name])}
        assert len(now) == 2 and any(".form." in name for name in now)


def test_float32_is_as_exact_as_it_can_be(seed):
    for part in (Dense(), LowRank(rank=3), PSD(rank=3)):
        found = net(part, dtype=torch.float32)
        form = operators(found)[0]
        w = form.matrix().detach().clone().double()
        Nuclear(AMOUNT).shrink(found, 1.0)
        assert (form.matrix() - prox(w, Nuclear(1.0), AMOUNT)).abs().max() < 3e-7


def test_the_amount_is_weight_times_factor(seed):
    found = net(Dense())
    half, whole = copy.deepcopy(found), copy.deepcopy(found)
    Nuclear(0.2).shrink(half, 0.25)
    Nuclear(0.05).shrink(whole, 1.0)
    assert same(half.state_dict(), whole.state_dict())
    Nuclear(0.0).shrink(found, 1.0)
    Frobenius(0.3).shrink(whole, 0.0)
    assert same(half.state_dict(), whole.state_dict())


def test_shared_blocks_shrink_once(seed):
    found = model(dim=D, heads=H, depth=3, shared=True, form=Dense(), content=Dense())
    w = operators(found)[0].matrix().detach().clone()
    Frobenius(1.0).shrink(found, 1.0)
    assert (operators(found)[0].matrix() - w / 2).abs().max() < 1e-15


@pytest.mark.parametrize("content", [Tied(), Preconditioned()], ids=repr)
def test_a_content_bound_to_its_form_shrinks_with_it_once(seed, content):
    found = net(Dense(), content)
    m, f = (operator.matrix().detach().clone() for operator in operators(found))
    Frobenius(1.0).shrink(found, 1.0)
    assert (operators(found)[0].matrix() - m / 2).abs().max() < 1e-15
    assert (operators(found)[1].matrix() - f / 2).abs().max() < 1e-14
    with pytest.raises(UserError, match=f"Frobenius: the content of layer 0, {type(content).__name__}.*bound to its form"):
        Frobenius(1.0, which="content").shrink(found, 1.0)


# Operators that take another left factor ------------------------------------------------------------------------------


@pytest.mark.parametrize("part", examples(parts.Operator))
def test_an_operator_takes_its_own_left_factor_or_says_no(part):
    """`assign(left_rows())` changes nothing; `assignable` tells beforehand whether it may be asked."""
    torch.manual_seed(0)
    given = LowRank(rank=4).build("form", D, 2).double()
    operator = part.build("content", D, 2, given).double()
    w, left = operator.matrix().detach().clone(), operator.left_rows().detach().clone()
    if not operator.assignable:
        with pytest.raises(TypeError, match="takes no other left factor"):
            operator.assign(left)
        return
    operator.assign(left)
    assert (operator.matrix() - w).abs().max() < 1e-14
    operator.assign(2 * left)
    assert (operator.matrix() - 2 * w).abs().max() < 1e-13
    assert all(p.requires_grad and p.is_leaf for p in operator.parameters())


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part", [Symmetric(rank=2), Identity(), ScaledOrthogonal(), Identity(scale=0.5, learned=False)], ids=repr
)
@PENALTIES
def test_an_operator_that_cannot_take_the_step_is_refused(part, penalty):
    name = type(part).__name__
    found = net(Dense(), part)
    before = copy.deepcopy(found.state_dict())
    for on in ("content", "both"):
        with pytest.raises(UserError, match=f"the content of layer 0, {name}") as caught:
            dataclasses.replace(penalty, which=on).shrink(copy.deepcopy(found), 1.0)
        assert type(penalty).__name__ in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"the form of layer 0, {name}"):
        penalty.shrink(net(part, Dense()), 1.0)
    dataclasses.replace(penalty, which="form").shrink(found, 1.0)
    assert not same(found.state_dict(), before)


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_a_senseless_weight_is_refused(weight):
    for penalty in (Nuclear, Frobenius):
        with pytest.raises(UserError, match="weight is"):
            penalty(weight)


def test_only_an_emformer_has_forms():
    with pytest.raises(UserError, match="a Linear has no forms"):
        Nuclear(0.1).shrink(nn.Linear(2, 2), 1.0)


def test_weights_that_are_not_finite_are_told():
    found = net(Dense())
    nn.init.constant_(operators(found)[0].left_factor, math.nan)
    with pytest.raises(UserError, match="the form of layer 0 has no singular values, because its weights are not finite"):
        Nuclear(0.1).shrink(found, 1.0)


@pytest.mark.parametrize(
    "mistake, told",
    [
        ({"model": {"content": Identity()}, "penalties": [Nuclear(0.1)]}, "Nuclear: the content of layer 0, Identity"),
        (
            {"model": {"layers": {0: {"form": Symmetric(rank=2)}}}, "penalties": [Frobenius(0.1)]},
            "Frobenius: the form of layer 0",
        ),
        ({"model": {"kernel": Hardmax(), "mask": Full()}}, "Hardmax of layer 0 cannot be trained"),
    ],
    ids=["content", "layer", "hardmax"],
)
def test_refusals_come_before_anything_is_written(tmp_path: Path, mistake: dict, told: str):
    plan = settings(tmp_path, objective=MaskedToken(), **({"model": {"mask": Full()}} | mistake))
    with pytest.raises(UserError, match=told):
        fit(plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_building_a_learner_changes_no_weight(tmp_path: Path):
    plan = settings(tmp_path, penalties=[Nuclear(0.1)])
    blocks = read_text(plan.data)
    one, two = (assemble(given, blocks)[0].state_dict() for given in (plan, without(plan)))
    assert same(one, two)


# Training -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Witness(parts.Penalty):
    """Changes nothing; remembers the factor and the weights at each of its turns."""

    seen: ClassVar[list[tuple[str, float, dict[str, Tensor]]]] = []
    name: str = ""

    @classmethod
    def examples(cls) -> Sequence[Witness]:
        return [cls()]

    def shrink(self, model: nn.Module, factor: float) -> None:
        Witness.seen.append((self.name, factor, copy.deepcopy(model.state_dict())))


@pytest.mark.parametrize("optimizer", [Muon(), AdamW()], ids=repr)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_the_optimiser_and_then_the_penalties(tmp_path: Path, optimizer, accumulate: int):
    """Two steps by hand: gradient, clip, rate, optimiser, prox in the order of the list; and what is saved is after the prox."""
    penalties = [Nuclear(0.02), Frobenius(0.01, which="content")]
    plan = settings(tmp_path, penalties=penalties, max_steps=4, accumulate=accumulate, optimizer=optimizer, save_every=1)
    fit(plan, tmp_path / "run")

    found, _, text = assemble(plan, read_text(plan.data))
    training = plan.training
    found.train()
    engine = optimizer.build(found)
    rates = [group["lr"] for group in engine.param_groups]
    batches = iter(text.train_dataloader())
    for step in range(4):
        engine.zero_grad()
        for _ in range(accumulate):
            batch = next(batches)
            (nll(found, batch) * (accumulate / batch.total) / accumulate).backward()
        clip_grad_norm_(found.parameters(), training.clip)
        factor = training.schedule.factor(step, 4)
        for group, rate in zip(engine.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        engine.step()
        for penalty in penalties:
            penalty.shrink(found, factor)
        if step + 1 in (1, 2, 4):
            saved = weights(tmp_path / "run", Run(tmp_path / "run").step(step + 1).stem)
            for name, p in found.state_dict().items():
                assert (saved[f"model.{name}"] - p).abs().max() < 1e-6, (step, name)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_once_after_every_step_with_the_factor_of_that_step(tmp_path: Path, accumulate: int):
    Witness.seen.clear()
    watch = [Witness(name="before"), Nuclear(0.02), Witness(name="after")]
    plan = settings(tmp_path, penalties=watch, max_steps=6, accumulate=accumulate, save_every=2)
    fit(plan, tmp_path / "run")
    seen = Witness.seen[2:]  # the learner tries them on a copy first
    assert [(name, factor) for name, factor, _ in seen] == [
        (name, plan.training.schedule.factor(step, 6)) for step in range(6) for name in ("before", "after")
    ]
    assert len({factor for _, factor, _ in seen}) > 3, "the schedule is flat: the test means nothing"
    moved = found = None
    for step in range(6):
        (_, factor, moved), (_, _, found) = seen[2 * step : 2 * step + 2]
        for role in ("form", "content"):
            key = f"blocks.0.attention.{role}."
            w = [state[f"{key}left_factor"].double().mT @ state[f"{key}right_factor"].double() for state in (moved, found)]
            assert (w[1] - prox(w[0], Nuclear(1.0), 0.02 * factor)).abs().max() < 1e-6
    assert same({f"model.{name}": p for name, p in found.items()}, weights(tmp_path / "run"))


def test_a_resumed_run_shrinks_as_one_that_was_not_stopped(tmp_path: Path):
    plan = settings(tmp_path, penalties=[Nuclear(0.003)], max_steps=9, save_every=3, validate_every=20)
    fit(plan, tmp_path / "whole")

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(plan, tmp_path / "parts", callbacks=[Stop()])
    assert load(tmp_path / "parts").step == 3
    fit(plan, tmp_path / "parts", resume=True)
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    fit(without(plan), tmp_path / "without")
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "without"))


def test_a_strong_penalty_lowers_the_rank_for_good(tmp_path: Path):
    """Nuclear to rank 1 or so, Frobenius to nothing of the kind."""
    ranks = {}
    for penalty in (Nuclear(0.02), Frobenius(0.02)):
        run = tmp_path / type(penalty).__name__
        fit(settings(tmp_path, model={"form": Dense(), "content": Dense()}, penalties=[penalty]), run)
        s = torch.linalg.svdvals(load(run).model.layer(0).attention.form.matrix().double())
        ranks[type(penalty)] = int((s > 1e-6 * s.max()).sum())
    assert ranks[Nuclear] < ranks[Frobenius] == 2 * 16, ranks


def test_two_processes_shrink_alike(tmp_path: Path):
    """From a YAML file, over two processes: the same run as in one."""
    config = Path(__file__).parents[2] / "configs" / "smoke.yaml"
    mine = tmp_path / "mine.yaml"
    mine.write_text("training: {penalties: [{class_path: Nuclear, init_args: {weight: 0.1, which: form}}]}\n")
    for devices in (1, 2):
        words = [
            *(sys.executable, "-m", "emformer", "fit", "-c", str(config), "-c", str(mine), "--run", str(tmp_path / str(devices))),
            *("--data.cache", str(tmp_path / "cache"), "--training.precision", "64", "--training.accelerator", "cpu"),
            *("--training.strategy", "ddp" if devices > 1 else "auto", "--training.devices", str(devices)),
            *("--training.max_steps", "6", "--training.batch", "8", "--training.accumulate", "2", "--training.sample", "0"),
            *("--training.validation_windows", "4"),
        ]
        done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    one, two = (weights(tmp_path / str(devices)) for devices in (1, 2))
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-7
    left, right = (one[f"model.blocks.0.attention.form.{side}_factor"] for side in ("left", "right"))
    s = torch.linalg.svdvals(left.mT @ right)[:, : left.shape[1]]
    assert (s < 1e-12).any(), "nothing was shrunk away"
