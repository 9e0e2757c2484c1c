"""A full mask with the next-token loss copies the answer (math A.8, J 8)."""

import math

import pytest
import torch
from builders import model
from torch.nn import functional

from emformer.ffn import GELU
from emformer.masks import Causal, Full
from emformer.model import Emformer
from emformer.operators import LowRank
from emformer.positions import RoPE
from emformer.settings import Embedding, Learned

VOCAB, LENGTH = 16, 16
POSITIONS = {
    "rope": {"positions": [RoPE()], "embedding": Embedding()},
    "learned": {"embedding": Embedding(positions=Learned(std=0.5))},
}


def loss(net: Emformer, windows: torch.Tensor) -> torch.Tensor:
    """Next-token loss where the next token is in the window: of the last position a full mask cannot know it either."""
    return functional.cross_entropy(net(windows)[:, :-1].flatten(0, 1), windows[:, 1:].flatten())


@pytest.mark.parametrize(("kind", "mask"), [("rope", Causal()), ("rope", Full()), ("learned", Full())], ids=repr)
def test_only_the_mask_keeps_the_next_token_secret(kind, mask):
    torch.manual_seed(0)
    sizes = dict(dim=64, heads=4, context=LENGTH + 1, form=LowRank(rank=16), content=LowRank(rank=16), ffn=GELU())
    net = model(VOCAB, torch.float32, mask=mask, **(sizes | POSITIONS[kind])).train()
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(400):
        adam.zero_grad()
        loss(net, torch.randint(VOCAB, (32, LENGTH + 1))).backward()
        adam.step()
    with torch.no_grad():
        fresh = loss(net.eval(), torch.randint(VOCAB, (1000, LENGTH + 1))).item()  # 16 000 predictions
    if mask.causal:
        assert fresh >= math.log(VOCAB) - 0.02
    else:
        assert fresh < 0.1
