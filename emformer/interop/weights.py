"""The tensors of a checkpoint, read as data, one file open at a time, into a model that was built without an initial draw.

Safetensors, or pickles of plain tensors under `weights_only`; no code in a file is run. What a file claims is compared with what
config.json claims before memory is taken for either.
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emformer.attention import Attention
from emformer.model import Emformer
from emformer.parts import UserError
from emformer.settings import Model

NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in FLOATS.items()}


class Place(NamedTuple):
    """Where a tensor lies: `key` in `file`, and what the file says of it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


class Entry(NamedTuple):
    """What becomes of one tensor of a checkpoint: `shape` as it must come, `into` {parameter of the model: its value of it},
    `onto` {parameter: what is added to it once it is there}."""

    shape: tuple[int, ...]
    into: Mapping[str, Callable[[Tensor], Tensor]]
    onto: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({})


class Weights:
    """The tensors of a checkpoint by name.

    `Weights.of(folder)` reads the headers; a tensor is read when it is asked for, and its file closed again.
    """

    def __init__(self, places: Mapping[str, Place], where: str):
        self.places, self.where = dict(places), where

    @classmethod
    def of(cls, folder: Path) -> Weights:
        """Raises `UserError` for files that are missing, damaged or no plain tensors, and for a tensor that is there twice."""
        places: dict[str, Place] = {}
        for file in _files(folder):
            for key, shape, dtype in _headers(file):
                if key in places:
                    raise UserError(f"{file}: the tensor '{_short(key)}' is in {places[key].file.name} already.")
                places[key] = Place(file, key, shape, dtype)
        return cls(places, str(folder))

    def renamed(self, name: Callable[[str], str | None]) -> Weights:
        """The same tensors under other names; those that become None are left out."""
        found: dict[str, Place] = {}
        for old, place in self.places.items():
            new = name(old)
            if new in found:
                raise UserError(f"{self.where}: the tensors '{_short(found[new].key)}' and '{_short(old)}' are the same one.")
            if new is not None:
                found[new] = place
        return Weights(found, self.where)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor once, file by file."""
        files: dict[Path, list[str]] = {}
        for name, place in self.places.items():
            files.setdefault(place.file, []).append(name)
        for file, names in files.items():
            with _opened(file) as get:
                for name in names:
                    yield name, get(self.places[name].key)

    def tensor(self, name: str) -> Tensor:
        with _opened(self.places[name].file) as get:
            return get(self.places[name].key)

    def tied(self, word: str, head: str, claimed: bool) -> tuple[bool, Weights]:
        """Whether the unembedding `head` is the embedding `word`, and the weights without the copy of it. config.json may claim
        so; where the head is there and another one, the library, too, believes the weights."""
        if not claimed or head not in self.places:
            return claimed, self
        one, other = self.places.get(word), self.places[head]
        alike = one is not None and one[2:] == other[2:] and other.dtype in FLOATS  # shape and type
        if not alike or not torch.equal(self.tensor(word), self.tensor(head)):
            return False, self
        return True, self.renamed(lambda name: None if name == head else name)

    def depth(self, name: str, layers: int) -> int:
        """`layers` of config.json, called `name` there; refused where there are fewer tensors than layers."""
        if layers > len(self.places):
            raise UserError(f"{self.where}: config.json says {name} {layers}, and the files hold {len(self.places)} tensors.")
        return layers

    def check(self, entries: Mapping[str, Entry]) -> None:
        """Every tensor that is asked for is there in its shape and of floating-point numbers, and no other is."""
        for name, entry in entries.items():
            place = self.places.get(name)
            if place is None:
                raise UserError(f"{self.where}: the tensor '{name}' is missing.")
            if place.shape != entry.shape:
                raise UserError(
                    f"{self.where}: the tensor '{name}' has the shape {list(place.shape)[:8]}, and config.json asks for "
                    f"{list(entry.shape)}."
                )
            if place.dtype not in FLOATS:
                raise UserError(f"{self.where}: the tensor '{name}' is stored as {place.dtype}; quantised weights are not read.")
        for name in self.places:
            if name not in entries:
                raise UserError(f"{self.where}: there is no place for the tensor '{_short(name)}' in a model of its config.json.")


def filled(vocab: int, settings: Model, dtype: torch.dtype, weights: Weights, entries: Mapping[str, Entry]) -> Emformer:
    """The model of these settings with these weights, converted to `dtype`, in evaluation mode.

    Built on the meta device: nothing is drawn, the global generator stays. Value biases that the model has no parameter for go
    into the drift (math A.2), g = b_O + sum_h W_O,h^T b_V,h, summed in float64. Memory: the model, and one tensor of the
    checkpoint at a time.

    Raises:
        UserError: if `weights` are not what `entries` ask for; before memory is taken.
    """
    weights.check(entries)
    with torch.device("meta"):
        model = Emformer(vocab, **vars(settings))
    model = model.to(dtype).to_empty(device="cpu").eval()
    if settings.embedding.tied:
        model.unembedding.weight = model.embedding.weight
    state = model.state_dict(keep_vars=True)
    written: set[int] = set()
    constants: dict[str, Tensor] = {}
    sums: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for name, tensor in weights.tensors():
            tensor = tensor.to(dtype)
            for target, change in entries[name].into.items():
                value, place = change(tensor), state.get(target)
                if place is None:
                    constants[target] = value.clone()
                    continue
                assert value.shape == place.shape, (name, target)
                place.copy_(value)
                written.add(id(place))
            sums += [(state[target], change(tensor).clone()) for target, change in entries[name].onto.items()]
        for whole, summand in sums:
            whole.add_(summand)
        for layer in range(settings.depth):
            bias = constants.pop(f"blocks.{layer}.attention.value_bias", None)
            if bias is not None:
                _drift(model.layer(layer).attention, bias)
    left = [name for name, value in state.items() if id(value) not in written]
    assert not left and not constants, (left, list(constants))
    return model


def _drift(attention: Attention, bias: Tensor) -> None:
    """g <- g + sum_h W_O,h^T b_V,h for b_V (G, r)."""
    assert attention.drift is not None
    rows = attention.content.left_rows().double()
    each = bias.double().repeat_interleave(len(rows) // len(bias), 0)
    attention.drift.copy_(attention.drift.double() + (each.unsqueeze(1) @ rows).sum((0, 1)))


def same(x: Tensor) -> Tensor:
    return x


def turned(x: Tensor) -> Tensor:
    """From (in, out), as GPT-2 has it, to (out, in), or back."""
    return x.mT


def rows(heads: int, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    """(heads r, d) -> (heads, r, d), and a bias (heads r) -> (heads, r), times the scale."""
    return lambda x: scale * x.unflatten(0, (heads, -1)) if scale != 1.0 else x.unflatten(0, (heads, -1))


def columns(heads: int) -> Callable[[Tensor], Tensor]:
    """(d, heads r) -> (heads, r, d)."""
    return lambda x: x.mT.unflatten(0, (heads, -1))


def after(first: Callable[[Tensor], Tensor], then: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: then(first(x))


# Files ----------------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    """The files of tensors in a folder: one, or the shards that an index names."""
    path = next((folder / name for name in NAMES if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds no weights; it should have {' or '.join(NAMES)}.")
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        shards = sorted(set(found))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no index of shards; restore it.") from error
    for name in shards:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", name):
            raise UserError(f"{path} names the shard {_short(str(name))!r}; a shard is a file of the same folder.")
        if not (folder / name).is_file():
            raise UserError(f"{path} names the shard '{_short(name)}', which is missing.")
    if not shards:
        raise UserError(f"{path} names no shard; restore it.")
    return [folder / name for name in shards]


def _headers(path: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(key, shape, dtype) of the tensors in a file."""
    if path.suffix == ".safetensors":
        with _reading(path), safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  (it is no dictionary)
                header = file.get_slice(key)
                yield key, tuple(header.get_shape()), header.get_dtype()
        return
    for key, tensor in _pickled(path).items():
        yield key, tuple(tensor.shape), CODES.get(tensor.dtype, str(tensor.dtype))


