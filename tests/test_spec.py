"""Specs: strict reading, defaults, coercion, sweeps and canonical form."""

import dataclasses
import json
import os

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsae_core import spec
from mlsae_core.spec import DataSpec, ModelSpec, RunSpec, SaeSpec, SiteSpec, SpecError, TrainSpec

MINIMAL = {
    "model": "neox-6l-128d",
    "data": "docstrings",
    "layers": "all",
    "expansion_factor": "16",
    "k": "16",
    "tokens": "2_000_000",
    "seed": "0",
}


def read(tmp_path, text):
    path = tmp_path / "spec.yml"
    path.write_text(text, encoding="utf-8")
    return spec.load_run(path)


def with_(**changes):
    return "".join(f"{name}: {value}\n" for name, value in (MINIMAL | changes).items())


def test_a_minimal_spec_gets_the_documented_defaults(tmp_path):
    run = read(tmp_path, with_())
    assert run.model == ModelSpec("neox-6l-128d")
    assert run.data == DataSpec("docstrings", context_length=256)
    assert run.sae.aux_alpha == 1 / 32
    assert run.sae.dead_tokens == 200_000  # a tenth of the run
    assert run.train.batch_tokens == run.train.micro_batch_tokens == 2048
    assert 1e-4 < run.train.learning_rate < 1e-2


