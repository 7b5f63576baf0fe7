"""Dictionaries for others: in formats of SAELens and Gemma Scope, and on the hub with a card."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mlsae_core import models, store
from mlsae_core.architecture import model_config, reading
from mlsae_core.spec import EvaluateSpec, RunSpec, SpecError, shown

if TYPE_CHECKING:
    import pandas as pd

    from mlsae_core.pipeline import Session
    from mlsae_core.sae import MLSAE

#: TransformerLens' names of what dictionaries read.
HOOKS = {"residual": "hook_resid_post", "mlp_output": "hook_mlp_out"}


def write_saelens(
    saes: Mapping[int, MLSAE], folder: str | Path, model_name: str, source: str = "residual"
) -> list[Path]:
    """Write dictionaries as SAELens 6 has them, with equal latents: a folder for each layer.

    A BatchTopK becomes a JumpReLU, as SAELens' own do: without the most that one vector may have.

    Args:
        saes: the dictionary of each layer; an MLSAE is that of all of its layers.
        folder: where ``blocks.N.hook_resid_post`` or the like are written.
        model_name: of the language model, as TransformerLens has it.
        source: "residual" or "mlp_output".

    Raises:
        SpecError: another source, of which TransformerLens has no activations.
    """
    import torch
    from safetensors.torch import save_file

    if source not in HOOKS:
        raise SpecError(f"source: expected {' or '.join(HOOKS)} for SAELens, got {source}")
    written = []
    for layer, sae in saes.items():
        hook = f"blocks.{layer}.{HOOKS[source]}"
        metadata = {"sae_lens_version": "6.0.0", "model_name": model_name, "hook_name": hook}
        config = {
            "architecture": "topk" if sae.activation.name == "topk" else "jumprelu",
            "d_in": sae.n_inputs,
            "d_sae": sae.n_latents,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "layer_norm" if sae.standardize else "none",
            "reshape_activations": "none",
            "metadata": metadata,
        }
        bias = torch.zeros(sae.n_latents) if sae.encoder_bias is None else sae.encoder_bias
        tensors = {
            "W_enc": sae.encoder.T,
            "W_dec": sae.decoder,
            "b_enc": bias,
            "b_dec": sae.pre_bias,
        }
        if sae.activation.name == "topk":
            config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
        else:
            tensors["threshold"] = sae.activation.threshold.expand(sae.n_latents)
        with _new_folder(Path(folder) / hook) as work:
            plain = {n: t.detach().float().cpu().contiguous() for n, t in tensors.items()}
            save_file(plain, work / "sae_weights.safetensors")
            (work / "cfg.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        written.append(Path(folder) / hook)
    return written


def write_gemma_scope(saes: Mapping[int, MLSAE], folder: str | Path) -> list[Path]:
    """Write dictionaries as Gemma Scope has them, with equal latents: ``layer_N/params.npz``.

    A BatchTopK becomes a JumpReLU without the most that one vector may have.

    Args:
        saes: the dictionary of each layer.
        folder: where the folders of the layers are written.

    Raises:
        SpecError: as `check_gemma_scope`.
    """
    import numpy as np

    written = []
    for layer, sae in saes.items():
        check_gemma_scope(sae.activation.name, sae.standardize)
        bias = -sae.encoder @ sae.pre_bias
        arrays = {
            "W_enc": sae.encoder.T,
            "W_dec": sae.decoder,
            "b_enc": bias if sae.encoder_bias is None else bias + sae.encoder_bias,
            "b_dec": sae.pre_bias,
            "threshold": sae.activation.threshold.expand(sae.n_latents),
        }
        with _new_folder(Path(folder) / f"layer_{layer}") as work:
            plain = {name: array.detach().float().cpu().numpy() for name, array in arrays.items()}
            np.savez(work / "params.npz", **plain)
        written.append(Path(folder) / f"layer_{layer}")
    return written


def check_gemma_scope(activation: str, standardize: bool):
    """Refuse dictionaries that Gemma Scope's format has no room for; the arguments are `SaeSpec`'s.

    Raises:
        SpecError: a TopK, or one that standardises.
    """
    if activation == "topk" or standardize:
        raise SpecError(
            "expected activation: batchtopk or jumprelu and standardize: false for Gemma Scope's "
            f"format, got {activation} and {str(standardize).lower()}"
        )


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder that is written whole; one that is there has no mark of this project and stays."""
    if path.exists():
        raise SpecError(f"expected a folder that does not exist yet, got {path}; name another")
    with store.atomic_folder(path) as work:
        yield work


