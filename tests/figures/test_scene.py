"""Scenes: what is staged agrees with the model and with independent arithmetic; the file keeps it, and nothing else passes."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from builders import model, stir
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from emformer import capture
from emformer.diagnostics import effective
from emformer.figures import scene as staging
from emformer.figures.scene import Scene, stage
from emformer.figures.staged import ARRAYS
from emformer.kernels import L2, Linear, Sigmoid
from emformer.masks import Causal, Full
from emformer.norms import LayerNorm
from emformer.observables.frame import observe
from emformer.operators import Dense, LowRank
from emformer.parts import UserError
from emformer.positions import RoPE
from emformer.settings import Drift, Functional

HOSTILE = [
    "<script>alert(1)</script>",
    "\u202egnp.exe",
    "$x^2$",
    "\"'",
    "\x00\x07",
    "\ud55c\U0001f40b",
    "\u2028",
    "a",
    " b",
    "c",
    "d",
]


def tokenizer() -> Tokenizer:
    return Tokenizer(WordLevel({word: k for k, word in enumerate(HOSTILE)}, unk_token="a"))


def prompts(count: int = 5, length: int = 12, vocab: int = 11) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, (count, length))


@pytest.fixture(scope="module")
def turned() -> tuple[torch.nn.Module, Scene]:
    torch.manual_seed(0)
    net = stir(model(positions=[RoPE()], norm=LayerNorm(bias=True), functional=Functional(), drift=Drift(), heads=2))
    labels = np.where(prompts() % 3 == 2, -1, prompts() % 3)
    return net, stage(net, tokenizer(), prompts(), labels, ["class", "fine"], title="a $title$")


def test_words_classes_and_states(turned):
    net, scene = turned
    trajectory = capture(net, torch.from_numpy(prompts()))
    assert scene.words == [[HOSTILE[k] for k in row] for row in prompts()]
    assert scene.states == [(0, "embed"), (0, "attn"), (1, "attn")] == [(x.layer, x.point) for x in trajectory.states]
    assert scene.class_name == "class" and set(scene.classes.flat) == {-1, 0, 1}
    assert stage(net, None, prompts()).words[0][0] == f"⟨{prompts()[0, 0]}⟩"
    bare = stage(net, None, prompts())
    assert bare.classes is None and bare.class_name == ""


def test_coordinates_are_those_of_one_principal_basis(turned):
    net, scene = turned
    clouds = np.stack([x.numpy().reshape(-1, 8) for x in capture(net, torch.from_numpy(prompts())).clouds])
    units = clouds / np.linalg.norm(clouds, axis=-1, keepdims=True)
    centred = units - units.mean(1, keepdims=True)
    _, s, vh = np.linalg.svd(centred.reshape(-1, 8), full_matrices=False)
    expected = centred @ vh[:3].T
    found = scene.coords.reshape(len(clouds), -1, 3)
    for axis in range(3):
        sign = np.sign((found[..., axis] * expected[..., axis]).sum())
        np.testing.assert_allclose(found[..., axis], sign * expected[..., axis], atol=2e-6)
    np.testing.assert_allclose(scene.explained, (s**2 / (s**2).sum())[:3], rtol=1e-5)


def test_clusters_keep_their_number_through_the_depth():
    """Six tight groups that never mix, whose tokens k-means numbers as it likes: after matching, the numbers are one column."""
    draw = np.random.default_rng(1)
    centres = np.linalg.qr(draw.normal(size=(10, 10)))[0]
    sizes = [20, 15, 11, 8, 6, 5, 4, 3]
    kind = draw.permutation(np.repeat(np.arange(8), sizes))
    states = [centres[(kind + shift) % 8] + 0.01 * draw.normal(size=(len(kind), 10)) for shift in range(5)]
    found = staging._clusters(torch.nn.functional.normalize(torch.from_numpy(np.stack(states)).float(), dim=-1), 0)
    assert (found == found[-1]).all()
    assert np.bincount(found[-1]).tolist() == sizes, "numbered by their size"
    assert (found[-1] == kind).all()


def test_matching_is_the_best_there_is():
    draw = np.random.default_rng(2)
    labels, goal = draw.integers(-1, 8, 300), draw.integers(-1, 8, 300)
    found = staging._matched(labels, goal)
    assert ((found < 0) == (labels < 0)).all() and len(set(zip(labels, found, strict=True))) <= 9

    def agree(names: np.ndarray) -> int:
        return int(((names[labels] == goal) & (labels >= 0) & (goal >= 0)).sum())

    own = int(((found == goal) & (found >= 0)).sum())
    assert own >= max(agree(draw.permutation(8)) for _ in range(2000))


def test_cosines_and_merges(turned):
    net, scene = turned
    clouds = [x.numpy().reshape(-1, 8) for x in capture(net, torch.from_numpy(prompts())).clouds]
    assert scene.order.tolist() == np.argsort(scene.clusters[-1].ravel(), kind="stable").tolist(), "60 of at most 96 tokens"
    assert (scene.ids[tuple(scene.cosine_tokens.T)] == scene.ids.ravel()[scene.order]).all()
    for state, x in enumerate(clouds):
        rows = x[scene.order]
        expected = rows @ rows.T / np.outer(np.linalg.norm(rows, axis=1), np.linalg.norm(rows, axis=1))
        np.testing.assert_allclose(scene.cosines[state], expected, atol=2e-6)
        # pieces by walking from each row
        pieces = scene.merges[state]
        for row in range(len(rows)):
            reached, new = {row}, {row}
            while new:
                new = {j for i in new for j in np.flatnonzero(expected[i] >= 0.9)} - reached
                reached |= new
            assert set(np.flatnonzero(pieces == pieces[row])) == reached and pieces[row] == min(reached)
    assert 1 < len(set(scene.merges[-1])) < 60, "neither all nor none"


def test_many_tokens_are_cut_to_whole_prompts():
    torch.manual_seed(0)
    net = model(context=128)
    assert len(stage(net, None, prompts(20, 30)).order) == 90
    long = stage(net, None, prompts(2, 110))
    assert len(long.order) == 96 and set(long.cosine_tokens[:, 0]) == {0} and long.cosine_tokens[:, 1].max() == 95
    assert long.pattern.shape[-1] == long.lens_prob.shape[1] == 64 and long.coords.shape[2] == 110
    # the pattern of a causal model is that of the whole prompt, cut
    whole = capture(net, torch.from_numpy(prompts(2, 110)))
    np.testing.assert_allclose(long.pattern[0], whole.pattern(whole.attentions[0])[0, :, :64, :64], atol=1e-3)


def test_attention_is_that_of_prompt_0(turned):
    net, scene = turned
    trajectory = capture(net, torch.from_numpy(prompts()))
    assert scene.steps == [(trajectory.steps[k].layer, "attn") for k in trajectory.attentions]
    hidden = ~np.tril(np.ones((12, 12), bool))
    for row, k in enumerate(trajectory.attentions):
        np.testing.assert_array_equal(scene.pattern[row], trajectory.pattern(k)[0].numpy().astype(np.float16))
        assert np.isnan(scene.scores[row][:, hidden]).all()
        np.testing.assert_array_equal(
            scene.scores[row][:, ~hidden], trajectory.scores(k)[0].numpy().astype(np.float16)[:, ~hidden]
        )
        read = trajectory.steps[k].read[0].numpy()
        read = read - read.mean(0)
        vectors = np.linalg.eigh(read.T @ read)[1]
        np.testing.assert_allclose(np.abs(scene.leaf_axis[row]), np.abs(read @ vectors[:, -1]), atol=1e-5)
        own = scene.pattern[row].astype(float)
        np.testing.assert_allclose(scene.sinks[row], [sink(net, k, head) for head in range(2)], atol=1e-6)
        np.testing.assert_allclose(own.sum(-1), 1, atol=1e-2)
    assert (scene.beta == 1).all()
    assert scene.sink_null == pytest.approx(np.mean([1 / n for n in range(2, 13)]))


def sink(net, k: int, head: int) -> float:
    """Mean weight on the first token over prompts, of all queries but the first."""
    trajectory = capture(net, torch.from_numpy(prompts()))
    return float(trajectory.pattern(k)[:, head, 1:, 0].mean())


def test_the_tilt_is_that_of_the_turned_matrix(turned):
    """r(Delta) from M_Delta = L R_Delta R^T, the rotation written out plane by plane."""
    net, scene = turned
    trajectory = capture(net, torch.from_numpy(prompts()))
    assert scene.tilt_offsets.tolist() == [-1, -2, -3, -4, -6, -8]
    for row, k in enumerate(trajectory.attentions):
        attention = net.layer(row).attention
        left, right = attention.form.left_rows().detach(), attention.form.right_rows().detach()
        a = effective_affine(net.layer(row))
        for head in range(2):
            u = trajectory.steps[k].read[0] @ left[head].T + attention.biases.left[head].detach()
            gradients = {}
            for offset in (0, *scene.tilt_offsets.tolist()):
                turn = torch.eye(4, dtype=torch.float64)
                for plane in range(2):
                    angle = offset * 10000.0 ** (-2 * plane / 4)
                    c, s = math.cos(angle), math.sin(angle)
                    turn[plane, plane], turn[plane, plane + 2], turn[plane + 2, plane], turn[plane + 2, plane + 2] = c, -s, s, c
                gradients[offset] = u @ turn @ right[head] @ a
            for column, offset in enumerate(scene.tilt_offsets.tolist()):
                cosine = torch.cosine_similarity(gradients[offset], gradients[0], dim=-1)
                assert scene.tilt[row, head, column] == pytest.approx(float(cosine.acos().mean()), abs=1e-5)


def effective_affine(block) -> torch.Tensor:
    return block.read_attn.affine(8)[0].detach()


def test_without_positions_nothing_tilts():
    torch.manual_seed(0)
    assert np.isnan(stage(model(), None, prompts()).tilt).all()


def test_spectra_are_those_of_the_effective_matrices(turned):
    net, scene = turned
    for row in range(2):
        whole = effective(net.layer(row))
        for found, w in ((scene.spectra_form, whole.form), (scene.spectra_content, whole.content)):
            assert found.shape == (2, 2, 4)
            for head in range(2):
                expected = np.linalg.eigvals(w[head].numpy())
                expected = expected[np.argsort(-np.abs(expected))][:4]
                assert sorted(np.round(found[row, head], 4), key=lambda z: (z.real, z.imag)) == pytest.approx(
                    sorted(np.round(expected, 4), key=lambda z: (z.real, z.imag)), abs=3e-4
                )


def test_spectra_of_different_widths_are_padded():
    torch.manual_seed(0)
    net = model(form=Dense(), content=LowRank(rank=2), layers={1: {"form": LowRank(rank=3, groups=1)}})
    scene = stage(net, None, prompts())
    assert scene.spectra_form.shape == (2, 2, 8) and scene.spectra_content.shape == (2, 2, 2)
    assert np.isfinite(scene.spectra_form[0]).all()
    assert np.isnan(scene.spectra_form[1, :, 3:]).all() and np.isfinite(scene.spectra_form[1, :, :3]).all()
    for row in range(2):
        w = effective(net.layer(row)).form
        found = np.nansum(scene.spectra_form[row], -1)
        np.testing.assert_allclose(found, torch.diagonal(w, dim1=-2, dim2=-1).sum(-1), atol=1e-5, err_msg="trace")


def test_the_lens_ends_with_the_answer(turned):
    net, scene = turned
    ids = torch.from_numpy(prompts())
    answer = net(ids)[0].detach().softmax(-1)
    p, top = answer.topk(5, -1)
    np.testing.assert_allclose(scene.lens_prob[-1], p, rtol=1e-5)
    assert scene.lens_words[-1] == [[HOSTILE[k] for k in row] for row in top.tolist()]
    np.testing.assert_allclose(scene.lens_entropy[-1], -(answer * answer.log()).sum(-1), rtol=1e-5)
    first = net.unembed(capture(net, ids).clouds[0])[0].detach().softmax(-1)
    np.testing.assert_allclose(scene.lens_prob[0], first.topk(5, -1)[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "scored", "sinking"),
    [
        ({"kernel": L2()}, False, True),
        ({"kernel": Sigmoid()}, True, True),
        ({"kernel": Linear()}, True, False),
        ({"mask": Full()}, True, True),
    ],
    ids=["L2", "sigmoid", "linear", "full"],
)
def test_other_kernels_and_masks(fields, scored, sinking):
    torch.manual_seed(0)
    scene = stage(model(**fields), None, prompts())
    seen = np.ones((12, 12), bool) if "mask" in fields else np.tril(np.ones((12, 12), bool))
    assert np.isfinite(scene.scores[:, :, seen]).all() == scored
    assert np.isfinite(scene.sinks).all() == sinking
    assert np.isfinite(scene.pattern.astype(float)).all()
    if sinking:
        assert (scene.sinks >= 0).all() and (scene.sinks <= 1).all()


def test_attention_keeps_within_its_cells(monkeypatch):
    torch.manual_seed(0)
    net = model(depth=7)
    monkeypatch.setattr(staging, "CELLS", 3 * 2 * 12 * 12)
    scene = stage(net, None, prompts())
    assert scene.steps == [(0, "attn"), (3, "attn"), (6, "attn")]
    whole = capture(net, torch.from_numpy(prompts()))
    np.testing.assert_allclose(scene.pattern[1], whole.pattern(whole.attentions[3])[0], atol=1e-3)
    assert scene.sinks.shape == (3, 2) and scene.sinks[2] == pytest.approx([sink(net, whole.attentions[6], h) for h in range(2)])
    monkeypatch.setattr(staging, "CELLS", 2 * 5 * 5)
    assert stage(net, None, prompts()).pattern.shape == (1, 2, 5, 5), "one layer at least, of fewer tokens"


def test_tokens_without_a_direction_are_left_out():
    torch.manual_seed(0)
    net = model(dim=2, form=LowRank(rank=2), content=LowRank(rank=2), ffn=None)
    with torch.no_grad():
        net.embedding.weight[3] = 0
    scene = stage(net, None, prompts())
    lost = prompts() == 3
    assert lost.any() and (np.isnan(scene.coords[0]).all(-1) == lost).all()
    assert ((scene.clusters[0] < 0) == lost).all()
    assert (scene.coords[..., 2][~np.isnan(scene.coords[..., 2])] == 0).all(), "E has two dimensions"
    rows = scene.ids.ravel()[scene.order] == 3
    assert np.isnan(scene.cosines[0][rows]).all() and np.isfinite(scene.cosines[0][~rows][:, ~rows]).all()
    assert (scene.merges[0][rows] == np.flatnonzero(rows)).all(), "each a piece of its own"


def test_the_mean_cosine_is_the_one_that_is_recorded(turned):
    net, _ = turned
    one = prompts(1, 20)
    scene = stage(net, None, one)
    rows = observe(capture(net, torch.from_numpy(one)), ["clustering"])
    recorded = rows[(rows["key"] == "clu.mean_cos") & (rows["cloud"] == "raw")]["mean"].to_numpy(float)
    off = ~np.eye(20, dtype=bool)
    np.testing.assert_allclose([one[off].mean() for one in scene.cosines], recorded, atol=1e-6)
    pieces = rows[(rows["key"] == "clu.components") & (rows["param"] == "c=0.9")]["mean"].to_numpy(float)
    assert [len(set(state)) for state in scene.merges] == pieces.tolist()


def test_staging_is_a_pure_function(turned, tmp_path):
    net, scene = turned
    net.train()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    labels = np.where(prompts() % 3 == 2, -1, prompts() % 3)
    again = stage(net, tokenizer(), prompts(), labels, ["class", "fine"], title="a $title$")
    assert net.training and torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    net.eval()
    assert scene.save(tmp_path / "a").read_bytes() == again.save(tmp_path / "b").read_bytes()


def test_the_file_keeps_everything(turned, tmp_path):
    _, scene = turned
    for one in (scene, replace(scene, classes=None, class_name="", sink_null=math.nan)):
        found = Scene.load(one.save(tmp_path / "scene.safetensors"))
        for field in fields(Scene):
            a, b = getattr(one, field.name), getattr(found, field.name)
            if isinstance(a, np.ndarray):
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)
            else:
                assert a == b or (a != a and b != b), field.name


def test_what_is_no_scene_is_refused_in_a_sentence(turned, tmp_path):
    net, scene = turned
    path = scene.save(tmp_path / "scene.safetensors")
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    size = 8 + int.from_bytes(whole[:8], "little")
    damaged = [whole[:cut] for cut in (0, 7, 8, size // 2, size, len(whole) - 1)]
    damaged += [b"\x80\x04cos\nsystem\n.", b"{}", whole + b"x"]
    for _ in range(150):  # a flipped byte of the header; some flips harm nobody
        place = int(draw.integers(size))
        damaged.append(whole[:place] + bytes([whole[place] ^ int(draw.integers(1, 256))]) + whole[place + 1 :])
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            Scene.load(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 100
    capture(net, torch.from_numpy(prompts())).save(path)
    with pytest.raises(UserError, match="cannot be read as a scene"):
        Scene.load(path)
    with pytest.raises(UserError, match="does not exist"):
        Scene.load(tmp_path / "none")
    with pytest.raises(UserError, match="cannot write the scene"):
        scene.save(tmp_path / "none" / "scene")


def test_arrays_that_do_not_fit_are_refused(turned, tmp_path):
    _, scene = turned
    path = scene.save(tmp_path / "scene.safetensors")
    arrays = load_file(path)
    meta = {"emformer.scene": header(path)}

    def refused(changed: dict[str, np.ndarray], text: str | None = None) -> None:
        save_file(changed, path, meta if text is None else {"emformer.scene": text})
        with pytest.raises(UserError, match="cannot be read as a scene"):
            Scene.load(path)

    for name in arrays:
        if name != "classes":
            refused({key: x for key, x in arrays.items() if key != name})
        if arrays[name].ndim and arrays[name].shape[0] > 1:
            refused(arrays | {name: arrays[name][:-1].copy()})
        refused(arrays | {name: arrays[name].astype(np.float64 if arrays[name].dtype != np.float64 else np.int64)})
    refused(arrays | {"clusters": arrays["clusters"] + 8})
    refused(arrays | {"order": arrays["order"][::-1].copy()})
    refused(arrays | {"more": arrays["order"]})
    known = json.loads(meta["emformer.scene"])
    for name, value in (("words", [["a"]]), ("words", "a"), ("title", 3), ("states", [[0]]), ("steps", None), ("threshold", "x")):
        refused(arrays, json.dumps(known | {name: value}))
    refused(arrays, json.dumps({key: value for key, value in known.items() if key != "basis"}))
    refused(arrays, json.dumps(known | {"unknown": 1}))
    save_file(arrays, path, {"emformer.scene": json.dumps(known | {"format": 99})})
    with pytest.raises(UserError, match="another version"):
        Scene.load(path)
    assert set(arrays) == set(ARRAYS)


def header(path) -> str:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size])["__metadata__"]["emformer.scene"]


def test_tokens_and_labels_must_fit(turned):
    net, _ = turned
    for tokens in (prompts()[0], prompts() + 11, prompts() - 20, prompts()[:0]):
        with pytest.raises(ValueError, match="ids below 11"):
            stage(net, None, tokens)
    with pytest.raises(ValueError, match="labels"):
        stage(net, None, prompts(), prompts()[:2])
    assert isinstance(net.layer(0).attention.mask, Causal)
