"""Our own folder: every model comes back bit for bit, ties stay ties, and what is in a file is data."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VOCAB, examples, model, words
from published import CASES, FAMILIES, drawn
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import emformer as emf
from emformer import evaluation, parts, surgery
from emformer.block import Parallel
from emformer.evaluation import evaluate
from emformer.ffn import ReLU2, SwiGLU
from emformer.files import replaced_folder
from emformer.interop import own, read
from emformer.masks import Causal, Full
from emformer.model import Emformer
from emformer.norms import LayerNorm, RMSNorm
from emformer.operators import Dense, LowRank
from emformer.parts import UserError
from emformer.placements import PostNorm, SandwichNorm, Sphere
from emformer.positions import RoPE
from emformer.settings import Drift, Embedding, Functional, Learned, Settings, Transform
from emformer.text import Bytes, Characters, save, vocabulary
from emformer.training import MaskedToken, NextToken

OPERATORS = examples(parts.Operator)
ROLES = [pytest.param(role, *one.values, id=f"{role} {one.id}") for role in ("form", "content") for one in OPERATORS]


def around(net: Emformer, objective: parts.Objective | None = None) -> Settings:
    return own.around(net.settings, parts.plain(objective or NextToken()), "a test")


def there_and_back(net: Emformer, folder: Path, **fields: Any) -> Emformer:
    own.save(net, None, around(net), folder, **fields)
    found = read(folder, own.dtype(json.loads((folder / "config.json").read_text())))
    assert found.family == "emformer" and not found.model.training and found.tokenizer is None
    assert parts.plain(found.settings) == parts.plain(net.settings)
    return found.model


def same(one: Emformer, other: Emformer) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)
    tokens = words(9, vocab=one.vocab)
    assert torch.equal(one(tokens), other(tokens))


@pytest.mark.parametrize(("role", "part"), ROLES)
def test_every_operator_comes_back(role: str, part: parts.Operator, tmp_path: Path):
    try:
        net = model(**{role: part, "depth": 1})
    except UserError:
        pytest.skip("a content alone")
    same(there_and_back(net, tmp_path / "out"), net)


@pytest.mark.parametrize("kernel", examples(parts.Kernel))
def test_every_kernel_comes_back(kernel: parts.Kernel, tmp_path: Path):
    try:
        net = model(kernel=kernel, functional=Functional(), drift=Drift(), depth=1)
    except UserError:  # no functional, or no causal mask, with this one
        net = model(kernel=kernel, mask=Full(), depth=1)
    same(there_and_back(net, tmp_path / "out"), net)


MODELS = {
    "tied": dict(embedding=Embedding(tied=True, positions=Learned())),
    "shared": dict(shared=True, depth=3, placement=Sphere()),
    "a head of its own": dict(embedding=Embedding(norm=LayerNorm(bias=True), transform=Transform(RMSNorm()), bias=True)),
    "layers that differ": dict(layers={1: {"form": LowRank(rank=2), "ffn": ReLU2(), "positions": (RoPE(base=50.0),)}}),
    "side by side": dict(arrangement=Parallel(), ffn=SwiGLU(bias=True), placement=SandwichNorm()),
    "float32": dict(dtype=torch.float32, functional=Functional(), drift=Drift(), positions=[RoPE()]),
    "bidirectional": dict(mask=Full(), placement=PostNorm(), norm=LayerNorm(bias=True), epsilon=-0.5),
}


@pytest.mark.parametrize("case", MODELS)
def test_every_composition_comes_back(case: str, tmp_path: Path):
    net = model(**MODELS[case])
    draws = torch.get_rng_state()
    back = there_and_back(net, tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), draws)
    same(back, net)
    assert (back.unembedding.weight is back.embedding.weight) == net.settings.embedding.tied
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert ("unembedding.weight" in names) == (case != "tied") and sorted(names) == sorted(set(names))


def test_types_are_kept_and_asked_for(tmp_path: Path):
    net = model(dtype=torch.float32)
    own.save(net, None, around(net), tmp_path / "half", dtype=torch.bfloat16)
    assert {value.dtype for value in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    as_saved, wide = emf.load(tmp_path / "half").model, emf.load(tmp_path / "half", dtype=torch.float64).model
    assert as_saved.embedding.weight.dtype == torch.bfloat16 and wide.embedding.weight.dtype == torch.float64
    assert torch.equal(wide.embedding.weight, net.embedding.weight.bfloat16().double())


def test_nothing_of_this_machine_is_in_it(tmp_path: Path):
    """What is shared tells of the model, not of where its text lay."""
    net = model()
    folder = own.save(net, Bytes().build(iter(())), around(net), tmp_path / "out", step=12)
    content = json.loads((folder / "config.json").read_text())
    assert content.keys() == {"model_type", "format", "vocab", "dtype", "step", "model", "objective"}
    assert str(tmp_path) not in (folder / "config.json").read_text() and content["step"] == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_surgery_is_not_saved(tmp_path: Path):
    changed = surgery.noise(model(), 0.1, on="left", seed=0)
    with pytest.raises(UserError, match=r"changed by surgery \(noise"):
        own.save(changed, None, around(changed), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# emformer.load --------------------------------------------------------------------------------------------------------


def test_a_folder_of_ours_is_loaded(tmp_path: Path):
    tokenizer = Characters().build(iter(["to be or not to be"]))
    net = model(vocab=vocabulary(tokenizer) + 1, mask=Full())
    own.save(net, tokenizer, around(net, MaskedToken(share=0.3)), tmp_path / "out", step=40)
    run = emf.load(tmp_path / "out")
    same(run.model, net)
    assert (run.step, run.family, run.path) == (40, "emformer", tmp_path / "out")
    assert run.config.training.objective == MaskedToken(share=0.3)
    assert run.has_tokenizer and run.tokenizer.encode("not").ids == tokenizer.encode("not").ids
    assert run.config.data.tokenizer.build(iter(())).to_str() == run.tokenizer.to_str()
    with pytest.raises(UserError, match=r"the text that .* learned from is not part of it: name another one with --text"):
        evaluate(run)
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 30)
    assert evaluate(run, str(text)).positions > 0


@pytest.mark.parametrize("case", FAMILIES.values())
def test_a_folder_of_another_library_is_loaded(case: str, tmp_path: Path):
    """With settings that are true of it, so that commands for runs work on it."""
    net = drawn(case)
    net.save_pretrained(tmp_path / "hf")
    run = emf.load(str(tmp_path / "hf"))
    assert run.family == net.config.model_type and run.step == 0 and run.model.embedding.weight.dtype == torch.float32
    assert emf.load(tmp_path / "hf", dtype=torch.float64).model.embedding.weight.dtype == torch.float64
    assert parts.plain(run.config.model) == parts.plain(run.model.settings)
    assert isinstance(run.config.training.objective, MaskedToken if case == "bert" else NextToken)
    assert not run.has_tokenizer
    with pytest.raises(UserError, match="came without a tokenizer"):
        _ = run.tokenizer


def masking(vocab: int, mask: str | None) -> Tokenizer:
    tokenizer = Characters().build(iter([chr(97 + k) for k in range(vocab - 2 - (mask is not None))]))
    if mask is not None:
        tokenizer.add_special_tokens([mask])
    return tokenizer


def test_a_masked_model_is_shown_its_own_mask_token(tmp_path: Path):
    net, text = drawn("bert"), tmp_path / "text.txt"
    net.save_pretrained(tmp_path / "hf")
    text.write_text("abcdefgh" * 40)
    save(masking(30, "[MASK]"), tmp_path / "hf" / "tokenizer.json")
    run = emf.load(tmp_path / "hf")
    assert run.config.training.objective == MaskedToken(mask_token=29)
    seen = []
    run.model.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    found = evaluate(run, str(text))
    assert found.unit == "nats per masked token" and any((tokens == 29).any() for tokens in seen)
    assert max(int(tokens.max()) for tokens in seen) == 29
    save(masking(CASES["bert"][2]["vocab_size"], None), tmp_path / "hf" / "tokenizer.json")
    with pytest.raises(UserError, match="has no mask token"):
        evaluate(emf.load(tmp_path / "hf"), str(text))


def test_logits_that_would_not_fit_go_through_in_smaller_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A vocabulary of 50,000 and a context of 1,024 are 200 MB of logits a window."""
    net, text = model(vocab=257), tmp_path / "text.txt"
    own.save(net, Bytes().build(iter(())), around(net), tmp_path / "out")
    text.write_text("abcdefgh" * 40)
    run, sizes = emf.load(tmp_path / "out"), []
    run.model.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    whole = evaluate(run, str(text))
    monkeypatch.setattr(evaluation, "LOGITS", 5 * 24 * 257 + 7)
    again = evaluate(run, str(text))
    assert sizes[0] == sum(sizes[1:]) == whole.windows and max(sizes[1:]) == 5
    assert again.loss == pytest.approx(whole.loss, abs=1e-12) and again.error == pytest.approx(whole.error, abs=1e-12)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path):
    net = model()
    own.save(net, masking(VOCAB + 1, None), around(net), tmp_path / "out")
    with pytest.raises(UserError, match=f"the model has {VOCAB} tokens and its tokenizer {VOCAB + 1}"):
        emf.load(tmp_path / "out")


