"""A run so small that everything can be measured on it in a second: one layer, sixteen dimensions, a grammar of few sentences."""

from __future__ import annotations

from pathlib import Path

from emformer.block import PreNorm
from emformer.ffn import ReLU2
from emformer.kernels import Softmax
from emformer.masks import Causal
from emformer.norms import RMSNorm
from emformer.operators import LowRank
from emformer.positions import RoPE
from emformer.records import Run
from emformer.settings import Data, Model, Probe, Settings, Training
from emformer.text import BPE, Grammar
from emformer.training import AtEnd, BreathingCallback, ClusteringCallback, FlowCallback, Muon, NextToken, fit

CORPUS = Grammar(sentences=300)
PROMPTS, LENGTH = 40, 16


def trained(folder: Path, steps: int = 4) -> Run:
    """A run of a few steps in `folder`/run that recorded at its end, with a checkpoint of the steps 0, 1, 2, 4 …"""
    part = LowRank(rank=4)
    model = Model(
        dim=16,
        depth=1,
        heads=2,
        context=32,
        form=part,
        content=part,
        kernel=Softmax(),
        mask=Causal(),
        placement=PreNorm(),
        positions=[RoPE()],
        norm=RMSNorm(),
        ffn=ReLU2(),
    )
    settings = Settings(
        model=model,
        data=Data(corpus=CORPUS, tokenizer=BPE(vocab=300), cache=str(folder / "cache")),
        training=Training(
            objective=NextToken(),
            optimizer=Muon(),
            max_steps=steps,
            batch=4,
            validate_every=steps,
            validation_windows=2,
            sample=0,
            accelerator="cpu",
        ),
        probe=Probe(prompts=PROMPTS, length=LENGTH),
        callbacks=[FlowCallback(AtEnd(), 24), ClusteringCallback(AtEnd(), PROMPTS), BreathingCallback(AtEnd(), PROMPTS)],
    )
    return Run(fit(settings, folder / "run").path)
