"""Staging a scene: a model and a few prompts in, everything out that is drawn of them and is no row of records.

scene = stage(run.model, run.tokenizer, prompts)
scene.save("scene.safetensors")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
from scipy.linalg import eigh
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from emformer.figures.staged import CLUSTERS, Scene
from emformer.geometry import leaves, sinks
from emformer.geometry.clusters import kmeans, unit
from emformer.geometry.spectra import eigenvalues, wide
from emformer.model import Emformer
from emformer.observables.foliation import gradients
from emformer.trajectory import Trajectory, capture, captures

__all__ = ["Scene", "stage"]

STARTS = 2  # of k-means: it is half of the cost
COMPARED = 96  # tokens in a matrix of cosines
CUT = 64  # tokens of prompt 0 whose attention and lens are drawn
CELLS = 1_000_000  # of all patterns together
TOP = 5
THRESHOLD = 0.9
OFFSETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 63)
BASIS = (
    "directions x/|x| of the raw stream, the mean direction of each state removed, in one principal basis of all states pooled; "
    "nothing is scaled, so a cloud that shrinks gathers"
)


@torch.no_grad()
def stage(
    model: Emformer,
    tokenizer: tokenizers.Tokenizer | None,
    tokens: np.ndarray,
    labels: np.ndarray | None = None,
    names: Sequence[str] = (),
    *,
    title: str = "",
    seed: int = 0,
) -> Scene:
    """The scene of `model` on the prompts `tokens`, a pure function of its arguments; the model is left as it was.

    Cost: a pass over the prompts one at a time, a principal basis (d^3), S k-means of P N tokens, the effective
    operators' eigenvalues at their rank, and S readings of the vocabulary for the first tokens of prompt 0: half a second
    for a default model on 8 x 64 tokens, ten seconds for GPT-2, on one core.

    Args:
        tokenizer: turns ids into words; None writes ids.
        tokens: ids (P, N), P and N at least 1.
        labels: a class of each token (P, N), -1 for none.
        names: of the classification that `labels` are (its first is told).
        title: what the scene is of, for people.
        seed: of the k-means.

    Raises:
        ValueError: for tokens that are no (P, N) array of ids of this model, or labels of another shape.
    """
    tokens = np.ascontiguousarray(tokens, dtype=np.int64)
    if tokens.ndim != 2 or not tokens.size or tokens.min() < 0 or tokens.max() >= model.vocab:
        raise ValueError(f"a scene takes tokens (P, N) with ids below {model.vocab}, not {tokens.shape}")
    if labels is not None and labels.shape != tokens.shape:
        raise ValueError(f"labels {labels.shape} do not fit tokens {tokens.shape}")
    place = next(model.parameters()).device
    ids = torch.from_numpy(tokens).to(place)
    units, shares, states = _pass(model, ids)
    count = tokens.shape[0] * tokens.shape[1]
    coords, explained = _principal(units.flatten(1, 2))
    clusters = _clusters(units.flatten(1, 2), seed)
    order = _order(clusters[-1], tokens.shape)
    cosines = _cosines(units.flatten(1, 2)[:, torch.from_numpy(order)])
    words = [[_word(tokenizer, int(one)) for one in prompt] for prompt in tokens]
    first = capture(model, ids[:1, : _cut(model, tokens.shape[1])])
    chosen = _spaced(first.attentions, CELLS // max(1, model.settings.heads * first.steps[0].before.shape[1] ** 2))
    kept = [first.attentions.index(k) for k in chosen]
    seen = _attention(first, chosen)
    likely, probabilities, entropies = _lens(first, tokenizer)
    shape = (len(states), *tokens.shape)
    assert coords.shape == (len(states), count, 3)
    return Scene(
        title=title,
        words=words,
        ids=tokens,
        classes=None if labels is None else np.ascontiguousarray(labels, dtype=np.int64),
        class_name="" if labels is None else next(iter(names), "class"),
        states=states,
        coords=coords.reshape(*shape, 3),
        basis=BASIS,
        explained=explained,
        clusters=clusters.reshape(shape),
        order=order,
        cosine_tokens=np.stack(np.divmod(order, tokens.shape[1]), -1),
        cosines=cosines.astype(np.float32),
        merges=_merges(cosines),
        threshold=THRESHOLD,
        steps=[(first.steps[k].layer, first.steps[k].point) for k in chosen],
        sinks=shares.values[kept],
        sink_null=shares.null,
        **seen,
        lens_words=likely,
        lens_prob=probabilities,
        lens_entropy=entropies,
    )


class _Shares(NamedTuple):
    values: np.ndarray  # (all steps of attention, H)
    null: float


def _pass(model: Emformer, ids: Tensor) -> tuple[Tensor, _Shares, list[tuple[int, str]]]:
    """Directions (S, P, N, d) in float32 on the CPU, nan where there is none; weights on the first token; what the states are."""
    units, masses, nulls, states = [], [], [], []
    for trajectory in captures(model, ids, chunk=1):
        states = [(state.layer, state.point) for state in trajectory.states]
        units.append(torch.stack([unit(x[0]).cloud.float().cpu() for x in trajectory.clouds]))
        masses.append(torch.stack([_mass(trajectory, k) for k in trajectory.attentions]) if trajectory.attentions else None)
        if not nulls:
            even = [sinks.uniform(trajectory.visible(k)) for k in trajectory.attentions]
            nulls = [
                float(sinks.sink_mass(a, trajectory.visible(k)).mean) for a, k in zip(even, trajectory.attentions, strict=True)
            ]
    known = [one for one in masses if one is not None]
    values = torch.stack(known).nanmean(0).cpu().numpy() if known else np.empty((0, model.settings.heads))
    finite = [null for null in nulls if math.isfinite(null)]
    return torch.stack(units, 1), _Shares(values, sum(finite) / len(finite) if finite else math.nan), states


def _mass(trajectory: Trajectory, k: int) -> Tensor:
    """(H,): mean weight on the first token of the one prompt; nan where weights may be negative."""
    kernel, pattern = trajectory.block(k).attention.kernel, wide(trajectory.pattern(k)[0])
    trajectory.forget()
    if kernel.signed:
        return pattern.new_full((len(pattern),), torch.nan)
    if not kernel.normalised:
        total = pattern.sum(-1, keepdim=True)
        pattern = pattern * (1 / total).where(total > 0, 0.0)
    return sinks.sink_mass(pattern, trajectory.visible(k)).mean


def _principal(units: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (S, P N, 3) in one principal basis of all states, each with its mean removed, and the shares of variance."""
    centred = [wide(u) - wide(u).nanmean(0) for u in units]
    d = units.shape[-1]
    spread = torch.zeros(d, d, dtype=torch.float64)
    for rows in centred:
        known = rows.nan_to_num(0.0)
        spread += known.mT @ known
    total, width = float(spread.trace()), min(3, d)
    values, vectors = eigh(spread.numpy(), subset_by_index=[d - width, d - 1])
    values, vectors = values[::-1], vectors[:, ::-1]
    # an eigenvector has no sign of its own: the largest entry is positive
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(width)])
    basis, shares = np.zeros((d, 3)), np.zeros(3)
    basis[:, :width] = vectors
    shares[:width] = values.clip(min=0) / total if total > 0 else 0.0
    return np.stack([rows.numpy() @ basis for rows in centred]).astype(np.float32), shares