# Files are not trusted ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    net = model(layers={1: {"ffn": ReLU2()}})
    return own.save(net, None, around(net), tmp_path / "out")


def changed(folder: Path, *path: str, value: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(content))


PART = {"class_path": "os.mkdir", "init_args": {"path": "harmed"}}


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("format",), 2, "has the format 2; this version reads 1"),
        (("format",), "1", "format is '1'"),
        (("vocab",), VOCAB + 1, "the tensor 'embedding.weight' has the shape"),
        (("vocab",), -3, "vocab is -3"),
        (("vocab",), 2**40, "vocab is"),
        (("step",), "many", "step is 'many'"),
        (("model",), [1], "lacks the settings 'model' or 'objective'"),
        (("objective",), None, "lacks the settings 'model' or 'objective'"),
        (("objective",), PART, "mkdir"),
        (("model", "ffn"), PART, "mkdir"),
        (("model", "ffn"), {"class_path": "nowhere.at_all.Part"}, "nowhere.at_all"),
        (("model", "ffn"), "emformer.ffn.GELU", "expected settings, found the text"),
        (("model", "dpeth"), 3, "dpeth"),
        (("model", "dim"), 16, "has the shape"),
        (("model", "dim"), "wide", "dim"),
        (("model", "dim"), 10**30, "cannot be built|dim"),
        (("model", "depth"), 10**12, "depth"),
        (("model", "context"), 10**12, "context of 1000000000000"),
        (("model", "heads"), -1, "model.heads is -1"),
        (("model", "heads"), 4, "has the shape"),
        (("model", "layers"), {"first": {"ffn": None}}, "a layer 'first'"),
        (("model", "layers"), {"7": {"ffn": None}}, "names layer 7"),
        (("model", "form", "init_args", "rank"), 10**9, "has the shape"),
        (("model", "positions"), [PART], "mkdir"),
        (("model", "norm"), None, "no place for the tensor"),
    ],
    ids=str,
)
def test_a_config_that_says_something_else(
    folder: Path, path: tuple[str, ...], value: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    changed(folder, *path, value=value)
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    with pytest.raises(UserError, match=told) as caught:
        emf.load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert time.perf_counter() - start < 5 and not (tmp_path / "harmed").exists()


def test_depth_that_no_file_backs_up(folder: Path):
    """A block that layers share needs no tensors: the number of layers alone would keep a machine busy."""
    net = model(shared=True)
    own.save(net, None, around(net), folder, overwrite=True)
    changed(folder, "model", "depth", value=10**12)
    with pytest.raises(UserError, match="depth of 1000000000000"):
        emf.load(folder)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_weights_that_are_torn(folder: Path, share: float):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read") as caught:
        emf.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "surplus", "shape", "integers", "no file"])
