"""Checkpoints as the transformers library writes them, small and with every feature, and the library itself as the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

V, D, T = 37, 24, 17  # vocabulary, dimension, tokens

GPT2 = dict(vocab_size=V, n_embd=D, n_layer=3, n_head=3, n_positions=20, bos_token_id=0, eos_token_id=0)
SIZES = dict(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=41,
    num_hidden_layers=3,
    max_position_embeddings=20,
    bos_token_id=0,
    eos_token_id=0,
)
LLAMA = SIZES | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=10, attention_bias=True, mlp_bias=True)
NEOX = SIZES | dict(num_attention_heads=3)
BERT = SIZES | dict(num_attention_heads=3)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=50.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)


def turning(kind: str, share: float = 0.5, **more: Any) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=100.0, partial_rotary_factor=share, **more))


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2, own width, by layer": (
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT2 | dict(n_inner=37, scale_attn_by_inverse_layer_idx=True, layer_norm_epsilon=1e-3),
    ),
    "gpt2, exact gelu, unscaled, untied": (
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT2 | dict(activation_function="gelu", scale_attn_weights=False, tie_word_embeddings=False),
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA | dict(rms_norm_eps=1e-3)),
    "llama, one group, no biases, tied": (
        "LlamaForCausalLM",
        "LlamaConfig",
        LLAMA | dict(num_key_value_heads=1, head_dim=None, attention_bias=False, mlp_bias=False, tie_word_embeddings=True),
    ),
    "llama, llama3": ("LlamaForCausalLM", "LlamaConfig", LLAMA | dict(rope_parameters=LLAMA3)),
    "llama, linear": (
        "LlamaForCausalLM",
        "LlamaConfig",
        LLAMA | dict(rope_parameters=dict(rope_type="linear", rope_theta=100.0, factor=3.0)),
    ),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX),
    "neox, in turn, half of the head": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        NEOX | dict(use_parallel_residual=False) | turning("default"),
    ),
    "neox, linear, tied": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        NEOX | dict(tie_word_embeddings=True, hidden_act="gelu_new") | turning("linear", factor=2.0),
    ),
    "neox, no attention biases": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        NEOX | dict(attention_bias=False, layer_norm_eps=1e-3) | turning("default", share=1.0),
    ),
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "bert, untied": (
        "BertForMaskedLM",
        "BertConfig",
        BERT | dict(tie_word_embeddings=False, type_vocab_size=3, layer_norm_eps=1e-3),
    ),
}
FAMILIES = {"gpt2": "gpt2", "llama": "llama", "gpt_neox": "neox", "bert": "bert"}  # the plain case of each


def drawn(case: str, seed: int = 0) -> Any:
    """The library's model in float32: every weight and bias from N(0, .3^2), gains of norms around 1. Its default draw, with
    zero biases and nearly uniform attention, would hide mistakes."""
    name, config, fields = CASES[case]
    model = getattr(transformers, name)(getattr(transformers, config)(**fields)).eval()
    generator = torch.Generator().manual_seed(seed)
    gains = {id(m.weight) for m in model.modules() if isinstance(m, nn.LayerNorm) or type(m).__name__.endswith("RMSNorm")}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((id(parameter) in gains) + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def saved(case: str, folder: Path, seed: int = 0) -> Path:
    """The folder, with a drawn checkpoint in it."""
    drawn(case, seed).save_pretrained(folder)
    return folder


class Wide(TorchFunctionMode):
    """Whoever asks for float32 gets float64.

    Without it the library is no oracle at 1e-10: it forms the angles of RoPE, the RMS norm and the softmax of Llama and NeoX in
    float32, whatever the type of the model.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


@torch.no_grad()
def truth(case: str, folder: Path, tokens: torch.Tensor) -> Any:
    """What the library makes of a checkpoint in float64 throughout: `.logits`, `.hidden_states`, `.attentions`."""
    with Wide():
        model = getattr(transformers, CASES[case][0]).from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        found = model.eval()(tokens, output_hidden_states=True, output_attentions=True)
    assert found.logits.dtype == torch.float64
    return found


def words(count: int = T, batch: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randint(V, (batch, count), generator=torch.Generator().manual_seed(seed))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def told(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; `...` takes one away."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
