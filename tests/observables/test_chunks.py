"""Long contexts: what attention says is the same in pieces, and no piece is larger than the budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from builders import examples, model, only, words
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emformer import parts, surgery
from emformer.block import Parallel
from emformer.ffn import GELU
from emformer.kernels import Hardmax, SinkSoftmax, Softmax, TopK
from emformer.masks import All, Causal, Full, Window
from emformer.model import Emformer
from emformer.norms import LayerNorm
from emformer.observables import Look, Pass, Row
from emformer.observables.energy import Energy, forces, queries
from emformer.observables.flow import Flow
from emformer.observables.foliation import Foliation
from emformer.observables.gaussian import Gaussian
from emformer.observables.landscape import Landscape
from emformer.observables.signal import Signal
from emformer.observables.sinks import Sinks
from emformer.observables.spectrum import Spectrum
from emformer.observables.wgf import GradientFlow
from emformer.operators import LowRank
from emformer.parts import UserError
from emformer.positions import RoPE
from emformer.settings import Drift, Functional
from emformer.trajectory import Trajectory, capture

T, HEADS = 13, 2
ROWWISE = [Energy(), Sinks(), Foliation(), Signal(), Gaussian()]
EVERY = [*ROWWISE, Spectrum(), GradientFlow(probes=2), Landscape()]


def rows(observables: list[parts.Observable], trajectory: Trajectory) -> list[Row]:
    once = Pass([Look(observables)])
    once.update(trajectory)
    return once.rows()


def compositions() -> Iterator[Emformer]:
    """Every kernel under every mask that it takes, with positions and without, and the kernels that surgeries make."""
    given: dict[str, Any] = {
        "functional": Functional(),
        "drift": Drift(),
        "norm": LayerNorm(bias=True),
        "ffn": GELU(),
        "depth": 1,
    }
    for example in examples(parts.Kernel):
        for mask, positions in ((Causal(), [RoPE()]), (Full(), [])):
            fields = {"kernel": example.values[0], "mask": mask, "positions": positions}
            for some in (given, {"depth": 1}):
                try:
                    yield model(**(some | fields))
                except UserError:  # Sinkhorn under a causal mask, a functional that the kernel does not notice
                    continue
                break
    yield model(arrangement=Parallel(), mask=All((Causal(), Window(size=9))), **given)
    for mask in (Causal(), Full()):
        net = model(mask=mask, form=LowRank(rank=4, groups=1), depth=1)
        yield surgery.remove_sink(net, position=2, heads=[1])
        yield surgery.replace_sink(net, "zero", position=2, heads=[0])
        yield surgery.swap_kernel(net, TopK(k=3), heads=[1])


def test_pieces_are_the_whole():
    """Rows of queries, one prompt, one head at a time: every family tells the same of every kernel, to rounding."""
    torch.manual_seed(0)
    for net in compositions():
        tokens = words(T)
        known = {place(row): row for row in rows(EVERY, capture(net, tokens))}
        for budget, families in ((HEADS * T * 4, ROWWISE), (T * T, [*ROWWISE, Spectrum()]), (HEADS * T * T, EVERY)):
            split = capture(net, tokens)
            split.budget = budget
            some = rows(families, split)
            assert {place(row) for row in some} <= set(known) and (len(some) == len(known) or families != EVERY)
            for row in some:
                if row.key == "fol.common_corr" and not net.layer(0).attention.kernel.rowwise:
                    continue  # of balanced columns, which are constant but for what the balancing left
                one = known[place(row)]
                assert (one.n_valid, one.n_dropped) == (row.n_valid, row.n_dropped), (one, row)
                close = 2e-2 if "kappa" in row.key else 1e-10  # of 1e13 the last digits are rounding
                for a, b in zip((*one[3:5], *one[8:10]), (*row[3:5], *row[8:10]), strict=True):  # means, deviations, nulls
                    same = a is b if a is None or b is None else math.isclose(a, b, rel_tol=close, abs_tol=close)
                    assert same, (one, row)


def place(row: Row) -> tuple:
    return row[:3] + row[10:]


def test_chunks_are_rows_of_the_pattern():
    """To 1e-12, whatever the mask: the pieces put together are the scores, the pattern, and what one may see."""
    torch.manual_seed(0)
    cases: list[tuple[parts.Kernel, parts.Mask]] = [
        (kernel, mask)
        for kernel, mask in itertools.product(
            (Softmax(), SinkSoftmax(), Hardmax(), TopK(k=3)), (Causal(), Full(), Window(size=4))
        )
    ]
    for kernel, mask in cases:
        found = capture(model(kernel=kernel, mask=mask, positions=[RoPE()]), words(T))
        found.budget = 2 * HEADS * T * 5
        pieces = list(found.chunks(0))
        assert [piece.queries for piece in pieces] == [slice(0, 5), slice(5, 10), slice(10, 13)]
        assert (torch.cat([piece.pattern for piece in pieces], 2) - found.pattern(0)).abs().max() < 1e-12
        assert (torch.cat([piece.scores for piece in pieces], 2) - found.scores(0)).abs().max() < 1e-12
        table = found.visible(0)
        assert torch.equal(torch.cat([piece.visible for piece in pieces]), table)
        assert all(map(torch.equal, found.counts(0), (table.sum(1), table.sum(0))))
        found.forget()
        found.budget = 2 * T * T
        lots = list(found.matrices(0))
        assert [lot for lot, _ in lots] == [slice(0, 1), slice(1, 2)]
        assert (torch.cat([a for _, a in lots], 1) - found.pattern(0)).abs().max() < 1e-12
        found.budget -= 1
        assert list(found.matrices(0)) == []


def test_what_fits_is_one_piece_and_nothing_is_copied():
    torch.manual_seed(0)
    found = capture(model(), words(T))
    (piece,) = found.chunks(0)
    assert piece.pattern is found.pattern(0) and next(found.lots()) is found
    found.budget = HEADS * T * T
    first, second = found.lots()
    assert first.prompts == second.prompts == 1 and first.budget == found.budget
    for one, whole in zip(second.steps, found.steps, strict=True):
        assert one.before.data_ptr() == whole.before[1:].data_ptr() and torch.equal(one.update, whole.update[1:])
    assert torch.equal(second.tokens, found.tokens[1:]) and torch.equal(second.states[-1].read, found.states[-1].read[1:])
    with_labels = Trajectory.from_clouds(torch.randn(3, 4, 5, 6), labels=torch.zeros(4, 5).long())
    with_labels.budget = 1
    parts_of = list(with_labels.lots())
    assert [one.prompts for one in parts_of] == [1] * 4 and parts_of[3].labels.shape == (1, 5)


def test_forces_and_queries_of_one_row_at_a_time():
    torch.manual_seed(0)
    whole = capture(model(heads=4, form=LowRank(rank=4, groups=2), positions=[RoPE()], **{"functional": Functional()}), words(T))
    split = capture(whole.model, whole.tokens)
    split.budget = 1
    for one, two in zip(forces(whole, 1), forces(split, 1), strict=True):
        assert (one - two).abs().max() < 1e-12
    one, two = queries(whole, 0), queries(split, 0)
    assert one.keys() == two.keys()
    for key, values in one.items():
        torch.testing.assert_close(values, two[key], rtol=0, atol=1e-12, equal_nan=True)


class Largest(TorchDispatchMode):
    """The most `numbers` in any tensor that an operation returns, and the most `held`, in bytes, of all that are alive at a time:
    a view of one column keeps its whole array."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = self.held = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
                storage = x.untyped_storage()
                if storage.nbytes() >= 1 << 16:
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        self.held = max(self.held, sum(size for _, size in self._alive.values()))
        return out


