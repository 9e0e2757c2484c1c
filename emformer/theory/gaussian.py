"""Gaussian clouds: what a layer of attention does to infinitely many tokens whose law is Gaussian.

A kernel whose context mean is affine in the query moves a Gaussian law to a Gaussian one, so that a mean and a covariance say
everything: of a flow by an ordinary differential equation, of a residual step exactly. Which kernels these are, and what their
means are, the kernels know themselves (`Kernel.mean_field`); all else here is one code for every kernel and number of heads.

    gaussian = theory.closure(theory.idealised(2, form=M, content=F, space="flat"))
    theory.evolve(gaussian, theory.Law(mean, cov), until=10.0)

With sources: V = F and A = M^T (S3, Castin et al. 2025, 2501.18322; math E.6). Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64
from scipy.integrate import LSODA
from torch import Tensor

from emformer.diagnostics import factors
from emformer.kernels import Kernel
from emformer.kernels.base import Affine
from emformer.kernels.softmax import SoftmaxKernel
from emformer.model import Emformer
from emformer.types import Cloud

LARGEST = 1e8  # trace of a covariance at which a law counts as gone
SHARES = (0.01, 0.03, 0.1, 0.3)  # of the largest trace, between which its growth is judged
QUICKENS = 0.25  # least power of the trace by which its rate rises in a blow-up: 1 of 1/(t* - t), 1/2 of its square, 0 of exp t

Mean = Float64[Tensor, "*batch d"]
Covariance = Float64[Tensor, "*batch d d"]
Growth = Float64[Tensor, "d d"]
Numbers = Float64[Tensor, "*batch"]
Points = Float64[Tensor, "*batch 3"]
Queries = Float64[Tensor, "T d"]


class Law(NamedTuple):
    """N(mean, cov): (…, d) and (…, d, d), cov positive semidefinite, singular or not."""

    mean: Tensor
    cov: Tensor

    def sample(self, prompts: int, tokens: int, seed: int = 0) -> Cloud:
        """Independent tokens (B, N, d) of a law without batch, from a generator of their own."""
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(prompts, tokens, len(self.mean), generator=generator, dtype=torch.float64)
        return self.mean + z @ _root(self.cov)


@dataclass(frozen=True, eq=False)
class Closure:
    """A layer as it acts on Gaussian clouds, every query and key of one law.

    `left`, `right` (H, r, d): rows of the factors of M_h = L_h R_h^T. `content` (H, d, d): F_h. `drift` (d,). A causal mask
    changes nothing as long as tokens are independent and of one law, and are many before each query.
    """

    kernel: Kernel
    left: Tensor
    right: Tensor
    content: Tensor
    drift: Tensor

    @property
    def tilt(self) -> Tensor:
        """M_h^T (H, d, d), from a query to its relevance gradient; A of the sources."""
        return self.right.mT @ self.left

    def field(self, law: Law) -> Affine:
        """The velocity of a token x, summed over heads: Gamma(x) = offset + gain x, (…, d) and (…, d, d)."""
        found = self.kernel.mean_field(self.left, self.right, law.mean, law.cov)
        if found is None:
            raise ValueError(f"{type(self.kernel).__name__} does not keep a Gaussian cloud Gaussian: there is no closure")
        offset = (self.content @ found.offset.unsqueeze(-1)).squeeze(-1).sum(-2) + self.drift
        return Affine(offset, (self.content @ found.gain).sum(-3))

    def velocity(self, law: Law) -> Law:
        """(alpha', Sigma') under x' = Gamma(x): alpha' = Gamma(alpha), Sigma' = gain Sigma + Sigma gain^T."""
        offset, gain = self.field(law)
        half = gain @ law.cov
        return Law(offset + _apply(gain, law.mean), half + half.mT)

    def step(self, law: Law, epsilon: float) -> Law:
        """The law of x + epsilon Gamma(x), as a residual layer makes it: exact."""
        offset, gain = self.field(law)
        whole = torch.eye(gain.shape[-1], dtype=gain.dtype) + epsilon * gain
        return Law(_apply(whole, law.mean) + epsilon * offset, whole @ law.cov @ whole.mT)

    def growth(self) -> Growth:
        """Sigma' at N(0, I). For softmax it is B = beta sum_h (F_h M_h^T + M_h F_h^T), V A + A^T V^T of the sources: positive
        eigenvalues spread a cloud, negative ones gather it. `emformer.circuits.growth` tells it of layers with norms, and by
        heads."""
        dim = self.content.shape[-1]
        one = torch.eye(dim, dtype=torch.float64)
        return self.velocity(Law(one.new_zeros(dim), one)).cov

    def commutes(self, cov: Covariance, tolerance: float = 1e-10) -> Bool[Tensor, "*batch"]:
        """Whether each F_h commutes with the cloud's covariance and with B = `growth()`, up to a relative `tolerance`: then
        `closed_form` is the solution for softmax attention, and otherwise in general not (it is where heads cancel: F and -F with
        one M). M may be anything.

        Raises:
            ValueError: for another kernel.
        """
        growth = _softmax(self)[0]
        return (_commute(self.content, cov.unsqueeze(-3), tolerance) & _commute(self.content, growth, tolerance)).all(-1)


