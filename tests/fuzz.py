"""Give every command damaged and hostile inputs, and see that each works or ends in one line.

`make fuzz` runs 2,000 seeded inputs, tests/test_fuzz.py a sample of them. An input is right where
its command ends with a documented code within 10 s and 2 GB, and where one that does not end with 0
says one line of ours: "error: …", without control characters and not longer than a paragraph. The
commands run in forks of a process that has imported what is large, so that memory is what an input
asks for, and 2,000 of them take minutes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # which is read when it is imported

import torch
import tqdm.auto
import tqdm.std
import yaml
from tiny_lm import CONFIGS
from workers import sentences, use_data, write_jsonl

from mlsae_core import store

SECONDS, MEGABYTES, LINE = 10.0, 2048, 1200
RECORDED = 2000  # inputs of which the outcomes are kept
CODES = {0: "works", 1: "stopped", 2: "refused"}
CONTEXT = 16


class Kind(NamedTuple):
    """A kind of input: `make` writes a good one into a folder and gives the command that reads it;
    `break_it` damages it. share: of all inputs."""

    make: Callable[[Path, Path], list[str]]
    break_it: Callable[[Path, random.Random], str]
    share: int


# --- how things break -----------------------------------------------------------------------------

VALUES = [
    3, 8, 64, 0.01, "4", "1e-3", "topk", "batchtopk", "residual", "mlp_output", "same", "all",
    None, True, False, 0, 1, -1, 2, 10**9, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-320, 1e308,
    float("inf"), float("nan"), "", " ", "x", "nan", "1e9999", "0x10", "../..", "/", "~", "~nobody",
    ".", "a" * 300, "a/" * 2000, "\x1b[31mred\x1b[0m", "line\nline", "‮rtl", "\ud800", "🙂" * 50,
    "<script>alert(1)</script>", [], [[]], {}, [1, 2, 3], ["a"] * 3, {"a": 1}, {"path": "x"},
    list(range(2000)), [[[[[[[[]]]]]]]],
]  # fmt: skip

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def broken_bytes(content: bytes, dealt: random.Random) -> tuple[bytes, str]:
    """A file's content after one of the accidents that happen to files."""
    size = len(content)
    start, end = sorted(dealt.randint(0, size) for _ in range(2))
    way = dealt.choice(
        ("cut", "flip", "zeros", "gap", "twice", "more", "empty", "pointer", "noise", "other")
    )
    some = bytes(dealt.randrange(256) for _ in range(64))
    made = {
        "cut": content[:start],
        "flip": bytes(b ^ (1 << dealt.randrange(8)) if i == start else b for i, b in
                      enumerate(content)) if size < 2**16 else content[:start] + some[:1]
                + content[start + 1 :],
        "zeros": content[:start] + bytes(end - start) + content[end:],
        "gap": content[:start] + content[end:],
        "twice": content + content,
        "more": content[:start] + some + content[start:],
        "empty": b"",
        "pointer": POINTER,
        "noise": some * dealt.choice((1, 100)),
        "other": b"\xff\xfe" + content,
    }[way]  # fmt: skip
    return made, way


def broken_value(value, dealt: random.Random):
    """A nested value of which one part is replaced, missing, renamed or doubled."""
    if isinstance(value, dict) and value and dealt.random() < 0.8:
        name = dealt.choice(list(value))
        rest = {key: inner for key, inner in value.items() if key != name}
        way = dealt.random()
        if way < 0.1:
            return rest
        if way < 0.15:
            return rest | {str(name) + dealt.choice(("x", " ", "\n", "\x1b[2J")): value[name]}
        return value | {name: broken_value(value[name], dealt)}
    if isinstance(value, list) and value and dealt.random() < 0.5:
        place = dealt.randrange(len(value))
        return [*value[:place], broken_value(value[place], dealt), *value[place + 1 :]]
    return dealt.choice(VALUES)


