"""Damage: what happens to files on disks, on the way, and in the hands of somebody who means harm."""

from __future__ import annotations

import pickle
import random
import zipfile
from io import BytesIO
from pathlib import Path

# what parsers of YAML, JSON, TOML and pickles are known to trip over
WORDS = [
    b"null",
    b"{}",
    b"[]",
    b'""',
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"1000000000000000000000",
    b"9999999999",
    b"1e-400",
    b"true",
    b"\x00",
    b"\xff\xfe",
    b"\xe2\x80\xae",
    b"!!python/object/apply:os.system ['touch CANARY']",
    b"&a [*a, *a]",
    b"*missing",
    b"class_path: os.system",
    b"class_path: subprocess.Popen",
    b'"class_path": "builtins.exec"',
    b"../../../../etc/passwd",
    b"[" * 2000,
    b"{" * 2000,
    b'{"a":' * 400,
    b"\n",
    b"  ",
    b"\t",
    b"'",
    b'"',
    b"cposix\nsystem\n(S'touch CANARY'\ntR.",
]


class Bomb:
    """A pickle that would leave a file behind if it were ever run."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return exec, (f"open({str(self.canary)!r}, 'w').close()",)


def bombs(whole: bytes, canary: Path) -> list[bytes]:
    """Pickles that run code when read as code: alone, and as the data of a checkpoint's archive."""
    alone = [pickle.dumps(Bomb(canary), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    inside = []
    for one in alone:
        if not zipfile.is_zipfile(BytesIO(whole)):
            break
        target = BytesIO()
        with zipfile.ZipFile(BytesIO(whole)) as source, zipfile.ZipFile(target, "w") as copy:
            for entry in source.infolist():
                copy.writestr(entry, one if entry.filename.endswith("data.pkl") else source.read(entry))
        inside.append(target.getvalue())
    return [*alone, *inside]


def mutated(whole: bytes, draw: random.Random, canary: Path) -> bytes:
    """The bytes after one to four accidents."""
    found = bytearray(whole)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        at, end = sorted(draw.randrange(len(found) + 1) for _ in range(2))
        accident = draw.randrange(9)
        if accident == 0 and found:  # bits
            for _ in range(draw.choice([1, 8, 64])):
                found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
        elif accident == 1:  # a write that was cut off
            del found[at:]
        elif accident == 2:  # a lost head
            del found[:at]
        elif accident == 3:  # a lost block
            del found[at : min(end, at + 4096)]
        elif accident == 4:  # a block of zeros
            found[at : min(end, at + 512)] = bytes(min(end, at + 512) - at)
        elif accident == 5:  # a block twice
            found[at:at] = found[at : min(end, at + 4096)]
        elif accident == 6:  # noise
            found[at:at] = draw.randbytes(draw.choice([1, 7, 300]))
        else:  # a word
            found[at : at + draw.choice([0, 0, 1, 4, 16])] = draw.choice(WORDS).replace(b"CANARY", str(canary).encode())
    return bytes(found)


def laughs(depth: int = 40) -> bytes:
    """YAML of a few lines that means 2^depth values."""
    return "\n".join(["a0: &a0 [x, x]", *(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]" for k in range(1, depth))]).encode()


def rewritten(tree: object, draw: random.Random) -> object:
    """Plain data with one leaf, or one branch, that somebody changed: the file itself stays well formed."""
    values = [
        None,
        True,
        -1,
        0,
        1.5,
        10**12,
        10**30,
        float("nan"),
        float("inf"),
        "",
        "x" * 5000,
        "os.system",
        [],
        {},
        [[]],
        {"a": {}},
    ]
    if isinstance(tree, dict) and tree and draw.random() < 0.9:
        key = draw.choice(list(tree))
        if draw.random() < 0.1:
            return {name: value for name, value in tree.items() if name != key}
        if draw.random() < 0.1:
            return tree | {draw.choice(["", "class_path", "__class__", "x", "init_args"]): draw.choice(values)}
        return tree | {key: rewritten(tree[key], draw)}
    if isinstance(tree, list) and tree and draw.random() < 0.9:
        at = draw.randrange(len(tree))
        return [*tree[:at], rewritten(tree[at], draw), *tree[at + 1 :]]
    return draw.choice(values)