@pytest.mark.parametrize("positions", [[RoPE()], []], ids=["rope", "none"])
def test_no_array_is_larger_than_the_budget(positions):
    """2,048 tokens and 4 heads: 16.8 million pairs, a budget of one million. Whole patterns, which cannot be had, are counted."""
    torch.manual_seed(0)
    net = model(dim=16, heads=4, depth=1, context=2048, dtype=torch.float32, positions=positions, ffn=GELU())
    found = capture(net, words(2048, batch=1))
    found.budget = 1 << 20
    watch = Largest()
    with watch:
        told = rows([*EVERY, Flow()], found)
    assert watch.numbers <= found.budget < 2048**2, f"{watch.numbers:,} numbers at once"
    assert watch.held <= 8 * 8 * found.budget, f"{watch.held:,} bytes at once"  # of float64, where all pairs are 16 budgets
    assert only(told, "attn.entropy_norm").n_valid == only(told, "sink.mass").n_valid == 1
    for param in ("A", "I+A"):
        row = only(told, "spec.rho_A", param=param, cloud="read")
        assert (row.mean, row.n_valid, row.n_dropped) == (None, 0, 1)
    if not positions:
        for key in ("wgf.omega", "wgf.r2", "wgf.viol", "wgf.tv_ratio", "wgf.dissip_slope"):
            row = only(told, key)
            assert (row.mean, row.n_valid, row.n_dropped) == (None, 0, 1), key
    with watch:  # what the budget is for
        found.pattern(0)
    assert watch.numbers >= 4 * 2048**2
