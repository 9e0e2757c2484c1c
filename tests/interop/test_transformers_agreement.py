"""Models of four families, read as M and F, are the library's own: logits, states, attention, and their rounding."""

from __future__ import annotations

import published
import pytest
import torch
import transformers
from published import CASES, FAMILIES, T, distance, drawn, saved, truth, words

import emformer as emf
from emformer import diagnostics, inspection, interop, parts
from emformer.configuration import revive
from emformer.model import Emformer
from emformer.observables.frame import defaults
from emformer.parts import UserError

EVERY = pytest.mark.parametrize("case", CASES)
PLAIN = pytest.mark.parametrize("case", FAMILIES.values())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """case -> the folder of its checkpoint."""
    made = {}

    def of(case: str):
        if case not in made:
            made[case] = saved(case, tmp_path_factory.mktemp("checkpoint"))
        return made[case]

    return of


@EVERY
@torch.no_grad()
def test_logits_states_and_patterns_in_float64(case, checkpoint):
    """Largest error measured 1e-15."""
    tokens, folder = words(), checkpoint(case)
    expected, found = truth(case, folder, tokens), interop.read(folder, torch.float64)
    assert distance(found.model(tokens), expected.logits) < 1e-10
    trajectory = emf.capture(found.model, tokens)
    layers = [state.x for state in trajectory.states if state.point != "attn"]
    # the library's last state is behind the closing norm
    layers[-1] = found.model.norm(layers[-1])
    assert len(layers) == len(expected.hidden_states) == 4
    for x, state in zip(layers, expected.hidden_states, strict=True):
        assert distance(x, state) < 1e-10
    for k, pattern in zip(trajectory.attentions, expected.attentions, strict=True):
        assert distance(trajectory.pattern(k), pattern) < 1e-10
    # what is compared is no uniform attention (deeper, tokens may have become alike), in nats over the tokens of the second half
    a = trajectory.pattern(0)
    entropy = -(a.clamp(min=1e-300).log() * a).sum(-1)
    assert ((a > 0).sum(-1).log() - entropy)[..., T // 2 :].mean() > 0.3


@EVERY
@torch.no_grad()
def test_rounding_in_float32_is_no_worse_than_the_librarys(case, tmp_path):
    """Relative to float64, in each of four draws of the weights; measured 0.7 to 1.4 times the library's."""
    tokens = words()
    for seed in range(4):
        folder = saved(case, tmp_path / str(seed), seed)
        exact = truth(case, folder, tokens).logits
        library = getattr(transformers, CASES[case][0]).from_pretrained(folder).eval()
        assert 0 < distance(interop.read(folder).model(tokens), exact) <= 2 * distance(library(tokens).logits, exact)


@EVERY
def test_a_model_is_built_without_a_draw(case, checkpoint):
    folder, before = checkpoint(case), torch.get_rng_state()  # making the folder draws
    found = interop.read(folder)
    assert torch.equal(torch.get_rng_state(), before)
    model = found.model
    assert not model.training and found.masked == case.startswith("bert") and found.tokenizer is None
    assert found.settings is model.settings and FAMILIES[found.family] == case.split(",")[0]
    assert {p.device.type for p in model.parameters()} == {"cpu"} and {p.dtype for p in model.parameters()} == {torch.float32}
    tied = model.settings.embedding.tied
    assert tied == (model.unembedding.weight is model.embedding.weight)
    assert tied == drawn(case).config.tie_word_embeddings


@EVERY
@torch.no_grad()
def test_settings_survive_as_plain_data(case, checkpoint):
    """What our own checkpoints hold: settings as plain data, and `state_dict`."""
    model, tokens = interop.read(checkpoint(case), torch.float64).model, words()
    around = {
        "data": {"corpus": {"class_path": "PythonDocs"}, "tokenizer": {"class_path": "Bytes"}},
        "training": {"objective": {"class_path": "NextToken"}, "optimizer": {"class_path": "AdamW"}},
    }
    settings = revive({"model": parts.plain(model.settings), **around}).model
    assert settings == model.settings
    twin = Emformer(model.vocab, **vars(settings)).double().eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(tokens), model(tokens))