@contextmanager
def _opened(path: Path) -> Generator[Callable[[str], Tensor]]:
    """What reads a tensor of the file by its key, as long as the file is open."""
    if path.suffix == ".safetensors":
        with _reading(path), safe_open(path, "pt") as file:
            yield file.get_tensor
    else:
        yield _pickled(path).__getitem__


@contextmanager
def _reading(path: Path) -> Generator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors: it is truncated, or something else.") from error


def _pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` file, mapped into memory where its format allows that."""
    try:
        found = plain_data(path, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        raise UserError(f"{path} cannot be read: it is truncated, or holds something other than plain tensors.") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{path} is no dictionary of tensors.")
    for key, tensor in found.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu" or hollow(tensor):
            raise UserError(f"{path}: '{_short(key)}' is no plain tensor.")
    check_shared(found, path)
    return found


def plain_data(path: Path, *, mmap: bool = False) -> Any:
    """What `torch.save` wrote, on the CPU, as data (`weights_only`). Raises what torch does for a damaged or foreign file, and
    ValueError for an archive that is compressed: torch never writes one, reads its bytes as numbers where it maps them, and
    would else unpack a small file to any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("the archive is compressed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch comments on foreign files; our sentence follows
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def check_shared(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise where tensors claim more than twice the numbers that are stored: a model of any size would be made of one tensor.
    Two may share theirs, as tied embeddings do."""
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    storages = {one.data_ptr(): one.nbytes() for one in (tensor.untyped_storage() for tensor in tensors.values())}
    if claimed > 2 * sum(storages.values()):
        raise UserError(f"{path}: its tensors are views of fewer numbers than they claim.")


def hollow(tensor: Tensor) -> bool:
    """Whether it claims more numbers than are stored: memory would be taken for what no file holds."""
    return tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()


def _short(name: str) -> str:
    """A name from an untrusted file, on one line."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    return name if len(name) <= 80 else name[:79] + "…"
