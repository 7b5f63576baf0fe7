"""Experiments: sweeps and cases over a run, as YAML declares them, and what is refused."""

import pytest
from test_spec import MINIMAL, with_

from mlsae_book.declared import load_experiment
from mlsae_core.spec import EvaluateSpec, RunSpec, SpecError


def test_a_sweep_is_the_product_of_its_lists_in_the_files_order(tmp_path):
    path = tmp_path / "experiment.yml"
    fields = "".join(f"  {name}: {value}\n" for name, value in MINIMAL.items())
    path.write_text(
        f"title: T\nrun:\n{fields}sweep:\n  k: [8, 16]\n  expansion_factor: [2, 4]\n"
        "evaluate: {tokens: 1e5}\n"
    )
    experiment = load_experiment(path)
    labels = [tuple(labels.values()) for labels, _ in experiment.runs]
    assert labels == [(8, 2), (8, 4), (16, 2), (16, 4)]
    assert [(r.sae.k, r.sae.expansion_factor) for _, r in experiment.runs] == labels
    assert experiment.evaluate == EvaluateSpec(100_000, "test")


def test_cases_are_runs_by_name(tmp_path):
    path = tmp_path / "experiment.yml"
    fields = "".join(f"  {name}: {value}\n" for name, value in MINIMAL.items())
    path.write_text(
        f"run:\n{fields}cases:\n  plain:\n  wide: {{k: 16, expansion_factor: 4}}\n"
        "analyses: [evaluate]\nweights: false\n"
    )
    experiment = load_experiment(path)
    assert [labels for labels, _ in experiment.runs] == [{"case": "plain"}, {"case": "wide"}]
    plain, wide = (run for _, run in experiment.runs)
    assert plain.sae.k == int(MINIMAL["k"])
    assert (wide.sae.k, wide.sae.expansion_factor) == (16, 4)
    assert (experiment.analyses, experiment.weights) == (("evaluate",), False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {}\ncases: [a]\n", "cases: expected `name: {field: value}` lines"),
        ("run: {}\ncases: {a: 3}\n", "cases: expected `name: {field: value}` lines"),
        ("run: {}\ncases: {a: {}}\nsweep: {k: [1]}\n", "cases: expected either"),
        (
            "run: {model: a, expansion_factor: 2, k: 2, tokens: 4096}\nweights: perhaps\n",
            "weights: expected true | false, got 'perhaps'",
        ),
        ("run: 3\n", "run: expected the fields of a run, got '3'"),
        ("run: {}\nsweeep: {}\n", "sweeep: unknown field; did you mean `sweep`?"),
        ("run: {}\nsweep: {k: 3}\n", "sweep: expected `field: [value, value]` lines"),
        ("run: {}\nsweep: {k: []}\n", "sweep: expected `field: [value, value]` lines"),
        ("run: {}\n", "model: missing"),
        ("run: {model: a, expansion_factor: 2, tokens: 4096}\n", "k: missing; expected whole"),
        (
            "run: {model: a, expansion_factor: 2, k: 2, tokens: 4096}\nevaluate: {split: dev}\n",
            "evaluate.split: expected train | validation | test, got 'dev'",
        ),
        (
            "run: {model: a, expansion_factor: 2, k: 2, tokens: 4096}\nevaluate: {tokens: 0}\n",
            "evaluate.tokens: expected a number above 0, got 0",
        ),
    ],
)
def test_bad_experiments_are_named(tmp_path, text, message):
    path = tmp_path / "experiment.yml"
    path.write_text(text)
    with pytest.raises(SpecError) as error:
        load_experiment(path)
    assert message in str(error.value)


def test_a_run_alone_is_an_experiment_and_evaluation_can_be_left_out(tmp_path):
    path = tmp_path / "run.yml"
    path.write_text(with_())
    experiment = load_experiment(path)
    assert isinstance(experiment.runs[0][1], RunSpec)
    assert experiment.title == "run"
    indented = "".join(f"  {name}: {value}\n" for name, value in MINIMAL.items())
    for off in ("", "false", "null"):
        path.write_text(f"run:\n{indented}evaluate: {off}\n")
        assert load_experiment(path).evaluate is None
