"""Out: what `transformers` computes from an exported folder is what the model computes, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import model, words
from published import Wide, distance

from emformer import parts, surgery
from emformer.block import Parallel, PostNorm
from emformer.ffn import GELU, ExactGELU, ReLU2, SwiGLU
from emformer.interop import read
from emformer.interop.export import export
from emformer.kernels import SinkSoftmax, Softmax
from emformer.masks import All, Causal, Window
from emformer.model import Emformer
from emformer.norms import LayerNorm, RMSNorm
from emformer.operators import (
    PSD,
    Dense,
    Identity,
    LowRank,
    Preconditioned,
    ScaledOrthogonal,
    Skew,
    Split,
    Symmetric,
    Tied,
)
from emformer.parts import UserError
from emformer.placements import SandwichNorm, Sphere
from emformer.positions import InterpolatedRoPE, KeyNorm, Llama3RoPE, RoPE
from emformer.settings import Drift, Embedding, Functional, Learned
from emformer.text import BPE, Characters

LEGIBLE = Embedding(unembed_std=0.3, positions=Learned())
AS_GPT2: dict[str, Any] = dict(
    norm=LayerNorm(bias=True),
    ffn=GELU(bias=True),
    functional=Functional(),
    drift=Drift(),
    embedding=LEGIBLE,
    kernel=Softmax(beta=0.7),
    epsilon=0.6,
)
AS_LLAMA: dict[str, Any] = dict(
    norm=RMSNorm(),
    ffn=SwiGLU(bias=True),
    functional=Functional(),
    drift=Drift(),
    positions=[RoPE(base=100.0)],
    kernel=Softmax(beta=0.7),
    epsilon=0.6,
)


def drawn(seed: int = 0, dtype: torch.dtype = torch.float64, **fields: Any) -> Emformer:
    """A model with every weight and bias from N(0, .3^2), and gains around 1."""
    net = model(dtype=torch.float64, **fields)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            draw = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(draw + 1 if name.endswith("gain") else draw)
    return net.to(dtype)


@torch.no_grad()
def theirs(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of `transformers`, in float64 throughout; every tensor of the folder has its place there, and no other."""
    with Wide():
        net, told = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
        )
        logits = net.eval()(tokens).logits
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return logits


@torch.no_grad()
def agrees(net: Emformer, folder: Path, to: str) -> Any:
    report = export(net, None, folder, to)
    tokens = words(20)
    assert distance(theirs(folder, tokens), net(tokens)) < 1e-10 and report.error < 1e-10 and report.exact
    return report


GPT2S = {
    "every bias": {},
    "no bias, no gain, no network, no positions": dict(
        norm=LayerNorm(gain=False),
        ffn=None,
        functional=None,
        drift=None,
        embedding=Embedding(unembed_std=0.3),
        form=LowRank(rank=1),
    ),
    "tied, shared, groups": dict(
        embedding=Embedding(tied=True, positions=Learned()),
        shared=True,
        form=LowRank(rank=3, groups=1),
        content=LowRank(rank=2, groups=1),
    ),
    "psd and tied": dict(form=PSD(rank=3), content=Tied()),
    "symmetric, narrow": dict(form=Symmetric(rank=4), content=Preconditioned(), heads=2),
    "dense, one head": dict(form=Dense(), content=Split(theta=0.4), heads=1),
    "identity, one head": dict(form=Identity(), content=ScaledOrthogonal(), heads=1),
    "networks of two widths, exact gelu": dict(
        ffn=ExactGELU(), layers={0: {"ffn": ExactGELU(bias=True, hidden=13)}}, norm=LayerNorm(eps=1e-2)
    ),
    "layers that differ": dict(
        layers={1: {"form": LowRank(rank=2), "kernel": Softmax(beta=2.0), "drift": None, "ffn": None, "epsilon": -0.5}}
    ),
    "a mask that is causal": dict(mask=All((Causal(),))),
}


@pytest.mark.parametrize("case", GPT2S)
def test_as_gpt2(case: str, tmp_path: Path):
    agrees(drawn(**(AS_GPT2 | GPT2S[case])), tmp_path / "out", "gpt2")


