"""What an observation knows, as plain data: written to a file while it goes on, and put back into a fresh one.

A dump is a tree for JSON and the tensors that it speaks of. Of code it holds names only: those of classes, each of which must be
defined in a module of the fresh observation or of `emformer.observables`. Nothing is imported or called on its behalf. What a
setting fixes (parts, methods) is not written but taken from the fresh observation.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from emformer import parts
from emformer.files import replaced
from emformer.parts import UserError

FORMAT = 1
HOME = "emformer.observables"
PLAIN = (bool, int, str, type(None))


class Dump(NamedTuple):
    """`tree`: nested lists, strings and numbers. `tensors`: by the names that the tree gives them, each contiguous on the CPU."""

    tree: Any
    tensors: dict[str, Tensor]


class Saved(NamedTuple):
    """A dump from a file, and what was written there about it."""

    about: dict[str, Any]
    dump: Dump


def dump(value: Any) -> Dump:
    """What `value` (an observation, a pass) knows. It may hold numbers, strings, tensors, arrays, generators of torch, lists,
    tuples, dictionaries and objects of these, also the same one in several places.

    Tensors on the CPU are not copied: write them before the observation goes on. Cost: one walk.

    Raises:
        TypeError: for anything else.
    """
    writer = _Writer()
    root = writer.node(value)
    return Dump([list(writer.layouts), root], writer.tensors)


def restore(value: Any, found: Dump, device: torch.device | str = "cpu") -> None:
    """Put a fresh `value` into the state that was dumped: what it then does is what the other would have done, bit for bit.

    Args:
        value: as it was when the dumped one began: of the same settings.
        device: where tensors go that were not on the CPU.

    Raises:
        ValueError: if the dump is not of such a value; `value` is then of no use.
    """
    try:
        layouts, root = found.tree
        reader = _Reader(layouts, found.tensors, torch.device(device), _classes(value))
        if reader.node(root, value) is not value:
            raise ValueError(f"the state is not that of a {type(value).__name__}")
    except (LookupError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise ValueError(f"the state does not fit: {error}") from error


def save(path: Path, value: Any, about: Mapping[str, Any]) -> None:
    """Write the state of `value` with `about` (plain data) to one safetensors file, atomically.

    Raises:
        OSError: as the system does. TypeError: see `dump`.
    """
    found = dump(value)
    text = json.dumps({"format": FORMAT, "about": about, "tree": found.tree}, allow_nan=False)
    with replaced(path) as partial:
        save_file(found.tensors, partial, {"emformer": text, "digest": _digest(text, found.tensors)})


def read(path: Path) -> Saved:
    """What `save` wrote, as data.

    Raises:
        UserError: for a file that is missing, truncated, changed or something else.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
        text = metadata["emformer"]
        if metadata["digest"] != _digest(text, tensors):
            raise ValueError("its digest is another")
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise UserError(f"{path} has the format {content['format']} of states; this version reads {FORMAT}.")
        return Saved(content["about"], Dump(content["tree"], tensors))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except UserError:
        raise
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as a saved state: it is truncated, changed, or something else.") from error


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.blake2b(text.encode(), digest_size=32)
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        total.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _slots(cls: type) -> Iterator[str]:
    for one in cls.__mro__:
        slots = one.__dict__.get("__slots__", ())
        yield from (name for name in ((slots,) if isinstance(slots, str) else slots) if not name.startswith("__"))


def _attributes(value: object) -> dict[str, Any]:
    """What an object holds, by name, in a fixed order."""
    slots = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
    return slots | getattr(value, "__dict__", {})


def _fixed(value: Any) -> bool:
    """Whether a setting fixes it: it is the same in every fresh observation."""
    return isinstance(value, parts.Part) or inspect.isroutine(value)


