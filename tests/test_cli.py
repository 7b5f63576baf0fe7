"""The command line as a stranger and as a hostile user would call it."""

import json
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from workers import sentences, write_jsonl

from mlsae_book.__main__ import main as book
from mlsae_core import activations, lm, pipeline, store, text
from mlsae_core.__main__ import _duration
from mlsae_core.__main__ import main as core

CONTEXT = 8
OF_THE_BOOK = ("materialise", "pretrain", "lens", "reproduce")


@pytest.fixture
def call(data, inputs, capsys):
    """Write a spec, run a command on it; gives exit code, output and errors."""
    base = {
        "model": str(inputs / "llama"),
        "data": {"path": str(inputs / "text.jsonl"), "context_length": CONTEXT},
        "layers": "all",
        "expansion_factor": 2,
        "k": 4,
        "tokens": 256,
        "seed": 0,
        "batch_tokens": 64,
    }

    def run(*arguments, raw=None, **changes):
        values = {n: v for n, v in (base | changes).items() if v is not ...}
        (data / "spec.yml").write_text(yaml.safe_dump(values) if raw is None else raw)
        arguments = [str(data / "spec.yml") if a == "SPEC" else a for a in arguments]
        try:
            code = (book if {*arguments[:1]} & {*OF_THE_BOOK} else core)(arguments)
        except SystemExit as stop:  # argparse
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def stored():
    return [path for path in store.STORE.rglob("*") if path.is_file()]


def assert_refused(result, message):
    code, out, err = result
    assert (code, out) == (2, "")
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert stored() == []


# --- a stranger ---------------------------------------------------------------------------------


def test_two_lines_are_changed_for_another_model_and_another_text(call, inputs, data):
    rows = [{"text": d} for d in sentences(250)]
    (data / "mine.json").write_text(json.dumps(rows))
    code, out, _ = call("train", "SPEC")
    assert code == 0
    assert re.search(r"FVU 0\.\d+, dead latents .*%, 256 tokens in \d+ s", out)
    for architecture, path in (("gpt2", inputs / "text.jsonl"), ("llama", data / "mine.json")):
        mine = {"path": str(path), "context_length": CONTEXT}
        arguments = ("evaluate", "SPEC", "--tokens", "1e2", "--split", "test")
        code, out, _ = call(*arguments, model=str(inputs / architecture), data=mine)
        assert code == 0
        header, *rows, path = out.splitlines()
        assert {"layer", "fvu_global", "delta_ce", "kl"} <= set(header.split())
        assert len(rows) == 3
        assert (store.STORE / path).is_dir()


def test_relative_paths_start_at_the_working_directory(call, inputs, data, tmp_path):
    shutil.copytree(inputs / "gemma2", tmp_path / "folder")
    shutil.copyfile(inputs / "text.jsonl", tmp_path / "text.jsonl")
    mine = {"path": "text.jsonl", "context_length": CONTEXT}
    assert call("train", "SPEC", model="folder", data=mine)[0] == 0


def test_an_experiment_is_materialised_shipped_and_found(call, inputs, data):
    experiment = yaml.safe_dump(
        {
            "title": "T",
            "run": {
                "model": str(inputs / "gpt_neox"),
                "data": {"path": str(inputs / "text.jsonl"), "context_length": CONTEXT},
                "expansion_factor": 2,
                "k": 4,
                "tokens": 128,
                "batch_tokens": 64,
            },
            "sweep": {"k": [2, 4]},
            "evaluate": {"tokens": 64},
        }
    )
    code, out, _ = call("status", "SPEC", raw=experiment)
    assert (code, out.count("missing")) == (0, 6)
    code, out, _ = call("materialise", "SPEC", "--ship", raw=experiment)
    assert (code, len(out.splitlines())) == (0, 7)
    code, out, _ = call("status", "SPEC", raw=experiment)
    assert (code, out.count("shipped")) == (0, 6)
    code, out, _ = call("status")
    assert (code, out.count("shipped"), out.count("stored")) == (0, 6, 7)  # and the tokens


