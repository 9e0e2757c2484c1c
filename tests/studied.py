"""Subjects of studies, made and not trained: any small model, with prompts of the grammar and the classes of their words."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
import torch
from builders import model
from torch import Tensor

from emformer import parts
from emformer.model import Emformer
from emformer.operators.dense import DenseOperator
from emformer.records import Loaded
from emformer.settings import Data, Settings, Training
from emformer.studies.subjects import Subject
from emformer.text import BPE, Grammar
from emformer.text.grammar import token_labels
from emformer.training import AdamW, NextToken

CORPUS = Grammar(sentences=300)
VOCAB = 301  # of the tokenizer, and one for a mask token


class Text(NamedTuple):
    tokenizer: tokenizers.Tokenizer
    tokens: Tensor  # (n,)
    labels: Tensor  # (classifications, n)


@functools.cache
def text() -> Text:
    """Some sentences of the grammar in tokens."""
    documents = list(CORPUS.labelled_documents())
    tokenizer = BPE(vocab=VOCAB - 1).build(iter([text for text, _ in documents]))
    ids, labels = [], []
    for one, spans in documents:
        encoding = tokenizer.encode(one, add_special_tokens=False)
        ids += encoding.ids
        labels.append(token_labels(encoding.offsets, spans))
    return Text(tokenizer, torch.tensor(ids), torch.from_numpy(np.concatenate(labels).T.copy()))


def small(seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> Emformer:
    """A small model of the words of `text`, with weights that are this seed's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model(VOCAB, dtype, **fields)


@torch.no_grad()
def write(net: Emformer, layer: int, form: Tensor, content: Tensor) -> None:
    """Give every head of a layer of dense operators this M and this F, (d, d) each."""
    attention = net.layer(layer).attention
    for operator, matrix in ((attention.form, form), (attention.content, content)):
        assert isinstance(operator, DenseOperator)
        operator.assign(matrix.mT.expand(operator.heads, -1, -1))


def subject(
    net: Emformer,
    tokens: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    prompts: int = 8,
    length: int = 16,
    labelled: bool = True,
    objective: parts.Objective | None = None,
    seed: int = 0,
    begun: int = 0,
    name: str = "made",
) -> Subject:
    """A subject of this model: `prompts` of `length` tokens of the grammar, side by side, or those that are given. `begun`: the
    seed of its run, and so of its untrained twin."""
    known = text()
    classes: tuple[str, ...] = ()
    if tokens is None:
        tokens = known.tokens[: prompts * length].view(prompts, length)
        if labelled:
            labels, classes = known.labels[:, : prompts * length].reshape(-1, prompts, length), CORPUS.label_names
    elif labels is not None:
        classes = tuple(f"class{k}" for k in range(len(labels)))
    settings = Settings(
        model=net.settings,
        data=Data(corpus=CORPUS, tokenizer=BPE(vocab=VOCAB - 1)),
        training=Training(objective=objective or NextToken(), optimizer=AdamW(), seed=begun),
    )
    loaded = Loaded(net.eval(), known.tokenizer, settings, Path(name), 0)
    return Subject(name, loaded, tokens, labels, classes, torch.arange(len(tokens)), seed)
