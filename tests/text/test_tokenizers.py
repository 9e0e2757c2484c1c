"""Tokenizers: every text comes back, the separator is never read out of text, broken files are told."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emformer.parts import UserError
from emformer.text import BPE, Bytes, Characters, Pretrained, fingerprint, load, save
from emformer.text.tokenizers import SEPARATOR, identity

SAMPLE = "The cat sat on the mat; a naïve café, 12 € and <|endoftext|> in the text.\n\n  Indented\tline.\r\n" * 20
OWN = {setting: setting.build(iter([SAMPLE])) for setting in (BPE(300), Bytes(), Characters())}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(
    st.sampled_from([SEPARATOR, " ", "  ", "\n", "the", "é", "𝄞", "\0", "a" * 9]), max_size=12
).map("".join)


@settings(max_examples=150, deadline=None)
@given(TEXT)
@pytest.mark.parametrize("setting", [BPE(300), Bytes()], ids=repr)
def test_every_text_comes_back(setting, text: str) -> None:
    ids = OWN[setting].encode(text, add_special_tokens=False).ids
    assert OWN[setting].decode(ids, skip_special_tokens=False) == text
    assert 0 not in ids
    if setting == Bytes():
        assert len(ids) == len(text.encode())


@settings(max_examples=100, deadline=None)
@given(st.text(sorted(set(SAMPLE)), max_size=60))
def test_seen_characters_come_back(text: str) -> None:
    ids = OWN[Characters()].encode(text).ids
    assert OWN[Characters()].decode(ids) == text and len(ids) == len(text) and not {0, 1} & set(ids)


def test_ids_of_the_special_tokens() -> None:
    for tokenizer in OWN.values():
        assert tokenizer.token_to_id(SEPARATOR) == 0
        assert 0 not in tokenizer.encode(SEPARATOR).ids
    characters = OWN[Characters()]
    assert characters.encode("Ω").ids == [1] == [characters.token_to_id("<unk>")]
    assert characters.get_vocab_size() == 2 + len(set(SAMPLE))
    assert OWN[Bytes()].get_vocab_size() == 257 and OWN[BPE(300)].get_vocab_size() == 300


def test_training_is_deterministic_and_needs_room() -> None:
    assert fingerprint(BPE(300).build(iter([SAMPLE]))) == fingerprint(OWN[BPE(300)])
    assert fingerprint(BPE(301).build(iter([SAMPLE]))) != fingerprint(OWN[BPE(300)])
    assert BPE(257).build(iter([SAMPLE])).get_vocab_size() == 257
    with pytest.raises(UserError, match="257"):
        BPE(256)


@pytest.mark.parametrize("setting", list(OWN), ids=repr)
def test_save_and_load(tmp_path: Path, setting) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("old")
    save(OWN[setting], path)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    for again in (load(path), Pretrained(str(path)).build(iter([])), Pretrained(str(tmp_path)).build(iter([]))):
        assert fingerprint(again) == fingerprint(OWN[setting])
        assert again.encode(SAMPLE).ids == OWN[setting].encode(SAMPLE).ids
        assert 0 not in again.encode(SAMPLE).ids  # the JSON alone would not keep that


def test_loading_removes_truncation_and_padding(tmp_path: Path) -> None:
    tokenizer = BPE(300).build(iter([SAMPLE]))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    save(tokenizer, tmp_path / "tokenizer.json")
    assert load(tmp_path / "tokenizer.json").encode(SAMPLE).ids == OWN[BPE(300)].encode(SAMPLE).ids


def test_broken_files_are_told(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    save(OWN[Bytes()], path)
    for content in (path.read_text()[:500], json.dumps({"model": "of something else"}), "", "\0"):
        path.write_text(content)
        with pytest.raises(UserError, match=r"not a whole tokenizer.json"):
            load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"not a whole tokenizer.json"):
        load(path)
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load(tmp_path / "missing.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no tokenizer.json"):
        Pretrained(str(tmp_path / "empty")).build(iter([]))
    with pytest.raises(UserError, match="no tokenizer file"):
        Pretrained(str(tmp_path / "missing.json")).build(iter([]))


def test_a_name_without_network_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be reached.*BPE, Bytes or Characters"):
        Pretrained("nobody/nothing-at-all").build(iter([]))
    assert time.monotonic() - start < 4


def test_identity_follows_settings_and_the_file(tmp_path: Path) -> None:
    assert identity(BPE(300)) == identity(BPE(300)) != identity(BPE(301))
    save(OWN[Bytes()], tmp_path / "tokenizer.json")
    before = identity(Pretrained(str(tmp_path)))
    save(OWN[BPE(300)], tmp_path / "tokenizer.json")
    assert identity(Pretrained(str(tmp_path))) != before


def test_the_floor_needs_no_torch_and_no_datasets() -> None:
    code = (
        "import sys, os; os.environ.pop('TOKENIZERS_PARALLELISM', None); import emformer.text;"
        "assert os.environ['TOKENIZERS_PARALLELISM'] == 'false';"
        "print([m for m in ('torch', 'datasets', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