def _clusters(units: Tensor, seed: int) -> np.ndarray:
    """(S, P N): k-means state by state from the last one back, each numbered after the one it was matched with."""
    found: list[np.ndarray] = []
    for rows in units.flip(0):
        own = kmeans(rows, CLUSTERS, seed, STARTS).labels.numpy()
        found.append(_by_size(own) if not found else _matched(own, found[-1]))
    return np.stack(found[::-1])


def _by_size(labels: np.ndarray) -> np.ndarray:
    """Numbered by descending size, among equals by their first token."""
    names, first, sizes = np.unique(labels[labels >= 0], return_index=True, return_counts=True)
    rank = np.full(CLUSTERS, -1)
    rank[names[np.lexsort((first, -sizes))]] = np.arange(len(names))
    return np.where(labels >= 0, rank[labels], -1)


def _matched(labels: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Numbered so that as many tokens as possible have the number that they have in `goal`."""
    common = np.zeros((CLUSTERS, CLUSTERS))
    both = (labels >= 0) & (goal >= 0)
    np.add.at(common, (labels[both], goal[both]), 1)
    own, names = linear_sum_assignment(-common)
    rank = np.full(CLUSTERS, -1)
    rank[own] = names
    return np.where(labels >= 0, rank[labels], -1)


def _order(last: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Places of at most `COMPARED` tokens, whole prompts where one fits, by their last cluster and then by place."""
    prompts, length = shape
    count = min(COMPARED // length, prompts) * length if length <= COMPARED else COMPARED
    return np.argsort(last[:count], kind="stable")


def _cosines(units: Tensor) -> np.ndarray:
    """(S, n, n) in float64; 1 on the diagonal to the last bit, nan without a direction."""
    rows = wide(units)
    found = (rows @ rows.mT).clamp(-1, 1)
    # units were rounded once
    found.diagonal(dim1=-2, dim2=-1).copy_(torch.ones(1, dtype=found.dtype).where(rows[..., 0].isfinite(), torch.nan))
    return found.numpy()


def _merges(cosines: np.ndarray) -> np.ndarray:
    """(S, n): each token's piece of the graph cos >= THRESHOLD, named by its least row."""
    found = []
    for one in cosines:
        pieces = connected_components(one >= THRESHOLD, directed=False)[1]
        _, first, of = np.unique(pieces, return_index=True, return_inverse=True)
        found.append(first[of])
    return np.stack(found).astype(np.int64)


def _cut(model: Emformer, length: int) -> int:
    """Tokens of prompt 0 so that the patterns of one layer at least are within `CELLS`."""
    return min(length, CUT, max(1, math.isqrt(CELLS // model.settings.heads)))


def _spaced(steps: list[int], most: int) -> list[int]:
    """All, or `most` (one at least) of them, evenly spaced from the first to the last."""
    if len(steps) <= most:
        return steps
    return [steps[k] for k in np.linspace(0, len(steps) - 1, max(1, most)).round().astype(int)]


def _attention(first: Trajectory, chosen: list[int]) -> dict[str, np.ndarray]:
    """Everything of the scene that has an axis A."""
    assert first.model is not None
    heads, tokens = first.model.settings.heads, first.steps[0].before.shape[1]
    offsets = [-offset for offset in OFFSETS if offset < tokens]
    half = float(np.finfo(np.float16).max)
    pattern, scores = (np.full((len(chosen), heads, tokens, tokens), np.nan, np.float16) for _ in range(2))
    beta, axis = np.full(len(chosen), np.nan), np.full((len(chosen), tokens), np.nan, np.float32)
    tilt = np.full((len(chosen), heads, len(offsets)), np.nan, np.float32)
    form, content = [], []
    for row, k in enumerate(chosen):
        kernel = first.block(k).attention.kernel
        pattern[row] = first.pattern(k)[0].float().clamp(-half, half).cpu().numpy()
        if not kernel.reads_factors:
            s = first.scores(k)[0].float().clamp(-half, half)
            scores[row] = s.where(first.visible(k), torch.nan).cpu().numpy()
            beta[row] = getattr(kernel, "beta", math.nan)
        axis[row] = _first_axis(first.steps[k].read[0])
        field = gradients(first, k)
        if field is not None and field.turned and offsets:
            core = field.core
            angle = leaves.tilt(lambda offset, f=field, c=core: f.coefficients(offset) @ c, offsets).angle[0]
            tilt[row] = angle.float().cpu().numpy()
        for kept, values in zip((form, content), _spectra(first, k), strict=True):
            kept.append(values)
    first.forget()
    return {
        "pattern": pattern,
        "scores": scores,
        "beta": beta,
        "leaf_axis": axis,
        "tilt": tilt,
        "tilt_offsets": np.array(offsets, np.int64),
        "spectra_form": _padded(form, heads),
        "spectra_content": _padded(content, heads),
    }


def _first_axis(read: Tensor) -> np.ndarray:
    """(T,): the first principal coordinate of a cloud."""
    rows = wide(read)
    rows = (rows - rows.mean(0)).cpu().numpy()
    if not np.isfinite(rows).all():
        return np.full(len(rows), np.nan)
    u, s, _ = np.linalg.svd(rows, full_matrices=False)
    values = u[:, 0] * s[0]
    return values * (np.sign(values[np.abs(values).argmax()]) or 1.0)


def _spectra(trajectory: Trajectory, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (H, r) of the effective M = A^T L R^T A and F = L R^T A of step k: those of R^T L, r x r, but for zeros."""
    attention = trajectory.block(k).attention
    a, _ = trajectory.fold(k)
    found = []
    for operator, folds_left in ((attention.form, True), (attention.content, False)):
        left, right = wide(operator.left_rows()), operator.right_rows()
        if right is None:
            right = torch.eye(operator.dim, dtype=left.dtype, device=left.device).unsqueeze(0)
        else:
            right = wide(right).repeat_interleave(operator.heads // operator.groups, 0)
        if a is not None:
            left, right = left @ wide(a) if folds_left else left, right @ wide(a)
        core = right @ left.mT
        values = eigenvalues(core)[:, : operator.dim] if core.isfinite().all() else core.new_full(core.shape[:2], torch.nan)
        found.append(values.cpu().numpy().astype(np.complex64))
    return found[0], found[1]


def _padded(rows: list[np.ndarray], heads: int) -> np.ndarray:
    """(A, H, r) of rows (H, r) of different r."""
    width = max((x.shape[1] for x in rows), default=0)
    found = np.full((len(rows), heads, width), np.nan, np.complex64)
    for row, x in zip(found, rows, strict=True):
        row[:, : x.shape[1]] = x
    return found


def _lens(first: Trajectory, tokenizer: tokenizers.Tokenizer | None) -> tuple[list[list[list[str]]], np.ndarray, np.ndarray]:
    """The most probable next tokens at every state of prompt 0, their probabilities, and the entropy of all."""
    model = first.model
    words: list[list[list[str]]] = []
    probabilities, entropies = [], []
    assert model is not None
    for x in first.clouds:
        logits = wide(model.unembed(x)[0])
        whole = logits.softmax(-1)
        p, top = whole.topk(min(TOP, model.vocab), -1)
        known = logits.isfinite().all(-1, keepdim=True)
        words.append([[_word(tokenizer, one) for one in row] for row in top.tolist()])
        probabilities.append(p.where(known, torch.nan).float().cpu().numpy())
        entropy = torch.special.entr(whole).sum(-1)
        entropies.append(entropy.where(known[..., 0], torch.nan).float().cpu().numpy())
    return words, np.stack(probabilities), np.stack(entropies)


def _word(tokenizer: tokenizers.Tokenizer | None, token: int) -> str:
    """The text of one token; its id where it has none of its own."""
    text = "" if tokenizer is None else tokenizer.decode([token], skip_special_tokens=False)
    return text or f"⟨{token}⟩"
