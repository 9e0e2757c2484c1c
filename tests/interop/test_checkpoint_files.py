"""Files of weights and tokenizers: sharded, older, damaged, hostile. Everything is data, and every mistake is one sentence."""

from __future__ import annotations

import json
import os
import struct
import weakref
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from published import V, drawn, saved, told, words
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from emformer import interop
from emformer.interop import weights
from emformer.parts import UserError

T = words()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a GPT-2, and its logits."""
    folder = saved("gpt2", tmp_path_factory.mktemp("gpt2"))
    with torch.no_grad():
        return folder, interop.read(folder).model(T)


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def copy(whole, folder: Path) -> Path:
    """config.json alone."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((whole[0] / "config.json").read_bytes())
    return folder


def shards(content: dict[str, torch.Tensor], folder: Path, count: int, kind: str) -> list[str]:
    """`count` files and their index, dealt round, so that what belongs together is apart."""
    names = sorted(content)
    stem, ending = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    files = [f"{stem}-{k + 1:05}-of-{count:05}.{ending}" for k in range(count)]
    dealt = {file: {name: content[name].clone() for name in names[k::count]} for k, file in enumerate(files)}
    for file, part in dealt.items():
        save_file(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in dealt.items() for name in part}}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return files


# What is read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@torch.no_grad()
def test_shards_are_opened_one_by_one(kind, whole, tmp_path, monkeypatch):
    folder = copy(whole, tmp_path / "sharded")
    files = shards(state(whole[0]), folder, 5, kind)
    opened, read, now = weights._opened, Counter(), []

    @contextmanager
    def counted(path):
        assert not now, f"{path.name} is opened while {now} is"
        now.append(path.name)
        read[path.name] += 1
        with opened(path) as get:
            yield get
        now.pop()

    monkeypatch.setattr(weights, "_opened", counted)
    assert torch.equal(interop.read(folder).model(T), whole[1])
    assert read == Counter(files)


@torch.no_grad()
def test_the_librarys_own_shards(whole, tmp_path):
    drawn("gpt2").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(interop.read(tmp_path).model(T), whole[1])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 2020"])
@torch.no_grad()
def test_pickles_of_plain_tensors(zipped, whole, tmp_path):
    """Both tied tensors are in such a file, and the tables that older versions saved beside them."""
    folder, content = copy(whole, tmp_path / "bin"), dict(drawn("gpt2").state_dict())
    assert {"transformer.wte.weight", "lm_head.weight"} <= content.keys()
    for k in range(3):
        content[f"transformer.h.{k}.attn.bias"] = torch.ones(1, 1, 20, 20, dtype=torch.uint8).tril()
        content[f"transformer.h.{k}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    found = interop.read(folder)
    assert found.settings.embedding.tied and torch.equal(found.model(T), whole[1])


@torch.no_grad()
def test_a_bias_that_is_there_twice(tmp_path):
    """BERT's decoder has its bias under two names; what is added is the decoder's."""
    folder, content = saved("bert", tmp_path), dict(drawn("bert").state_dict())
    expected = interop.read(folder).model(T)
    assert {"cls.predictions.bias", "cls.predictions.decoder.bias"} <= content.keys()
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    assert torch.equal(interop.read(folder).model(T), expected)


@torch.no_grad()
def test_what_older_versions_saved_of_neox_and_bert(tmp_path):
    for case, more in (
        ("neox", ["gpt_neox.layers.0.attention.rotary_emb.inv_freq", "gpt_neox.layers.1.attention.bias"]),
        ("bert", ["bert.embeddings.position_ids", "bert.pooler.dense.bias", "cls.seq_relationship.weight"]),
        ("llama", ["model.layers.2.self_attn.rotary_emb.inv_freq"]),
    ):
        folder = saved(case, tmp_path / case)
        expected = interop.read(folder).model(T)
        content = {name.replace("lm_head", "embed_out") if case == "neox" else name: x for name, x in state(folder).items()}
        if case == "bert":
            for new, old in (("weight", "gamma"), ("bias", "beta")):
                content = {name.replace(f"LayerNorm.{new}", f"LayerNorm.{old}"): x for name, x in content.items()}
            assert any(name.endswith("gamma") for name in content)
        save_file(content | {name: torch.arange(5) for name in more}, folder / "model.safetensors")
        assert torch.equal(interop.read(folder).model(T), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tensors_do_not_pile_up(dtype, whole, monkeypatch):
    """When one is read, at most the one before is still there: memory is the model's own, and little more."""
    opened, kept = weights._opened, []

    @contextmanager
    def watched(path):
        with opened(path) as get:

            def fetch(key):
                assert sum(reference() is not None for reference in kept) <= 1
                tensor = get(key)
                kept.append(weakref.ref(tensor))
                return tensor

            yield fetch

    monkeypatch.setattr(weights, "_opened", watched)
    interop.read(whole[0], dtype)
    assert len(kept) == len(state(whole[0]))


# What is not ----------------------------------------------------------------------------------------------------------

KEY = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop(KEY), r"the tensor 'h\.1\.mlp\.c_fc\.weight' is missing"),
        (
            lambda s: s.update({KEY: s[KEY].T.contiguous()}),
            r"'h\.1\.mlp\.c_fc\.weight' has the shape \[96, 24\], and .* \[24, 96\]",
        ),
        (
            lambda s: s.update({"transformer.h.3.ln_1.bias": s["transformer.ln_f.bias"] + 1}),
            r"no place for the tensor 'h\.3\.ln_1\.bias'",
        ),
        (lambda s: s.update({KEY: s[KEY].to(torch.int8)}), "stored as I8; quantised"),
        (lambda s: s.update({KEY: s[KEY].to(torch.float8_e4m3fn)}), "stored as F8_E4M3; quantised"),
        (lambda s: s.update({KEY.removeprefix("transformer."): s[KEY] + 1}), "are the same one"),
        (lambda s: s.update({"a\nb" * 60: s[KEY] + 1}), r"no place for the tensor 'a\?ba\?b"),
        (lambda s: s.clear(), "hold 0 tensors"),
    ],
    ids=["missing", "turned", "surplus", "int8", "float8", "twice", "a long name", "empty"],
)
def test_tensors_that_do_not_fit(change, sentence, whole, tmp_path):
    folder, content = copy(whole, tmp_path / "bad"), state(whole[0])
    change(content)
    save_file(content, folder / "model.safetensors")
    refused(folder, sentence)


