"""A tiny run whose numbers are written down: they change only with the version of a stage.

If this fails after a change that is meant to change numbers, raise the stage's version in
`store.STAGES`, so that older results are not mistaken for new ones, and write the new numbers here.
"""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from workers import sentences

from mlsae_book import corpus, experiments, planted, stages
from mlsae_book.pretrain import train_tokenizer
from mlsae_core import analysis, pipeline, spec, store, text

# stage → its version when these numbers were written, and the numbers
GOLDEN = {
    "documents": (1, {"docstrings": "One.|Two.|Three."}),
    "tokens": (1, {"digest": "5fb02123765715fd"}),
    "train": (1, {"loss": 0.257868, "fvu": 0.172691, "fvu_2": 0.183902}),
    "evaluate": (
        1,
        {
            "fvu_global_0": 0.16162131,
            "fvu_global_2": 0.18342389,
            "fvu_per_dimension_0": 0.16798705,
            "fvu_per_dimension_2": 0.19218707,
            "l1_0": 4.2348086,
            "l1_2": 4.101293,
            "delta_ce_0": -8.0967943e-05,
            "delta_ce_2": -0.0023854127,
            "kl_0": 0.00059786534,
            "kl_2": 0.00068144849,
        },
    ),
    "distributions": (
        2,
        {
            "mean_entropy": 0.795916775795444,
            "var_l": 0.6728333055448683,
            "exp_var_l_given_j": 0.5117918420305555,
        },
    ),
    "drift": (1, {"norm_0": 0.082531003, "norm_2": 0.084199149}),
    "geometry": (1, {"mmcs": 0.58503925, "independent": 0.60539093}),
    "transfer": (1, {"fvu_1": 0.15794815}),
    "importance": (2, {"r_l0": 0.85502371, "r_activation": 0.98860792, "another": 0.86276768}),
    "duplicates": (1, {"cosine": 0.58815440, "self_next": 0.76672649}),
    "planted": (
        1,
        {
            "ratio_latent_truth": 0.576678,
            "ratio_latent_oracle": 0.574358,
            "ratio_latent_estimate": 0.780063,
            "ratio_token_truth": 0.5,
            "ratio_token_oracle": 0.51165,
            "ratio_token_estimate": 0.0672273,
            "mean_entropy_truth": 0.601933,
            "mean_entropy_oracle": 0.599916,
            "mean_entropy_estimate": 0.81894,
        },
    ),
    "prompts": (1, {"entropy": 0.573081, "permuted": 0.668008}),
    "predictions": (1, {"token": "<", "probability": 0.004173}),
    "massive": (1, {"fvu": 0.179517, "latents": 37.2294}),
    "chosen": (1, {"activation": 2.71065, "mean_layer": 1.108585}),
}


def tokens_digest(inputs):
    tokenizer = train_tokenizer(sentences(300), 300)
    data = spec.DataSpec(str(inputs / "text.jsonl"), context_length=16)
    digest = hashlib.sha256()
    for split in text.SPLITS:
        digest.update(text.blocks(data, tokenizer, split).blocks.tobytes())
    return digest.hexdigest()[:16]


