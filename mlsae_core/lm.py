"""A frozen causal language model: read activations, replace them, run the rest.

Any Hugging Face decoder-only architecture is found by its structure: the blocks are the
``ModuleList`` of length ``num_hidden_layers`` in the base model, the final norm is the norm beside
it, and everything after that (output embeddings, logit scaling, soft-capping) is the model's own
code. Activations are read by hooks on the blocks, never from ``output_hidden_states``, whose last
entry most architectures take after the final norm.

Sequences are packed, so no attention mask is passed: every position is a real token.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from mlsae_core import models, modules
from mlsae_core.architecture import (
    check_layers,
    check_shapes,
    check_shards,
    empty_model,
    reading,
)
from mlsae_core.products import fast_products
from mlsae_core.spec import HookPoint, ModelSpec, SpecError
from mlsae_core.text import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MLP_NAMES = ("mlp", "ffn", "feed_forward", "block_sparse_moe")


@dataclass(frozen=True)
class Original:
    """One pass of the unmodified model, with what is needed to resume it from any layer.

    Args:
        tokens: (batch, position) int64.
        embeddings: (batch, position, d_model), the input of block 0.
        activations: hook point -> (layer, batch, position, d_model), all layers; has ``residual``.
        calls: per block, the arguments it was called with besides the residual stream.
    """

    tokens: Tensor
    embeddings: Tensor
    activations: dict[str, Tensor]
    calls: list[tuple[tuple, dict[str, Any]]]

    @property
    def residual(self) -> Tensor:
        """(layer, batch, position, d_model): the residual stream after every block."""
        return self.activations["residual"]

    def block_input(self, layer: int) -> Tensor:
        """(batch, position, d_model): the residual stream before block `layer`."""
        return self.embeddings if layer == 0 else self.residual[layer - 1]


class LanguageModel:
    """A frozen causal language model with its tokenizer.

    Hook points: ``residual`` is the residual stream after a block, before the final norm;
    ``mlp_input`` the input of the block's MLP, after its norm; ``mlp_output`` what the MLP adds to
    the residual stream, so after the post-norm where an architecture has one (as Gemma Scope has
    it for Gemma 2). That they are so is measured: the residual stream when a model is loaded, the
    others before they are first used.

    Attributes:
        model, tokenizer, name: as they were given.
        n_layers, d_model, vocab_size, device: of the model.
        special_ids: 1-D int64: of EOS, which ends documents, and of BOS and PAD where these are no
            tokens of text.
    """

    def __init__(self, model: PreTrainedModel, tokenizer, name: str = "model"):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.name = tokenizer, name
        self.base = model.base_model
        config = model.config.get_text_config()
        self.n_layers, self.d_model = config.num_hidden_layers, config.hidden_size
        self.vocab_size = config.vocab_size
        self.max_positions = getattr(config, "max_position_embeddings", None)
        self.device = next(model.parameters()).device
        self.special_ids = torch.tensor(
            _special_ids(tokenizer), dtype=torch.int64, device=self.device
        )
        self._special_ids = self.special_ids.cpu()  # for tokens that are not on the device yet
        owner, self.blocks, final_norm = modules.find_blocks(model, self.n_layers)
        # The model's own code from the final norm on: a copy that shares all parameters, in which
        # the module that owns the blocks returns the residual stream it is given, normalised.
        self._head = modules.with_submodule(model, owner, modules.Given(final_norm))
        self._is_compiled = False
        self._per_sequence: list[dict[tuple, bool]] = [{} for _ in self.blocks]
        self._sites: dict[str, list[nn.Module]] = {"residual": [*self.blocks]}
        self._verify()

    @classmethod
    def load(cls, model: ModelSpec, device: str | torch.device = "cpu") -> LanguageModel:
        """Load weights from safetensors, or draw them at random for a null model.

        With `model.random_weights` the configuration alone is read and the weights are the
        architecture's initialisation from that seed; torch's global generator is left as it was.

        Raises:
            SpecError: the folder, weights, configuration or tokenizer is missing or unreadable, or
                the architecture does not fit.
        """
        # Half of the time that a chapter's imports take; needed where a model is loaded.
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoTokenizer,
            PreTrainedConfig,
        )
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # shards, not seconds: noise in every notebook
        dtype = getattr(torch, model.dtype)
        with reading(
            "model.path: expected a causal language model in safetensors with its tokenizer; "
            f"{model.path!r} could not be loaded"
        ):
            path, name, revision = _resolve(model)
            options = {"revision": revision, "trust_remote_code": False}
            check_layers(PreTrainedConfig.get_config_dict(path, revision=revision)[0])
            config = AutoConfig.from_pretrained(path, **options)
            empty = empty_model(config, model.dtype)
            if revision is None and not hasattr(config, "quantization_config"):
                check_shapes(empty, Path(path), model)
            if model.random_weights is None:
                network, report = AutoModelForCausalLM.from_pretrained(
                    path, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
                )
                if missing := report["missing_keys"]:
                    raise SpecError(
                        f"model.path: {model.path!r} lacks weights for {len(missing)} parameters "
                        f"such as {sorted(missing)[0]!r}; expected a complete checkpoint"
                    )
            else:
                with torch.random.fork_rng(devices=[]):
                    # Not torch.manual_seed, which would reseed the GPUs' generators as well.
                    torch.default_generator.manual_seed(model.random_weights)
                    network = AutoModelForCausalLM.from_config(config, dtype=dtype)
                name = f"{name}-random{model.random_weights}"
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
            return cls(network.to(device), tokenizer, name)

    def compiled(self, backend: str = "inductor") -> LanguageModel:
        """The same weights in compiled blocks, for :meth:`capture` of the residual stream alone.

        Every shape of a batch is compiled when it is first seen. On a CUDA device each block is
        replayed as a CUDA graph. Activations differ by rounding in the model's precision.
        ``mlp_input`` and ``mlp_output`` are refused: they lie inside of what is compiled. This
        model stays as it is, for everything else.
        """
        twin = copy.copy(self)
        twin._is_compiled = True
        graphs = self.device.type == "cuda" and backend == "inductor"
        mode = "reduce-overhead" if graphs else None
        # What is compiled belongs to a code object: one for each model gives it a limit of
        # recompilation of its own, and is shared by the model's blocks.
        own = FunctionType(modules.forward.__code__.replace(), modules.forward.__globals__)
        forward = torch.compile(own, backend=backend, dynamic=False, mode=mode)
        # The forward alone and not the call, so that hooks stay outside of what is compiled: they
        # come and go with every pass, and the last one raises.
        blocks = [copy.copy(block) for block in self.blocks]
        for block, original in zip(blocks, self.blocks, strict=True):
            block.forward = partial(forward, original)
        twin.blocks = nn.ModuleList(blocks)
        [name] = (name for name, module in self.model.named_modules() if module is self.blocks)
        twin.model = modules.with_submodule(self.model, name, twin.blocks)
        twin.base = twin.model.base_model
        return twin

    def keep_mask(self, tokens: Tensor) -> Tensor:
        """(batch, position) bool: True where the token is none of the special ones."""
        known = self._special_ids if tokens.device.type == "cpu" else self.special_ids
        return torch.isin(tokens, known, invert=True)

    @torch.no_grad()
    def capture(
        self,
        tokens: Tensor,
        layers: Sequence[int],
        hook_points: Sequence[str] = ("residual",),
    ) -> dict[str, Tensor]:
        """Activations of some layers; the pass ends after the last of them, without logits.

        Under ``no_grad`` rather than ``inference_mode``, because autoencoders train on the result
        and autograd refuses to save inference tensors.

        Args:
            tokens: (batch, position) int64.
            layers: block indices from 0; the result has them in this order.
            hook_points: any of ``residual``, ``mlp_input``, ``mlp_output``.

        Returns:
            hook point -> (layer, batch, position, d_model) in the model's precision.
        """
        return self._run(tokens, layers, hook_points)

    @torch.no_grad()
    def original(self, tokens: Tensor, hook_points: Sequence[str] = ("residual",)) -> Original:
        """A pass through all blocks, kept so that it can be resumed from any of them.

        Args:
            tokens: (batch, position) int64.
            hook_points: activations to keep; ``residual`` is always among them.
        """
        tokens = self._check_tokens(tokens)
        self._check_hook_points(hook_points)
        calls: list[tuple[tuple, dict[str, Any]]] = []
        inputs: list[Tensor] = []

        def keep_call(_, args, kwargs):
            stream, args, kwargs = modules.split_call(args, kwargs)
            inputs.append(stream)
            calls.append((args, kwargs))

        with ExitStack() as hooks:
            for block in self.blocks:
                handle = block.register_forward_pre_hook(keep_call, with_kwargs=True)
                hooks.callback(handle.remove)
            points = tuple(dict.fromkeys(("residual", *hook_points)))
            activations = self._run(tokens, range(self.n_layers), points)
        return Original(tokens, inputs[0], activations, calls)

    def resume(
        self,
        original: Original,
        layer: int,
        replacement: Tensor,
        hook_point: str = "residual",
    ) -> Tensor:
        """Logits of the model with one layer's activations replaced.

        Gradients flow to `replacement` if it requires them: the weights are frozen, so nothing
        else is recorded.

        Args:
            replacement: (..., batch, position, d_model), for example one row per steering factor.

        Returns:
            (..., batch, position, vocabulary).
        """
        return self.logits(self.resume_layers(original, {layer: replacement}, hook_point)[0])

    def resume_layers(
        self,
        original: Original,
        replacements: Mapping[int, Tensor],
        hook_point: str = "residual",
    ) -> Tensor:
        """The last residual stream when each of several layers is replaced, one at a time.

        All replaced copies run through the blocks as one batch that grows at every replaced layer,
        so each block is called once.

        Args:
            replacements: layer -> (..., batch, position, d_model), all of the same shape.

        Returns:
            (layer, ..., batch, position, d_model) after the last block, layers in ascending order;
            for :meth:`logits`.
        """
        self._check_layers(replacements)
        self._check_hook_points((hook_point,))
        shape = next(iter(replacements.values())).shape
        if any(r.shape != shape for r in replacements.values()) or (
            shape[-3:] != original.embeddings.shape
        ):
            raise ValueError(
                f"replacements: expected equal shapes (..., {tuple(original.embeddings.shape)}), "
                f"got {[tuple(r.shape) for r in replacements.values()]}"
            )
        stream: Tensor | None = None
        for layer in range(min(replacements), self.n_layers):
            if stream is not None:
                stream = self._call_block(layer, stream, original)
            if layer in replacements:
                rows = replacements[layer].flatten(0, -3)
                if hook_point != "residual":
                    before = original.block_input(layer)
                    before = before.repeat(len(rows) // len(before), 1, 1)
                    with self._replaced(layer, hook_point, rows):
                        rows = self._call_block(layer, before, original)
                stream = rows if stream is None else torch.cat([stream, rows])
        return stream.view(len(replacements), *shape)

    def logits(self, residual: Tensor) -> Tensor:
        """Final norm and output head on the residual stream after the last block.

        Args:
            residual: (..., position, d_model).

        Returns:
            (..., position, vocabulary).
        """
        rows = residual.reshape(-1, *residual.shape[-2:])
        with fast_products(self.device):
            return self._head(inputs_embeds=rows).logits.view(*residual.shape[:-1], -1)

    # --- inside -----------------------------------------------------------------------------

    def _run(self, tokens, layers, hook_points) -> dict[str, Tensor]:
        layers = self._check_layers(layers)
        self._check_hook_points(hook_points)
        tokens = self._check_tokens(tokens)
        kept: dict[str, dict[int, Tensor]] = {point: {} for point in hook_points}
        with ExitStack() as hooks:
            for point in hook_points:
                for layer in layers:
                    handle = self._watch(layer, point, kept[point])
                    hooks.callback(handle.remove)
            last = self.blocks[max(layers)].register_forward_hook(modules.stop)
            hooks.callback(last.remove)
            if self._is_compiled and self.device.type == "cuda":
                # A block's graph would else free what the one before it has returned. All of it
                # is copied below, before the next pass overwrites it.
                torch.compiler.cudagraph_mark_step_begin()
            with suppress(modules.Stop), fast_products(self.device), modules.unpacked():
                self.base(input_ids=tokens, use_cache=False)
        return {
            point: torch.stack([found[layer] for layer in layers]) for point, found in kept.items()
        }

    def _watch(self, layer: int, point: str, kept: dict[int, Tensor]):
        """Hook that keeps the activations of one layer at one hook point."""
        module = self._site(layer, point)
        if point == "mlp_input":

            def keep_input(_, args, kwargs):
                kept[layer] = modules.split_call(args, kwargs)[0].clone()

            return module.register_forward_pre_hook(keep_input, with_kwargs=True)

        def keep_output(_, __, output):
            found = modules.first(output)
            # To that of an MLP some blocks add attention's in place.
            kept[layer] = found if point == "residual" else found.clone()

        return module.register_forward_hook(keep_output)

    def _replaced(self, layer: int, point: str, rows: Tensor):
        """The MLP's input or output of one block is `rows` while this is entered."""
        return modules.replacing(self._site(layer, point), point, rows)

    def _site(self, layer: int, point: str) -> nn.Module:
        if self._is_compiled and point != "residual":
            raise SpecError(
                f"--compile: expected source and target to be residual, got {point}, which lies "
                "inside of a compiled block"
            )
        if self._is_compiled:
            return self.blocks[layer]
        if point not in self._sites:
            original = self.original(self._tiny_tokens())
            sites = [self._prove(layer, point, original) for layer in range(self.n_layers)]
            self._sites[point] = sites
        return self._sites[point][layer]

    @torch.no_grad()
    def _prove(self, layer: int, point: str, original: Original) -> nn.Module:
        """The module of one block that has its MLP's input, or all that this MLP adds.

        Names say which module is the MLP; what follows on its output alone, such as a norm, may
        take its place. Putting the same tensor back must change nothing, a change of the output
        must come out of the block as it is, and the residual stream must not be in it already.
        """
        block, before = self.blocks[layer], original.block_input(layer)
        named = [(name, getattr(block, name, None)) for name in _MLP_NAMES]
        name, mlp = next((m for m in named if isinstance(m[1], nn.Module)), ("", None))
        if mlp is None:
            raise SpecError(
                f"source/target: {point!r} needs an MLP module named one of "
                f"{', '.join(_MLP_NAMES)} in each block; {type(block).__name__} of {self.name} has "
                f"{', '.join(name for name, _ in block.named_children())}"
            )
        calls: list[tuple[nn.Module, Any, tuple, Any]] = []
        with ExitStack() as hooks:
            for child in block.children():
                keep = partial(modules.keep_call, calls)
                handle = child.register_forward_hook(keep, with_kwargs=True)
                hooks.callback(handle.remove)
            expected = self._call_block(layer, before, original)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(expected.shape, generator=generator).to(expected)
        noise *= expected.float().square().mean().sqrt().to(expected.dtype)

        def changed(module: nn.Module, value: Tensor, by: Tensor) -> Tensor:
            with modules.replacing(module, point, value + by):
                return self._call_block(layer, before, original)

        chain, reason = None, "is not called by its block"
        for module, given, others, made in calls:
            if module is not mlp and (point == "mlp_input" or not modules.same(given, chain)):
                continue
            chain, value = made, given if point == "mlp_input" else made
            if not isinstance(value, Tensor) or value.shape != before.shape:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                reason = f"has {shape} there, not (batch, position, d_model)"
                continue
            strays = [changed(module, value, torch.zeros_like(noise)) - expected]
            if point == "mlp_output":
                strays.append(changed(module, value, noise) - expected - noise)
                args, kwargs = modules.map_tensors(partial(modules.shifted, noise), others)
                strays.append(modules.first(module(given, *args, **kwargs)) - made)
            worst = float(torch.stack([s.float().norm() for s in strays]).max() / noise.norm())
            if worst <= (1e-3 if expected.dtype == torch.float32 else 0.05):
                return module
            reason = (
                "is not what the block adds to the residual stream, or putting it back changes the "
                f"model (relative difference {worst:.2g})"
            )
        raise SpecError(
            f"source/target: {point!r} cannot be had of {type(block).__name__} of {self.name}: "
            f"that of {name!r} in block {layer} {reason}"
        )

    def _call_block(self, layer: int, stream: Tensor, original: Original) -> Tensor:
        batch = len(original.tokens)
        repeat = modules.repeater(self._per_sequence[layer], batch, len(stream) // batch)
        args, kwargs = modules.map_tensors(repeat, original.calls[layer])
        with fast_products(self.device):
            return modules.first(self.blocks[layer](stream, *args, **kwargs))

    def _check_layers(self, layers: Iterable[int]) -> list[int]:
        layers = list(layers)
        unknown = [i for i in layers if not 0 <= i < self.n_layers]
        if unknown or not layers or len(set(layers)) != len(layers):
            raise SpecError(
                f"layers: expected distinct block indices from 0 to {self.n_layers - 1} of "
                f"{self.name}, got {layers}"
            )
        return layers

    def _check_hook_points(self, hook_points: Sequence[str]) -> None:
        for point in hook_points:
            if point not in get_args(HookPoint):
                raise SpecError(
                    f"source/target: expected one of {', '.join(get_args(HookPoint))}, "
                    f"got {point!r}"
                )
            self._site(0, point)  # proven before any hook is there

    def _check_tokens(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
            raise ValueError(
                f"tokens: expected (batch, position) int64, got {tuple(tokens.shape)} "
                f"{tokens.dtype}"
            )
        if self.max_positions is not None and tokens.shape[1] > self.max_positions:
            raise SpecError(
                f"data.context_length: {self.name} has {self.max_positions} positions, got "
                f"sequences of {tokens.shape[1]} tokens"
            )
        return tokens.to(self.device)

    def _tiny_tokens(self, batch: int = 2) -> Tensor:
        return torch.arange(3 * batch, device=self.device).view(batch, 3) % self.vocab_size

    @torch.no_grad()
    def _verify(self) -> None:
        """Resume a tiny pass from every block, twice expanded, and compare with the model's logits.

        Catches architectures whose blocks need more than the arguments they are called with. Which
        of these have rows for each sequence is seen in batches of two sizes.
        """
        tokens, kind = self._tiny_tokens(), type(self.model).__name__
        expected = self.model(input_ids=tokens, use_cache=False).logits
        if not expected.isfinite().all():
            raise SpecError(f"model.path: {self._not_finite()}")
        try:
            original, larger = self.original(tokens), self.original(self._tiny_tokens(3))
            for known, *calls in zip(self._per_sequence, original.calls, larger.calls, strict=True):
                shapes: list[dict[tuple, int]] = [{}, {}]
                for found, call in zip(shapes, calls, strict=True):
                    modules.map_tensors(lambda p, t, f=found: f.update({p: (*t.shape, 0)[0]}), call)
                known |= {p: n != shapes[1].get(p, n) for p, n in shapes[0].items()}
            twice = {i: original.residual[i].expand(2, -1, -1, -1) for i in range(self.n_layers)}
            resumed = self.resume_layers(original, twice)
            error = max(float((self.logits(rows) - expected).abs().max()) for rows in resumed)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as failure:
            raise SpecError(
                f"model.path: {kind} cannot be resumed after its blocks: {failure}"
            ) from failure
        tolerance = 1e-3 if expected.dtype == torch.float32 else 0.1
        if not error <= tolerance * expected.abs().max().clamp(min=1e-3):
            raise SpecError(
                f"model.path: resuming {kind} after its blocks changes its logits by {error:.2g}; "
                "expected blocks that depend on nothing but the residual stream and their call's "
                "arguments"
            )

    def _not_finite(self) -> str:
        """Why the logits of a tiny pass are not finite."""
        bad = [n for n, p in self.model.named_parameters() if not p.isfinite().all()]
        if bad:
            return (
                f"{len(bad)} weights of {self.name} have NaN or infinite values, such as {bad[0]}"
            )
        residual = self.capture(self._tiny_tokens(), range(self.n_layers))["residual"]
        layers = [i for i, rows in enumerate(residual) if not rows.isfinite().all()]
        where = f"after block {layers[0]}" if layers else "in its logits"
        dtype = str(residual.dtype).removeprefix("torch.")
        return (
            f"{self.name} overflows in {dtype}, {where}; expected a model.dtype in which it is "
            "finite, such as bfloat16 or float32"
        )


def _resolve(model: ModelSpec) -> tuple[str, str, str | None]:
    """Path for Hugging Face, display name and revision of a shipped name, a folder or a hub id."""
    folder = models.weights(model.path)
    if folder is None:
        return model.path, model.path.split("/")[-1], model.revision
    if model.random_weights is None and not any(folder.glob("*.safetensors")):
        raise SpecError(f"model.path: {model.path!r} has no weights; expected *.safetensors")
    if model.random_weights is None:
        check_shards(folder, model.path)
    if not any(folder.glob("tokenizer*")) and not (folder / "vocab.json").is_file():
        raise SpecError(f"model.path: {model.path!r} has no tokenizer; expected tokenizer.json")
    return str(folder), Path(model.path).resolve().name, None


def _special_ids(tokenizer) -> list[int]:
    """EOS, and those of BOS and PAD that text cannot spell: some tokenizers pad with a letter."""
    found = {tokenizer.eos_token_id} - {None}
    for token in {tokenizer.bos_token_id, tokenizer.pad_token_id} - {None, *found}:
        if token not in token_ids(tokenizer, [tokenizer.decode([token])])[0]:
            found.add(token)
    return sorted(found)
