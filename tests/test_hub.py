"""Text that is streamed from a hub: faults, lanes, several processes, kills."""

import itertools
import json
import os
import signal
import time

import datasets
import hub as doubles
import numpy as np
import pandas as pd
import pytest
import torch
import workers
from huggingface_hub import constants
from safetensors.numpy import load_file
from test_train import free_port, results, spec_text
from workers import sentences

from mlsae_book.pretrain import train_tokenizer
from mlsae_core import pipeline, text
from mlsae_core.sae import MLSAE
from mlsae_core.spec import DataSpec, run_from_dict

DATA = DataSpec("owner/texts", context_length=8)
FILES = 5  # so 4 lanes, the first of two files


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(sentences(300), 300)


def shards(count, documents=300):
    """Files of a data set, which hold every count-th document."""
    rows = [json.dumps({"text": document}) + "\n" for document in sentences(documents)]
    return {f"train-{n:02}.jsonl": "".join(rows[n::count]).encode() for n in range(count)}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with a data set of `FILES` files, which this process uses."""
    monkeypatch.setenv("HF_TOKEN", "")
    for module, names in (
        (constants, ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_CACHE")),
        (datasets.config, [n for n in vars(datasets.config) if n.startswith(("STREAM", "HF_"))]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))  # restored after the test
    with doubles.serving(shards(FILES)) as hub:
        doubles.use(hub.url, tmp_path / "cache")
        yield hub


# --- one process --------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", doubles.FAULTS)
def test_no_document_is_lost_or_doubled_when_a_hub_fails_for_a_moment(hub, fault):
    expected = [document for n in range(FILES) for document in sentences(300)[n::FILES]]
    rows = text._data_set(DATA)
    hub.faults = [fault]
    assert list(text.documents(DATA, rows)) == expected
    assert hub.met == [fault]


def test_each_lane_packs_its_own_files_and_batches_take_turns(hub, tokenizer):
    blocks = text.blocks(DATA, tokenizer, "train")
    assert blocks.lanes == 4
    lanes = []
    for n in range(4):
        own = [d for file in (n, n + 4) for d in sentences(300)[file::FILES] if file < FILES]
        own = [document for document in own if text.split_of(document) == "train"]
        (packed,) = text.pack(own, tokenizer, 8)
        lanes.append(torch.from_numpy(packed).long())
    found = list(itertools.islice(blocks.batches(3, seed=0), 600))
    for n, lane in enumerate(lanes):
        own = torch.cat(found[n::4])
        passes = lane.repeat(len(own) // len(lane) + 1, 1)
        assert len(own) > len(lane)  # each begins again at its own end
        assert torch.equal(own, passes[: len(own)])
    for start, every in ((0, 2), (1, 2), (3, 4), (2, 3), (5, 8), (7, 1)):
        some = itertools.islice(blocks.batches(3, 0, start, every), 9)
        assert all(map(torch.equal, some, found[start::every]))
    one_pass = list(blocks.batches(3))
    for start, every in ((0, 1), (1, 3), (4, 2)):
        some = list(blocks.batches(3, None, start, every))
        assert all(map(torch.equal, some, one_pass[start::every]))
        assert len(some) == len(one_pass[start::every])


def test_the_order_of_a_training_is_part_of_its_key(tmp_path):
    local = workers.write_jsonl(tmp_path / "text.jsonl", [{"text": "la"}])
    model = workers.write_jsonl(tmp_path / "config.json", []).parent
    for path, order in (("owner/texts", {"lanes": "16"}), (str(local), {})):
        fields = {"model": str(model), "data": path, "expansion_factor": 1, "k": 1, "tokens": 9999}
        parents = pipeline.run_key(run_from_dict(fields))[2]
        assert {name: parents[name] for name in parents if name == "lanes"} == order


@pytest.mark.parametrize(("files", "lanes"), [(1, 1), (2, 2), (3, 2), (31, 16), (32, 16)])
def test_there_are_as_many_lanes_as_files_but_a_power_of_two_and_at_most_sixteen(
    hub, tokenizer, files, lanes
):
    hub.files = shards(files)
    assert text.blocks(DATA, tokenizer, "train").lanes == lanes


def test_a_process_reads_only_the_files_of_its_own_lanes(hub, tokenizer):
    for rank in range(4):
        blocks = text.blocks(DATA, tokenizer, "train")
        assert blocks.lanes == 4  # opening it reads the first file, to learn its columns
        hub.read.clear()
        for _ in itertools.islice(blocks.batches(3, 0, rank, every=4), 100):
            pass
        files = {file for _, file in hub.read}
        assert files == {f"train-{n:02}.jsonl" for n in range(rank, FILES, 4)}


def test_a_lane_without_a_sequence_reads_all_files(hub, tokenizer):
    hub.files = shards(2)
    hub.files["train-01.jsonl"] = b'{"text": "la"}\n'
    blocks = text.blocks(DATA, tokenizer, "train")
    even, odd = (torch.cat(list(itertools.islice(blocks.batches(3, 0, n, 2), 9))) for n in range(2))
    assert torch.equal(even, odd)


# --- several processes --------------------------------------------------------------------------


def start(processes, folder, spec, url, ranks=2, checkpoint_steps=None):
    """Start `train` in so many ranks; each names itself to the hub."""
    port, arguments = free_port(), ["train", str(spec)]
    started = [
        processes.Process(
            target=workers.streaming_command,
            args=(arguments, folder, url, (rank, ranks, port), checkpoint_steps),
        )
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    return started


def codes(started):
    for process in started:
        process.join(300)
    return [process.exitcode for process in started]


def test_two_processes_on_a_stream_are_killed_continue_and_train_what_one_does(
    inputs, processes, tmp_path
):
    data = "{path: owner/texts, context_length: 8}"
    (tmp_path / "spec.yml").write_text(spec_text(inputs, data=data))
    with doubles.serving(shards(2)) as hub:
        alone = start(processes, tmp_path / "alone", tmp_path / "spec.yml", hub.url, ranks=1)
        assert codes(alone) == [0]
        hub.read.clear()
        killed = start(processes, tmp_path / "killed", tmp_path / "spec.yml", hub.url, 2, 5)
        for _ in range(6000):
            if (tmp_path / "killed" / "ready").exists():
                break
            time.sleep(0.05)
        for process in killed:
            os.kill(process.pid, signal.SIGKILL)
        assert codes(killed) == [-signal.SIGKILL] * 2
        assert list((tmp_path / "killed" / "store" / "checkpoints").glob("*.pt"))
        again = start(processes, tmp_path / "killed", tmp_path / "spec.yml", hub.url)
        assert codes(again) == [0, 0]
        # The first batch of the run, from which the bias starts, is the first lane's.
        assert hub.read["rank1", "train-01.jsonl"] > 0 == hub.read["rank0", "train-01.jsonl"]
    one, two = results(tmp_path / "alone"), results(tmp_path / "killed")
    pd.testing.assert_frame_equal(one[1], two[1], check_exact=True)
    files = [artefact.meta["files"]["model.safetensors"] for artefact, _ in (one, two)]
    assert files[0] == files[1]


def test_three_processes_measure_what_one_does(inputs, processes, tmp_path):
    """Batches are dealt to them: four, so that only one of them has any in the second round."""
    MLSAE(16, 128, 4, generator=torch.Generator().manual_seed(0)).save_pretrained(tmp_path / "sae")
    fields = {
        "model": inputs / "gpt_neox",
        "data": f"{{path: {inputs / 'text.jsonl'}, context_length: 8}}",
        "dictionary": tmp_path / "sae",
    }
    spec, port = tmp_path / "spec.yml", free_port()
    spec.write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
    alone, together = tmp_path / "alone", tmp_path / "together"
    ranks = [(together, (rank, 3, port)) for rank in range(3)]
    started = [
        processes.Process(target=workers.measure, args=(spec, *where))
        for where in ((alone, None), *ranks)
    ]
    for process in started:
        process.start()
    assert codes(started) == [0] * 4

    def found(stage, name, read):
        folders = [next((data / "store" / stage).iterdir()) for data in (alone, together)]
        return [read(folder / name) for folder in folders]

    one, several = found("evaluate", "evaluation.csv", pd.read_csv)
    assert 3 * 1024 < one.tokens[0] < 4 * 1024 - 200  # the special ones left out
    pd.testing.assert_frame_equal(several, one, rtol=1e-6)
    one, several = found("distributions", "distributions.safetensors", load_file)
    for name, array in one.items():
        np.testing.assert_allclose(several[name], array, rtol=1e-3, err_msg=name)
    one, several = found("distributions", "variances.json", lambda path: path.read_text())
    one, several = (pd.json_normalize(json.loads(text)) for text in (one, several))
    pd.testing.assert_frame_equal(several, one, rtol=1e-9)  # what was drawn at random as well


@pytest.mark.parametrize("context", [8, 10**6])
def test_tokenising_may_take_longer_than_a_collective(inputs, processes, tmp_path, context):
    """By a launch whose collectives may take 2 seconds, and a tokeniser that takes 5."""
    spec = tmp_path / "spec.yml"
    data = f"{{path: {inputs / 'text.jsonl'}, context_length: {context}}}"
    batch = {"micro_batch_tokens": 4 * context, "batch_tokens": 4 * context, "tokens": 4 * context}
    spec.write_text(spec_text(inputs, data=data, **batch))
    port = free_port()
    started = [
        processes.Process(
            target=workers.tokenise_slowly, args=(spec, tmp_path, (rank, 2, port), 2, 5)
        )
        for rank in (0, 1)
    ]
    for process in started:
        process.start()
    # Text too short for such a context: the main process says why, the other that there is one.
    assert codes(started) == ([0, 0] if context == 8 else [2, 1])
    assert len(list(tmp_path.glob("store/tokens/*"))) == (context == 8)