LLAMAS = {
    "every bias": {},
    "groups, tied, no biases": dict(
        form=LowRank(rank=6, groups=1),
        content=LowRank(rank=6, groups=1),
        functional=None,
        drift=None,
        ffn=SwiGLU(),
        embedding=Embedding(tied=True),
    ),
    "a bias alone": dict(drift=None, ffn=SwiGLU(), norm=RMSNorm(gain=False, eps=1e-3)),
    "a drift alone": dict(functional=None, ffn=None),
    "content wider than the form, odd": dict(content=LowRank(rank=7, groups=1)),
    "dense content, llama3": dict(content=Dense(), positions=[Llama3RoPE(base=50.0, offset=3, factor=4.0, original=16)]),
    "dense form": dict(form=Dense(), content=LowRank(rank=3)),
    "dense, linear": dict(form=Skew(), content=Dense(), positions=[InterpolatedRoPE(base=100.0, factor=3.0)], heads=4),
    "layers that differ": dict(
        layers={1: {"form": LowRank(rank=4, groups=1), "kernel": Softmax(), "ffn": None, "functional": None}}, heads=4
    ),
    "layers of two ranks that turn alike": dict(
        form=LowRank(rank=4), layers={1: {"form": LowRank(rank=2), "positions": (RoPE(base=10.0),)}}
    ),
}


@pytest.mark.parametrize("case", LLAMAS)
def test_as_llama(case: str, tmp_path: Path):
    agrees(drawn(**(AS_LLAMA | LLAMAS[case])), tmp_path / "out", "llama")


# What is cut ----------------------------------------------------------------------------------------------------------


def effective(net: Emformer, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """M, u, F, g on tokens before gain and offset, written here (math A.6)."""
    block = net.layer(layer)
    (m, f), norm, d = block.attention.matrices(), block.read_attn, net.settings.dim
    pi = torch.eye(d, dtype=torch.float64) - 1 / d
    a, b = norm.gain.diag() @ pi, norm.bias
    u, drift = block.attention.functional(), block.attention.drift
    return a.T @ m @ a, (m.mT @ b + u) @ a, f @ a, drift + (f @ b).sum(0)


@pytest.mark.parametrize("to_cut", ["both", "form", "content"])
@torch.no_grad()
def test_wider_operators_are_cut_as_well_as_can_be(to_cut: str, tmp_path: Path):
    """Form and functional together, and content, are the best of their rank; the drift is what it was."""
    fields = dict(
        form=LowRank(rank=4) if to_cut == "content" else Dense(), content=LowRank(rank=4) if to_cut == "form" else Dense()
    )
    net = drawn(**(AS_GPT2 | fields | dict(epsilon=1.0, kernel=Softmax())))
    report = export(net, None, tmp_path / "out", "gpt2")
    assert not report.exact and [cut.layer for cut in report.truncation] == [0, 1]
    back = read(tmp_path / "out", torch.float64).model
    for cut in report.truncation:
        m, u, f, g = effective(net, cut.layer)
        new_m, new_u, new_f, new_g = effective(back, cut.layer)
        assert torch.allclose(new_g, g, atol=1e-12)
        joint, new = torch.cat([m, u[:, None]], 1), torch.cat([new_m, new_u[:, None]], 1)
        for whole, part in ((joint, new), (f, new_f)):
            tail = torch.linalg.svdvals(whole)[:, 4:].square().sum(-1).sqrt()  # Eckart and Young
            assert torch.allclose((whole - part).norm(dim=(1, 2)), tail, atol=1e-12)
        for value, whole, part in ((cut.form, m, new_m), (cut.content, f, new_f)):
            assert value == pytest.approx(float(((whole - part).norm(dim=(1, 2)) / whole.norm(dim=(1, 2))).max()), abs=1e-12)
        assert (cut.form > 0.1) == (to_cut != "content") and (cut.content > 0.1) == (to_cut != "form")
        assert f"layer {cut.layer}: |M - M_r|/|M| {cut.form:.2e}, |F - F_r|/|F| {cut.content:.2e}" in str(report)
    tokens = words(20)
    other = theirs(tmp_path / "out", tokens)
    assert distance(other, back(tokens)) < 1e-10
    assert 1e-4 < report.error < 1 and 0.2 < report.error / distance(other, net(tokens)) < 5  # on other tokens


@torch.no_grad()
def test_wide_operators_of_low_rank_lose_nothing(tmp_path: Path):
    """A dense M of rank d/H, with a functional in the span of its keys, is written exactly."""
    net = drawn(**(AS_GPT2 | dict(form=Dense(), content=Dense())))
    for layer in (0, 1):
        attention, low = net.layer(layer).attention, torch.randn(2, 4, 8, dtype=torch.float64)
        attention.form.left_factor.copy_(low.mT @ torch.randn(2, 4, 8, dtype=torch.float64))
        attention.biases.left.copy_((torch.randn(2, 1, 4, dtype=torch.float64) @ low).squeeze(1))
        attention.content.left_factor.copy_(torch.randn(2, 8, 4, dtype=torch.float64) @ torch.randn(2, 4, 8, dtype=torch.float64))
    report = agrees(net, tmp_path / "out", "gpt2")
    assert all(max(cut.form, cut.content) < 1e-12 for cut in report.truncation) and len(report.truncation) == 2


# Types, tokenizers, folders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("to", "fields"), [("gpt2", AS_GPT2), ("llama", AS_LLAMA)])
def test_types(to: str, fields: dict[str, Any], tmp_path: Path):
    """Written as asked; the error told is that of the rounding."""
    net = drawn(dtype=torch.float32, **fields)
    for dtype, low, high in ((None, 0, 1e-4), (torch.bfloat16, 1e-4, 0.2), (torch.float64, 0, 1e-4)):
        report = export(net, None, tmp_path / str(dtype), to, dtype=dtype)
        assert low <= report.error < high
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(dtype), dtype="auto")
        assert {parameter.dtype for parameter in found.parameters()} == {dtype or torch.float32}
        assert json.loads((tmp_path / str(dtype) / "config.json").read_text())["dtype"] == str(dtype or torch.float32)[6:]
        assert report.parameters == sum(parameter.numel() for parameter in found.parameters())