@torch.no_grad()
def closure(model: Emformer, layer: int = 0) -> Closure:
    """The closure of one layer of a model, its step size left out.

    Raises:
        ValueError: where more than attention acts on the cloud, or on the score (a norm, a placement on the sphere, an FFN,
            positions, biases), and for a kernel that keeps no Gaussian cloud Gaussian.
    """
    block = model.layer(layer)
    attention = block.attention
    in_the_way = {
        "a norm or a sphere": any(part is not None for part in (block.read_attn, block.shape_attn, block.place_attn)),
        "positions": len(attention.positions) > 0,
        "biases": attention.biases is not None or attention.value_bias is not None or attention.kernel.value is not None,
        "an FFN": block.ffn is not None,
    }
    found = [name for name, there in in_the_way.items() if there]
    if found:
        raise ValueError(f"layer {layer} has {' and '.join(found)}: a Gaussian cloud does not stay Gaussian there")
    told = factors(block)
    drift = told.form_left.new_zeros(told.form_left.shape[-1]) if attention.drift is None else attention.drift.double()
    whole = Closure(attention.kernel, told.form_left, told.form_right, told.content_left.mT @ told.content_right, drift)
    whole.growth()  # says at once if there is no closure
    return whole


class Evolution(NamedTuple):
    """A law in time: `times` (K,), `means` (K, d), `covs` (K, d, d), up to the end or to where it was stopped.

    `stopped`: when the trace of the covariance went beyond the largest allowed; `blow_up`: when it is infinite, if its rate then
    rose as a power of it (by the first power where it is as 1/(t* - t), by none where as exp t, however late the growth began;
    what is steeper than the fourth power of 1/(t* - t) cannot be told from that). inf where that did not happen.
    """

    times: Float64[Tensor, " K"]
    means: Float64[Tensor, "K d"]
    covs: Float64[Tensor, "K d d"]
    stopped: float
    blow_up: float

    @property
    def end(self) -> Law:
        """The last law."""
        return Law(self.means[-1], self.covs[-1])