def test_weights_of_another_model(folder: Path, kind: str):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    told = "no weights"
    if kind == "missing":
        del tensors["norm.gain"]
        told = "'norm.gain' is missing"
    elif kind == "surplus":
        tensors["more"] = torch.ones(2)
        told = "no place for the tensor 'more'"
    elif kind == "shape":
        tensors["norm.gain"] = torch.ones(2)
        told = "'norm.gain' has the shape"
    elif kind == "integers":
        tensors["norm.gain"] = torch.ones(8, dtype=torch.int64)
        told = "stored as I64"
    save_file(tensors, path)
    if kind == "no file":
        path.unlink()
    with pytest.raises(UserError, match=told):
        emf.load(folder)


def test_parts_of_somebody_else_need_their_module(tmp_path: Path):
    """Saved by class path; another process must import the module before it loads, and is told so."""
    net = model(form=Dense(), mask=Causal())
    folder = own.save(net, None, around(net), tmp_path / "out")
    changed(folder, "model", "mask", value={"class_path": "my_masks.Odd"})
    with pytest.raises(UserError, match="import 'my_masks' first"):
        emf.load(folder)


# Folders appear whole -------------------------------------------------------------------------------------------------


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path):
    place = tmp_path / "deep" / "down"
    with replaced_folder(place) as partial:
        (partial / "one").write_text("1")
        assert not place.exists()
    assert [path.name for path in place.iterdir()] == ["one"]
    with pytest.raises(RuntimeError), replaced_folder(place) as partial:
        (partial / "two").write_text("2")
        raise RuntimeError
    assert [path.name for path in place.iterdir()] == ["one"]
    with replaced_folder(place) as partial:
        (partial / "two").write_text("2")
    assert [path.name for path in place.iterdir()] == ["two"] and [path.name for path in place.parent.iterdir()] == ["down"]


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = tmp_path / "place"
    place.mkdir()
    (place / "one").write_text("1")
    rename = os.rename

    def failing(a: Path, b: Path) -> None:
        if str(a).endswith(".part"):
            raise OSError("no")
        rename(a, b)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no"), replaced_folder(place) as partial:
        (partial / "two").write_text("2")
    assert [path.name for path in place.iterdir()] == ["one"] and [path.name for path in tmp_path.iterdir()] == ["place"]
