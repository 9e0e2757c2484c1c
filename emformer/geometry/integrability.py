"""Is a velocity field on clouds a gradient, and does the flow climb the energy that it would be the gradient of?

A field maps clouds (B, N, d) to velocities (B, N, d), each prompt by itself. It is looked at in one of three spaces: "ambient" at
the cloud as given; "sphere" at the unit vectors theta = x/|x| of RMSNorm, velocities and perturbations projected to the tangent
space of (S^{d-1})^N; "centred" the same for LayerNorm, within the hyperplane of mean 0. A field is called with clouds of the type
and device of x, so with those of its own parameters; everything after it is float64, and so is what is returned. nan where a
token has no direction, and for the zero field.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.optimize import nnls
from torch import Tensor

from emformer.geometry.energy import forces, scores
from emformer.geometry.paths import direction
from emformer.geometry.spectra import asymmetry, wide

Space = Literal["ambient", "sphere", "centred"]
Cloud = Float[Tensor, "B N d"]
Field = Callable[[Tensor], Tensor]
Forms = Float[Tensor, "H d d"]
Prompts = Float64[Tensor, " B"]
One = Float[Tensor, "*#batch d"]  # of a pair, whose batches broadcast
Both = Float[Tensor, "..."]


def project(x: One, v: One, space: Space) -> Both:
    """v_i - <v_i, theta_i> theta_i with theta the unit vectors x, for "centred" without its mean too; v itself for "ambient".

    Cost N d. Source: math E.3.
    """
    if space == "ambient":
        return v
    if space == "centred":
        v = v - v.mean(-1, keepdim=True)
    return v - (v * x).sum(-1, keepdim=True) * x


def defect(jacobian: Float[Tensor, "*batch n n"]) -> Float64[Tensor, "*batch"]:
    """omega = |(J - J^T)/2|_F^2 / |J|_F^2, the integrability defect of a field with the Jacobian J.

    In [0, 1]: 0 a gradient, 1 a pure rotation. Null (iid entries): (n - 1)/(2n). nan for J = 0. Cost n^2. Source: math E.3.
    """
    return asymmetry(jacobian)


def jacobian(field: Field, x: Cloud, space: Space) -> Float64[Tensor, "B n n"]:
    """The derivative of the field at each prompt, n = N d rows for velocities; projected on both sides unless "ambient".

    On the sphere it is the covariant derivative in ambient coordinates: of same norm as in any orthonormal tangent frame, and as
    symmetric. Cost n backward passes a prompt, memory n^2: for small clouds; `estimated_defect` for others. Source: math E.3.
    """
    derivative = torch.func.jacrev(_velocity(field, space))
    found = []
    for theta in _place(x, space).unsqueeze(1):
        full = derivative(theta)
        size = theta.numel()
        rows = project(wide(theta), wide(full).reshape(size, *theta.shape[1:]), space).flatten(1)
        found.append(project(wide(theta), rows.mT.reshape(size, *theta.shape[1:]), space).flatten(1).mT)
    return torch.stack(found)


def exact_defect(field: Field, x: Cloud, space: Space) -> Prompts:
    """`defect` of the `jacobian`, prompt by prompt."""
    return defect(jacobian(field, x, space))


class Estimate(NamedTuple):
    """Per prompt (B,), with its standard error over probes (nan for one probe)."""

    value: Prompts
    error: Prompts


def estimated_defect(field: Field, x: Cloud, space: Space, probes: int = 64, seed: int = 0, chunk: int = 8) -> Estimate:
    """omega = (1/4) E|J xi - J^T xi|^2 / E[(|J xi|^2 + |J^T xi|^2)/2] over random signs xi: Hutchinson's estimate of `defect`.

    In [0, 1] for any number of probes, and exactly 0 for a symmetric J, because the difference is taken before the square. The
    standard error is that of a ratio of means. The field must be differentiable in forward and in reverse mode, which the weights
    of every kernel are and fused attention is not. Cost: a probe is about 4 calls of the field. Source: math E.3.

    Args:
        seed: of the probes' own generator.
        chunk: probes at once, as so many copies of the cloud in one batch.

    Raises:
        ValueError: for no probe.
    """
    if probes < 1:
        raise ValueError("an estimate needs at least one probe")
    theta, velocity = _place(x, space), _velocity(field, space)
    generator = torch.Generator().manual_seed(seed)
    rotations, sizes = [], []
    for start in range(0, probes, chunk):
        count = min(chunk, probes - start)
        points = theta.repeat(count, 1, 1)
        signs = torch.randint(0, 2, points.shape, generator=generator).to(points) * 2 - 1
        xi = project(points, signs, space)
        pushed = torch.func.jvp(velocity, (points,), (xi,))[1]
        pulled = torch.func.vjp(velocity, points)[1](xi)[0]
        ahead, back = (wide(project(points, w, space)).reshape(count, len(theta), -1) for w in (pushed, pulled))
        rotations.append((ahead - back).square().sum(-1) / 4)
        sizes.append((ahead.square().sum(-1) + back.square().sum(-1)) / 2)
    rotation, size = torch.cat(rotations), torch.cat(sizes)
    scale = size.mean(0)
    scale = scale.where(scale > 0, torch.nan)
    value = rotation.mean(0) / scale
    spread = (rotation - value * size).square().sum(0) / (probes * (probes - 1) or torch.nan)
    return Estimate(value, spread.sqrt() / scale)


def alignment(v: Cloud, gradient: Cloud, x: Cloud, space: Space) -> Prompts:
    """R^2 = cos^2(v, grad E) over the flattened cloud after `project`: does the field follow, or flee, this energy.

    In [0, 1]. Null (isotropic v): 1/(N d) ambient, 1/(N (d - 1)) on the sphere, 1/(N (d - 2)) centred. nan where either is 0.
    Cost N d. Source: math K (2).
    """
    theta = wide(_place(x, space))
    v, g = (project(theta, wide(w), space).flatten(1) for w in (v, gradient))
    scale = v.square().sum(-1) * g.square().sum(-1)
    return ((v * g).sum(-1).square() / scale.where(scale > 0, torch.nan)).clamp(max=1)


def best_alignment(v: Cloud, gradients: Float[Tensor, "B H N d"], x: Cloud, space: Space) -> Prompts:
    """The largest cos^2(v, sum_h c_h grad E_h) over c_h >= 0: does the field climb any mixture of the heads' energies.

    In [0, 1]; 0 if it descends all of them. Null (isotropic v): at most H/(N d'), d' as in `alignment`, and half of that for
    orthogonal gradients. nan where v or all gradients are 0. Non-negative least squares in H unknowns, prompt by prompt. Cost
    H^2 N d. Source: math K (2).
    """
    theta = wide(_place(x, space))
    v = project(theta, wide(v), space).flatten(1)
    g = project(theta.unsqueeze(1), wide(gradients), space).flatten(2).mT
    found = [_climb(one, some) for one, some in zip(v, g, strict=True)]
    return v.new_tensor(found)


def log_energy(x: Cloud, form: Forms, beta: float = 1.0, space: Space = "sphere") -> Float64[Tensor, "B H"]:
    """log E_M, E_M = sum_ij e^{beta theta_i^T M_h theta_j}, i = j included, theta the tokens in this space.

    At most log N^2 + beta max s. Equals log(2 beta N^2 E_beta) for M = I; then E e^{-beta}/N^2 in (0, 1] is 1 iff there is one
    cluster. The logarithm, because e^{beta s} overflows; `relative_drop` compares two. Cost H N d (N + d). Source: math E.1, E.4.
    """
    return (beta * scores(_place(wide(x), space), form)).flatten(-2).logsumexp(-1)


def energy(x: Cloud, form: Forms, beta: float = 1.0, space: Space = "sphere") -> Float64[Tensor, "B H"]:
    """E_M, see `log_energy`; nan where it is above the largest float64."""
    found = log_energy(x, form, beta, space).exp()
    return found.where(found.isfinite(), torch.nan)


def energy_gradient(x: Cloud, form: Forms, beta: float = 1.0, space: Space = "sphere") -> Float64[Tensor, "B H N d"]:
    """grad log E_M at theta: beta sum_j (w_kj M + w_jk M^T) theta_j, w = softmax of beta s over all pairs; projected.

    Of the direction of grad E_M, without its overflow. N times it is of the order of a velocity. Cost H N d (N + d).
    Source: math E.1, E.4.
    """
    theta = _place(wide(x), space)
    s = beta * scores(theta, form)
    w = s.flatten(-2).softmax(-1).view_as(s)
    action, reaction = forces(w, theta, form)
    return project(theta.unsqueeze(1), beta * (action + reaction), space)


def relative_drop(before: Float[Tensor, "*batch"], after: Float[Tensor, "*batch"]) -> Float64[Tensor, "*batch"]:
    """1 - E'/E = -(e^{log E' - log E} - 1) from two `log_energy`: positive where the energy fell; at most 1. Source: math E.4.

    nan where it rose beyond the largest float64.
    """
    found = -torch.expm1(wide(after) - wide(before))
    return found.where(found.isfinite(), torch.nan)


def violations(change: Float[Tensor, "*batch"], tolerance: float = 0.0) -> Float64[Tensor, "*batch"]:
    """1 where an energy that should not fall changed by less than -tolerance, 0 where it did not, nan where undefined.

    Their mean is the violation fraction, null (a field that does not know the energy) 1/2. Steps or tokens, along any axes.
    Source: math K (3).

    Args:
        tolerance: in units of `change`, above its rounding: 1e-12 for log E from float64 clouds, about 1e-6 from float32.
    """
    change = wide(change)
    return (change < -tolerance).double().where(~change.isnan(), torch.nan)


def variation_ratio(change: Float[Tensor, " S *batch"]) -> Float64[Tensor, "*batch"]:
    """TV-/TV = sum of the falls / sum of |change| along the first axis: how much of the movement goes the wrong way.

    In [0, 1], null 1/2; 0 monotone. For a sequence of energies pass its differences, `energies.diff(dim=0)`. nan if nothing
    moves, or if any change is undefined. Source: math K (3).
    """
    change = wide(change)
    whole = change.abs().sum(0)
    return (-change).clamp(min=0).sum(0) / whole.where(whole > 0, torch.nan)


class Slope(NamedTuple):
    """A slope, its standard error, the number of samples used and of those left out because one of the two was nan."""

    slope: float
    error: float
    n_valid: int
    n_dropped: int


def dissipation_slope(change: Float[Tensor, "*batch"], predicted: Float[Tensor, "*batch"]) -> Slope:
    """The least-squares slope of the changes of an energy on <grad E, step>, through the origin: no force, no change.

    1 for small steps, to first order in their size: what it is away from 1 is second order. For log E take the gradient of log E,
    and as step the movement of theta, to first order D_t/|Pi x|. The error assumes independent samples; nan below two. nan for
    no samples or predictions 0. Source: math K (4).
    """
    change, predicted = wide(change).flatten(), wide(predicted).flatten()
    known = change.isfinite() & predicted.isfinite()
    y, x = change[known], predicted[known]
    square = float(x.square().sum()) or torch.nan
    slope = float((x * y).sum()) / square
    freedom = len(x) - 1 if len(x) > 1 else torch.nan
    error = (float((y - slope * x).square().sum()) / freedom / square) ** 0.5
    return Slope(slope, error, len(x), int((~known).sum()))


def _place(x: Tensor, space: Space) -> Tensor:
    """The point at which the field is taken, in the type of x."""
    return x if space == "ambient" else direction(x, space == "centred").to(x)


def _velocity(field: Field, space: Space) -> Field:
    """W = P_theta field(theta), the projection a part of what is differentiated."""
    return lambda theta: project(theta, field(theta), space)


def _climb(v: Tensor, g: Tensor) -> float:
    """max over c >= 0 of cos^2(v, g c); g (n, H)."""
    square = float(v.square().sum())
    if not (square > 0 and g.isfinite().all() and g.any()):
        return torch.nan
    # the fit is the nearest point of the cone, so <v, fit> = |fit|^2; columns of one size keep the solver well conditioned
    sizes = g.norm(dim=0)
    basis, core = torch.linalg.qr(g[:, sizes > 0] / sizes[sizes > 0])
    weights, _ = nnls(core.cpu().numpy(), (basis.mT @ v).cpu().numpy())
    return min(1.0, float(np.square(core.cpu().numpy() @ weights).sum()) / square)