def evolve(
    gaussian: Closure,
    law: Law,
    until: float,
    times: Sequence[float] | None = None,
    *,
    largest: float = LARGEST,
    tolerance: float = 1e-10,
) -> Evolution:
    """The law under the layer's flow x' = Gamma(x), from time 0 to `until`.

    What is integrated is the mean and a root R of the covariance Sigma = R R^T, R' = gain R: no error makes Sigma indefinite, and
    eigenvalues far below the largest keep their digits. The integrator (LSODA) notices stiffness, which there is wherever wide
    clouds come to rest: on lines u with u^T M u = 0.

    Args:
        law: without batch.
        times: when the law is told, ascending in [0, until]; default: after each step of the integrator, which are dense where
            the law moves fast.
        largest: it stops where tr Sigma passes this, or a hundred times the trace at the start if that is more: it takes two
            decades to tell a blow-up. A covariance knows its narrow directions to 1e-16 of its trace only, and L2 and Sinkhorn
            attention ask for them: at 1e8 they take thousands of steps, at 1e5 few.
        tolerance: relative error allowed in a step; that of the result is about 100 times as much.

    Raises:
        ValueError: for times that do not ascend in [0, until], or a largest trace that the law has from the start.
        ArithmeticError: where the integrator gives up.

    Cost: some 500 to 2,000 evaluations of 0.1 ms, or d^3; and d^2 more for each of a few Jacobians where it is stiff.
    """
    dim = len(law.mean)
    asked = None if times is None else np.asarray(times, dtype=np.float64)
    if asked is not None and (len(asked) == 0 or asked[0] < 0 or asked[-1] > until or bool((np.diff(asked) <= 0).any())):
        raise ValueError(f"times ascend in [0, {until:g}]")
    width = float(law.cov.trace())
    if width >= largest:
        raise ValueError(f"the trace of the covariance is {width:g} at the start; the largest allowed is {largest:g}")
    largest = max(largest, width / SHARES[0])

    def split(y: np.ndarray) -> tuple[Tensor, Tensor]:
        whole = torch.from_numpy(y)
        return whole[:dim], whole[dim:].view(dim, dim)

    def speed(t: float, y: np.ndarray) -> np.ndarray:
        mean, root = split(y)
        offset, gain = gaussian.field(Law(mean, root @ root.mT))
        return torch.cat([gain @ mean + offset, (gain @ root).flatten()]).numpy()

    def pace(y: np.ndarray) -> tuple[float, float]:
        """The trace and its rate, tr Sigma'/tr Sigma."""
        mean, root = split(y)
        law = Law(mean, root @ root.mT)
        trace = float(law.cov.trace())
        return trace, float(gaussian.velocity(law).cov.trace()) / trace

    start = torch.cat([law.mean, _root(law.cov).flatten()]).numpy()
    told_at, states = [], []
    below = dict.fromkeys(SHARES, start)  # the last states whose traces are below these shares of the largest
    stopped = blow_up = math.inf

    def tell(at: float, y: np.ndarray) -> None:
        told_at.append(at)
        states.append(y.copy())

    if asked is None or asked[0] == 0:
        tell(0.0, start)
    solver = LSODA(speed, 0.0, start, until, rtol=tolerance, atol=1e-3 * tolerance)
    while solver.status == "running":
        before = solver.t
        solver.step()
        if solver.status == "failed" or not np.isfinite(solver.y).all():
            raise ArithmeticError(f"the law is no longer finite, or cannot be followed, after time {before:g}")
        reached = solver.t
        width = float(np.square(solver.y[dim:]).sum())
        below |= {share: solver.y.copy() for share in SHARES if width < share * largest}
        gone = width >= largest
        if gone:
            stopped = reached
            paces = [pace(y) for y in (*below.values(), solver.y)]
            powers = [_power(*both) for both in pairwise(paces)]
            if min(powers) > QUICKENS:  # all along: an exponential that overtakes a slower one quickens for a factor of ten only
                blow_up = reached + 1 / (powers[-1] * paces[-1][1])
        if asked is None:
            tell(reached, solver.y)
        else:
            within = asked[(asked > before) & (asked <= reached)]
            if len(within):
                dense = solver.dense_output()
                for at in within:
                    tell(float(at), dense(at))
        if gone:
            break
    whole = torch.from_numpy(np.stack(states)) if states else torch.zeros(0, dim + dim * dim, dtype=torch.float64)
    roots = whole[:, dim:].reshape(-1, dim, dim)
    return Evolution(torch.tensor(told_at, dtype=torch.float64), whole[:, :dim], roots @ roots.mT, stopped, blow_up)


def blow_up(gaussian: Closure, cov: Covariance) -> Numbers:
    """t* = 1/lambda_max(Sigma^{1/2} B Sigma^{1/2}), when the cloud is infinitely wide if `Closure.commutes`; inf where no
    eigenvalue is positive.

    Raises:
        ValueError: for another kernel than softmax.

    Cost d^3. Source: math E.6.
    """
    growth, size = _softmax(gaussian)
    top = torch.linalg.eigvalsh(_seen(growth, _root(cov)))[..., -1]
    rounding = 1e-13 * size * cov.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (1 / top).where(top > rounding, math.inf)


def closed_form(gaussian: Closure, cov: Covariance, time: float) -> Covariance:
    """Sigma(t) = (Sigma^-1 - t B)^-1, the solution for softmax if `Closure.commutes`; of a singular Sigma too.

    Raises:
        ValueError: for another kernel, and for a time at or after the blow-up of any of the clouds.

    Cost d^3. Source: math E.6; S3.
    """
    first = float(blow_up(gaussian, cov).min())
    if not time < first:
        raise ValueError(f"the cloud is infinitely wide at {first:g}; there is nothing at {time:g}")
    root = _root(cov)
    inner = torch.eye(root.shape[-1], dtype=root.dtype) - time * _seen(gaussian.growth(), root)
    return root @ torch.linalg.solve(inner, root)


def limit(gaussian: Closure, cov: Covariance, tolerance: float = 1e-10) -> Covariance:
    """`closed_form` at t -> infinity, B negative semidefinite: (P Sigma^-1 P)^-1 on the kernel of B, P its projector, and 0
    elsewhere; so of rank dim ker B where Sigma has full rank. Eigenvalues of B below `tolerance` of what it is the sum of,
    2 beta sum_h |F_h| |M_h|, are 0.

    Raises:
        ValueError: for another kernel than softmax, and for a B with a positive eigenvalue: there is no limit.

    Cost d^3. Source: math E.6.
    """
    growth, size = _softmax(gaussian)
    values, vectors = torch.linalg.eigh(growth)
    if values[-1] > tolerance * size:
        raise ValueError(f"B has the positive eigenvalue {float(values[-1]):g}: the cloud has no limit")
    root, rest = _root(cov), vectors[:, values < -tolerance * size]
    # Sigma^{1/2} Q Sigma^{1/2}, Q the projector on what is orthogonal to Sigma^{1/2} im B
    axes, sizes, _ = torch.linalg.svd(root @ rest, full_matrices=False)
    if rest.shape[-1]:
        axes = axes * (sizes / sizes.amax(-1, keepdim=True) > tolerance).unsqueeze(-2)
    part = root @ axes
    return cov - part @ part.mT


