"""The changes that CONTRIBUTING.md walks through are made, with the code that stands there."""

import json
import re
from pathlib import Path

import jupytext
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file
from test_pipeline import run_of

from mlsae_core import activation, formats, objective, pipeline, spec, store, text
from mlsae_core.sae import MLSAE
from mlsae_core.spec import EvaluateSpec

GUIDE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def code(heading):
    """The names that the Python of a section defines."""
    section = re.search(rf"### {heading}\n(.*?)\n##", GUIDE, re.DOTALL)[1]
    names = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL)), names)
    return names


@pytest.fixture(autouse=True)
def tables():
    """What is registered here is not known to other tests."""
    known = (
        pipeline.STAGES,
        store.STAGES,
        activation.ACTIVATIONS,
        text.SOURCES,
        formats.FORMATS,
    )
    before = [dict(table) for table in known]
    yield
    for table, content in zip(known, before, strict=True):
        table.clear()
        table.update(content)


def test_a_metric(inputs, data):
    code("A metric that a chapter shows")
    made = pipeline.Session().make("liveness", run_of(inputs), EvaluateSpec(tokens=64))
    assert 0 < pd.read_csv(made.file("liveness.csv")).live[0] <= 1
    assert made.meta["tokens"] > 0
    assert pipeline.Session("read-only").make("liveness", run_of(inputs), EvaluateSpec(tokens=64))


def test_an_activation():
    code("An activation")
    sae = MLSAE(16, 64, 8, activation="floor", generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(1))
    values, _ = sae.encode(x)
    assert (values > 0).sum(-1).amax() <= 8
    assert values[values > 0].min() > 0.1
    losses, optimizer = [], sae.make_optimizer(1e-2)
    for _ in range(20):
        loss = objective.loss(sae, x)
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.total.detach()))
    assert losses[-1] < losses[0]


def test_a_text_source(inputs, data):
    code("A text source")
    run = run_of(inputs, data={"path": "fables", "context_length": 16})
    made = pipeline.Session().make("evaluate", run, EvaluateSpec(tokens=64))
    assert len(pd.read_csv(made.file("evaluation.csv")))


def test_a_loader(tmp_path):
    code("A loader")
    sae = MLSAE(4, 8, 2, generator=torch.Generator().manual_seed(0))
    tensors = {name: getattr(sae, name).detach() for name in ("encoder", "decoder", "pre_bias")}
    save_file(tensors | {"decoder": tensors["decoder"] + 1}, tmp_path / "plain.safetensors")
    settings = {"n_inputs": 4, "n_latents": 8, "k": 2}
    (tmp_path / "plain.json").write_text(json.dumps(settings))
    loaded = MLSAE.from_pretrained(tmp_path)
    assert torch.equal(loaded.encoder, sae.encoder)
    assert torch.equal(loaded.decoder, sae.decoder + 1)


def test_the_folders_of_a_repository_are_fields_of_a_spec():
    [example] = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    run = spec.run_from_dict(yaml.safe_load(example))
    found = [int(formats.LAYER.search(folder)[1]) for folder in run.dictionary.folders]
    assert found == list(run.site.layers)


def test_a_chapter():
    chapter = jupytext.reads(code("A chapter")["CHAPTER"].lstrip(), "py:percent")
    kinds = [cell.cell_type for cell in chapter.cells]
    assert kinds == ["markdown", "code", "code"]
    for cell in chapter.cells:
        if cell.cell_type == "code":
            compile(cell.source, "cell", "exec")


def test_every_section_is_tested():
    walked = re.search(r"## Five changes.*?\n## ", GUIDE, re.DOTALL)[0]
    assert len(re.findall(r"^### ", walked, re.MULTILINE)) == 5
