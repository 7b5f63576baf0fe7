"""A tiny run whose numbers are written down: they change only with the version of a stage.

If this fails after a change that is meant to change numbers, raise the stage's version in
`store.STAGES`, so that older results are not mistaken for new ones, and write the new numbers here.
"""

import hashlib
import json
from dataclasses import replace

import pandas as pd
import pytest
from workers import sentences

from mlsae_core import analysis, experiments, pipeline, spec, store, text
from mlsae_core.lens import Lens
from mlsae_core.pretrain import train_tokenizer

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
}


def tokens_digest(inputs):
    tokenizer = train_tokenizer(sentences(300), 300)
    data = spec.DataSpec(str(inputs / "text.jsonl"), context_length=16)
    digest = hashlib.sha256()
    for split in text.SPLITS:
        digest.update(text.blocks(data, tokenizer, split).blocks.tobytes())
    return digest.hexdigest()[:16]


@pytest.fixture
def numbers(inputs, data, tmp_path):
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
    source = tmp_path / "module.py"
    source.write_text('"""One."""\nclass A:\n    """Two."""\n    def f():\n        """Three."""\n')
    return {
        "documents": {"docstrings": "|".join(text.file_docstrings(source))},
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
    batches = list(pipeline.Batches(session.blocks(run, "test"), run, settings))
    for dtype in ("float32", "bfloat16"):
        lm = session.lm(replace(run.model, dtype=dtype))
        tables.append(
            analysis.evaluate(
                lm, session.sae(run), Lens.identity(), run.site, batches, ablations=False
            )
        )
    metrics = ["fvu_global", "fvu_per_dimension", "l1", "delta_ce", "kl"]
    exact, rounded = (table[metrics].mean() for table in tables)
    assert rounded.to_numpy() == pytest.approx(exact.to_numpy(), rel=5e-3)
    assert not rounded.equals(exact)
