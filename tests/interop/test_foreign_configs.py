"""config.json is not trusted: what is not supported is refused by name, and what makes no sense in one sentence."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from published import FAMILIES, LLAMA3, saved, told

from emformer import interop
from emformer.parts import UserError

CONFIG = {
    "gpt2": dict(vocab="vocab_size", dim="n_embd", depth="n_layer", heads="n_head", context="n_positions"),
    "llama": dict(vocab="vocab_size", dim="hidden_size", depth="num_hidden_layers", heads="num_attention_heads"),
}
CONFIG["bert"] = CONFIG["neox"] = CONFIG["llama"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {case: saved(case, tmp_path_factory.mktemp(case)) for case in FAMILIES.values()}


@pytest.fixture
def checkpoint(checkpoints, tmp_path):
    """case -> a folder of its own whose config.json may be changed."""

    def of(case: str) -> Path:
        for file in checkpoints[case].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    return of


def refused(folder: Path, sentence: str) -> None:
    start = time.perf_counter()
    with pytest.raises(UserError, match=sentence) as error:
        interop.read(folder)
    text = str(error.value)
    assert "\n" not in text and len(text) < 600 and text.endswith(".") and time.perf_counter() - start < 5


ROPE = {key: value for key, value in LLAMA3.items() if key != "rope_type"}


@pytest.mark.parametrize(
    ("case", "changes", "sentence"),
    [
        ("llama", {"sliding_window": 4096}, "sliding_window asks for attention in a sliding window"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layers of 'sliding_attention'"),
        ("llama", {"num_local_experts": 8}, "a mixture of experts"),
        ("llama", {"alibi": True}, "ALiBi"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantised weights"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; silu"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "heads of which only a part turns"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rotary positions of their own"),
        *[
            (
                "llama",
                {"rope_parameters": ROPE | {"rope_type": kind}},
                f"rope_type '{kind}' is not supported; default, linear, llama3",
            )
            for kind in ("yarn", "dynamic", "longrope", "proportional")
        ],
        ("llama", {"rope_parameters": ..., "rope_scaling": {"type": "su", "factor": 2.0}}, "type 'su' is not supported"),
        ("neox", {"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic' is not supported"),
        ("neox", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported; gelu, gelu_new"),
        ("gpt2", {"add_cross_attention": True}, "cross attention"),
        ("gpt2", {"activation_function": "quick_gelu"}, "activation_function 'quick_gelu' is not supported; gelu, gelu_new"),
        ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned heads"),
        ("bert", {"is_decoder": True}, "is_decoder True is not supported"),
        (
            "bert",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type 'relative_key' is not supported; absolute",
        ),
        ("bert", {"hidden_act": "gelu_new"}, "hidden_act 'gelu_new' is not supported; gelu are"),
        ("gpt2", {"model_type": "mistral"}, "model_type 'mistral' is not supported; .*bert.*gpt2, gpt_neox, llama"),
        ("gpt2", {"model_type": ...}, "model_type is not said"),
        ("gpt2", {"model_type": ["gpt2"]}, "is not supported"),
    ],
)
def test_what_is_not_built_is_refused_by_name(case, changes, sentence, checkpoint):
    folder = checkpoint(case)
    told(folder, **changes)
    refused(folder, sentence)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("llama", {"sliding_window": None, "layer_types": ["full_attention"] * 3, "num_local_experts": 0, "alibi": False}),
        ("llama", {"sliding_window": 4096, "use_sliding_window": False}),
        ("gpt2", {"n_ctx": 20, "task_specific_params": {"a": {"b": 1}}, "pruned_heads": {}, "reorder_and_upcast_attn": True}),
        ("bert", {"position_embedding_type": "absolute", "quantization_config": None, "classifier_dropout": None}),
    ],
)
def test_what_asks_for_nothing_is_read(case, changes, checkpoint):
    folder = checkpoint(case)
    told(folder, **changes)
    assert interop.read(folder).settings.depth == 3


@pytest.mark.parametrize("value", [..., None, 0, -3, 2.5, "12", [3], {}, True, 10**12, 10**400, 1e300], ids=lambda v: str(v)[:9])
@pytest.mark.parametrize("case", CONFIG)
@pytest.mark.parametrize("size", ["vocab", "dim", "depth", "heads"])
def test_sizes_that_are_none(case, size, value, checkpoint):
    folder, name = checkpoint(case), CONFIG[case][size]
    told(folder, **{name: value})
    if value is ... or value is None:
        refused(folder, f"config.json does not say '{name}'")
    else:
        refused(folder, f"config.json: {name} is .*; it should be a whole number from 1 to 2147483647")


@pytest.mark.parametrize("value", [2, 5, 48, 10**6, 2**31 - 1])
@pytest.mark.parametrize("case", CONFIG)
@pytest.mark.parametrize("size", ["vocab", "dim", "depth", "heads"])
def test_sizes_that_the_tensors_do_not_have(case, size, value, checkpoint):
    """Found before a model of that size is built. A number of heads that divides d would be another model of the same tensors."""
    folder = checkpoint(case)
    told(folder, **{CONFIG[case][size]: value})
    if size == "heads" and 24 % value == 0 and (case, value) not in (("llama", 2), ("neox", 2)):
        assert interop.read(folder).settings.heads == value
    elif size == "depth" and value == 2:
        refused(folder, "no place for the tensor '.*2")
    else:
        refused(folder, "missing|shape|does not divide|hold .* tensors|would turn")


@pytest.mark.parametrize(
    ("case", "changes", "sentence"),
    [
        ("gpt2", {"layer_norm_epsilon": "tiny"}, "layer_norm_epsilon is 'tiny'; it should be a number"),
        ("gpt2", {"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon is -1e-05"),
        ("gpt2", {"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ("gpt2", {"scale_attn_weights": "yes"}, "scale_attn_weights is 'yes'; it should be true or false"),
        ("gpt2", {"n_inner": 0}, "n_inner is 0"),
        ("gpt2", {"n_positions": 21}, r"'wpe.weight' has the shape \[20, 24\], and config.json asks for \[21, 24\]"),
        ("gpt2", {"activation_function": {"a": 1}}, "activation_function {'a': 1} is not supported"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ("llama", {"head_dim": 7}, "7 of 7 coordinates of a head would turn"),
        ("llama", {"head_dim": None, "hidden_size": 25}, "num_attention_heads 4 does not divide hidden_size 25"),
        ("llama", {"head_dim": 10**6}, "has the shape"),
        ("llama", {"rope_parameters": [1]}, r"rope_parameters is \[1\]; it should be a dictionary"),
        ("llama", {"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0; it should be a positive number"),
        ("llama", {"rope_parameters": {"rope_theta": 10**400}}, "rope_theta is .*; it should be a positive number"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "does not say 'factor'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "does not say 'low_freq_factor'"),
        ("llama", {"rope_parameters": LLAMA3 | {"high_freq_factor": 0.5}}, "high should be above low"),
        ("neox", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "3 of 8 coordinates of a head would turn"),
        ("neox", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "12 of 8 coordinates"),
        ("bert", {"type_vocab_size": 3}, r"token_type_embeddings.weight' has the shape \[2, 24\]"),
    ],
)
def test_facts_that_make_no_sense(case, changes, sentence, checkpoint):
    folder = checkpoint(case)
    told(folder, **changes)
    refused(folder, sentence)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"[1, 2]", "holds no settings"),
        (b'"gpt2"', "holds no settings"),
        (b" " * (1 << 24) + b"{}", "holds no settings"),
        (b'{"model_type": "' + b"x" * 5000 + b'"}', "model_type 'xxx"),
        (json.dumps({"model_type": "gpt2", "n_embd": "1\n2"}).encode(), "does not say 'vocab_size'"),
        (b'{"model_type": "gpt2", "vocab_size": ' + b"9" * 5000 + b"}", "JSON|vocab_size is"),
    ],
    ids=range(10),
)
def test_files_that_are_no_config(content, sentence, checkpoint):
    folder = checkpoint("gpt2")
    (folder / "config.json").write_bytes(content)
    refused(folder, sentence)


def test_a_folder_without_config(tmp_path):
    refused(tmp_path, "has no config.json; name a folder that a model was saved to")
    os.mkfifo(tmp_path / "config.json")  # whoever opened it would wait for a writer
    refused(tmp_path, "has no config.json")
