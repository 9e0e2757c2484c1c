"""Train a model from Python instead of from YAML: copy this file and change any part.

python train/fit.py [FOLDER]
"""

import sys

import emformer as emf
from emformer.block import PreNorm
from emformer.ffn import ReLU2
from emformer.kernels import Softmax
from emformer.masks import Causal
from emformer.norms import RMSNorm
from emformer.operators import LowRank
from emformer.positions import RoPE
from emformer.settings import Data, Model, Settings, Training
from emformer.text import BPE, Grammar
from emformer.training import Muon, NextToken

settings = Settings(
    model=Model(
        dim=64, depth=3, heads=4, context=64,
        form=LowRank(rank=16), content=LowRank(rank=16, update_std=0.4),
        kernel=Softmax(), positions=[RoPE()], mask=Causal(),
        placement=PreNorm(), norm=RMSNorm(), ffn=ReLU2(update_std=0.4),
    ),
    data=Data(corpus=Grammar(sentences=20000), tokenizer=BPE(vocab=1024)),
    training=Training(objective=NextToken(), optimizer=Muon(), max_steps=300, batch=32, sample=30),
)  # fmt: skip

if __name__ == "__main__":  # workers and DDP start this file again
    done = emf.fit(settings, sys.argv[1] if len(sys.argv) > 1 else None, resume=len(sys.argv) > 1)
    print(f"{done.path}: {done.last['val_bits_per_byte']:.3f} bits per byte")