@EVERY
@torch.no_grad()
def test_decoding_with_a_memory_is_the_whole_pass(case, checkpoint):
    model, tokens = interop.read(checkpoint(case), torch.float64).model, words()
    if case.startswith("bert"):
        with pytest.raises(UserError, match="not causal"):
            model.generate(tokens, 1)
        return
    memory = model.memory()
    pieces = tokens.split([6, *[1] * (T - 6)], 1)
    steps = [last for piece in pieces for *_, last in [model.flow(piece, memory)]]
    found = torch.cat([model.unembed(step.after) for step in steps], 1)
    assert distance(found, model(tokens)) < 1e-12
    library = getattr(transformers, CASES[case][0]).from_pretrained(checkpoint(case), dtype=torch.float64)
    greedy = library.generate(tokens[:, :6], max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert torch.equal(model.generate(tokens[:, :6], 8, temperature=0.0), greedy)


@PLAIN
def test_everything_can_be_observed(case, checkpoint):
    """Every family of observables has finite rows of every layer, closure holds, and `info` tells of the operators."""
    model = interop.read(checkpoint(case)).model
    tokens = words(batch=12)
    trajectory = emf.capture(model, tokens, labels=tokens % 3)
    ours = [one for one in defaults() if type(one).__module__.startswith("emformer.")]  # not those of other tests
    frame = emf.observe(trajectory, ours)
    expected = {"flow", "clu", "geo", "breath", "attn", "fol", "sink", "spec", "op", "signal", "lens", "gauss"}
    if case in ("gpt2", "bert"):  # positions that turn make no matrix
        expected.add("wgf")
    assert set(frame["key"].str.split(".").str[0]) == expected
    for family in ("flow.speed_rel", "clu.mean_cos", "attn.entropy_norm", "op.asym", "lens.entropy"):
        rows = frame[frame["key"] == family]
        assert len(rows) and rows["mean"].notna().all(), family
    assert set(frame[frame["key"] == "op.asym"]["layer"]) == {0, 1, 2}
    assert len(diagnostics.diagnose(model)) == 3 * model.settings.heads
    counted = inspection.costs(model.vocab, model.settings)
    assert counted.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("case", "bare"),
    [("gpt2", "GPT2Model"), ("llama, one group, no biases, tied", "LlamaModel"), ("neox, linear, tied", "GPTNeoXModel")],
)
@torch.no_grad()
def test_names_without_the_prefix_of_a_head(case, bare, tmp_path):
    """A bare model, as the hub's gpt2 is saved: no prefix and no head, which is tied."""
    model, tokens = drawn(case), words()
    body = getattr(model, model.base_model_prefix)
    assert type(body).__name__ == bare
    body.save_pretrained(tmp_path / "bare")
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(interop.read(tmp_path / "bare").model(tokens), interop.read(tmp_path / "whole").model(tokens))


@torch.no_grad()
def test_tied_on_paper_only(tmp_path):
    """Both tensors in the file, and different: the library believes the weights, and so do we."""
    folder, tokens = saved("gpt2, exact gelu, unscaled, untied", tmp_path), words()
    published.told(folder, tie_word_embeddings=True)
    found = interop.read(folder, torch.float64)
    assert not found.settings.embedding.tied
    assert distance(found.model(tokens), truth("gpt2", folder, tokens).logits) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision_is_widened_before_anything_is_computed(dtype, tmp_path):
    model, tokens = drawn("llama").to(dtype), words()
    model.save_pretrained(tmp_path / "half")
    model.float().save_pretrained(tmp_path / "wide")
    published.told(tmp_path / "wide", dtype="float32")
    halves, wide = (interop.read(tmp_path / name).model for name in ("half", "wide"))
    assert torch.equal(halves(tokens), wide(tokens))


OLD = {
    "llama": dict(rope_parameters=..., rope_theta=50.0, rope_scaling=None),
    "llama, linear": dict(rope_parameters=..., rope_theta=100.0, rope_scaling={"type": "linear", "factor": 3.0}),
    "llama, llama3": dict(
        rope_parameters=..., rope_theta=50.0, rope_scaling={k: v for k, v in published.LLAMA3.items() if k != "rope_theta"}
    ),
    "neox": dict(rope_parameters=..., rotary_pct=0.5, rotary_emb_base=100.0),
    "gpt2": dict(n_inner=..., scale_attn_weights=..., scale_attn_by_inverse_layer_idx=..., tie_word_embeddings=...),
    "bert": dict(tie_word_embeddings=..., type_vocab_size=2, layer_norm_eps=...),
}


@pytest.mark.parametrize("case", OLD)
@torch.no_grad()
def test_keys_of_older_configs(case, tmp_path):
    folder, tokens = saved(case, tmp_path), words()
    published.told(folder, **OLD[case])
    expected = truth(case, folder, tokens).logits
    assert distance(interop.read(folder, torch.float64).model(tokens), expected) < 1e-10