class _Writer:
    """Nodes of the tree: scalars as they are, everything else a list that begins with its kind. Mutable values are numbered as
    they come, and told once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.layouts: list[list[Any]] = []
        self._numbers: dict[Any, int] = {}  # of layouts
        self._storages: set[int] = set()
        self._seen: dict[int, tuple[int, Any]] = {}  # by id: number, and the value, so that its id stays its own

    def node(self, value: Any) -> Any:
        if type(value) in PLAIN:
            return value
        if type(value) is float:
            return value if math.isfinite(value) else ["float", repr(value)]
        if _fixed(value):
            return ["fixed"]
        if isinstance(value, tuple):
            items = [self.node(item) for item in value]
            return ["tuple", *items] if type(value) is tuple else ["named", self._layout(value, ()), *items]
        if isinstance(value, np.generic):
            return ["number", self._tensor(torch.from_numpy(np.array(value)))]
        if id(value) in self._seen:
            return ["again", self._seen[id(value)][0]]
        self._seen[id(value)] = len(self._seen), value
        if isinstance(value, Tensor):
            # sums may be taken in the order of the memory, so that is kept
            order = sorted(range(value.ndim), key=lambda k: -value.stride(k)) if not value.is_contiguous() else []
            return ["tensor", self._tensor(value.detach().permute(order) if order else value.detach()), order, value.is_cpu]
        if isinstance(value, torch.Generator):
            return ["generator", self._tensor(value.get_state())]
        if isinstance(value, np.ndarray):
            return ["array", self._tensor(torch.from_numpy(value))]
        if type(value) is list:
            return ["list", *(self.node(item) for item in value)]
        if type(value) is dict:
            return ["dict", *(self.node(item) for pair in value.items() for item in pair)]
        if isinstance(value, set | frozenset | bytes | bytearray | type) or type(value).__module__ == "builtins":
            raise TypeError(f"an observation cannot be saved that holds a {type(value).__name__}")
        held, ways = _attributes(value), (type(value).__reduce__, type(value).__reduce_ex__)
        hidden = not hasattr(value, "__dict__") and not any(_slots(type(value)))
        if hidden or ways != (object.__reduce__, object.__reduce_ex__):  # what it knows is out of sight
            raise TypeError(f"an observation cannot be saved that holds a {type(value).__name__}")
        return ["object", self._layout(value, held), *(self.node(item) for item in held.values())]

    def _tensor(self, value: Tensor) -> str:
        name = str(len(self.tensors))
        whole = value.cpu().contiguous()
        storage = whole.untyped_storage()
        # a view, of which the file would hold all, or a second one of the same numbers, which it would not take
        shared = storage.nbytes() != whole.nbytes or storage.data_ptr() in self._storages
        self.tensors[name] = whole.clone() if shared else whole
        self._storages.add(self.tensors[name].untyped_storage().data_ptr())
        return name

    def _layout(self, value: Any, names: Any) -> int:
        key = type(value).__module__, type(value).__qualname__, tuple(names)
        if key not in self._numbers:
            self._numbers[key] = len(self.layouts)
            self.layouts.append([key[0], key[1], list(key[2])])
        return self._numbers[key]


class _Reader:
    def __init__(self, layouts: Any, tensors: Mapping[str, Tensor], device: torch.device, known: Mapping[tuple[str, str], type]):
        self._tensors, self._device = tensors, device
        homes = {module for module, _ in known}
        self._layouts = [(_class(module, name, known, homes), names) for module, name, names in layouts]
        self._values: list[Any] = []  # by number

    def node(self, node: Any, fresh: Any) -> Any:
        """The value of a node; `fresh` is what a fresh observation has in its place, None where it has nothing."""
        if type(node) in PLAIN or type(node) is float:
            return node
        kind, *rest = node
        if kind == "float":
            return float(rest[0])
        if kind == "fixed":
            if not _fixed(fresh):
                raise ValueError("the state wants a part that a fresh one does not have")
            return fresh
        if kind == "again":
            return self._values[rest[0]]
        if kind == "tuple":
            return tuple(self._items(rest, fresh))
        if kind == "named":
            cls, _ = self._layouts[rest[0]]
            if not issubclass(cls, tuple):
                raise ValueError(f"{cls.__name__} is no tuple")
            return cls._make(self._items(rest[1:], fresh))  # type: ignore[attr-defined]
        if kind == "number":
            return self._tensors[rest[0]].numpy()[()]
        place = len(self._values)
        self._values.append(None)
        self._values[place] = value = self._mutable(kind, rest, fresh, place)
        return value

    def _mutable(self, kind: str, rest: list[Any], fresh: Any, place: int) -> Any:
        if kind == "tensor":
            name, order, here = rest
            found = self._tensors[name]
            found = found.permute([order.index(k) for k in range(found.ndim)]) if order else found
            return found if here else found.to(self._device)
        if kind == "array":
            return self._tensors[rest[0]].numpy()
        if kind == "generator":
            generator = fresh if isinstance(fresh, torch.Generator) else torch.Generator()
            generator.set_state(self._tensors[rest[0]])
            return generator
        if kind == "list":
            whole = self._values[place] = fresh if type(fresh) is list else []
            whole[:] = self._items(rest, list(whole))
            return whole
        if kind == "dict":
            table = self._values[place] = fresh if type(fresh) is dict else {}
            before = dict(table)
            table.clear()
            for key, item in zip(rest[::2], rest[1::2], strict=True):
                at = self.node(key, None)
                table[at] = self.node(item, before.get(at))
            return table
        if kind != "object":
            raise ValueError(f"'{kind}' is no kind of node")
        cls, names = self._layouts[rest[0]]
        if issubclass(cls, tuple | type | parts.Part):
            raise ValueError(f"{cls.__name__} is nothing that an observation changes")
        whole = self._values[place] = fresh if type(fresh) is cls else object.__new__(cls)
        for name, item in zip(names, rest[1:], strict=True):
            if name.startswith("__") or not name.isidentifier():
                raise ValueError(f"'{name}' is no attribute")
            object.__setattr__(whole, name, self.node(item, getattr(whole, name, None)))  # some are frozen
        return whole

    def _items(self, nodes: list[Any], fresh: Any) -> list[Any]:
        before = list(fresh) if isinstance(fresh, list | tuple) else []
        return [self.node(node, before[k] if k < len(before) else None) for k, node in enumerate(nodes)]


def _classes(fresh: Any) -> dict[tuple[str, str], type]:
    """Classes of what a fresh value holds, at any depth, by module and name."""
    found: dict[tuple[str, str], type] = {}
    seen: set[int] = set()
    waiting = [fresh]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or type(value) in PLAIN or _fixed(value) or isinstance(value, Tensor | np.ndarray | torch.Generator):
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
            continue
        if isinstance(value, list | tuple):
            waiting += value
        if type(value).__module__ != "builtins":
            found[type(value).__module__, type(value).__qualname__] = type(value)
            waiting += _attributes(value).values()
    return found


def _class(module: str, name: str, known: Mapping[tuple[str, str], type], homes: set[str]) -> type:
    """The class of this name that a fresh value has, or that one of its modules or of this package defines."""
    if (module, name) in known:
        return known[module, name]
    if module not in homes and not module.startswith(f"{HOME}."):
        raise ValueError(f"{module}.{name} is no class of an observation")
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part)
    if not isinstance(found, type) or (found.__module__, found.__qualname__) != (module, name):
        raise ValueError(f"{module}.{name} is no class of an observation")
    return found