def test_how_long_a_run_takes_is_said_in_a_unit_that_can_be_read(call):
    code, out, _ = call("status", "SPEC", tokens=10**14, batch_tokens=64)
    assert code == 0
    assert re.search(r" time_here .*\n +train \w+ missing +[\d,]+ days ", out)
    said = {0: "0 s", 119.6: "120 s", 120: "2 min", 7199: "120 min", 7200: "2 h", 172800: "2 days"}
    assert {seconds: _duration(seconds) for seconds in said} == said


def test_status_without_results_says_so(call):
    code, out, _ = call("status")
    assert code == 0
    assert "no results yet" in out


def test_an_interrupt_is_one_line_and_its_own_exit_code(call, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.Session, "train", interrupt)
    code, _, err = call("train", "SPEC")
    assert code == 130
    assert err.startswith("interrupted; the same command continues")


def help_of(package):
    ran = [sys.executable, "-m", package, "--help"]
    return subprocess.run(ran, capture_output=True, text=True, check=True).stdout


def test_help_tells_a_newcomer_what_to_write():
    shown = help_of("mlsae_core")
    words = "train evaluate status SPEC.yml layers: expansion_factor MLSAE_DATA"
    for word in [*words.split(), "working directory", "Exit codes"]:
        assert word in shown
    fields = shown[shown.index("  model:") : shown.index("All other")]
    from mlsae_core.spec import run_from_dict

    assert run_from_dict(yaml.safe_load(fields)).sae.k == 16  # the example is a spec


def test_help_of_the_book_names_its_commands():
    shown = help_of("mlsae_book")
    for word in [*OF_THE_BOOK, "EXPERIMENT.yml", "analyses", "Exit codes"]:
        assert word in shown


@pytest.mark.parametrize("command", ["train", "evaluate", "status", *OF_THE_BOOK])
def test_every_command_has_help(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert "usage" in out


# --- a hostile user: arguments and specs --------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [(), ("fly",), ("train",), ("train", "SPEC", "--force", "--read-only"), ("train", "a", "b")],
)
def test_wrong_usage_is_exit_code_2(call, arguments):
    code, _, err = call(*arguments)
    assert code == 2
    assert "usage" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expansion_facter": 2}, "expansion_facter: unknown field; did you mean"),
        ({"k": 33}, "k: expected at most the 32 latents that expansion_factor 2 gives at width 16"),
        ({"k": "many"}, "k: expected whole number, got 'many'"),
        ({"k": ...}, "k: missing; expected whole number"),
        ({"model": ...}, "model: missing"),
        ({"layers": [7]}, "layers: expected block indices from 0 to 2"),
        ({"seed": -1}, "seed: expected a number from 0"),
        ({"tokens": 10}, "tokens: expected at least one batch"),
        ({"source": "attention"}, "source: expected residual | mlp_input | mlp_output"),
        ({"basis": "nowhere"}, "basis: expected `identity` or a tuned-lens folder (from /"),
        ({"model": "./nowhere"}, "model.path: expected a shipped name"),
        ({"model": {"path": "x", "dtype": "int8"}}, "model.dtype: expected float32"),
        (
            {"data": {"path": "nowhere.jsonl", "context_length": 8}},
            "a hub id, or a file or folder",
        ),
        ({"data": {"path": "a", "context": 4}}, "data.context: unknown field; did you mean"),
        ({"raw": ""}, "spec.yml: expected `field: value` lines, got nothing"),
        ({"raw": "k: 1\nk: 2\n"}, "k: given twice (line 2)"),
        ({"raw": "k: [\n"}, "spec.yml: not valid YAML"),
        ({"raw": "run: {k: 1}\n"}, "run: "),
    ],
)
def test_bad_specs_are_one_line_and_exit_code_2(call, changes, message):
    assert_refused(call("train", "SPEC", **changes), message)


def test_missing_files_are_named(call):
    for command in ("train", "evaluate", "materialise", "status"):
        code, _, err = call(command, "none.yml")
        assert (code, err) == (2, "error: none.yml: no such file; expected a YAML file\n")
    code, _, err = call("pretrain", "none")
    assert code == 2
    assert err.startswith("error: recipe: expected a YAML file or one of")


