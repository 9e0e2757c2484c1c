"""What a study's models lose on its prompts, by the objective that they were trained for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from emformer.model import Emformer
from emformer.parts import UserError
from emformer.studies.subjects import AT_ONCE, Subject, vocabulary_of
from emformer.training.data import Batch
from emformer.training.learner import nll
from emformer.training.objectives import IGNORE

STREAM = 23  # sets the masks of the objective apart from other random numbers of the seed


class Task(NamedTuple):
    """What the objective shows, (P, T), and asks for, `IGNORE` where it asks nothing."""

    inputs: Tensor
    targets: Tensor


def task(subject: Subject) -> Task:
    """The prompts cut by the objective that the model was trained for. Masks are drawn by a generator of their own.

    Raises:
        UserError: where the model would see what it is asked for, or has no id for a mask token.
    """
    model, objective = subject.model, subject.loaded.config.training.objective
    objective.check([model.layer(k).attention.mask for k in range(model.settings.depth)])
    vocab = vocabulary_of(subject)
    if vocab + objective.extra_tokens > model.vocab:
        raise UserError(f"{subject.name}: its tokenizer has no mask token, and its model no id to stand for one.")
    random = np.random.default_rng((STREAM, subject.seed))
    inputs, targets = objective.cut(subject.tokens.cpu().numpy(), random, vocab)
    return Task(*(torch.from_numpy(np.ascontiguousarray(x)).to(subject.tokens) for x in (inputs, targets)))


@torch.no_grad()
def by_token(model: Emformer, inputs: Tensor, targets: Tensor) -> np.ndarray:
    """-log p(target) in nats (P, T), nan where nothing is asked; a few prompts at a time."""
    found = []
    for start in range(0, len(inputs), AT_ONCE):
        some, asked = inputs[start : start + AT_ONCE], targets[start : start + AT_ONCE]
        each = nll(model, Batch(some, asked, 1, 0), reduction="none").view_as(asked).double()
        found.append(each.where(asked != IGNORE, torch.nan).cpu())
    return torch.cat(found).numpy()


def by_prompt(model: Emformer, inputs: Tensor, targets: Tensor) -> np.ndarray:
    """The mean of `by_token` over the targets of each prompt (P,); nan for none."""
    each = by_token(model, inputs, targets)
    known = ~np.isnan(each)
    count = known.sum(1)
    return np.divide(np.where(known, each, 0.0).sum(1), count, out=np.full(len(each), np.nan), where=count > 0)