def break_file(path: Path, dealt: random.Random) -> str:
    """Damage a file as its kind of content may be damaged, or put something else in its place."""
    way = dealt.random()
    if way < 0.06:
        path.unlink()
        place = dealt.choice(("nothing", "a folder", "a link to itself", "a link to nothing"))
        if place == "a folder":
            path.mkdir()
        elif place == "a link to itself":
            path.symlink_to(path.name)
        elif place == "a link to nothing":
            path.symlink_to("nowhere")
        return f"{path.name}: {place}"
    content = path.read_bytes()
    if way < 0.6 and path.suffix in (".json", ".yml"):
        value = broken_value(yaml.safe_load(content), dealt)
        path.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))
        return f"{path.name}: {str(value)[:300]}"
    if way < 0.6 and path.suffix == ".safetensors":
        size = int.from_bytes(content[:8], "little")
        header = broken_value(json.loads(content[8 : 8 + size]), dealt)
        written = json.dumps(header).encode("utf-8", "surrogatepass")
        path.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + size :])
        return f"{path.name}: header {str(header)[:300]}"
    made, way = broken_bytes(content, dealt)
    path.write_bytes(made)
    return f"{path.name}: {way}, {len(made)} of {len(content)} bytes"


def break_yaml(folder: Path, dealt: random.Random) -> str:
    (path,) = folder.rglob("*.yml")
    if dealt.random() < 0.7:
        value = broken_value(yaml.safe_load(path.read_text()), dealt)
        for _ in range(dealt.choice((0, 0, 1, 3))):
            value = broken_value(value, dealt)
        path.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))
        return str(value)[:300]
    return break_file(path, dealt)


def break_any(pattern: str) -> Callable[[Path, random.Random], str]:
    """Damage one of the files that a pattern matches."""
    return lambda folder, dealt: break_file(
        dealt.choice(sorted(path for path in folder.glob(pattern) if path.is_file())), dealt
    )


# --- good inputs ----------------------------------------------------------------------------------


