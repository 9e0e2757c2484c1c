"""Another library's model goes through the same analysis, and what is told of it is what that library computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import emformer as emf
from emformer.observables.lens import Lens
from emformer.observables.signal import Signal
from emformer.text import BPE, save

WORDS = ["the", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs"]
LENGTH = 12


@pytest.fixture
def gpt2(tmp_path: Path) -> tuple[Path, transformers.GPT2LMHeadModel]:
    """A random GPT-2 with a tokenizer, as a folder and as it is."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=24, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "gpt2")
    save(BPE(vocab=280).build(iter([" ".join(WORDS) * 9])), tmp_path / "gpt2" / "tokenizer.json")
    return tmp_path / "gpt2", model


@torch.no_grad()
def test_a_hugging_face_folder_is_measured_as_its_library_computes(gpt2, tmp_path: Path):
    """Entropy of the predictions, and sizes of the residual states, over all windows of a text."""
    folder, model = gpt2
    path = tmp_path / "text.txt"
    path.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 900)))
    out = emf.analyze(folder, text=path, out=tmp_path / "out", observables=[Lens(), Signal()], length=LENGTH, report=False)
    found = emf.read_records(out)
    tokenizer = emf.load(folder).tokenizer
    ids = tokenizer.encode(path.read_text(), add_special_tokens=False).ids
    windows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    assert len(windows) > 50
    theirs = model(windows, output_hidden_states=True)
    p = theirs.logits.double().log_softmax(-1)
    entropy = -(p.exp() * p).sum(-1).mean(1)
    ours = found.query("key == 'lens.entropy' and layer == 1 and point == 'ffn'").iloc[0]
    assert ours["n_valid"] == len(windows)
    assert ours["mean"] == pytest.approx(float(entropy.mean()), rel=1e-4)
    assert ours["sd"] == pytest.approx(float(entropy.std()), rel=1e-3)
    for query, state in (("layer == 0 and point == 'embed'", 0), ("layer == 0 and point == 'ffn'", 1)):
        norm = found.query(f"key == 'signal.variance' and {query}").iloc[0]
        variance = theirs.hidden_states[state].double().var(-1, correction=0).mean(1)
        assert norm["mean"] == pytest.approx(float(variance.mean()), rel=1e-4)


def test_it_asks_for_a_text_and_knows_how_far_positions_reach(gpt2, tmp_path: Path):
    folder, _ = gpt2
    with pytest.raises(emf.UserError, match="--text FILE"):
        emf.analyze(folder, out=tmp_path / "out")
    with pytest.raises(emf.UserError, match="24 positions"):
        emf.analyze(folder, out=tmp_path / "out", corpus="PythonDocs", length=25)
    with pytest.raises(emf.UserError, match="one model"):
        emf.analyze(folder, out=tmp_path / "out", corpus="PythonDocs", checkpoints="all")
    assert not (tmp_path / "out").exists()