def test_the_papers_run_gets_the_papers_batch_rate_and_window():
    run = spec.run_from_dict(MINIMAL | {"tokens": 10**9})
    assert (run.train.batch_tokens, run.train.learning_rate) == (131072, 1e-4)
    assert run.sae.dead_tokens == 10_000_000


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"learning_rate": "1e-4"}, ("train", "learning_rate"), 1e-4),
        ({"tokens": "2e6"}, ("train", "tokens"), 2_000_000),
        ({"k": "032"}, ("sae", "k"), 32),
        ({"seed": str(2**32 - 1)}, ("train", "seed"), 2**32 - 1),
        ({"layers": "3"}, ("site", "layers"), (3,)),
        ({"layers": "[0, 2]"}, ("site", "layers"), (0, 2)),
        ({"standardize": "False"}, ("sae", "standardize"), False),
        ({"model": "{path: 123, revision: 1.10}"}, ("model", "revision"), "1.10"),
        ({"target": "residual"}, ("site", "target"), "same"),
    ],
)
def test_values_are_read_as_they_are_meant(tmp_path, changes, field, expected):
    value = getattr(getattr(read(tmp_path, with_(**changes)), field[0]), field[1])
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expansion_facter": "3"}, "expansion_facter: unknown field; did you mean `expansion_f"),
        ({"on": "3"}, "on: unknown field"),
        ({"k": "sixteen"}, "k: expected whole number, got 'sixteen'"),
        ({"k": "1.5"}, "k: expected whole number, got '1.5'"),
        ({"k": ""}, "k: expected whole number, got nothing"),
        ({"k": "0"}, "k: expected a number above 0, got 0"),
        ({"k": "[1]"}, "k: expected whole number, got ['1']"),
        ({"tokens": "1e400"}, "tokens: expected whole number"),
        ({"tokens": "9" * 30}, "tokens: expected whole number"),
        ({"tokens": "100"}, "tokens: expected at least one batch of batch_tokens 2048, got 100"),
        ({"learning_rate": "nan"}, "learning_rate: expected number or nothing, got 'nan'"),
        ({"learning_rate": "0"}, "learning_rate: expected a number above 0"),
        ({"seed": "-1"}, "seed: expected a number from 0 to 2**32 - 1, got -1"),
        ({"dead_threshold": "-1"}, "dead_threshold: expected 0 or more"),
        ({"aux_k": "-1"}, "aux_k: expected 0 or more"),
        ({"standardize": "yes"}, "standardize: expected true | false, got 'yes'"),
        ({"precision": "fp64"}, "precision: expected fp32 | tf32 | fp16 | bf16, got 'fp64'"),
        ({"layers": "some"}, "layers: expected all or a list of whole numbers, got 'some'"),
        ({"layers": "[2, 1]"}, "layers: expected `all` or increasing block indices"),
        ({"layers": "[]"}, "layers: expected `all` or increasing block indices"),
        ({"layers": "[-1]"}, "layers: expected `all` or increasing block indices"),
        ({"source": "mlp"}, "source: expected residual | mlp_input | mlp_output, got 'mlp'"),
        ({"basis": "x", "source": "mlp_input"}, "basis: expected `identity`"),
        ({"batch_tokens": "3000", "micro_batch_tokens": "2048"}, "batch_tokens: expected a mult"),
        ({"micro_batch_tokens": "100"}, "micro_batch_tokens: expected at least one sequence"),
        ({"model": ""}, "model: expected a path or fields, got nothing"),
        ({"model": "''"}, "model.path: expected a shipped name"),
        ({"model": '"a\\nb"'}, r"model.path: expected a shipped name"),
        ({"model": "a" * 300}, "model.path: expected a shipped name"),
        ({"data": r'"\ud800"'}, "data.path: expected docstrings, a file"),
        ({"data": '"a\\0b"'}, "data.path: expected docstrings, a file"),
        ({"model": '"~nobody-of-this-name/a"'}, "model.path: expected a shipped name"),
        ({"basis": "a" * 300}, "basis: expected `identity` or a tuned-lens folder"),
        ({"model": "{revision: a}"}, "model.path: missing; expected text"),
        ({"model": "{path: a, dtype: half}"}, "model.dtype: expected float32 | bfloat16 | float16"),
        ({"data": "{path: a, colum: b}"}, "data.colum: unknown field"),
        ({"data": "{path: [a]}"}, "data.path: expected text, got ['a']"),
        ({"data": "{context_length: 1}"}, "data.context_length: expected a number of at least 2"),
    ],
)
def test_bad_values_are_named(tmp_path, changes, message):
    with pytest.raises(SpecError) as error:
        read(tmp_path, with_(**changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected `field: value` lines, got nothing"),
        ("- a", "expected `field: value` lines, got ['a']"),
        (with_() + "k: 2\n", "k: given twice (line 8)"),
        (with_() + "? [a]\n: 3\n", "not valid YAML"),
        (with_() + "a: *b\n", "not valid YAML"),
        (with_() + "a: &a [*a]\n", "not valid YAML"),
        (with_() + "a: !!int b\n", "not valid YAML"),
        (with_() + "a: !!python/object:os.system b\n", "not valid YAML"),
        (with_() + "\ta: 1\n", "not valid YAML"),
        (with_() + "---\na: 1\n", "not valid YAML"),
        (with_() + "a: [" + "[" * 600, "not valid YAML"),
        ("run:\n  k: 1\n", "is an experiment"),
    ],
)
def test_files_that_are_no_spec_are_refused(tmp_path, text, message):
    with pytest.raises(SpecError) as error:
        read(tmp_path, text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"none\.yml: no such file"):
        spec.load_run(tmp_path / "none.yml")
    with pytest.raises(SpecError, match="is a folder; expected a YAML file"):
        spec.load_run(tmp_path)
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match=r"binary\.yml: not valid YAML"):
        spec.load_run(tmp_path / "binary.yml")
    with pytest.raises(SpecError, match=r"x: cannot be read: File name too long"):
        spec.load_run("x" * 300)


def test_what_is_far_too_large_for_a_spec_is_not_read(tmp_path):
    (tmp_path / "weights").touch()
    os.truncate(tmp_path / "weights", 2**40)
    with pytest.raises(SpecError, match=r"weights: expected a YAML file of at most 1048576 bytes"):
        spec.load_run(tmp_path / "weights")


_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_nested = _scalars | st.lists(_scalars, max_size=3)
_values = _nested | st.lists(_nested, max_size=3) | st.dictionaries(st.text(max_size=5), _nested)


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from([*MINIMAL, "model", "aux_k", "title"]), _values))
def test_whatever_the_values_there_is_a_run_or_a_spec_error(changes):
    message = ""
    try:
        run = spec.run_from_dict(MINIMAL | changes)
    except SpecError as error:
        message = str(error)
    else:
        again = spec.run_from_dict(yaml.safe_load(yaml.safe_dump(spec.flat(run))))
        assert again == run
    assert "\n" not in message


def test_equal_runs_are_equal_however_they_are_built():
    lists = SiteSpec(layers=[0, 1])
    assert lists == SiteSpec(layers=(0, 1)) == SiteSpec(layers=range(2))
    assert hash(lists) == hash(SiteSpec(layers=(0, 1)))
    whole, text = TrainSpec(tokens=10**6, learning_rate=1), TrainSpec("1e6", learning_rate="1")
    assert spec.canonical(spec.to_dict(whole)) == spec.canonical(spec.to_dict(text))
    with pytest.raises(SpecError, match="k: expected whole number"):
        SaeSpec(expansion_factor=2, k=None)
    with pytest.raises(SpecError, match=r"evaluate\.split: expected train"):
        spec.EvaluateSpec(split="tset")


def test_a_run_reads_back_from_its_canonical_form():
    run = spec.run_from_dict(MINIMAL | {"layers": ["0", "2"], "stacked": "true"})
    assert spec.run_from_dict(json.loads(spec.canonical(spec.flat(run)))) == run


def test_flat_fields_have_one_owner():
    sections = (SiteSpec, SaeSpec, TrainSpec)
    fields = [f.name for cls in sections for f in dataclasses.fields(cls)] + ["model", "data"]
    assert set(spec.flat(spec.run_from_dict(MINIMAL))) == set(fields)
    fields += [f.name for f in dataclasses.fields(ModelSpec)] + ["context_length"]  # beside in keys
    fields += [name for cls in (*sections, RunSpec, ModelSpec) for name in cls._former]
    assert len(fields) == len(set(fields))


def test_a_dictionary_is_sized_by_the_width_of_its_input():
    run = spec.run_from_dict(MINIMAL | {"layers": [0, 2]})
    assert run.n_latents(n_layers=3, d_model=8) == 128
    stacked = dataclasses.replace(run, site=SiteSpec((0, 2), stacked=True))
    assert stacked.n_latents(n_layers=3, d_model=8) == 256
    with pytest.raises(SpecError, match=r"layers: expected block indices from 0 to 1.*got 2"):
        run.n_latents(n_layers=2, d_model=8)
    many = dataclasses.replace(run, sae=SaeSpec(expansion_factor=1, k=16))
    with pytest.raises(SpecError, match=r"k: expected at most the 8 latents.*got 16"):
        many.n_latents(n_layers=3, d_model=8)


def test_a_sweep_is_the_product_of_its_lists_in_the_files_order(tmp_path):
    path = tmp_path / "experiment.yml"
    fields = "".join(f"  {name}: {value}\n" for name, value in MINIMAL.items())
    path.write_text(
        f"title: T\nrun:\n{fields}sweep:\n  k: [8, 16]\n  expansion_factor: [2, 4]\n"
        "evaluate: {tokens: 1e5}\n"
    )
    experiment = spec.load_experiment(path)
    labels = [tuple(labels.values()) for labels, _ in experiment.runs]
    assert labels == [(8, 2), (8, 4), (16, 2), (16, 4)]
    assert [(r.sae.k, r.sae.expansion_factor) for _, r in experiment.runs] == labels
    assert experiment.evaluate == spec.EvaluateSpec(100_000, "test")


def test_cases_are_runs_by_name(tmp_path):
    path = tmp_path / "experiment.yml"
    fields = "".join(f"  {name}: {value}\n" for name, value in MINIMAL.items())
    path.write_text(
        f"run:\n{fields}cases:\n  plain:\n  wide: {{k: 16, expansion_factor: 4}}\n"
        "analyses: [evaluate]\nweights: false\n"
    )
    experiment = spec.load_experiment(path)
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
        spec.load_experiment(path)
    assert message in str(error.value)


def test_a_run_alone_is_an_experiment_and_evaluation_can_be_left_out(tmp_path):
    path = tmp_path / "run.yml"
    path.write_text(with_())
    experiment = spec.load_experiment(path)
    assert isinstance(experiment.runs[0][1], RunSpec)
    assert experiment.title == "run"
    indented = "".join(f"  {name}: {value}\n" for name, value in MINIMAL.items())
    for off in ("", "false", "null"):
        path.write_text(f"run:\n{indented}evaluate: {off}\n")
        assert spec.load_experiment(path).evaluate is None