def test_bad_evaluation_settings_are_named(call):
    refused = call("evaluate", "SPEC", "--split", "dev")
    assert_refused(refused, "evaluate.split: expected train | validation | test, got 'dev'")
    assert_refused(call("evaluate", "SPEC", "--tokens", "0"), "evaluate.tokens: expected a number")
    assert_refused(call("evaluate", "SPEC", "--tokens", "x"), "evaluate.tokens: expected whole")


def test_a_missing_result_is_exit_code_2_when_only_reading(call):
    assert_refused(call("train", "SPEC", "--read-only"), "nothing of this stage exists")


@pytest.fixture
def backend(monkeypatch):
    """Choose what compiles; the default needs a C++ compiler and half a minute."""
    return lambda name: monkeypatch.setattr(lm.LanguageModel.compiled, "__defaults__", (name,))


def test_a_compiled_run_is_the_run_that_is_found_later(call, backend):
    backend("aot_eager")
    code, out, _ = call("train", "SPEC", "--compile")
    assert code == 0
    assert call("train", "SPEC")[1] == out


def test_what_cannot_be_compiled_is_named_before_text_is_read(call, backend):
    backend("aot_eager")
    message = "--compile: expected source and target to be residual, got mlp_output"
    assert_refused(call("train", "SPEC", "--compile", target="mlp_output"), message)
    backend("nothing")
    assert_refused(call("train", "SPEC", "--compile"), "could not be compiled: Invalid backend")


def test_unknown_and_missing_trackers_are_named(call):
    assert_refused(call("train", "SPEC", "--track", "sheet"), "--track: expected one of")
    from accelerate.tracking import get_available_trackers

    if "tensorboard" not in get_available_trackers():
        refused = call("train", "SPEC", "--track", "tensorboard")
        assert_refused(refused, "got tensorboard, whose package is missing")


# --- a hostile user: models ---------------------------------------------------------------------


def without(name):
    return lambda folder: [file.unlink() for file in folder.glob(name)]


def rewrite(name, **changes):
    def damage(folder):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | changes))

    return damage


def other_tokenizer(eos, n_words):
    def damage(folder):
        words = {"<eos>": 0} | {f"w{i}": i for i in range(1, n_words)}
        backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        for file in folder.glob("tokenizer*"):
            file.unlink()
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos).save_pretrained(folder)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("*.safetensors"), "has no weights; expected *.safetensors"),
        (without("config.json"), "has no config.json; expected a Hugging Face folder"),
        (without("tokenizer*"), "has no tokenizer; expected tokenizer.json"),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            "config.json cannot be read",
        ),
        (
            lambda folder: (folder / "config.json").write_text("{}"),
            "config.json cannot be read",
        ),
        (rewrite("config.json", model_type="unheard-of"), "whose config.json cannot be read"),
        (rewrite("config.json", num_hidden_layers="two"), "whose config.json cannot be read"),
        (rewrite("config.json", num_hidden_layers=5), "lacks weights"),
        (rewrite("config.json", hidden_size=32), "model.path"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99),
            "could not be loaded",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "could not be loaded"),
        (other_tokenizer(None, 40), "expected a tokenizer with an EOS token"),
        (other_tokenizer("<eos>", 400), "got one with ids up to 399; the model has 300 embeddings"),
    ],
)
def test_damaged_models_are_named_before_text_is_read(
    call, inputs, data, damage, message, monkeypatch
):
    monkeypatch.setattr(text, "documents", None)
    shutil.copytree(inputs / "llama", data / "model")
    damage(data / "model")
    refused = call("train", "SPEC", model=str(data / "model"))
    assert_refused(refused, message)
    assert "model.path: " in refused[2]


