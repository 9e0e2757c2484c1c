"""The readout: a model whose last point fetches its target in one known layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import fill, model
from studied import small, subject, write
from torch.nn import functional

from emformer import parts, surgery
from emformer.masks import All, Causal, Full
from emformer.model import Emformer
from emformer.operators import Dense
from emformer.parts import UserError
from emformer.positions import RoPE
from emformer.settings import Embedding, Learned
from emformer.studies.claims.readout import Readout, _lot
from emformer.training import MaskedToken
from emformer.verdicts import Findings, Verdict

WORDS, LENGTH, PROMPTS, WHERE = 10, 9, 12, 3
TOKENS = torch.randint(WORDS, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0))
TOKENS[:, -1] = TOKENS[:, WHERE]  # the target is the word at a known place
TOKENS[:, LENGTH - 2] = (TOKENS[:, WHERE] + 1) % WORDS  # and not the last point's own, nor the first one's
TOKENS[:, 0] = (TOKENS[:, WHERE] + 2) % WORDS


def silent(share: float, word: str) -> None:
    pass


def by_claim(findings: Findings, words: str) -> Verdict:
    (found,) = [one for one in findings.verdicts if words in one.claim]
    return found


def curve(findings: Findings, panel: str) -> np.ndarray:
    frame = findings.charts["layers"].frame
    return frame[(frame["line"] == "made") & (frame["panel"] == panel)].sort_values("x")["y"].to_numpy()


@torch.no_grad()
def fetching(layer: int, depth: int = 3) -> Emformer:
    """Only in `layer` anything is added: to the last point, the word at `WHERE`, where the unembedding reads."""
    dim = 2 * WORDS + LENGTH
    net = model(
        WORDS,
        torch.float32,
        dim=dim,
        depth=depth,
        heads=1,
        context=LENGTH,
        form=Dense(),
        content=Dense(),
        norm=None,
        embedding=Embedding(positions=Learned()),
    )
    word, place = torch.arange(WORDS), 2 * WORDS + torch.arange(LENGTH)
    net.embedding.weight.copy_(torch.eye(WORDS, dim))
    fill(net.positions, torch.eye(dim)[place])
    net.unembedding.weight.zero_()
    net.unembedding.weight[word, WORDS + word] = 10.0
    for one in range(depth):
        form, content = torch.zeros(dim, dim), torch.zeros(dim, dim)
        form[place, place] = 40.0
        form[place[LENGTH - 2], place[WHERE]] = 80.0
        content[WORDS + word, word] = 1.0 if one == layer else 0.0
        write(net, one, form, content)
    return net


@pytest.mark.parametrize("layer", range(3))
def test_the_last_point_needs_the_others_up_to_the_layer_that_fetches(layer):
    one = subject(fetching(layer), TOKENS)
    findings = Readout(points=3).run([one], silent)
    cut, exchanged = curve(findings, "cut off from layer"), curve(findings, "others exchanged from layer")
    fetched = np.arange(4) > layer
    known = np.log(1 + (WORDS - 1) * np.exp(-10))
    assert cut[fetched] == pytest.approx(known, abs=1e-4) and exchanged[fetched] == pytest.approx(known, abs=1e-4)
    # it fetches its own word instead, and is sure of it
    assert cut[~fetched] == pytest.approx(10 + known, abs=1e-3)
    assert (exchanged[~fetched] > 5).all()
    lens = curve(findings, "read at layer")
    assert lens[~fetched] == pytest.approx(np.log(WORDS), abs=1e-5) and lens[fetched] == pytest.approx(known, abs=1e-4)
    assert by_claim(findings, "takes what it tells").word == "supported"
    assert by_claim(findings, "up to the last layer").word == ("supported" if layer == 2 else "refuted")
    assert by_claim(findings, "in every layer").word == "refuted"
    assert by_claim(findings, "any other point").word == "supported"
    assert by_claim(findings, "alone").word == "holds"
    # the point at WHERE is the target itself, and writes it too
    assert by_claim(Readout(points=6).run([one], silent), "any other point").word == "refuted"
    told = "in all layers" if layer == 2 else f"before layer {layer + 1},"
    assert told in findings.note


class BySelf(parts.Mask):
    """What surgery cuts: the last query sees itself and the first token."""

    causal, shape = True, "table"

    def visible(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j <= i) & ((i < LENGTH - 2) | (j == i) | (j == 0))


@torch.no_grad()
def test_a_cut_is_what_masks_do():
    """Two tokens at their places against the whole prompt under another mask from each layer on, of a model with everything."""
    net = small(depth=3, positions=[RoPE()], embedding=Embedding(unembed_std=0.3, positions=Learned()))
    tokens = subject(net, length=LENGTH).tokens
    cut = _lot(net, tokens, tokens.roll(1, 0)[:, :-1], 2)[1]
    for layer in range(3):
        other = surgery.change_mask(net, All([Causal(), BySelf()]), range(layer, 3))
        expected = functional.cross_entropy(other(tokens[:, :-1])[:, -1].double(), tokens[:, -1], reduction="none")
        assert cut[:, layer] == pytest.approx(expected.numpy(), abs=1e-5)
    plain = functional.cross_entropy(net(tokens[:, :-1])[:, -1].double(), tokens[:, -1], reduction="none")
    assert cut[:, 3] == pytest.approx(plain.numpy(), abs=1e-5)


def test_a_model_that_reads_no_context_is_refuted():
    """A bigram model: each layer adds nothing."""
    findings = Readout(points=2).run([subject(fetching(layer=-1), TOKENS)], silent)
    assert by_claim(findings, "takes what it tells").word == "refuted"
    assert "worth nothing" in findings.note


def test_other_models_are_refused():
    with pytest.raises(UserError, match="next token"):
        Readout().run([subject(small(mask=Full()), objective=MaskedToken())], silent)
    with pytest.raises(UserError, match="not causal"):
        Readout().run([subject(small(mask=Full()))], silent)
    with pytest.raises(UserError, match="--length"):
        Readout().run([subject(small(), length=2)], silent)