def test_the_model_is_left_as_it_is(tmp_path: Path):
    net = drawn(**(AS_GPT2 | dict(form=Dense(), dropout=0.5))).train()
    before, draws = {name: value.clone() for name, value in net.state_dict().items()}, torch.get_rng_state()
    export(net, None, tmp_path / "out", "gpt2")
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), draws) and all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("setting", [BPE(vocab=300), Characters()])
def test_the_tokenizer_comes_along(setting: parts.Tokenizer, tmp_path: Path):
    text = "the quick brown fox jumps over the lazy dog, twice."
    tokenizer = setting.build(iter([text * 9]))
    net = drawn(**AS_LLAMA, vocab=300)
    export(net, tokenizer, tmp_path / "out", "llama")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found(text).input_ids == tokenizer.encode(text).ids
    assert found.decode(tokenizer.encode(text).ids) == text
    assert found.eos_token_id == 0 and found.model_max_length == 24
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.eos_token_id == config.bos_token_id == 0
    again = read(tmp_path / "out").tokenizer
    assert again is not None and again.encode(text).ids == tokenizer.encode(text).ids


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_is_replaced_only_if_asked_and_only_a_model(tmp_path: Path):
    one, other = drawn(**AS_GPT2), drawn(seed=1, **AS_GPT2)
    out = tmp_path / "out"
    out.mkdir()  # an empty one is as good as none
    export(one, None, out, "gpt2")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="not empty"):
        export(other, None, out, "gpt2")
    assert contents(tmp_path) == before
    export(other, None, out, "gpt2", overwrite=True)
    assert contents(tmp_path).keys() == before.keys() and contents(tmp_path) != before
    for name, told in (("notes.txt", "notes.txt, which is no part"), ("config.yaml", "config.yaml, which is no part")):
        (out / name).write_text("mine")
        before = contents(tmp_path)
        with pytest.raises(UserError, match=told):
            export(one, None, out, "gpt2", overwrite=True)
        assert contents(tmp_path) == before
        (out / name).unlink()
    (out / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no config\.json of a model"):
        export(one, None, out, "gpt2", overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        export(one, None, out / "config.json", "gpt2", overwrite=True)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from emformer.interop import own

    net, out = drawn(**AS_GPT2), tmp_path / "out"
    export(net, None, out, "gpt2")
    before = contents(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise own.SafetensorError("No space left on device")

    monkeypatch.setattr(own, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        export(drawn(seed=1, **AS_GPT2), None, out, "gpt2", overwrite=True)
    assert contents(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


# What does not fit ----------------------------------------------------------------------------------------------------

REFUSED = {
    "placement": ("gpt2", dict(placement=PostNorm()), "layer 0 has the placement PostNorm"),
    "sphere": ("llama", dict(placement=Sphere()), "placement Sphere"),
    "sandwich": ("llama", dict(placement=SandwichNorm()), "placement SandwichNorm"),
    "arrangement": ("gpt2", dict(arrangement=Parallel()), "arrangement Parallel"),
    "norm": ("gpt2", dict(norm=RMSNorm()), "norm RMSNorm, and GPT-2 has LayerNorm"),
    "no norm": ("gpt2", dict(norm=None), "the norm None"),
    "their norm": ("llama", dict(norm=LayerNorm()), "norm LayerNorm, and Llama has RMSNorm"),
    "kernel": ("gpt2", dict(kernel=SinkSoftmax()), "kernel SinkSoftmax"),
    "kernel without weights": ("llama", dict(kernel=SinkSoftmax(learned=False)), "kernel SinkSoftmax"),
    "mask": ("gpt2", dict(layers={1: {"mask": All((Causal(), Window(3)))}}), "layer 1 has the mask All"),
    "network": ("gpt2", dict(ffn=ReLU2()), "FFN ReLU2, and GPT-2 has GELU or ExactGELU"),
    "their network": ("llama", dict(ffn=GELU()), "FFN GELU, and Llama has SwiGLU"),
    "two networks": ("gpt2", dict(layers={0: {"ffn": ExactGELU()}}), "networks of different kinds"),
    "rope": ("gpt2", dict(positions=[RoPE()]), "positions RoPE, and GPT-2 has learned ones"),
    "no rope": ("llama", dict(positions=[]), "layer 0 has no positions, and Llama has RoPE"),
    "norms of keys": ("llama", dict(positions=[RoPE(), KeyNorm()]), "positions RoPE, KeyNorm"),
    "part of rope": ("llama", dict(positions=[RoPE(fraction=0.5)]), "RoPE on 0.5 of its factors"),
    "two ropes": ("llama", dict(layers={1: {"positions": (RoPE(base=7.0),)}}), "layers that turn at different rates"),
    "two kinds of rope": ("llama", dict(layers={1: {"positions": (InterpolatedRoPE(base=100.0),)}}), "turn at different rates"),
    "learned positions": ("llama", dict(embedding=LEGIBLE), "learned positions, and Llama has RoPE"),
    "two eps": ("gpt2", dict(layers={0: {"norm": LayerNorm(bias=True, eps=1e-3)}}), "norms with eps 1e-05 and 0.001"),
    "odd heads": ("gpt2", dict(heads=3), "3 heads in 8 dimensions"),
    "norm of the embedding": ("gpt2", dict(embedding=Embedding(norm=LayerNorm())), "weights 'embedding_norm.gain'"),
    "bias of the logits": ("llama", dict(embedding=Embedding(bias=True)), "weights 'unembedding.bias'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case: str, tmp_path: Path):
    to, fields, told = REFUSED[case]
    base = AS_GPT2 if to == "gpt2" else AS_LLAMA
    with pytest.raises(UserError, match=told) as caught:
        export(model(**(base | fields)), None, tmp_path / "out", to)
    assert f"export to {to}" in str(caught.value) and "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_base_beyond_float32_is_refused(tmp_path: Path):
    fields = AS_LLAMA | dict(form=LowRank(rank=2), content=LowRank(rank=40), positions=[RoPE(base=100.0)])
    with pytest.raises(UserError, match=r"rank 2 in heads 40 wide, which needs the base 1e\+40"):
        export(model(**fields), None, tmp_path / "out", "llama")


def test_a_format_that_is_none(tmp_path: Path):
    with pytest.raises(UserError, match="no format 'mamba'; choose from gpt2, llama"):
        export(model(**AS_GPT2), None, tmp_path / "out", "mamba")


def test_what_a_surgery_leaves_plain_is_exported(tmp_path: Path):
    net = drawn(**AS_GPT2)
    agrees(surgery.skip(net, "attn", heads=[1]), tmp_path / "one", "gpt2")
    agrees(surgery.skip(net, "ffn", layers=0), tmp_path / "two", "gpt2")
    agrees(surgery.swap_kernel(net, Softmax(beta=3.0)), tmp_path / "three", "gpt2")
    agrees(surgery.change_mask(surgery.change_mask(net, Window(size=2)), Causal()), tmp_path / "four", "gpt2")


def test_what_a_surgery_adds_is_refused(tmp_path: Path):
    net = drawn(**AS_GPT2)
    means = surgery.means(net, [words(12)])
    for changed in (
        surgery.mean_ablate(net, means, "attn", layers=0),
        surgery.mean_ablate(net, means, "ffn", layers=0),
        surgery.remove_sink(net, position=0),
    ):
        with pytest.raises(UserError, match="export"):
            export(changed, None, tmp_path / "out", "gpt2")
        assert not list(tmp_path.iterdir())
