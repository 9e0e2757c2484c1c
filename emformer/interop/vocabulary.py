"""The tokenizer of a checkpoint: its tokenizer.json, or the vocabulary that older checkpoints of GPT-2 and BERT have instead.

Special tokens that a text spells out stay text, as everywhere in emformer, and none is put around a text: what a post-processor
would add ([CLS], <s>) is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from emformer.text import load
from emformer.text.tokenizers import guarded

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # of BERT
SEPARATOR = "<|endoftext|>"  # of GPT-2


def read_tokenizer(folder: Path, family: str) -> tokenizers.Tokenizer | None:
    """The tokenizer in a folder; None where there is none that is known.

    Raises:
        UserError: for a file that is damaged.
    """
    if (folder / "tokenizer.json").is_file():
        tokenizer = load(folder / "tokenizer.json")
        tokenizer.post_processor = None
        return tokenizer
    names, build = OLDER.get(family, ((), None))
    if build is None or not all((folder / name).is_file() for name in names):
        return None
    with guarded(f"{folder}: {' and '.join(names)} cannot be read as the vocabulary of a tokenizer", "restore it"):
        tokenizer = build(folder)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _gpt2(folder: Path) -> tokenizers.Tokenizer:
    vocabulary, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([SEPARATOR] if SEPARATOR in vocabulary else [])
    return tokenizer


def _bert(folder: Path) -> tokenizers.Tokenizer:
    vocabulary, told = models.WordPiece.read_file(str(folder / "vocab.txt")), _told(folder)
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=told.get("tokenize_chinese_chars") is not False,
        strip_accents=told.get("strip_accents"),
        lowercase=told.get("do_lower_case") is not False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([word for word in SPECIAL if word in vocabulary])
    return tokenizer


def _told(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, where there is one."""
    path = folder / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


OLDER: Mapping[str, tuple[tuple[str, ...], Callable[[Path], tokenizers.Tokenizer]]] = {
    "gpt2": (("vocab.json", "merges.txt"), _gpt2),
    "bert": (("vocab.txt",), _bert),
}
