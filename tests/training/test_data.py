"""Batches are functions of their index, their parts are the whole, and the loss of the parts has the whole's gradient."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import settings
from torch.nn import functional

from emformer.parts import UserError
from emformer.text import Windows
from emformer.training import MaskedToken, NextToken
from emformer.training.data import Text, TrainingBatches, ValidationBatches, read_text
from emformer.training.fit import assemble
from emformer.training.objectives import IGNORE

OBJECTIVES = [NextToken(), MaskedToken(0.3)]


def windows(count: int = 997, context: int = 8) -> Windows:
    return Windows(np.random.default_rng(0).integers(0, 40, count), context, 5)


def batches(objective, tmp_path: Path, rank: int = 0, world: int = 1, **training) -> TrainingBatches:
    plan = settings(tmp_path, objective=objective, **({"batch": 12} | training)).training
    return TrainingBatches(windows(), objective, 40, plan, rank, world)


def equal(a, b) -> bool:
    return torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) and a[2:] == b[2:]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_a_batch_is_a_function_of_its_index(tmp_path: Path, objective):
    ordered = batches(objective, tmp_path, accumulate=3)
    found = {index: ordered[index] for index in range(200)}  # 800 windows, 6 epochs
    assert [batch.index for batch in found.values()] == list(range(200))
    fresh = batches(objective, tmp_path, accumulate=3)
    for index in random.Random(0).sample(range(200), 60):
        assert equal(fresh[index], found[index])
    assert not torch.equal(found[0].inputs, found[3].inputs)
    other = batches(objective, tmp_path, accumulate=3, seed=1)
    if isinstance(objective, MaskedToken):
        assert not torch.equal(other[0].targets, found[0].targets)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 3), (3, 2)])
def test_the_shares_are_the_batch(tmp_path: Path, objective, world: int, accumulate: int):
    whole = batches(objective, tmp_path)
    ranks = [batches(objective, tmp_path, rank, world, accumulate=accumulate) for rank in range(world)]
    for step in (0, 1, 7, 50):
        shares = [one[step * accumulate + micro] for micro in range(accumulate) for one in ranks]
        assert {len(share.inputs) for share in shares} == {12 // (world * accumulate)}
        assert {share.total for share in shares} == {int((whole[step].targets != IGNORE).sum())} == {whole[step].total}
        assert sum(int((share.targets != IGNORE).sum()) for share in shares) == whole[step].total

        def lines(parts) -> list[tuple]:
            return sorted((*a, *b) for part in parts for a, b in zip(part.inputs.tolist(), part.targets.tolist(), strict=True))

        assert lines(shares) == lines([whole[step]])


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"training\.batch is 12.*5 processes times 2 micro-batches"):
        batches(NextToken(), tmp_path, 0, 5, accumulate=2)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (1, 4), (3, 2)])
def test_the_gradient_is_that_of_the_mean_over_all_positions(tmp_path: Path, objective, world: int, accumulate: int):
    plan = settings(tmp_path, objective=objective, batch=12, accumulate=accumulate, precision="64")
    blocks = read_text(plan.data)
    model, learner, data = assemble(plan, blocks)
    whole = TrainingBatches(data.train, objective, data.vocab, replace(plan.training, accumulate=1), 0, 1)[3]

    logits = model(whole.inputs).flatten(0, 1)
    mean = functional.cross_entropy(logits, whole.targets.flatten(), ignore_index=IGNORE)
    plain = torch.autograd.grad(mean, list(model.parameters()))

    learner._trainer = SimpleNamespace(world_size=world)  # all that the loss asks of a trainer
    total, counts, losses = [torch.zeros_like(g) for g in plain], [], []
    for rank in range(world):
        shares = TrainingBatches(data.train, objective, data.vocab, plan.training, rank, world)
        for micro in range(accumulate):
            share = shares[3 * accumulate + micro]
            counts.append(int((share.targets != IGNORE).sum()))
            # what Lightning then does: divide by `accumulate`, and average over the processes
            loss = learner.training_step(share, 0) / (accumulate * world)
            losses.append(float(loss.detach()))
            for sum_, g in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
                sum_ += g
    if isinstance(objective, MaskedToken) and len(counts) > 1:
        assert len(set(counts)) > 1, "the shares should be uneven"
    assert sum(losses) == pytest.approx(float(mean.detach()), rel=1e-13)
    assert float(learner._step_loss) / world == pytest.approx(float(mean.detach()), rel=1e-12)
    for a, b in zip(total, plain, strict=True):
        assert (a - b).abs().max() < 1e-12 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("size", [1, 5, 200])
def test_validation_covers_the_split_once(objective, size: int):
    text = windows()
    found = ValidationBatches(text, objective, 40, size, None)
    every = [found[index] for index in range(len(found))]
    assert sum(len(batch.inputs) for batch in every) == len(text) == 996 // 8
    for batch in every:
        assert batch.total == int((batch.targets != IGNORE).sum())
    if isinstance(objective, NextToken):
        assert np.array_equal(torch.cat([b.inputs for b in every]).flatten(), text.tokens[: 8 * len(text)])
        assert np.array_equal(torch.cat([b.targets for b in every]).flatten(), text.tokens[1 : 8 * len(text) + 1])
    again = ValidationBatches(text, objective, 40, size, None)
    assert all(equal(again[index], every[index]) for index in reversed(range(len(every))))


@pytest.mark.parametrize("limit", [1, 2, 7, 124, 500])
def test_a_limit_spreads_evenly(limit: int):
    text = windows()
    picked = ValidationBatches(text, NextToken(), 40, 3, limit).picked
    assert len(picked) == len(set(picked)) == min(limit, len(text))
    assert picked[0] == 0 and (limit == 1 or picked[-1] == len(text) - 1)
    if len(picked) > 1:
        gaps = np.diff(picked)
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_the_validation(tmp_path: Path, world: int):
    plan = settings(tmp_path, batch=6, validation_windows=None)
    blocks = read_text(plan.data)
    seen = []
    for rank in range(world):
        data = Text(blocks, plan.model.context, plan.training)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world, global_step=0)  # type: ignore[assignment]
        seen += [tuple(row) for batch in data.val_dataloader() for row in batch.inputs.tolist()]
    every = Windows(blocks.validation, plan.model.context, 0)
    assert sorted(seen) == sorted(tuple(row[:-1]) for row in every.fixed(0, len(every)).tolist())


@pytest.mark.parametrize("workers", [0, 2])
def test_the_text_starts_where_the_trainer_is(tmp_path: Path, workers: int):
    plan = settings(tmp_path, accumulate=2)
    data = Text(read_text(plan.data), plan.model.context, plan.training, workers)
    first = [batch for batch, _ in zip(data.train_dataloader(), range(20), strict=False)]
    assert [batch.index for batch in first] == list(range(20))
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, global_step=7)  # type: ignore[assignment]
    for expected, batch in zip(first[14:], data.train_dataloader(), strict=False):
        assert equal(expected, batch)


def test_loaders_leave_the_global_generator_alone(tmp_path: Path):
    plan = settings(tmp_path)
    data = Text(read_text(plan.data), plan.model.context, plan.training)
    before = torch.get_rng_state()
    next(iter(data.train_dataloader()))
    list(data.val_dataloader())
    assert torch.equal(before, torch.get_rng_state())
