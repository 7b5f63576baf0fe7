"""Text: documents of every source, disjoint splits, packing, order, streaming."""

import collections
import gzip
import itertools
import json
import math
import threading

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from workers import sentences, write_jsonl

from mlsae_book.pretrain import END_OF_TEXT, train_tokenizer
from mlsae_core import store, text
from mlsae_core.spec import DataSpec, SpecError

CONTEXT = 8


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(sentences(200), 300)


def joined_ids(tokenizer, documents):
    """Ids of the text joined by EOS, tokenised in one piece: what packing should equal."""
    return tokenizer(END_OF_TEXT.join([*documents, ""]), add_special_tokens=False)["input_ids"]


# --- splits -------------------------------------------------------------------------------------


def test_splits_have_their_shares_and_depend_on_the_document_alone():
    shares = collections.Counter(map(text.split_of, sentences(20_000)))
    assert set(shares) == set(text.SPLITS)
    for split, share in (("test", 1 / 8), ("validation", 1 / 32)):
        deviation = math.sqrt(share * (1 - share) / 20_000)
        assert abs(shares[split] / 20_000 - share) < 4 * deviation
    assert [text.split_of(d) for d in sentences(50)[::-1]] == [
        text.split_of(d) for d in sentences(50)
    ][::-1]


@pytest.mark.parametrize("split", text.SPLITS)
def test_a_split_holds_its_documents_and_no_others(data, tokenizer, split):
    documents = sentences(400)
    spec = DataSpec(str(write_jsonl(data / "t.jsonl", [{"text": d} for d in documents])))
    spec = DataSpec(spec.path, context_length=CONTEXT)
    own = [d for d in dict.fromkeys(documents) if text.split_of(d) == split]
    ids = joined_ids(tokenizer, own)
    whole = len(ids) // CONTEXT * CONTEXT
    assert text.blocks(spec, tokenizer, split).blocks.flatten().tolist() == ids[:whole]


# --- packing ------------------------------------------------------------------------------------

_documents = st.lists(st.text(min_size=1).filter(lambda d: END_OF_TEXT not in d), max_size=12)


