"""Out to the architectures of others: an Emformer that fits GPT-2 or Llama as a folder that `transformers` loads.

What they have no name for is folded into what they have: beta and the scale of M into the query weights, the step size into the
output weights, what is absent into zeros and ones. GPT-2's heads are d/H wide, so a form or a content of higher rank is cut to
its best factors of that rank, and the report says what was lost. Llama's heads are as wide as they need to be. Anything else is
refused by name. What was written is read back and compared with the model before the folder takes its place.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from emformer.interop import read, to_gpt2, to_llama
from emformer.interop.outward import Truncation, Written, lossless
from emformer.interop.own import named, write_weights, writing
from emformer.model import Emformer
from emformer.parts import UserError
from emformer.text.tokenizers import SEPARATOR, UNKNOWN, save

FORMATS: dict[str, Callable[[Emformer, torch.dtype], Written]] = {"gpt2": to_gpt2.write, "llama": to_llama.write}


@dataclass(frozen=True)
class Report:
    """What an export did.

    `width` of a head; `parameters` written; `folded`: what went into what, a line each; `truncation`: of layers whose operators
    were cut; `error`: Frobenius norm of the difference of the logits over that of the model's own, on random tokens, of what was
    read back, rounding to its type included.
    """

    folder: Path
    family: str
    layers: int
    heads: int
    dim: int
    width: int
    parameters: int
    folded: tuple[str, ...]
    truncation: tuple[Truncation, ...]
    error: float

    @property
    def exact(self) -> bool:
        """Whether nothing was lost: no operator was cut, or none that had more than it kept."""
        return lossless(self.truncation)

    def __str__(self) -> str:
        lines = [
            f"{self.family:<11} {self.layers} layers of {self.heads} heads, {self.width} wide, d = {self.dim}, "
            f"{self.parameters:,} parameters",
            *(f"{'folded' if k == 0 else '':<11} {line}" for k, line in enumerate(self.folded)),
        ]
        for k, cut in enumerate(self.truncation):
            lines.append(
                f"{'cut to rank' if k == 0 else '':<11} layer {cut.layer}: |M - M_r|/|M| {cut.form:.2e}, "
                f"|F - F_r|/|F| {cut.content:.2e} (the worst head)"
            )
        lines.append(f"{'logits':<11} relative error {self.error:.1e} on random tokens, read back")
        return "\n".join(lines)


@torch.no_grad()
def export(
    model: Emformer,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    to: str = "gpt2",
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Report:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads, with the logits of `model`.

    GPT-2 (`to="gpt2"`): LayerNorm before each sublayer, softmax under the causal mask, GELU, learned positions or none. M and F
    may be of any kind; of rank up to d/H they are exact. Beyond, each head keeps the best rank-d/H approximation, in the
    Frobenius norm, of its *effective* form together with its functional of the key, and of its effective content: on tokens
    as they leave the norm, before gain and bias. What the cut changes in the drift is corrected.

    Llama (`to="llama"`): RMSNorm, softmax under the causal mask, RoPE on all of the factors, SwiGLU. Heads are as wide as the
    wider of M and F (`head_dim`), always exact: a form narrower than that keeps its angles by another base. A dense M makes
    heads of width d that share one key, the token itself.

    Args:
        model: is left as it is.
        tokenizer: is written beside it, so that `AutoTokenizer` finds it; null for none.
        folder: appears whole or not at all.
        to: "gpt2" or "llama".
        dtype: of the weights written; null for the model's own.
        overwrite: replace a folder that holds a model and nothing else.

    Raises:
        UserError: for a model that does not fit, by name, and a folder that is taken; nothing is then written.

    Cost: memory for the weights written, those read back, and one layer in float64; where operators are cut, a singular value
    decomposition of a d x d matrix a head.
    """
    if to not in FORMATS:
        raise UserError(f"export: there is no format '{to}'; choose from {', '.join(FORMATS)}.")
    dtype = dtype or model.embedding.weight.dtype
    written = FORMATS[to](model, dtype)
    separator = None if tokenizer is None else tokenizer.token_to_id(SEPARATOR)
    config = {**written.config, "dtype": named(dtype), "bos_token_id": separator, "eos_token_id": separator, "use_cache": True}
    with writing(folder, overwrite) as partial:
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_weights(written.tensors, partial)
        if tokenizer is not None:
            _write_tokenizer(tokenizer, partial, model.settings.context)
        error = _difference(model, read(partial, dtype).model)
        # rounding is of the size of eps and grows with depth; beyond its root the model does something that was not written
        eps = max(torch.finfo(one).eps for one in (dtype, model.embedding.weight.dtype))
        if lossless(written.truncation) and not error <= 10 * eps**0.5:
            changed = f", which was changed by surgery ({'; '.join(model.surgery)})" if model.surgery else ""
            raise UserError(
                f"export: what was written for {to} gives other logits than this model{changed} (relative error {error:.1e}); "
                "it is not kept."
            )
    settings = model.settings
    return Report(
        Path(folder),
        to,
        settings.depth,
        settings.heads,
        settings.dim,
        written.width,
        sum(tensor.numel() for tensor in written.tensors.values()),
        tuple(written.folded),
        tuple(written.truncation),
        error,
    )


def _write_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """tokenizer.json, and the file that tells `AutoTokenizer` to take it as it is."""
    save(tokenizer, folder / "tokenizer.json")
    special = {"bos_token": SEPARATOR, "eos_token": SEPARATOR, "unk_token": UNKNOWN}
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **{role: token for role, token in special.items() if tokenizer.token_to_id(token) is not None},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _difference(model: Emformer, other: Emformer) -> float:
    """|logits - other's|/|logits| on four random texts of the context's length, at most 64 tokens."""
    device = model.embedding.weight.device
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab, (4, min(model.settings.context, 64)), generator=draw)
    training = model.training
    try:
        wanted = model.eval()(tokens.to(device)).cpu().double()
    finally:
        model.train(training)
    found = other.eval()(tokens).double()
    size = float(wanted.norm())
    return float((found - wanted).norm()) / size if size else float(found.norm())
