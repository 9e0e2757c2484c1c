"""Ranges by layer: heads that look a known number of tokens back, and the window of surgery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from builders import fill, model
from studied import small, subject, write

from emformer import parts, surgery
from emformer.kernels import Linear
from emformer.masks import Causal, Full
from emformer.model import Emformer
from emformer.operators import Dense
from emformer.parts import UserError
from emformer.positions import RoPE
from emformer.settings import Embedding, Learned
from emformer.studies.claims.ranges import Ranges, _writes, reaches
from emformer.trajectory import capture
from emformer.verdicts import Findings

LENGTH, PROMPTS = 16, 8
DRAW = torch.Generator().manual_seed(0)
TOKENS = torch.stack([torch.randperm(LENGTH, generator=DRAW) for _ in range(PROMPTS)])  # every word once: orthogonal contents


def silent(share: float, word: str) -> None:
    pass


@torch.no_grad()
def looking_back(shifts: Sequence[int]) -> Emformer:
    """Layer l reads the word that stands shifts[l] tokens before; what it writes, no later layer reads."""
    dim = 3 * LENGTH
    net = model(
        LENGTH,
        torch.float32,
        dim=dim,
        depth=len(shifts),
        heads=1,
        context=LENGTH,
        form=Dense(),
        content=Dense(),
        norm=None,
        embedding=Embedding(positions=Learned()),
    )
    word, place = torch.arange(LENGTH), LENGTH + torch.arange(LENGTH)
    net.embedding.weight.copy_(torch.eye(LENGTH, dim))
    fill(net.positions, torch.eye(dim)[place])
    for layer, shift in enumerate(shifts):
        form, content = torch.zeros(dim, dim), torch.zeros(dim, dim)
        form[place[shift:], place[: LENGTH - shift]] = 60.0
        content[2 * LENGTH + word, word] = 1.0
        write(net, layer, form, content)
    return net


def curves(findings: Findings, panel: str) -> np.ndarray:
    frame = findings.charts["ranges"].frame
    return frame[(frame["line"] == "made") & frame["panel"].str.contains(panel)].sort_values("x")["y"].to_numpy()


@pytest.mark.parametrize(
    ("shifts", "word"), [((0, 1, 2, 4, 6), "supported"), ((6, 4, 2, 1, 0), "refuted"), ((1, 2, 5), "undecided")]
)
def test_heads_that_look_back_by_so_many_tokens(shifts, word):
    """Over the mean distance (i - 1)/2 of the i keys beside the first: closed form, and the trend that was planted. Three layers
    of one model are in order by chance too often."""
    findings = Ranges().run([subject(looking_back(shifts), TOKENS)], silent)
    queries = np.arange(7, LENGTH)
    expected = [(shift / ((queries - 1) / 2)).mean() for shift in shifts]
    assert curves(findings, "weights") == pytest.approx(expected, abs=1e-5)
    looks, writes = findings.verdicts[0], findings.verdicts[3]
    assert looks.word == writes.word == word
    assert looks.measured.value == writes.measured.value == (-1 if word == "refuted" else 1)
    assert findings.verdicts[1].word == ("refuted" if word == "refuted" else "supported")
    tails = findings.charts["tails"].frame
    for layer, shift in enumerate(shifts):
        curve = tails[tails["line"] == f"layer {layer}"].set_index("x")["y"]
        for r in reaches(LENGTH):  # without its key a query reads the r + 2 others alike, the first token among them
            assert curve[r] == pytest.approx(0 if r >= shift else (1 + 1 / (r + 2)) ** 0.5, abs=1e-5)


@dataclass(frozen=True)
class NearOrFirst(parts.Mask):
    """j <= i, and i - j <= r or j = 0."""

    r: int = 1

    @property
    def causal(self) -> bool:
        return True

    @property
    def shape(self) -> Literal["table"]:
        return "table"

    def visible(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j <= i) & ((i - j <= self.r) | (j == 0))


@torch.no_grad()
def test_what_is_masked_is_what_surgery_masks():
    net = small(positions=[RoPE()], dtype=torch.float64)
    trajectory = capture(net, subject(net).tokens)
    index = torch.arange(trajectory.steps[0].before.shape[1])
    for k in trajectory.attentions:
        step = trajectory.steps[k]
        tails = _writes(trajectory, k)[1]
        for column, r in enumerate(reaches(len(index))):
            other = surgery.change_mask(net, NearOrFirst(r), step.layer).layer(step.layer).attention
            change = (other.update(step.read, index)[1] - step.update).norm(dim=-1) / step.update.norm(dim=-1)
            assert torch.allclose(tails[:, column], change[:, 7:].mean(1), atol=1e-12)


def test_uniform_weights_are_the_null():
    """M = 0: every layer looks as far as the null under either mask, and no trend is there to be found."""
    for mask in (Causal(), Full()):
        net = small(norm=None, form=Dense(), content=Dense(), mask=mask)
        for layer in range(2):
            write(net, layer, torch.zeros(8, 8), torch.eye(8))
        findings = Ranges().run([subject(net)], silent)
        assert curves(findings, "weights") == pytest.approx([1, 1], abs=1e-5)
        assert curves(findings, "update") == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "length", "words"),
    [({"depth": 1}, 16, "deeper"), ({}, 8, "--length"), ({"kernel": Linear()}, 16, "negative")],
    ids=["depth", "length", "kernel"],
)
def test_what_has_no_range_is_refused(fields, length, words):
    with pytest.raises(UserError, match=words):
        Ranges().run([subject(small(**fields), length=length)], silent)
