"""What looking costs: every cloud and every pattern of a model, against that model's plain forward pass elsewhere."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emformer import interop
from emformer.trajectory import Trajectory
from emformer.trajectory import capture as captured

Timing = Callable[[Callable[[], Any], Callable[[], Any], int, int], dict]
PROMPTS, TOKENS = 8, 256
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def capture(alternating: Timing, rounds: int) -> dict:
    """clouds and patterns of GPT-2, 8 x 256 tokens, closure asserted / transformers forward   goal <= 1.3"""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(attn_implementation="sdpa")).eval()  # 12 layers, d = 768, 12 heads
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = interop.read(Path(folder)).model.to(DEVICE).eval()
    theirs = theirs.to(DEVICE)
    tokens = torch.randint(theirs.config.vocab_size, (PROMPTS, TOKENS), device=DEVICE)

    def look() -> tuple[Trajectory, list[Tensor]]:
        found = captured(ours, tokens)
        return found, [found.pattern(k) for k in found.attentions]

    @torch.no_grad()
    def forward() -> Tensor:
        return theirs(tokens, use_cache=False).logits

    # the same numbers are looked at, or there is nothing to compare
    read = look()[0].states[-1].read
    assert read is not None
    logits = forward()
    with torch.no_grad():
        assert (ours.unembedding(read) - logits).norm() < 1e-4 * logits.norm()
    return alternating(look, forward, rounds, 1) | {"goal": "<= 1.3"}


BENCHES = (capture,)
