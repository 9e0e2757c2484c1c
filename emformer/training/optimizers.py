"""Optimisers. Both multiply the learning rate of an operator's factors by the operator's own `rates` (math I)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emformer import parts
from emformer.attention import Biases
from emformer.model import Emformer
from emformer.operators import Operator


@dataclass(frozen=True)
class AdamW(parts.Optimizer):
    """AdamW with decoupled weight decay on matrices (not on gains, biases and the embedding). One fused call a group.

    Args:
        rate: learning rate.
        beta1: decay of the mean gradient.
        beta2: decay of the mean square.
        weight_decay: per step, times the learning rate.
    """

    rate: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        _check(self)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        groups: dict[tuple[float, float], list[Tensor]] = defaultdict(list)
        for parameter, rate, matrix, decays in _parameters(model):
            groups[rate, self.weight_decay if matrix and decays else 0.0].append(parameter)
        return torch.optim.AdamW(
            # the decay is divided by the multiplier that the optimiser applies to it: weights shrink alike, whatever their rate
            [{"params": p, "lr": self.rate * rate, "weight_decay": decay / rate} for (rate, decay), p in groups.items()],
            betas=(self.beta1, self.beta2),
            fused=True,
        )


@dataclass(frozen=True)
class Muon(parts.Optimizer):
    """Muon for the matrices inside the blocks, Adam for everything else.

    The momentum of each matrix is replaced by a matrix with the same singular vectors and singular values near 1, so a step
    moves every singular direction by about `rate`: five iterations bring those of a Gaussian 32 x 128 matrix to 0.88 … 1.12,
    three to 0.2 … 1.9, which learns no slower. The factors of M and F are orthogonalised head by head, which is cheaper than
    together (r x r Gram matrices) and fits what they are: H separate operators. All matrices of one shape go through one
    batched product.

    Args:
        rate: length of a step in every singular direction of a matrix.
        momentum: of the gradient (Nesterov).
        iterations: of the orthogonalisation, 1 to 5.
        weight_decay: of the matrices, per step, times the learning rate.
        adam_rate: learning rate of embeddings, gains and biases.
        beta1: decay of Adam's mean gradient.
        beta2: decay of Adam's mean square.
    """

    rate: float = 0.02
    momentum: float = 0.9
    iterations: int = 3
    weight_decay: float = 0.0
    adam_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95

    def __post_init__(self) -> None:
        _check(self)
        if not 1 <= self.iterations <= len(_POLAR):
            raise parts.UserError(f"Muon: iterations is {self.iterations}; choose 1 to {len(_POLAR)}.")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        groups: dict[tuple[bool, float, bool], list[Tensor]] = defaultdict(list)
        for parameter, rate, matrix, decays in _parameters(model):
            groups[matrix, rate, decays].append(parameter)
        return MuonWithAdam(
            [
                {
                    "params": p,
                    "lr": (self.rate if matrix else self.adam_rate) * rate,
                    "weight_decay": self.weight_decay / rate if decays else 0.0,
                    "matrix": matrix,
                }
                for (matrix, rate, decays), p in groups.items()
            ],
            {
                "momentum": self.momentum,
                "iterations": self.iterations,
                "beta1": self.beta1,
                "beta2": self.beta2,
            },
        )


def _check(setting: AdamW | Muon) -> None:
    """Rates and decays may not be negative, and what is a mean over the past is a share in [0, 1)."""
    name = type(setting).__name__
    for field, value in vars(setting).items():
        if field in ("momentum", "beta1", "beta2") and not 0 <= value < 1:
            raise parts.UserError(f"{name}: {field} is {value}; choose a share in [0, 1).")
        if field in ("rate", "adam_rate", "weight_decay") and not 0 <= value < float("inf"):
            raise parts.UserError(f"{name}: {field} is {value}; choose a number from 0 up.")


def _parameters(model: nn.Module) -> Iterator[tuple[Tensor, float, bool, bool]]:
    """Each trainable parameter once, with its rate multiplier, whether it is a matrix inside a block, and whether decay shrinks
    what it stands for."""
    logarithms: set[int] = set()
    rates: dict[int, float] = {}
    matrices: set[int] = set()
    vectors: set[int] = set()  # embeddings are rows of vectors, not maps, also when they unembed
    for module in model.modules():
        if isinstance(module, Biases):
            rates |= {id(p): module.rates[name] for name, p in module.named_parameters()}
        elif isinstance(module, Operator):
            rates |= {id(p): module.rates.get(name, 1.0) for name, p in module.named_parameters()}
            matrices |= {id(p) for p in module.parameters() if p.ndim == 3}  # (heads, ., .)
            logarithms |= {id(getattr(module, name)) for name in module.generators}
        elif isinstance(module, nn.Linear):
            matrices.add(id(module.weight))
        elif isinstance(module, nn.Embedding):
            vectors.add(id(module.weight))
    if isinstance(model, Emformer):
        vectors.add(id(model.unembedding.weight))
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = id(parameter)
            yield parameter, rates.get(key, 1.0), key in matrices and key not in vectors, key not in logarithms


class MuonWithAdam(torch.optim.Optimizer):
    """Groups with `matrix` true take Muon's step, the others Adam's (without weight decay)."""

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any]):
        super().__init__(groups, defaults)

    @property
    def flops(self) -> int:
        """FLOPs of one step's orthogonalisations: 2 (2 m^2 n + m^3) an iteration and m x n matrix."""
        total = 0
        for group in self.param_groups:
            for p in group["params"] if group["matrix"] else ():
                m, n = min(p.shape[-2:]), max(p.shape[-2:])
                total += group["iterations"] * 2 * (2 * m * m * n + m**3) * (p.numel() // (m * n))
        return total

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._muon if group["matrix"] else self._adam)(group, parameters)
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        gradients = [p.grad for p in parameters]
        buffers = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])  # ty: ignore[no-matching-overload]
        ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])  # ty: ignore[no-matching-overload]
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, p in enumerate(parameters):
            shapes[min(p.shape[-2:]), max(p.shape[-2:])].append(index)
        for indices in shapes.values():
            # wide matrices of one shape, heads and layers and factors, in one batch
            wide = [_wide(ahead[k]) for k in indices]
            steps = orthogonalise(torch.cat(wide), group["iterations"]).split([len(w) for w in wide])
            for k, step in zip(indices, steps, strict=True):
                p = parameters[k]
                p.add_((step if p.shape[-2] <= p.shape[-1] else step.mT).view_as(p), alpha=-group["lr"])

    def _adam(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p].update(step=torch.zeros((), dtype=torch.float32), exp_avg=torch.zeros_like(p))
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in parameters]
        gradients = [p.grad for p in parameters]
        means, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        beta1, beta2 = group["beta1"], group["beta2"]
        for s in states:
            s["step"] += 1
        count = float(states[0]["step"])
        torch._foreach_lerp_(means, gradients, 1 - beta1)  # ty: ignore[no-matching-overload]
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)  # ty: ignore[no-matching-overload]
        scale = torch._foreach_sqrt(squares)
        torch._foreach_div_(scale, (1 - beta2**count) ** 0.5)
        torch._foreach_add_(scale, 1e-10)
        torch._foreach_addcdiv_(parameters, means, scale, -group["lr"] / (1 - beta1**count))


# Odd polynomials a x + b x^3 + c x^5 whose composition brings singular values in (0, 1] near 1 fastest.
# Amsel, Persson, Musco, Gower: The Polar Express, arXiv 2505.16932, algorithm 1 (five steps, lower bound 1e-3).
_POLAR = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


def orthogonalise(matrices: Tensor, iterations: int = 3) -> Tensor:
    """The semi-orthogonal polar factor U V^T of each wide matrix (B, m, n), m <= n, approximately.

    Cost per iteration and matrix: 2 m^2 n + m^3 multiply-adds. In bfloat16 on CUDA, else in the dtype given.
    """
    x = matrices.bfloat16() if matrices.is_cuda and matrices.dtype == torch.float32 else matrices
    x = x / (1.01 * torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-12)
    for a, b, c in _POLAR[:iterations]:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


def _wide(x: Tensor) -> Tensor:
    """As a batch of matrices with at least as many columns as rows."""
    x = x.reshape(-1, *x.shape[-2:])
    return x if x.shape[-2] <= x.shape[-1] else x.mT
