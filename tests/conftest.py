"""Fixtures: a data folder of its own for a test, tiny model folders, and processes to be killed."""

import multiprocessing
import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from workers import sentences, use_data, write_jsonl

# Where there is no CUDA device, Triton's kernels run in its interpreter. It looks when it is first
# imported, which PyTorch's compiler may do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A loaded machine is no failure. One commit draws one set of examples, so CI says the same twice.
slow = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, **slow)
settings.load_profile("same")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty folder in the place of `data/`; the working directory is its parent."""
    from mlsae_core import store

    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("DATA", "MODELS", "SHIPPED", "STORE"):
        monkeypatch.setattr(store, name, getattr(store, name))  # restored after the test
    use_data(folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder with `text.jsonl` and models of all architectures with a 300-token tokenizer."""
    from tiny_lm import CONFIGS
    from transformers import AutoModelForCausalLM

    from mlsae_book.pretrain import train_tokenizer

    folder = tmp_path_factory.mktemp("inputs")
    documents = sentences(300)
    write_jsonl(folder / "text.jsonl", [{"text": text} for text in documents])
    tokenizer = train_tokenizer(documents, 300)
    for name, make in CONFIGS.items():
        config = make()
        config.vocab_size = len(tokenizer)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def talk(monkeypatch):
    """A text `talk` by its release, and what is installed: [] as pinned, else what differs."""
    from mlsae_core import text

    installed: list[str] = []

    def documents():
        return {f"{' '.join(installed)} {one}": text.split_of(one) for one in sentences(300)}

    declared = text.Source(documents, lambda: {"talk": 1}, lambda: list(installed))
    monkeypatch.setitem(text.SOURCES, "talk", declared)
    return installed


@pytest.fixture(scope="session")
def processes():
    """Processes that start quickly, since a server imports what they need once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlsae_core.train", "mlsae_core.analysis", "transformers"])
    return context