def tokenizer_in(folder: Path) -> Tokenizer:
    found = interop.read(folder).tokenizer
    assert found is not None
    return found


def refused(folder: Path, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        interop.read(folder)
    text = str(error.value)
    assert "\n" not in text and len(text) < 500


@pytest.mark.parametrize("keep", [0, 4, 100, 2000, -1])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_truncated_files(keep, name, whole, tmp_path):
    folder = copy(whole, tmp_path / "bad")
    save_file(state(whole[0]), folder / name) if name.endswith("safetensors") else torch.save(state(whole[0]), folder / name)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:keep])
    refused(folder, "truncated, or")


def test_a_header_that_promises_more_than_there_is(whole, tmp_path):
    """10^15 numbers in a file of a few bytes: told before memory is taken."""
    folder = copy(whole, tmp_path / "bad")
    header = json.dumps({"wte.weight": {"dtype": "F32", "shape": [10**9, 10**6], "data_offsets": [0, 4 * 10**15]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(folder, "truncated, or")


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("hidden", [lambda: Evil(), lambda: {KEY: Evil()}, lambda: {"a": torch.ones(2), "b": [Evil()]}])
def test_a_pickle_that_would_execute_code(hidden, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = copy(whole, tmp_path / "bad")
    torch.save(hidden(), folder / "pytorch_model.bin")
    refused(folder, "something other than plain tensors")
    assert not (tmp_path / "executed").exists()
    with pytest.raises((RuntimeError, AttributeError, TypeError)):  # and it would have
        torch.load(folder / "pytorch_model.bin", weights_only=False) + "x"
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([1, 2], "no dictionary of tensors"),
        ({1: torch.ones(2)}, "no dictionary of tensors"),
        ({"a": 3}, "'a' is no plain tensor"),
        ({"a": torch.ones(4).to_sparse()}, "'a' is no plain tensor"),
        ({"a": torch.ones(1).expand(10**9)}, "'a' is no plain tensor"),
    ],
)
def test_pickles_of_something_else(content, sentence, whole, tmp_path):
    folder = copy(whole, tmp_path / "bad")
    torch.save(content, folder / "pytorch_model.bin")
    refused(folder, sentence)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ("{", "no index of shards"),
        ("[]", "no index of shards"),
        ("[" * 10**5, "no index of shards"),
        ('{"weight_map": {"a": "../../secret.safetensors"}}', "names the shard '../../secret.safetensors'"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names the shard '/etc/passwd'"),
        ('{"weight_map": {"a": 3, "b": 3}}', "names the shard '3'"),
        ('{"weight_map": {"a": "model-9.safetensors"}}', "'model-9.safetensors', which is missing"),
        ('{"weight_map": {}}', "names no shard"),
        ('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}', "is in one.safetensors already"),
    ],
)
def test_indices_of_shards(index, sentence, whole, tmp_path):
    folder = copy(whole, tmp_path / "bad")
    for name in ("one", "two"):
        save_file({"a": torch.ones(2)}, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, sentence)


def test_no_weights_at_all(whole, tmp_path):
    refused(copy(whole, tmp_path / "bad"), "holds no weights; it should have model.safetensors or")


def test_a_bert_without_its_head(tmp_path):
    drawn("bert").bert.save_pretrained(tmp_path)
    refused(tmp_path, r"no masked-language head \(cls\.predictions")


def test_a_head_that_is_missing_and_not_tied(tmp_path):
    drawn("llama").model.save_pretrained(tmp_path)
    refused(tmp_path, "the tensor 'lm_head.weight' is missing")


# Tokenizers -----------------------------------------------------------------------------------------------------------

TEXT = "The dog, it's naïve! <|endoftext|> won't [MASK] Café 123 été"


def byte_level(folder: Path) -> None:
    """vocab.json and merges.txt, as GPT-2 has them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 9, trainer)
    tokenizer.model.save(str(folder))


def pieces(folder: Path) -> None:
    """vocab.txt, as BERT has it."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the dog , it ' s na ##ive ! < | end ##of ##text > won t [ ] mask cafe 123 ete"
    (folder / "vocab.txt").write_text(words.replace(" ", "\n"))


def test_vocabularies_of_gpt2(tmp_path):
    folder = saved("gpt2", tmp_path)
    byte_level(folder)
    found = tokenizer_in(folder)
    library = transformers.GPT2Tokenizer.from_pretrained(folder)
    text = TEXT.replace("<|endoftext|>", "end")
    assert found.encode(text).ids == library(text)["input_ids"]
    assert found.decode(found.encode(TEXT).ids) == TEXT
    assert found.token_to_id("<|endoftext|>") not in found.encode(TEXT).ids  # what a text spells out is text


@pytest.mark.parametrize("lower", [True, False])
def test_vocabularies_of_bert(lower, tmp_path):
    folder = saved("bert", tmp_path)
    pieces(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower, "tokenizer_class": "BertTokenizer"}))
    found = tokenizer_in(folder)
    library = transformers.BertTokenizer.from_pretrained(folder, do_lower_case=lower)
    text = TEXT.replace("[MASK]", "mask")
    assert found.encode(text).ids == library(text, add_special_tokens=False)["input_ids"]
    ids = found.encode(TEXT).ids  # no [CLS], no [SEP], and [MASK] is a word in brackets
    assert len(ids) > 5 and not {2, 3, 4} & set(ids)