class Sampling(NamedTuple):
    """What N tokens instead of infinitely many cost a query: `error` (T,) the mean of |Gamma_N(x) - Gamma(x)|^2 in units of
    the update squared; `effective` (H, T) how many tokens a head's weights are worth, 1/sum_j a_j^2, in (0, N]."""

    error: Float64[Tensor, " T"]
    effective: Float64[Tensor, "H T"]


def sampling(gaussian: Closure, law: Law, x: Queries, tokens: int) -> Sampling:
    """Of softmax attention of the queries x to `tokens` independent tokens of the law, which they are not among; to leading order
    in 1/N. With b_h = beta M_h^T x,

        N error = sum_{h,k} exp(b_h . Sigma b_k) (tr(F_h Sigma F_k^T) + <F_h Sigma b_k, F_k Sigma b_h>)
        effective = N exp(-b_h . Sigma b_h)

    The constant is exponential in b . Sigma b: beyond about 1 it takes many more tokens until the law of large numbers rules.

    Raises:
        ValueError: for another kernel.

    Cost H^2 T d^2. Source: math E.6, there for one head.
    """
    kernel = gaussian.kernel
    if not isinstance(kernel, SoftmaxKernel):
        raise ValueError(f"the error of sampling is known for softmax attention, not for {type(kernel).__name__}")
    content, b = gaussian.content, kernel.beta * x @ gaussian.tilt.mT
    moved = b @ law.cov
    common = torch.einsum("htd,ktd->hkt", b, moved)
    trace = torch.einsum("hij,jl,kil->hk", content, law.cov, content)
    each = torch.einsum("hij,ktj->hkti", content, moved)  # F_h Sigma b_k
    cross = (each * each.transpose(0, 1)).sum(-1)
    error = (common.exp() * (trace.unsqueeze(-1) + cross)).sum((0, 1)) / tokens
    return Sampling(error, tokens * (-common.diagonal().mT).exp())


def cone(cov: Float64[Tensor, "*batch 2 2"]) -> Points:
    """((a, c), (c, b)) as the point (a - b, 2c, a + b): the covariances of the plane are the cone z >= sqrt(x^2 + y^2), those of
    rank one its surface; eigenvalues are (z -+ sqrt(x^2 + y^2))/2 and the determinant (z^2 - x^2 - y^2)/4. Sigma/tr Sigma is the
    point (x/z, y/z) of the unit disk. Source: S3; math E.6."""
    a, b, c = cov[..., 0, 0], cov[..., 1, 1], cov[..., 0, 1]
    return torch.stack([a - b, 2 * c, a + b], -1)


def from_cone(points: Points) -> Float64[Tensor, "*batch 2 2"]:
    """The inverse of `cone`."""
    x, y, z = points.unbind(-1)
    return torch.stack([torch.stack([z + x, y], -1), torch.stack([y, z - x], -1)], -2) / 2


# ----------------------------------------------------------------------------------------------------------------------


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _root(cov: Tensor) -> Tensor:
    """The symmetric root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT


def _softmax(gaussian: Closure) -> tuple[Tensor, float]:
    """B, and the size of the terms that it is the sum of: what cancels to rounding is that small beside it."""
    if not isinstance(gaussian.kernel, SoftmaxKernel):
        raise ValueError(f"the closed form is that of softmax attention, not of {type(gaussian.kernel).__name__}")
    norms = torch.linalg.matrix_norm(gaussian.content) * torch.linalg.matrix_norm(gaussian.tilt)
    return gaussian.growth(), 2 * gaussian.kernel.beta * float(norms.sum())


def _power(before: tuple[float, float], after: tuple[float, float]) -> float:
    """By which power of the trace its rate rises, from (trace, rate) before to those after; inf where that says nothing: no
    growth before, or both are one state."""
    (narrow, slow), (wide, fast) = before, after
    if fast <= 0:
        return 0.0
    return math.log(fast / slow) / math.log(wide / narrow) if slow > 0 and wide > narrow else math.inf


def _seen(growth: Tensor, root: Tensor) -> Tensor:
    whole = root @ growth @ root
    return (whole + whole.mT) / 2


def _commute(a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    size = torch.linalg.matrix_norm(a) * torch.linalg.matrix_norm(b)
    return torch.linalg.matrix_norm(a @ b - b @ a) <= tolerance * size