@pytest.fixture
def numbers(inputs, data, tmp_path, monkeypatch):
    """The same names as in GOLDEN, computed now."""
    run = spec.run_from_dict(
        {
            "model": str(inputs / "gpt_neox"),
            "data": {"path": str(inputs / "text.jsonl"), "context_length": 16},
            "expansion_factor": 8,
            "k": 2,
            "tokens": 20 * 128,
            "batch_tokens": 128,
            "micro_batch_tokens": 64,
            "dead_tokens": 200,
            "learning_rate": 0.01,
        }
    )
    settings, session = spec.EvaluateSpec(tokens=512), pipeline.Session()
    log = pd.read_csv(session.train(run).file("log.csv")).iloc[-1]
    table = pd.read_csv(session.evaluate(run, settings).file("evaluation.csv"))
    _, variances = experiments.read_distributions(session.distributions(run, settings))
    monkeypatch.setattr(stages, "PROMPTS", ("w1 w2 w3 w4",))
    prompts = pd.read_csv(session.make("prompts", run).file("spread.csv"))
    geometry = pd.read_csv(session.make("geometry", run).file("mmcs.csv"))
    drift = pd.read_csv(session.make("drift", run, settings).file("layers.csv"))
    transfer = pd.read_csv(session.make("transfer", run, settings).file("transfer.csv"))
    importance = pd.read_csv(session.make("importance", run, settings).file("importance.csv"))
    own = importance[importance.gradient == "own"]
    another = importance[importance.gradient == "another"].r_l0.mean()
    duplicates = pd.read_csv(session.make("duplicates", run, settings).file("duplicates.csv"))
    massive = session.make("massive", run, settings)
    groups = pd.read_csv(massive.file("positions.csv"))
    chosen = json.loads(session.make("chosen", run, settings).file("latents.json").read_text())
    predictions = pd.read_csv(session.make("predictions", run).file("predictions.csv"))
    world = planted.find_or_compute(
        planted.PlantedSpec(
            n_features=16, d_model=16, n_layers=3, active=4, training_tokens=8192, tokens=2048, k=2
        )
    )
    known = pd.read_csv(world.file("estimators.csv")).set_index("estimator")
    source = tmp_path / "module.py"
    source.write_text('"""One."""\nclass A:\n    """Two."""\n    def f():\n        """Three."""\n')
    return {
        "documents": {"docstrings": "|".join(corpus.file_docstrings(source))},
        "tokens": {"digest": tokens_digest(inputs)},
        "train": {name: float(log[name]) for name in ("loss", "fvu", "fvu_2")},
        "evaluate": {
            f"{name}_{layer}": float(table[name][layer])
            for name in ("fvu_global", "fvu_per_dimension", "l1", "delta_ce", "kl")
            for layer in (0, 2)
        },
        "distributions": {
            name: variances[name]["value"] if isinstance(variances[name], dict) else variances[name]
            for name in ("mean_entropy", "var_l", "exp_var_l_given_j")
        },
        "drift": dict(zip(("norm_0", "norm_2"), drift.norm[[0, 2]], strict=True)),
        "geometry": dict(zip(("mmcs", "independent"), geometry.mmcs[:2], strict=True)),
        "transfer": {"fvu_1": transfer.fvu_global[1]},
        "importance": own[["r_l0", "r_activation"]].mean().to_dict() | {"another": another},
        "duplicates": duplicates[["cosine", "self_next"]].mean().to_dict(),
        "planted": {
            f"{name}_{of}": known[of][name]
            for name in ("ratio_latent", "ratio_token", "mean_entropy")
            for of in ("truth", "oracle", "estimate")
        },
        "prompts": dict(zip(("entropy", "permuted"), prompts.entropy, strict=True)),
        "predictions": predictions[["token", "probability"]].iloc[0].to_dict(),
        "massive": groups[["fvu", "latents"]].mean().to_dict(),
        "chosen": {
            "activation": float(np.mean([c["texts"][0]["activation"] for c in chosen])),
            "mean_layer": float(np.mean([c["mean_layer"] for c in chosen])),
        },
    }


def test_numbers_change_only_with_their_stages_version(numbers):
    for stage, (version, written) in GOLDEN.items():
        now = json.dumps(numbers[stage])
        assert store.STAGES[stage] == version, f"{stage} has a new version: write {now}"
        for name, value in written.items():
            # Other processors sum in another order: a little, amplified by the choice of latents.
            expected = value if isinstance(value, str) else pytest.approx(value, rel=5e-3, abs=2e-5)
            assert numbers[stage][name] == expected, (
                f"{stage}: {name} differs; if it is meant to, raise store.STAGES[{stage!r}] and "
                f"write {now}"
            )


def test_a_language_model_in_bfloat16_changes_no_metric_by_half_a_percent():
    """The shipped dictionary on the shipped model: `dtype: bfloat16` in a spec is safe to take."""
    [(_, run)] = spec.load_experiment(store.ROOT / "book/experiments/default.yml").runs
    session, tables = pipeline.Session("read-only"), []
    settings = spec.EvaluateSpec(tokens=16_384)
    for dtype in ("float32", "bfloat16"):
        source = session.source(replace(run, model=replace(run.model, dtype=dtype)), settings)
        tables.append(analysis.evaluate(source, session.sae(run), ablations=False))
    metrics = ["fvu_global", "fvu_per_dimension", "l1", "delta_ce", "kl"]
    exact, rounded = (table[metrics].mean() for table in tables)
    assert rounded.to_numpy() == pytest.approx(exact.to_numpy(), rel=5e-3)
    assert not rounded.equals(exact)
