"""The paper's method as its text describes it, written plainly: what the numbers are compared with.

Our own writing, not the released code: every quantity is computed for itself, over whole matrices,
one layer at a time. Nothing here is meant to be fast, and nothing is made slow on purpose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mlsae_core.sae import MLSAE

ALPHA, STD_EPS, ADAM_EPS = 1 / 32, 1e-5, 6.25e-10


class Training:
    """One MLSAE and its optimiser, starting from the weights of another: dense throughout.

    Top-k of stored scores, a scatter, a dense decoder, one more for AuxK, autograd, and projection,
    Adam and rescaling over whole matrices.
    """

    def __init__(self, sae: MLSAE, learning_rate: float):
        self.k, self.aux_k = sae.k, sae.aux_k
        self.dead_tokens, self.dead_threshold = sae.dead_tokens, sae.dead_threshold
        self.encoder = torch.nn.Parameter(sae.encoder.detach().clone())
        self.decoder = torch.nn.Parameter(sae.decoder.detach().T.clone())  # (d_model, n_latents)
        self.bias = torch.nn.Parameter(sae.pre_bias.detach().clone())
        parameters = [self.encoder, self.decoder, self.bias]
        self.optimiser = torch.optim.Adam(parameters, lr=learning_rate, eps=ADAM_EPS)
        self.since = sae.tokens_since_active.clone()

    def decode(self, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        shape = (*values.shape[:-1], len(self.encoder))
        latents = torch.zeros(shape).scatter(-1, indices, values.relu())
        return latents @ self.decoder.T, latents

    def step(self, x: Tensor) -> float:
        """One optimiser step on activations (layer, token, d_model); returns the loss."""
        dead = self.since >= self.dead_tokens
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        scaled = (x - mean) / (std + STD_EPS)
        scores = (scaled - self.bias) @ self.encoder.T
        y, latents = self.decode(*scores.topk(self.k, dim=-1))
        error = x - ((y + self.bias) * std + mean)
        loss = (error.square().mean((1, 2)) / x.var((1, 2), unbiased=False)).mean()
        if dead.any():
            among_dead = scores.masked_fill(~dead, -torch.inf)
            again, _ = self.decode(*among_dead.topk(min(self.aux_k, int(dead.sum())), dim=-1))
            left = (scaled - y - self.bias).detach()
            auxk = (left - again).square().mean((1, 2)) / left.var((1, 2), unbiased=False)
            loss = loss + ALPHA * auxk.mean()
        loss.backward()
        with torch.no_grad():
            decoder = self.decoder
            decoder.grad -= (decoder.grad * decoder).sum(0) * decoder
            self.optimiser.step()
            self.optimiser.zero_grad()
            decoder.div_(decoder.norm(dim=0))
            fired = (latents > self.dead_threshold).flatten(0, 1).any(0)
            self.since.add_(x.shape[1]).masked_fill_(fired, 0)
        return loss.item()


def capture(lm, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Residual streams (layer, batch, position, d_model) and logits of one hooked, whole pass."""
    kept = []
    hooks = [
        b.register_forward_hook(lambda _, __, out: kept.append(_first(out))) for b in lm.blocks
    ]
    logits = lm.model(input_ids=tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return torch.stack(kept), logits


@torch.no_grad()
def evaluate(lm, sae: MLSAE, batches: list[Tensor]) -> dict[str, Tensor]:
    """MSE, delta CE and KL of every layer, (layer,) each: one hooked pass for each layer.

    sae: with the dense kernel. Definitions as `mlsae_core.analysis.evaluate` has them.
    """
    sums, vectors, predictions = torch.zeros(3, lm.n_layers, dtype=torch.float64), 0, 0
    for tokens in batches:
        keep, targets = lm.keep_mask(tokens), tokens[:, 1:].flatten()
        residual, original = capture(lm, tokens)
        log_p = original[:, :-1].flatten(0, 1).log_softmax(-1)
        ce = F.nll_loss(log_p, targets, reduction="none")
        vectors += int(keep.sum()) * lm.d_model
        predictions += len(targets)
        for layer, block in enumerate(lm.blocks):
            x = residual[layer][keep]
            recon = sae(x).recon
            logits = _replaced(lm, block, tokens, keep, recon)
            log_q = logits[:, :-1].flatten(0, 1).log_softmax(-1)
            delta = F.nll_loss(log_q, targets, reduction="none") - ce
            kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            parts = ((x - recon).square(), delta, kl)
            sums[:, layer] += torch.stack([part.sum(dtype=torch.float64) for part in parts])
    mse, delta, kl = sums / torch.tensor([[vectors], [predictions], [predictions]])
    return {"mse": mse, "delta_ce": delta, "kl": kl}


def _replaced(lm, block, tokens: Tensor, keep: Tensor, recon: Tensor) -> Tensor:
    """Logits of a whole pass in which one block's output is replaced where `keep` holds."""

    def replace(_, __, output):
        stream = _first(output).clone()
        stream[keep] = recon
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    hook = block.register_forward_hook(replace)
    logits = lm.model(input_ids=tokens, use_cache=False).logits
    hook.remove()
    return logits


def _first(output):
    return output[0] if isinstance(output, tuple) else output


class Distributions:
    """Eqs. 10 to 12 from dense (layer, token, latent) activations of each batch."""

    def __init__(self, n_layers: int, n_latents: int):
        self.layers = torch.arange(n_layers)[:, None, None]
        self.sums = torch.zeros(4, n_latents, dtype=torch.float64)  # Σ1, Σm, Σm², Σv
        self.weights = torch.zeros(n_layers, n_latents, dtype=torch.float64)

    @torch.no_grad()
    def update(self, indices: Tensor, values: Tensor) -> None:
        """Add the codes of a batch, (layer, token, k)."""
        shape = (*values.shape[:2], self.sums.shape[1])
        latents = torch.zeros(shape).scatter(-1, indices, values)
        total = latents.sum(0)
        active = total > 0
        probs = latents / total.where(active, 1)
        mean = (self.layers * probs).sum(0)
        variance = ((self.layers - mean).square() * probs).sum(0)
        parts = (active, mean, mean.square(), variance)
        self.sums += torch.stack([part.sum(0, dtype=torch.float64) for part in parts])
        self.weights += probs.sum(1, dtype=torch.float64)

    def compute(self) -> dict[str, Tensor]:
        """P(L | j), nan for latents that are never active, Eq. 11 and Eq. 12."""
        probs, live = self.weights / self.sums[0], self.sums[0] > 0
        n, m, m2, v = self.sums[:, live]
        mean, within = m / n, v / n
        given_j = within + m2 / n - mean.square()
        eq_11 = given_j.mean() / (given_j.mean() + mean.var(unbiased=False))
        return {
            "probs": probs,
            "ratio_latent": eq_11,
            "ratio_token": within.mean() / given_j.mean(),
        }