def test_a_tokenizer_json_comes_first_and_adds_nothing(tmp_path):
    folder = saved("bert", tmp_path)
    pieces(folder)
    tokenizer = Tokenizer(models.WordLevel({"[CLS]": 0, "dog": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[CLS]"])
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 0)])
    tokenizer.enable_truncation(1)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("dog dog").ids == [0]
    assert tokenizer_in(folder).encode("dog dog").ids == [1, 1]


@pytest.mark.parametrize(
    ("case", "files", "sentence"),
    [
        ("gpt2", {"tokenizer.json": b"{"}, "not a whole tokenizer.json"),
        ("gpt2", {"vocab.json": b"[1]", "merges.txt": b""}, "vocab.json and merges.txt cannot be read"),
        ("gpt2", {"vocab.json": b'{"a": 0}', "merges.txt": b"b c\n"}, "vocab.json and merges.txt cannot be read"),
        ("bert", {"vocab.txt": b"\xff\xfe\n"}, "vocab.txt cannot be read"),
        ("bert", {"vocab.txt": b"dog\n", "tokenizer_config.json": b"{"}, "vocab.txt cannot be read"),
    ],
)
def test_damaged_tokenizers(case, files, sentence, tmp_path):
    folder = saved(case, tmp_path)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    refused(folder, sentence)


def test_a_folder_without_a_tokenizer(tmp_path):
    folder = saved("gpt2", tmp_path)
    (folder / "vocab.json").write_text("{}")  # merges.txt is not there
    told(folder, bos_token_id=V - 1)
    assert interop.read(folder).tokenizer is None
