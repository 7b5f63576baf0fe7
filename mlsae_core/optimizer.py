"""Adam that keeps chosen rows at unit norm, as the decoder's are."""

import inspect
from collections.abc import Iterable

import torch
from torch import Tensor

from mlsae_core.pairs import is_cpu

BLOCK_SIZE = 2**17
"""Elements of a parameter that are treated at a time on a CPU."""


class ProjectedAdam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2017) that keeps chosen rows at unit norm.

    In parameter groups with `unit_rows`, the part of the gradient parallel to each row is removed
    before the step, so that Adam's moments hold only what turns the row, and rows are rescaled
    to unit norm after it (Bricken et al. 2023; Gao et al. 2024). Everything happens block by
    block of rows, while they are in the processor's cache.
    """

    def __init__(self, params: Iterable, lr: float = 1e-4, betas=(0.9, 0.999), eps: float = 1e-8):
        if not (lr >= 0 and eps >= 0):
            raise ValueError(f"expected lr and eps of at least 0, got lr={lr}, eps={eps}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "unit_rows": False})

    # Without the decorators that keep PyTorch's compiler out, since they import it: seconds, 80 MB.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; gradients of unit rows are projected in place."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        return loss

    def _update(self, param: Tensor, group: dict) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        tensors = (param, param.grad, state["exp_avg"], state["exp_avg_sq"])
        rows = len(param)
        if group["unit_rows"] and is_cpu(param.device):
            rows = max(1, BLOCK_SIZE // param[0].numel())
        for w, grad, mean, square in zip(*(t.split(rows) for t in tensors), strict=True):
            if group["unit_rows"]:
                grad.addcmul_((grad * w).sum(1, keepdim=True), w, value=-1)
            torch._fused_adam_(
                [w],
                [grad],
                [mean],
                [square],
                [],
                [state["step"]],
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=0.0,
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            if group["unit_rows"]:
                w /= torch.linalg.vector_norm(w, dim=1, keepdim=True)
