"""What is drawn of one model on a few prompts and is no row of records: arrays, words and numbers, in one file of data.

`emformer.figures.scene.stage` makes it from a model. This module, like the figures, needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from emformer.files import replaced
from emformer.parts import UserError

FORMAT = 1
CLUSTERS = 8  # of k-means, as the recorder has them: so many colours can be told apart
# of every array its type and axes; an axis has one length wherever it is named
ARRAYS: Mapping[str, tuple[str, str]] = {
    "ids": ("int64", "P N"),
    "classes": ("int64", "P N"),
    "coords": ("float32", "S P N 3"),
    "explained": ("float64", "3"),
    "clusters": ("int64", "S P N"),
    "order": ("int64", "n"),
    "cosine_tokens": ("int64", "n 2"),
    "cosines": ("float32", "S n n"),
    "merges": ("int64", "S n"),
    "pattern": ("float16", "A H T T"),
    "scores": ("float16", "A H T T"),
    "beta": ("float64", "A"),
    "leaf_axis": ("float32", "A T"),
    "tilt": ("float32", "A H D"),
    "tilt_offsets": ("int64", "D"),
    "spectra_form": ("complex64", "A H r"),
    "spectra_content": ("complex64", "A H q"),
    "sinks": ("float64", "A H"),
    "lens_prob": ("float32", "S T K"),
    "lens_entropy": ("float32", "S T"),
}
WORDS: Mapping[str, str] = {"words": "P N", "lens_words": "S T K"}
OPTIONAL = frozenset({"classes"})

POINTS = ("embed", "attn", "ffn", "block")


@dataclass(frozen=True, eq=False)
class Scene:
    """One model seen on P prompts of N tokens: S states, A steps of attention of H heads, n tokens compared, T of prompt 0.

    Attributes:
        title: what it is, for people.
        words: (P, N) the text of each token, as the tokenizer decodes it alone. Untrusted: escape before it is shown.
        ids: (P, N) token ids.
        classes: (P, N) class of each token, -1 for none; None where no classes are known. class_name: of the classification.
        states: (S) layer and point of each state, as `emformer.trajectory.State`; X^0 is (0, "embed").
        coords: (S, P, N, 3) principal coordinates of the tokens' directions x/|x| with the mean direction of their state removed,
            all in one basis; in units of the unit sphere's radius, nan for a token without a direction.
        basis: a sentence that says how the basis was found.
        explained: (3,) share of the pooled variance along each coordinate, in [0, 1].
        clusters: (S, P, N) k-means of the directions of each state, -1 for a token without one. The last state's are numbered by
            their size, and each earlier state's as the ones that they share most tokens with in the next: a colour keeps its
            meaning through the depth.
        order: (n,) places p N + t of the tokens that are compared, by their last cluster, then by place.
        cosine_tokens: (n, 2) the same as (prompt, position).
        cosines: (S, n, n) cos(x_i, x_j) of the raw stream, rows and columns in that order; nan without a direction.
        merges: (S, n) the piece of the graph that joins tokens of cosine >= `threshold`, named by the least row in it.
        threshold: of `merges`.
        steps: (A) layer and point of the steps of attention that follow; evenly spaced where all would be too many.
        pattern: (A, H, T, T) weights a_ij of prompt 0, cut to its first T tokens.
        scores: (A, H, T, T) scores s_ij without beta; nan where the mask hides j, or the kernel has no scores.
        beta: (A,) inverse temperature of the kernel, nan where it has none.
        leaf_axis: (A, T) first principal coordinate of what attention reads of prompt 0.
        tilt: (A, H, D) mean angle between the relevance gradients at an offset and at 0, radians; nan unless positions turn keys.
        tilt_offsets: (D,) offsets j - i, all negative.
        spectra_form, spectra_content: (A, H, r) and (A, H, q) eigenvalues of the effective M and F that their factors leave room
            for, by descending modulus, padded with nan; the other d - r are 0.
        sinks: (A, H) mean weight on the first token over all prompts and the queries with a choice, in [0, 1]; nan for weights
            that may be negative. sink_null: the same of uniform attention.
        lens_words, lens_prob: (S, T, K) the most probable next tokens at each state of prompt 0, through the closing norm, and
            their probabilities. lens_entropy: (S, T) of the whole distribution, nats. The last state is the model's answer.
    """

    title: str
    words: list[list[str]]
    ids: np.ndarray
    classes: np.ndarray | None
    class_name: str
    states: list[tuple[int, str]]
    coords: np.ndarray
    basis: str
    explained: np.ndarray
    clusters: np.ndarray
    order: np.ndarray
    cosine_tokens: np.ndarray
    cosines: np.ndarray
    merges: np.ndarray
    threshold: float
    steps: list[tuple[int, str]]
    pattern: np.ndarray
    scores: np.ndarray
    beta: np.ndarray
    leaf_axis: np.ndarray
    tilt: np.ndarray
    tilt_offsets: np.ndarray
    spectra_form: np.ndarray
    spectra_content: np.ndarray
    sinks: np.ndarray
    sink_null: float
    lens_words: list[list[list[str]]]
    lens_prob: np.ndarray
    lens_entropy: np.ndarray

    def __post_init__(self) -> None:
        fault = self._fault()
        if fault:
            raise ValueError(f"no scene: {fault}")

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file, at once; equal scenes give equal bytes.

        Raises `UserError` if it cannot be written.
        """
        path = Path(path)
        arrays = {name: np.ascontiguousarray(value) for name in ARRAYS if (value := getattr(self, name)) is not None}
        # complex numbers as pairs, which every reader of the format knows
        arrays = {name: x.view(np.float32) if x.dtype.kind == "c" else x for name, x in arrays.items()}
        meta = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ARRAYS}
        try:
            with replaced(path) as partial:
                # by hand: the library's own file would be closed to others, whatever the umask
                partial.write_bytes(save(arrays, {"emformer.scene": json.dumps({"format": FORMAT} | meta)}))
        except OSError as error:
            raise UserError(f"cannot write the scene {path}: {error}.") from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> Scene:
        """What `save` wrote, read as data. Raises `UserError` for a file that is missing, damaged or no scene."""
        path = Path(path)
        try:
            with safe_open(path, "np") as file:
                meta = json.loads((file.metadata() or {})["emformer.scene"])
                if meta.pop("format") != FORMAT:
                    raise UserError(f"{path} is a scene of another version; make it anew with emformer analyze or report.")
                found: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
            found = {name: _paired(x) if ARRAYS[name][0] == "complex64" else x for name, x in found.items()}
            for name in ("states", "steps"):
                meta[name] = [(int(layer), str(point)) for layer, point in meta[name]]
            for name in ("threshold", "sink_null"):
                meta[name] = float(meta[name])
            return cls(**({name: None for name in OPTIONAL} | found | meta))
        except FileNotFoundError:
            raise UserError(f"{path} does not exist.") from None
        except UserError:
            raise
        except Exception as error:  # whatever a foreign file brings: wrong types, lengths, names, encodings
            raise UserError(f"{path} cannot be read as a scene: it is damaged, or something else.") from error

    def _fault(self) -> str:
        """What does not fit together; "" where all does, so that who draws need not look."""
        lengths = {"S": len(self.states), "A": len(self.steps), "3": 3, "2": 2}
        for name, (dtype, axes) in ARRAYS.items():
            x = getattr(self, name)
            if x is None and name in OPTIONAL:
                continue
            if not isinstance(x, np.ndarray) or x.dtype != dtype:
                return f"{name} is no array of {dtype}"
            if not _fits(x.shape, axes.split(), lengths):
                return f"{name} has the shape {x.shape}, not ({axes})"
        for name, axes in WORDS.items():
            if not _spelled(getattr(self, name), [lengths[axis] for axis in axes.split()]):
                return f"{name} are not ({axes}) strings"
        if not all(isinstance(text, str) for text in (self.title, self.class_name, self.basis)):
            return "title, class_name and basis are strings"
        if not all(layer >= 0 and point in POINTS for layer, point in [*self.states, *self.steps]):
            return f"states and steps stand at layers from 0 on, at {', '.join(POINTS)}"
        if min(lengths[axis] for axis in "SPN") < 1 or (lengths["A"] and min(lengths["H"], lengths["T"]) < 1):
            return "there is nothing to draw"
        n, places = lengths["n"], lengths["P"] * lengths["N"]
        inside = {"order": (0, places), "merges": (0, n), "clusters": (-1, CLUSTERS)}
        for name, (low, high) in inside.items():
            x = getattr(self, name)
            if x.size and not (low <= x.min() and x.max() < high):
                return f"{name} names what is not there"
        if not np.array_equal(self.order, self.cosine_tokens @ np.array([lengths["N"], 1])):
            return "order and cosine_tokens name different tokens"
        if lengths["T"] > lengths["N"]:
            return "prompt 0 is shorter than what is drawn of it"
        return ""


def _paired(x: np.ndarray) -> np.ndarray:
    """Pairs of float32 along the last axis as complex numbers; anything else as it is."""
    return x.view(np.complex64) if x.dtype == np.float32 else x


def _fits(shape: tuple[int, ...], axes: list[str], lengths: dict[str, int]) -> bool:
    """Whether a shape has these axes, each of one length; the lengths of new ones are noted."""
    return len(shape) == len(axes) and all(lengths.setdefault(axis, size) == size for axis, size in zip(axes, shape, strict=True))


def _spelled(words: Any, shape: list[int]) -> bool:
    if not shape:
        return isinstance(words, str)
    return isinstance(words, list) and len(words) == shape[0] and all(_spelled(one, shape[1:]) for one in words)