@settings(max_examples=50)
@given(_documents, st.integers(2, 9))
def test_packing_equals_tokenising_the_joined_text(tokenizer, documents, context):
    blocks = list(text.pack(iter(documents), tokenizer, context))
    ids = joined_ids(tokenizer, documents) if documents else []
    flat = np.concatenate([np.empty(0, np.int32), *(b.flatten() for b in blocks)]).tolist()
    assert flat == ids[: len(ids) // context * context]  # so only the last incomplete one is gone
    assert all(block.shape[1] == context for block in blocks)


def test_documents_are_packed_in_chunks_of_1024(tokenizer):
    documents = sentences(1500)
    sizes = [len(chunk) for chunk in text.pack(documents, tokenizer, CONTEXT)]
    counts = [len(joined_ids(tokenizer, part)) for part in (documents[:1024], documents[1024:])]
    assert sizes == [count // CONTEXT for count in counts]


@settings(max_examples=50)
@given(st.lists(st.sampled_from([END_OF_TEXT, "<|endof", "text|>", " ", "a", "<|"]), max_size=6))
def test_text_that_spells_a_special_token_stays_text(tokenizer, parts):
    document = "".join(parts) + "."
    (ids,) = text.token_ids(tokenizer, [document])
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == document


def test_a_document_without_tokens_does_not_add_an_end():
    backend = Tokenizer(models.BPE({"<eos>": 0, "a": 1}, []))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    (block,) = text.pack(["a", "b", "b", "a a"], tokenizer, 5)
    assert block.tolist() == [[1, 0, 1, 1, 0]]


@pytest.mark.parametrize("eos", [None, "<eos>"])
def test_a_tokenizer_must_fit(eos):
    backend = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    message = r"EOS token.*without" if eos is None else r"ids up to 1; the model has 1 embeddings"
    with pytest.raises(SpecError, match=message):
        text.check_tokenizer(tokenizer, 1)
    if eos is not None:
        text.check_tokenizer(tokenizer, 2)


def test_tokens_are_those_of_one_tokenizer_and_one_end_of_documents():
    backend = Tokenizer(models.BPE({"<a>": 0, "<b>": 1, "c": 2}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<a>", pad_token="<b>")
    definition, key = tokenizer.backend_tokenizer.to_str(), text.tokenizer_key(tokenizer)
    tokenizer.eos_token = "<b>"
    assert tokenizer.backend_tokenizer.to_str() == definition
    assert text.tokenizer_key(tokenizer) != key


# --- order --------------------------------------------------------------------------------------


@given(st.integers(1, 7), st.integers(1, 4), st.integers(0, 2**32 - 1), st.integers(0, 9))
@settings(max_examples=30)
def test_batch_n_is_a_function_of_seed_and_n(n, size, seed, start):
    blocks = text.TokenBlocks(np.arange(2 * n, dtype=np.int32).reshape(n, 2))
    whole = list(itertools.islice(blocks.batches(size, seed), start + 4))
    later = list(itertools.islice(blocks.batches(size, seed, start), 4))
    assert all(map(torch.equal, whole[start:], later))
    visited = torch.cat(whole)[:, 0].tolist()
    for epoch in itertools.batched(visited, n) if hasattr(itertools, "batched") else []:
        assert len(set(epoch)) == len(epoch)
    assert sorted(visited[:n]) == list(range(0, 2 * n, 2))[: len(visited[:n])] or len(visited) < n


def test_seeds_and_passes_differ_in_order():
    blocks = text.TokenBlocks(np.arange(64, dtype=np.int32).reshape(32, 2))
    orders = {
        tuple(batch[:, 0].tolist())
        for seed in (0, 1)
        for batch in itertools.islice(blocks.batches(32, seed), 2)
    }
    assert len(orders) == 4


def test_without_a_seed_a_pass_is_in_order_and_complete():
    blocks = text.TokenBlocks(np.arange(14, dtype=np.int32).reshape(7, 2))
    batches = list(blocks.batches(3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat(batches).int(), torch.from_numpy(blocks.blocks))
    assert torch.equal(next(blocks.batches(3, start=2)), batches[2])
    assert batches[0].dtype == torch.int64


# --- files --------------------------------------------------------------------------------------

ROWS = ["first document", "second, ünïcode", "third\nof two lines"]


def write_all(folder):
    rows = [{"text": row, "n": i} for i, row in enumerate(ROWS)]
    write_jsonl(folder / "a.jsonl", rows)
    (folder / "b.json").write_text(json.dumps(rows, indent=1))
    (folder / "c.txt").write_text("\n\n" + "\n\n \n".join(ROWS) + "\n", encoding="utf-8-sig")
    pd.DataFrame(rows).to_parquet(folder / "d.parquet")
    for name in ("a.jsonl", "c.txt"):
        packed = zstandard.compress((folder / name).read_bytes())
        (folder / f"{name}.zst").write_bytes(packed)
    write_jsonl(folder / "E.JSON", rows)
    return sorted(path.name for path in folder.iterdir())


def test_every_format_gives_the_same_documents(tmp_path):
    for name in write_all(tmp_path):
        assert list(text.documents(DataSpec(str(tmp_path / name)))) == ROWS, name
    assert list(text.documents(DataSpec(str(tmp_path)))) == ROWS  # a folder: no document twice


def test_blanks_and_nothing_are_no_documents_and_half_characters_are_replaced(tmp_path):
    rows = [{"text": value} for value in ("", " \n", None, "a", "a", "\ud800b")]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    assert list(text.documents(DataSpec(str(path)))) == ["a", "?b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", '{"body": "a"}', "data.text_column: expected one of body, got text"),
        ("t.jsonl", '{"text": 3}', "data.text_column: expected text in text, got '3'"),
        (
            "t.jsonl",
            '{"text": "a"}\n{"text": ',
            "expected a list of objects or one object per line",
        ),
        ("t.jsonl", '"a"\n', "data.path: expected objects with a text column, got 'a'"),
        ("t.json", "[1, 2]", "data.path: expected objects with a text column, got '1'"),
        ("t.json", "[" * 100_000, "cannot read"),
        ("t.json", '[{"text": "a"}', "cannot read"),
        ("t.txt", b"\xff\xfe\xff", "cannot read"),
        ("t.jsonl.zst", b"not compressed", "cannot read"),
        ("t.parquet", b"not a table", "cannot read"),
        ("t.csv", "text\na\n", "data.path: expected a file ending in .jsonl, .json, .txt"),
        ("t.jsonl.gz", gzip.compress(b"{}"), "data.path: expected a file ending in .jsonl"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SpecError) as error:
        list(text.documents(DataSpec(str(path))))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_table_without_the_column_is_named(tmp_path):
    pd.DataFrame({"body": ["a"]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(SpecError, match=r"data\.text_column: expected one of body, got text"):
        list(text.documents(DataSpec(str(tmp_path / "t.parquet"))))


def test_paths_are_files_folders_or_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for path in ("none.jsonl", "./none", "/none", "a/b/c"):
        with pytest.raises(SpecError, match=r"data\.path: expected .*a hub id, or a file"):
            text.is_streamed(DataSpec(path))
    with pytest.raises(SpecError, match=r"in the folder empty, got none"):
        text.is_streamed(DataSpec("empty"))
    (tmp_path / "empty" / "python.txt").touch()
    with pytest.raises(SpecError, match=r"got empty/pyhton\.txt; did you mean `empty/python\.txt`"):
        text.is_streamed(DataSpec("empty/pyhton.txt"))
    with pytest.raises(SpecError, match=r"got empty/other\.txt$"):
        text.is_streamed(DataSpec("empty/other.txt"))
    assert text.is_streamed(DataSpec("owner/name-1.0"))
    assert not text.is_streamed(DataSpec("docstrings"))


def test_the_texts_key_is_its_content_not_its_place(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        write_jsonl(folder / "t.jsonl", [{"text": "a"}])
    key = text.data_key(DataSpec(str(one)))
    assert text.data_key(DataSpec(str(other / "t.jsonl"))) == key
    assert text.data_key(DataSpec(str(one), text_column="b")) != key
    (one / "t.jsonl").rename(one / "t.txt")  # the same bytes, other documents
    assert text.data_key(DataSpec(str(one))) != key
    fields = ({}, {"name": "c"}, {"split": "c"}, {"revision": "c"}, {"text_column": "c"})
    hub = [DataSpec("a/b", **changed) for changed in fields] + [DataSpec("a/c")]
    assert len({json.dumps(text.data_key(spec)) for spec in hub}) == len(hub)
    assert text.data_key(DataSpec("a/b", context_length=4)) == text.data_key(DataSpec("a/b"))


def test_text_is_tokenised_once_for_each_tokenizer_and_context(data, tokenizer, monkeypatch):
    path = str(write_jsonl(data / "t.jsonl", [{"text": d} for d in sentences(200)]))
    spec = DataSpec(path, context_length=8)
    first = text.packed(spec, tokenizer)
    assert first.meta["documents"]["train"] > 100
    assert first.meta["tokens"]["train"] == text.blocks(spec, tokenizer, "train").blocks.size
    other = text.packed(spec, train_tokenizer(sentences(50), 280))
    longer = text.packed(DataSpec(path, context_length=9), tokenizer)
    assert len({first.key, other.key, longer.key}) == 3
    monkeypatch.setattr(text, "_pack_splits", None)
    assert text.packed(spec, tokenizer).path == first.path


def test_too_little_text_leaves_nothing(data, tokenizer):
    path = write_jsonl(data / "t.jsonl", [{"text": d} for d in sentences(40)])
    for spec, split in ((DataSpec(str(path), context_length=4096), "train"),
                        (DataSpec(str(path), context_length=200), "validation")):  # fmt: skip
        with pytest.raises(SpecError, match=rf"data\.path: expected text.*the {split} split"):
            text.blocks(spec, tokenizer, split)
    (data / "blank.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(SpecError, match=r"data\.path: expected at least one document"):
        text.blocks(DataSpec(str(data / "blank.jsonl")), tokenizer, "train")
    assert not [file for file in store.STORE.rglob("*") if file.is_file()]


# --- hub data sets ------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A data set of 300 documents, in place of the hub; what was asked for is kept."""
    asked = []

    def load_dataset(path, name, **options):
        asked.append((path, name, options))
        return datasets.Dataset.from_dict({"body": sentences(300)}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_items_are_made_ahead_in_order_and_errors_come_in_their_place():
    """While one item is held the next two are made; the error of the fourth is raised after it."""
    made, two_more = [], threading.Event()

    def items():
        for i in range(4):
            if i == 3:
                raise ValueError("the fourth")
            made.append(i)
            if len(made) == 3:
                two_more.set()
            yield i

    found = text.ahead(items())
    assert next(found) == 0
    assert two_more.wait(5)  # although nobody has asked for them
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(ValueError, match="the fourth"):
        next(found)
    assert list(text.ahead(iter([]))) == []
    unbounded = text.ahead(itertools.count())
    assert [next(unbounded) for _ in range(5)] == [0, 1, 2, 3, 4]
    unbounded.close()


def test_a_hub_data_set_is_streamed_and_fast_forwarded(hub, tokenizer):
    spec = DataSpec("a/b", name="n", split="s", revision="r", text_column="body", context_length=8)
    blocks = text.blocks(spec, tokenizer, "train")
    own = [d for d in sentences(300) if text.split_of(d) == "train"]
    ids = joined_ids(tokenizer, own)
    expected = torch.tensor(ids[: len(ids) // 8 * 8]).view(-1, 8)
    batches = list(blocks.batches(5))
    assert torch.equal(torch.cat(batches), expected)
    assert hub[0] == ("a/b", "n", {"split": "s", "revision": "r", "streaming": True})
    n = len(batches)
    endless = list(itertools.islice(blocks.batches(5, seed=0), 2 * n))
    assert torch.equal(torch.cat(endless), torch.cat([expected] * 3)[: 10 * n])
    for start in (0, 3, n - 1, n, n + 2):  # also after the stream began again
        assert torch.equal(next(blocks.batches(5, seed=0, start=start)), endless[start])


def test_a_hub_data_set_that_does_not_do_is_refused(hub, tokenizer, monkeypatch):
    with pytest.raises(SpecError, match=r"data\.text_column: expected one of body, got text"):
        next(text.blocks(DataSpec("a/b", context_length=8), tokenizer, "train").batches(2))
    long = DataSpec("a/b", text_column="body", context_length=100_000)
    with pytest.raises(SpecError, match="fills at least one sequence"):
        next(text.blocks(long, tokenizer, "train").batches(2, seed=0))

    def fail(*_, **__):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(store.Stopped, match=r"data\.path: .*a/b cannot be read: no network"):
        list(text.documents(DataSpec("a/b")))


def test_tokens_are_counted_in_what_was_packed_of_the_release_that_is_installed(
    data, tokenizer, talk, monkeypatch
):
    spec = DataSpec("talk", context_length=CONTEXT)
    made = text.packed(spec, tokenizer).meta["tokens"]
    talk.append("two 2.10 → 3.0")
    other = text.packed(spec, tokenizer).meta["tokens"]
    assert made != other
    monkeypatch.setattr(text, "split_documents", lambda data: [])
    assert text.counted(spec, tokenizer) == other
    talk.clear()
    assert text.counted(spec, tokenizer) == made
