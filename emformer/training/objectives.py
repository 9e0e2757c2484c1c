"""Objectives: what the model is trained for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emformer import parts
from emformer.parts import UserError

IGNORE = -100  # the target of a position that carries no loss


@dataclass(frozen=True)
class NextToken(parts.Objective):
    """Predict the next token at every position; in nats per token, and in bits per byte of the text.

    Needs causal masks: under any other, position i sees its own target (math A.8, J 8).
    """

    @property
    def unit(self) -> str:
        return "nats per token"

    @property
    def covers_text(self) -> bool:
        return True

    @property
    def extra_tokens(self) -> int:
        return 0

    def check(self, masks: Sequence[parts.Mask]) -> None:
        for layer, mask in enumerate(masks):
            if not mask.causal:
                raise UserError(
                    f"objective NextToken with the mask {type(mask).__name__} in layer {layer}: position i would see token "
                    "i+1, its own target, and the loss would fall to zero without anything learned; "
                    "use the mask Causal, or the objective MaskedToken."
                )

    def cut(self, windows: np.ndarray, rng: np.random.Generator, vocab: int) -> tuple[np.ndarray, np.ndarray]:
        return windows[:, :-1], windows[:, 1:]


@dataclass(frozen=True)
class MaskedToken(parts.Objective):
    """Predict masked tokens: a share of the positions is chosen, of which 80 % show a mask token, 10 % a random token and
    10 % themselves; the loss is taken on the chosen positions, in nats per masked token. Legal under every mask (math A.8).

    Args:
        share: of the positions that are chosen, in (0, 1).
        mask_token: its id, where the tokenizer has one; null for one id beyond its vocabulary.
    """

    share: float = 0.15
    mask_token: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"MaskedToken: share is {self.share}; choose a share of the positions in (0, 1).")
        if self.mask_token is not None and self.mask_token < 0:
            raise UserError(
                f"MaskedToken: mask_token is {self.mask_token}; choose the id of the tokenizer's mask token, or null."
            )

    @property
    def unit(self) -> str:
        return "nats per masked token"

    @property
    def covers_text(self) -> bool:
        return False

    @property
    def extra_tokens(self) -> int:
        return 1 if self.mask_token is None else 0

    def check(self, masks: Sequence[parts.Mask]) -> None:
        pass

    def cut(self, windows: np.ndarray, rng: np.random.Generator, vocab: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = windows[:, :-1]
        chosen = rng.random(tokens.shape) < self.share
        chosen[:, 0] |= ~chosen.any(1)  # a window without any would have no loss to average
        fate = rng.random(tokens.shape)
        random = rng.integers(0, vocab, tokens.shape)
        shown = np.where(fate < 0.8, vocab if self.mask_token is None else self.mask_token, np.where(fate < 0.9, random, tokens))
        return np.where(chosen, shown, tokens), np.where(chosen, tokens, IGNORE)