def push(session: Session, run: RunSpec, repo: str, licence: str, private: bool = False) -> str:
    """Put the dictionary of a run on the hub, with a card that says what it is; gives its address.

    Trained and evaluated first where it is not yet. Needs a token of the hub, as its own command
    line leaves one.

    Raises:
        SpecError: weights that were not trained here, or a hub that does not take them.
    """
    if not isinstance(run, RunSpec):
        raise SpecError(
            "dictionary: expected a run that was trained here, got the weights of others"
        )
    if not re.fullmatch(r"[\w.-]+", licence):
        raise SpecError(f"licence: expected the hub's name of one, as `mit`, got {shown(licence)}")
    import pandas as pd
    from huggingface_hub import HfApi

    from mlsae_core.pipeline import is_main_process

    api, refused = HfApi(), f"{repo}: the hub did not take it"
    if is_main_process():
        with reading(refused):  # before anything is computed
            api.create_repo(repo, private=private, exist_ok=True)
    trained = session.with_weights(run, session.train(run))
    table = pd.read_csv(session.evaluate(run, EvaluateSpec()).file("evaluation.csv"))
    if not is_main_process():
        return repo
    with tempfile.TemporaryDirectory() as folder, reading(refused):
        session.sae(run).save_pretrained(folder)
        (Path(folder) / "README.md").write_text(
            card(run, repo, licence, table, trained.meta), encoding="utf-8"
        )
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=f"Dictionary {trained.key}"
        )
    return str(done)


def card(run: RunSpec, repo: str, licence: str, table: pd.DataFrame, meta: dict) -> str:
    """The model card of a trained run.

    Args:
        table: of `analysis.evaluate`.
        meta: of the training's artefact: its tokens, its parents and the commit that made it.
    """
    config = model_config(run.model)
    layers = run.site.indices(config.num_hidden_layers)
    named = run.model.path if models.folder(run.model.path) is None else None
    read = (
        run.site.source if run.site.target == "same" else f"{run.site.source} to {run.site.target}"
    )
    rows = {
        "language model": named or Path(run.model.path).name,
        "layers": ", ".join(map(str, layers)) + (", stacked" if run.site.stacked else ""),
        "reads": read,
        "basis": "as it is" if run.site.basis == "identity" else "tuned lens",
        "text": Path(run.data.path).name if Path(run.data.path).exists() else run.data.path,
        "tokens": f"{meta['tokens']:,}",
        "R": run.sae.expansion_factor,
        "latents": f"{run.n_latents(config.num_hidden_layers, config.hidden_size):,}",
        "k": run.sae.k,
        "activation": run.sae.activation,
        "mean FVU": f"{table.fvu_global.mean():.4f}",
        "commit": meta["commit"],
    }
    if differs := meta["parents"].get(store.DIFFERS):
        rows["other than pinned"] = differs
    shown = ["layer", "fvu_global", "fvu_per_dimension", "l0", "delta_ce", "kl"]
    numbers = [[f"{value:.4g}" for value in row] for row in table[shown].to_numpy()]
    front = ["---", f"license: {licence}", "tags:", "- sparse-autoencoder", "- mlsae"]
    front += [f"base_model: {named}"] * (named is not None) + ["---"]
    return "\n".join(
        [
            *front,
            "# A sparse autoencoder of a language model's layers",
            "",
            *_markdown(["what", "value"], [[name, str(value)] for name, value in rows.items()]),
            "",
            f"Measured on {int(table.tokens.iloc[0]):,} tokens that it was not trained on:",
            "",
            *_markdown(shown, numbers),
            "",
            "```python",
            "from mlsae_core.sae import MLSAE",
            "",
            f'sae = MLSAE.from_pretrained("{repo}")',
            "```",
            "",
        ]
    )


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
