"""Muon for matrices and convolutions, AdamW for the rest, and a running mean of the weights.

On a CPU steps are few and dear. Muon gives every direction of a weight matrix the same step length, and so needs
several times fewer of them. Sources: Jordan et al., "Muon" (2024), with the update scaled to AdamW's size as in
arXiv 2502.16982; AdamW (arXiv 1711.05101).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
ADAMW_SIZE = 0.2
MOMENTUM = 0.95
ADAM_BETAS = (0.9, 0.98)
ADAM_EPS = 1e-8

State = dict[str, Tensor]


class Optimizer:
    """Steps over named parameters; all that it remembers is in `state`, tensors by name."""

    def __init__(self, parameters: Mapping[str, Tensor], plain: tuple[str, ...], weight_decay: float = 0.0) -> None:
        """`plain`: beginnings of names that get AdamW although they are matrices (first and last layers)."""
        self.parameters = dict(parameters)
        self.weight_decay = weight_decay
        self.matrices = {n for n, p in self.parameters.items() if p.dim() > 1 and not n.startswith(plain)}
        self.state: State = {}
        for name, parameter in self.parameters.items():
            self.state[f"first.{name}"] = torch.zeros_like(parameter)
            if name not in self.matrices:
                self.state[f"second.{name}"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, rate: float, count: int, clip: float = 1.0) -> float:
        """One update with learning rate `rate`; `count` is the number of updates including this one. Gradients are
        scaled down to a joint norm of `clip`, and dropped. Returns their norm."""
        gradients = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        scale = (clip / (norm + 1e-6)).clamp(max=1.0)
        for name, gradient in gradients.items():
            parameter = self.parameters[name]
            parameter.mul_(1 - rate * self.weight_decay if parameter.dim() > 1 else 1.0)
            if name in self.matrices:
                parameter.sub_(rate * self._muon(name, gradient * scale))
            else:
                parameter.sub_(rate * self._adam(name, gradient * scale, count))
            parameter.grad = None
        return float(norm)

    def _muon(self, name: str, gradient: Tensor) -> Tensor:
        momentum = self.state[f"first.{name}"]
        momentum.mul_(MOMENTUM).add_(gradient)
        update = orthogonal((gradient + MOMENTUM * momentum).flatten(1))
        scaled: Tensor = ADAMW_SIZE * max(update.shape) ** 0.5 * update
        return scaled.view_as(gradient)

    def _adam(self, name: str, gradient: Tensor, count: int) -> Tensor:
        first, second = self.state[f"first.{name}"], self.state[f"second.{name}"]
        first.lerp_(gradient, 1 - ADAM_BETAS[0])
        second.lerp_(gradient.square(), 1 - ADAM_BETAS[1])
        bias_1, bias_2 = (1 - beta**count for beta in ADAM_BETAS)
        return (first / bias_1) / ((second / bias_2).sqrt() + ADAM_EPS)


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest matrix with all singular values 1, by Newton-Schulz iterations: [r, c] -> [r, c]."""
    a, b, c = NEWTON_SCHULZ
    x = matrix / (matrix.norm() + 1e-12)
    wide: Tensor = x if x.shape[0] <= x.shape[1] else x.T
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.T


class RunningMean:
    """Exponential mean of weights, with a short memory at first."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.state: State = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], count: int) -> None:
        """After update number `count`."""
        weight = 1 - min(self.decay, (1 + count) / (10 + count))
        for name, mean in self.state.items():
            mean.lerp_(parameters[name].detach(), weight)