def goods(folder: Path):
    """One good input of each kind, from which all others are copied."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from mlsae_book.pretrain import train_tokenizer
    from mlsae_core.sae import MLSAE

    documents = sentences(300)
    write_jsonl(folder / "text.jsonl", [{"text": text} for text in documents])
    (folder / "text.txt").write_text("\n\n".join(documents))
    tokenizer, config = train_tokenizer(documents, 300), CONFIGS["gpt_neox"]()
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 256  # as lenses need
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    n, d = config.num_hidden_layers, config.hidden_size
    (folder / "dictionary").mkdir()
    sae = MLSAE(d, 2 * d, 4)
    sae.save_pretrained(folder / "dictionary")
    others(sae, folder / "others")
    (folder / "lens").mkdir()
    lens = {"base_model_name_or_path": "model", "d_model": d, "num_hidden_layers": n, "bias": True}
    (folder / "lens/config.json").write_text(json.dumps(lens))
    parts = {f"{i}.weight": torch.zeros(d, d) for i in range(n)}
    parts |= {f"{i}.bias": torch.zeros(d) for i in range(n)}
    torch.save(parts, folder / "lens/params.pt")
    save_file({}, folder / "unused.safetensors")


def others(sae, folder: Path):
    """A dictionary for each layer, in three formats."""
    import numpy as np

    from mlsae_core import publish

    rows = {"W_enc": sae.encoder.T, "W_dec": sae.decoder, "b_dec": sae.pre_bias}
    rows = {name: tensor.detach().clone() for name, tensor in rows.items()}
    rows |= dict.fromkeys(("b_enc", "threshold"), torch.zeros(sae.n_latents))
    publish.write_saelens({0: sae}, folder, "model")
    for name in ("layer_1", "layers.2"):
        (folder / name).mkdir()
    np.savez(folder / "layer_1/params.npz", **{name: t.numpy() for name, t in rows.items()})
    torch.save(rows, folder / "layers.2/ae.pt")
    config = {"trainer": {"dict_class": "JumpReluAutoEncoder", "k": 4}}
    (folder / "layers.2/config.json").write_text(json.dumps(config))


def run_fields(good: Path, **fields) -> dict:
    data = {"path": str(good / "text.jsonl"), "context_length": CONTEXT}
    sae = {"expansion_factor": 2, "k": 4, "tokens": 512, "batch_tokens": 256}
    return {"model": str(good / "model"), "data": data, **sae} | fields


def write_spec(folder: Path, fields: dict) -> str:
    path = folder / "spec.yml"
    path.write_text(yaml.safe_dump(fields))
    return str(path)


def spec(good: Path, folder: Path) -> list[str]:
    return ["core", "train", write_spec(folder, run_fields(good))]


def experiment(good: Path, folder: Path) -> list[str]:
    """An experiment of two runs, of which the costs are asked for."""
    fields = {"title": "two", "run": run_fields(good), "sweep": {"k": [2, 4]},
              "evaluate": {"tokens": 256}, "analyses": ["evaluate", "distributions"]}  # fmt: skip
    return ["core", "status", write_spec(folder, fields)]


def recipe(good: Path, folder: Path) -> list[str]:
    architecture = CONFIGS["gpt_neox"]().to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    architecture = {name: architecture[name] for name in ("model_type", *names)}
    fields = {
        "architecture": architecture,
        "tokens": 512,
        "batch_tokens": 256,
        "vocab_size": 300,
        "data": {"path": str(good / "text.jsonl"), "context_length": CONTEXT},
    }
    (folder / "made").mkdir(exist_ok=True)
    path = folder / "made/recipe.yml"
    path.write_text(yaml.safe_dump(fields))
    return ["book", "pretrain", str(path)]


def text(good: Path, folder: Path, name: str = "text.jsonl") -> list[str]:
    shutil.copy(good / name, folder / name)
    data = {"path": str(folder / name), "context_length": CONTEXT}
    return ["core", "train", write_spec(folder, run_fields(good, data=data))]


def plain_text(good: Path, folder: Path) -> list[str]:
    return text(good, folder, "text.txt")


def compressed(good: Path, folder: Path) -> list[str]:
    import zstandard

    name = "text.txt.zst"
    content = (good / "text.txt").read_bytes()
    (folder / name).write_bytes(zstandard.ZstdCompressor().compress(content))
    data = {"path": str(folder / name), "context_length": CONTEXT}
    return ["core", "train", write_spec(folder, run_fields(good, data=data))]


def parquet(good: Path, folder: Path) -> list[str]:
    import pandas as pd

    name = "text.parquet"
    pd.DataFrame({"text": sentences(300)}).to_parquet(folder / name)
    data = {"path": str(folder / name), "context_length": CONTEXT}
    return ["core", "train", write_spec(folder, run_fields(good, data=data))]


def model(good: Path, folder: Path) -> list[str]:
    shutil.copytree(good / "model", folder / "model")
    return ["core", "train", write_spec(folder, run_fields(good, model=str(folder / "model")))]


def lens(good: Path, folder: Path) -> list[str]:
    shutil.copytree(good / "lens", folder / "lens")
    return ["core", "train", write_spec(folder, run_fields(good, basis=str(folder / "lens")))]


def dictionary(good: Path, folder: Path, name: str = "dictionary") -> list[str]:
    shutil.copytree(good / name, folder / "dictionary")
    fields = run_fields(good, dictionary=str(folder / "dictionary"))
    for name in ("expansion_factor", "k", "tokens", "batch_tokens"):
        del fields[name]
    return ["core", "evaluate", write_spec(folder, fields), "--tokens", "64"]


def layers(good: Path, folder: Path) -> list[str]:
    return dictionary(good, folder, "others")


KINDS = {
    "spec": Kind(spec, break_yaml, 25),
    "experiment": Kind(experiment, break_yaml, 20),
    "recipe": Kind(recipe, break_yaml, 8),
    "text as JSON lines": Kind(text, break_any("*.jsonl"), 6),
    "plain text": Kind(plain_text, break_any("*.txt"), 4),
    "compressed text": Kind(compressed, break_any("*.zst"), 5),
    "text as a table": Kind(parquet, break_any("*.parquet"), 4),
    "model": Kind(model, break_any("model/*"), 12),
    "lens": Kind(lens, break_any("lens/*"), 6),
    "dictionary": Kind(dictionary, break_any("dictionary/*"), 10),
    "dictionaries of others": Kind(layers, break_any("dictionary/*/*"), 10),
}


# --- one input ------------------------------------------------------------------------------------


def run_command(arguments: list[str], folder: Path):
    """Run a command of either package in this process, a fork; its output goes to files."""
    for name, stream in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.chdir(folder)
    use_data(folder / "data")
    package, *arguments = arguments
    if package == "core":
        from mlsae_core.__main__ import main
    else:
        from mlsae_book.__main__ import main
    code = main(arguments)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


class Found(NamedTuple):
    """What became of an input: in a word, and what is wrong with that, if anything is."""

    outcome: str
    fault: str


def judge(arguments: list[str], folder: Path) -> Found:
    """Run a command and judge how it ends."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    child = multiprocessing.get_context("fork").Process(
        target=run_command, args=(arguments, folder)
    )
    start, peak = time.monotonic(), 0.0
    child.start()
    while child.is_alive() and time.monotonic() - start < SECONDS:
        child.join(0.02)
        try:
            fields = Path(f"/proc/{child.pid}/status").read_text()
            peak = max(peak, *(int(line.split()[1]) / 1024 for line in fields.splitlines()
                               if line.startswith("VmHWM")))  # fmt: skip
        except (OSError, ValueError, TypeError):
            pass
    if running := child.is_alive():
        child.kill()
        child.join()
    if peak - before > MEGABYTES:
        return Found("over memory", f"{peak - before:.0f} MB")
    said = (folder / "err").read_text(errors="replace").replace("\r", "\n")
    if running and "tokens/s" in said:
        return Found("works, for long", "")  # with a bar that says for how long
    if running:
        return Found("over time", f"not done after {SECONDS:.0f} s: {said[-300:]}")
    lines = [
        line
        for line in said.split("\n")
        if line.strip() and not re.search(r"[0-9?](it|.*tokens)/s", line)
    ]
    own = [line for line in lines if line.startswith(("error: ", "interrupted"))]
    code = child.exitcode
    if code not in CODES:
        return Found("crashed", f"exit code {code}: {said[-500:]}")
    if "Traceback" in said:
        return Found("traceback", said[-500:])
    if code and len(own) != 1:
        return Found("no line of ours", said[-500:] or "nothing")
    if code and lines[-1] != own[0]:
        return Found("more lines", "\n".join(lines[-3:]))
    if any(len(line) > LINE for line in own):
        return Found("long line", own[0][:300])
    if any(not character.isprintable() for line in own for character in line):
        return Found("control characters", repr(own[0][:300]))
    return Found(CODES[code], "")