# --- a hostile user: text -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", "", "data.path: expected at least one document"),
        ("t.jsonl", '{"text": "  "}\n', "data.path: expected at least one document"),
        ("t.txt", "too short", "data.path: expected text that fills at least one sequence"),
        ("t.jsonl", '{"body": "a"}\n', "data.text_column: expected one of body, got text"),
        ("t.jsonl", '{"text": 1}\n', "data.text_column: expected text in text, got '1'"),
        ("t.jsonl", "no json\n", "data.path: cannot read"),
        ("t.parquet", "no table", "data.path: cannot read"),
        ("t.pdf", "%PDF", "data.path: expected a file ending in .jsonl"),
    ],
)
def test_bad_text_is_named(call, data, name, content, message):
    (data / name).write_text(content)
    spec = {"path": str(data / name), "context_length": 32}
    assert_refused(call("train", "SPEC", data=spec), message)


def test_text_without_a_test_split_is_refused_before_training(call, data):
    rows = [{"text": d} for d in sentences(400) if text.split_of(d) == "train"]
    spec = {"path": str(write_jsonl(data / "t.jsonl", rows)), "context_length": CONTEXT}
    assert_refused(call("evaluate", "SPEC", data=spec), "the test split of")


# --- damage and stops ---------------------------------------------------------------------------


def test_damaged_results_and_checkpoints_are_named(call, data):
    assert call("train", "SPEC")[0] == 0
    (folder,) = (store.STORE / "train").iterdir()
    (folder / "model.safetensors").write_bytes(b"damaged")
    for command in ("train", "evaluate"):
        code, _, err = call(command, "SPEC")
        assert code == 2
        assert "model.safetensors: damaged" in err
        assert f"delete {folder}; it is computed anew" in err
    assert call("train", "SPEC", "--force")[0] == 0
    checkpoint = pipeline.checkpoint_path("0" * 16)
    checkpoint.parent.mkdir(exist_ok=True)
    code, out, _ = call("status", "SPEC", seed=1)
    checkpoint = pipeline.checkpoint_path(re.search(r"train +([0-9a-f]{16})", out)[1])
    checkpoint.write_bytes(b"damaged")
    code, _, err = call("train", "SPEC", seed=1)
    assert code == 2
    assert "damaged checkpoint" in err
    assert "delete it to start anew" in err


def test_activations_that_are_not_finite_stop_with_exit_code_1(call, monkeypatch):
    real = lm.LanguageModel.capture

    def broken(self, tokens, *arguments):
        found = real(self, tokens, *arguments)
        if tokens.shape[1] > 2:
            next(iter(found.values()))[1] = torch.nan
        return found

    monkeypatch.setattr(lm.LanguageModel, "capture", broken)
    code, _, err = call("train", "SPEC")
    assert code == 1
    assert "error: batch 0: residual has NaN or infinite values at layers [1]" in err
    assert "no checkpoint was written" in err


def test_a_name_that_no_disk_has_room_for_is_exit_code_2(call):
    for arguments in (["pretrain", "a" * 300], ["train", "a" * 300]):
        code, _, errors = call(*arguments)
        assert code == 2
        assert errors.count("\n") == 1
    assert call("train", "SPEC", model="a" * 300)[0] == 2


def test_a_full_disk_is_one_line_and_exit_code_1(call, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write", full)
    code, _, err = call("train", "SPEC")
    assert code == 1
    assert err.splitlines()[-1] == "error: [Errno 28] No space left on device"


def test_measuring_only_special_tokens_stops_with_exit_code_1(call, monkeypatch):
    assert call("train", "SPEC")[0] == 0
    keep = lm.LanguageModel.keep_mask
    monkeypatch.setattr(
        lm.LanguageModel, "keep_mask", lambda self, tokens: keep(self, tokens) & False
    )
    code, _, err = call("evaluate", "SPEC")
    assert code == 1
    assert "tokens are special; expected text" in err


def test_every_line_of_the_log_is_read_back(call):
    assert call("train", "SPEC")[0] == 0
    (folder,) = (store.STORE / "train").iterdir()
    log = pd.read_csv(folder / "log.csv")
    assert list(log.tokens) == [64, 128, 192, 256]
    assert issubclass(activations.ActivationError, RuntimeError)