def attempt(name: str, number: int, good: Path) -> tuple[str, Found]:
    """The input of that kind and number: what was broken, and what became of it."""
    dealt = random.Random(f"{name} {number}")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as made:
        folder = Path(made)
        arguments = KINDS[name].make(good, folder)
        what = KINDS[name].break_it(folder, dealt)
        return what, judge(arguments, folder)


def prepare():
    """Import what is large, so that forks do not."""
    import datasets
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    from mlsae_book import __main__, pretrain  # noqa: F401
    from mlsae_core import analysis, pipeline, train  # noqa: F401

    datasets.disable_progress_bars()
    # One lock for each fork: a bar's own is shared by all, and would stay shut after a kill.
    tqdm.std.tqdm.set_lock(threading.RLock())
    tqdm.auto.tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)


def check_goods(good: Path):
    """Stop where an input that nobody broke does not work: nothing could be learnt from others."""
    for name, kind in KINDS.items():
        with tempfile.TemporaryDirectory(prefix="fuzz-") as made:
            found = judge(kind.make(good, Path(made)), Path(made))
            if found != ("works", ""):
                sys.exit(f"{name}: expected the good input to work, got {found}")


def sample(count: int) -> list[tuple[str, int]]:
    """Kinds and numbers of so many inputs, by the kinds' shares."""
    every = sum(kind.share for kind in KINDS.values())
    return [
        (name, i) for name, kind in KINDS.items() for i in range(-(-count * kind.share // every))
    ]


def record(name: str, facts: dict):
    """Keep what whole runs found, for the book's page of promises."""
    path = Path(__file__).with_name(f"{name}.json")
    path.write_text(json.dumps(facts, indent=1) + "\n")


def today() -> dict[str, str]:
    """Of which commit and day what is found is true."""
    commit = store.provenance()["commit"]
    return {"commit": commit, "date": time.strftime("%Y-%m-%d", time.gmtime())}


def main(count: int = 2000) -> int:
    """Try so many inputs; list what is wrong and count the rest."""
    prepare()
    counts: dict[str, Counter] = {name: Counter() for name in KINDS}
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        goods(Path(folder))
        check_goods(Path(folder))
        for name, number in sample(count):
            what, found = attempt(name, number, Path(folder))
            counts[name][found.outcome] += 1
            if found.fault:
                faults += 1
                print(f"{name} {number}, {found.outcome}\n  input: {what}\n  {found.fault}",
                      flush=True)  # fmt: skip
    for name, outcomes in counts.items():
        print(f"{name:20}", ", ".join(f"{n} {outcome}" for outcome, n in outcomes.most_common()))
    total = sum(c.total() for c in counts.values())
    print(f"{total} inputs, {faults} faults")
    if total >= RECORDED:
        record("fuzz", {"inputs": total, "faults": faults, "kinds": counts} | today())
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
