"""On an accelerator, if a pretended one: the CPU's results, and how often the host waits for it."""

import signal
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pretend_device
import pytest
import test_pipeline
import test_train
import torch
from pretend_device import waits
from tiny_lm import EOS, VOCAB, tiny_network, tiny_tokenizer, train_on_text
from torch.utils._python_dispatch import TorchDispatchMode
from workers import use_data

from mlsae_book import stages, surrogates
from mlsae_core import metrics, objective, pipeline, stops, store, train
from mlsae_core.activations import TextSource
from mlsae_core.lens import Lens
from mlsae_core.lm import LanguageModel
from mlsae_core.spec import EvaluateSpec
from mlsae_core.text import TokenBlocks

ROUNDING = {"rtol": 1e-3, "atol": 1e-5}
ANALYSES = (
    "evaluate",
    "distributions",
    "transfer",
    "geometry",
    "drift",
    "prompts",
    "examples",
    "importance",
    "duplicates",
)


@pytest.fixture(scope="module")
def there(processes):
    """Calls a function of this module in a process whose machine has the pretend device."""
    with ProcessPoolExecutor(1, processes, pretend_device.install) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(300)


# --- the device itself --------------------------------------------------------------------------


def refusals():
    """What is said to operations that mix devices; and what one is given that may."""
    ours, cpus = torch.arange(3, device="pretend"), torch.arange(3)
    mixed = {
        "sum": lambda: ours + cpus,
        "index": lambda: cpus[ours],
        "in place": lambda: cpus.index_add_(0, ours, ours),
        "mask": lambda: ours.masked_fill(cpus > 1, 0),
        "generator": lambda: torch.rand(2, device="pretend", generator=torch.Generator()),
        "its generator": lambda: torch.rand(2, generator=pretend_device.Generator()),
    }
    said = dict.fromkeys(mixed, "nothing")
    for name, operation in mixed.items():
        try:
            operation()
        except RuntimeError as error:
            said[name] = str(error)
    return said, (ours + torch.tensor(1)).tolist()


def counted():
    """What is counted for operations that need not wait; and by name, for each that must."""
    ours, cpus = torch.arange(3, device="pretend"), torch.arange(3)
    queued = (
        lambda: ours + 1,
        lambda: ours[ours],
        lambda: ours[1:].flip(0),
        lambda: torch.ones(2, device="pretend"),
        lambda: ours.masked_fill(ours > 1, 0),
        lambda: cpus.to("pretend", non_blocking=True),
    )
    waited_for = {
        "_to_copy": (ours.cpu, ours.tolist, lambda: cpus.to("pretend"), lambda: ours[[0]]),
        "copy_": (lambda: cpus.copy_(ours),),
        "index": (lambda: ours[ours > 1], lambda: ours[cpus]),
        "index_put_": (lambda: ours.index_put_((ours > 1,), ours[0]),),
        "nonzero": (ours.nonzero,),
        "_local_scalar_dense": (ours[0].item, lambda: bool(ours.any()), lambda: float(ours[1])),
        "equal": (lambda: ours.equal(ours),),
        "bincount": (ours.bincount,),
        "repeat_interleave": (lambda: ours.repeat_interleave(ours),),
    }

    def waits_of(operation):
        waits.clear()
        operation()
        return dict(waits)

    return (
        [waits_of(operation) for operation in queued],
        {name: list(map(waits_of, operations)) for name, operations in waited_for.items()},
    )


def test_the_device_is_as_strict_as_a_gpu(there):
    said, allowed = there(refusals)
    assert [name for name, message in said.items() if "device" not in message] == []
    assert allowed == [1, 2, 3]  # a single number may be the CPU's


def test_waits_are_counted(there):
    queued, waited_for = there(counted)
    assert queued == [{}] * 6
    for name, found in waited_for.items():
        assert found == [{f"elsewhere {name}": 1}] * len(found)


# --- training -----------------------------------------------------------------------------------


def inputs_on(device, **changes):
    tokens = torch.randint(2, VOCAB, (40, test_train.CONTEXT), generator=torch.Generator())
    tokens[::3, 2] = EOS
    lm = LanguageModel(tiny_network().to(device), tiny_tokenizer())
    return test_train.run_of(**changes), lm, TokenBlocks(tokens.int().numpy())


def train_on(device, checkpoint=None):
    """The log and the weights; with a checkpoint, of a run that was stopped and continued."""
    inputs = inputs_on(device)
    if checkpoint is not None:
        with pytest.raises(store.Stopped, match="after step 5 of 12"):
            train_on_text(*inputs, checkpoint=checkpoint, should_stop={5}.__contains__)
    sae, log, _ = train_on_text(*inputs, checkpoint=checkpoint)
    assert sae.encoder.device.type == device
    weights = {name: x.cpu().numpy() for name, x in sae.state_dict().items()}
    return log.drop(columns="tokens_per_second"), weights


def test_training_gives_the_cpus_numbers_and_continues_exactly(there, tmp_path):
    log, weights = there(train_on, "pretend")
    continued, same = there(train_on, "pretend", tmp_path / "checkpoint")
    pd.testing.assert_frame_equal(continued, log)
    assert all(np.array_equal(same[name], weights[name]) for name in weights)
    expected, others = train_on("cpu")
    assert (expected.auxk > 0).any()
    pd.testing.assert_frame_equal(log, expected, check_exact=False, **ROUNDING)
    for name, other in others.items():
        np.testing.assert_allclose(weights[name], other, **ROUNDING, err_msg=name)


def train_while_a_checkpoint_is_written(path):
    """The first of them is begun after step 1 and reaches the disk after step 8."""
    real, may_write, begun = store.save_checkpoint, threading.Event(), []

    def slowly(path, content):
        begun.append(content["state"]["step"])
        assert may_write.wait(60)
        real(path, content)
        if len(begun) == 1:
            path.rename(path.with_name("first"))

    def look(step):
        if step == 8:
            may_write.set()
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "CHECKPOINT_EVERY", 0)
        patch.setattr(store, "save_checkpoint", slowly)
        inputs = inputs_on("pretend")
        train_on_text(*inputs, checkpoint=path, checkpoint_seconds=0, should_stop=look)
    return begun


def test_a_device_trains_on_while_a_checkpoint_is_written(there, tmp_path):
    begun = there(train_while_a_checkpoint_is_written, tmp_path / "checkpoint")
    assert begun[0] == 1  # and none was begun while it was written
    assert len(begun) > 1
    assert begun[1] >= 8
    assert store.load_checkpoint(tmp_path / "first")["state"]["step"] == 1
    log, weights = there(train_on, "pretend")
    (tmp_path / "checkpoint").unlink()
    continued, same = there(go_on, tmp_path / "first")
    pd.testing.assert_frame_equal(continued, log)
    assert all(np.array_equal(same[name], weights[name]) for name in weights)


def go_on(checkpoint):
    sae, log, _ = train_on_text(*inputs_on("pretend"), checkpoint=checkpoint)
    return log.drop(columns="tokens_per_second"), {
        n: x.cpu().numpy() for n, x in sae.state_dict().items()
    }


def fail_to_write(path, step):
    """At which steps it was tried, where it fails from one on."""
    tried, real = [], store.save_checkpoint

    def full(path, content):
        tried.append(content["state"]["step"])
        if tried[-1] >= step:
            raise OSError("the disk is full")
        real(path, content)

    def is_due(checkpoint, _):
        """When the one before is done, whatever came of it."""
        wait([checkpoint._writing] if checkpoint._writing else [])
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train._Checkpoint, "is_due", is_due)
        patch.setattr(store, "save_checkpoint", full)
        with pytest.raises(OSError, match="the disk is full"):
            train_on_text(*inputs_on("pretend"), checkpoint=path)
    return tried


@pytest.mark.parametrize("step", [3, 12])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(there, tmp_path, step):
    """Before another is begun; the last one too."""
    assert there(fail_to_write, tmp_path / "checkpoint", step) == list(range(1, step + 1))
    kept = store.load_checkpoint(tmp_path / "checkpoint")
    assert kept["state"]["step"] == step - 1


STOPS = {
    "a loss": (store.Stopped, "loss is nan"),
    "another error": (RuntimeError, "of no kind that is known"),
    "a signal": (stops.Interrupted, "stopped by SIGTERM"),
}


def pools():
    return {t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")}


def stop_while_a_checkpoint_is_written(path, how):
    """What was said and in what order things came about; the first one takes its time."""
    came, may_write, real, step = [], threading.Event(), store.save_checkpoint, objective.loss

    def slowly(path, content):
        may_write.wait(0.5)
        real(path, content)
        came.append(content["state"]["step"])

    def broken(*arguments):
        loss = step(*arguments)
        if threads := pools() - before:
            writers.update(threads)
            if how == "another error":
                raise RuntimeError("of no kind that is known")
            if how == "a loss":
                return loss._replace(total=loss.total * torch.nan)
            signal.raise_signal(signal.SIGTERM)
        return loss

    before, writers = pools(), set()
    accelerator = train.make_accelerator(inputs_on("pretend")[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "save_checkpoint", slowly)
        patch.setattr(objective, "loss", broken)
        patch.setattr(accelerator, "wait_for_everyone", lambda: came.append("the others"))
        kind, message = STOPS[how]
        with pytest.raises(kind, match=message) as error:
            train_on_text(
                *inputs_on("pretend"),
                checkpoint=path,
                checkpoint_seconds=0,
                accelerator=accelerator,
            )
    return str(error.value), came, len(writers), any(t.is_alive() for t in writers)


@pytest.mark.parametrize("how", STOPS)
def test_whatever_stops_a_run_waits_for_the_checkpoint_that_is_written(there, tmp_path, how):
    path = tmp_path / "checkpoint"
    said, came, writers, alive = there(stop_while_a_checkpoint_is_written, path, how)
    assert came == ([1, 1, "the others"] if how == "a signal" else [1])
    assert ("the last good checkpoint is" in said) == (how != "another error")
    assert (writers, alive) == (1, False)
    assert store.load_checkpoint(path)["state"]["step"] == 1


def writers_of(device, path):
    """Whether each checkpoint was written by the thread that trains."""
    seen = []

    def note(path, content):
        seen.append(threading.current_thread() is threading.main_thread())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "save_checkpoint", note)
        train_on_text(*inputs_on(device), checkpoint=path, checkpoint_seconds=0)
    return set(seen)


@pytest.mark.parametrize("device", ["pretend", "cpu"])
def test_only_of_a_device_is_a_checkpoint_written_beside_the_training(there, tmp_path, device):
    """Of a CPU's tensors it would take a copy."""
    assert there(writers_of, device, tmp_path / "checkpoint") == {device == "cpu"}


def copy_as_cuda_does():
    """What becomes of two tensors, in order, where copies are queued."""
    came = []

    class Event:
        def record(self):
            came.append(f"recorded after {sum(waits.values())} copy")

        def synchronize(self):
            came.append("waited for")

    class Queued(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ == "_to_copy":
                came.append("queued" if kwargs.get("non_blocking") else "waits")
            return function(*args, **(kwargs or {}))

    state = {"own": torch.ones(2, device="pretend"), "cpus": torch.ones(2)}
    waits.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(store, "save_checkpoint", lambda *_: came.append("saved"))
        with Queued():
            content, copied = train._in_host_memory(state)
        state["cpus"] += 1
        train._Checkpoint._save(SimpleNamespace(path=None), content, copied)
    return came, content["cpus"].tolist()


def test_a_queued_copy_is_waited_for_before_it_is_written(there):
    came, kept = there(copy_as_cuda_does)
    assert came == ["queued", "recorded after 1 copy", "waited for", "saved"]
    assert kept == [1, 1]  # whatever becomes of the CPU's own meanwhile


def waits_of_steps(micro_batches, ranks=1, put_back=None):
    """Of every step between the first, which begins the run, and the last, which ends the log."""
    seen = []

    def note(_):
        seen.append(dict(waits))
        waits.clear()
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "LOG_ROWS", 1)
        if ranks > 1:  # as one of several, with nobody to add up with
            of = train._Plan.of
            patch.setattr(train._Plan, "of", lambda *a: replace(of(*a), every=ranks))
        if put_back == "the look at activations":
            gather = TextSource._gather
            patch.setattr(TextSource, "_gather", lambda *a: gather(*a[:-1], True))
        if put_back == "the question which are dead":
            loss = objective.loss
            patch.setattr(objective, "loss", lambda *a: loss(*a[:-1], None))
        run, *rest = inputs_on("pretend", micro_batch_tokens=64 // micro_batches)
        log = train_on_text(run, *rest, should_stop=note).log
    assert log.auxk.item() > 0
    return seen[1:]


ONE = {"train.py:_Loop.steps _to_copy": 1}


@pytest.mark.parametrize(("micro_batches", "ranks"), [(1, 1), (4, 1), (4, 2)])
def test_the_host_waits_once_a_step_however_many_micro_batches(there, micro_batches, ranks):
    assert there(waits_of_steps, micro_batches, ranks) == [ONE] * 10


@pytest.mark.parametrize(
    ("put_back", "wait"),
    [
        ("the look at activations", "activations.py:_check_finite _local_scalar_dense"),
        ("the question which are dead", "objective.py:loss nonzero"),
    ],
)
def test_a_wait_that_is_put_back_is_seen(there, put_back, wait):
    assert there(waits_of_steps, 4, 1, put_back) == [ONE | {wait: 4}] * 10


def batches_made(device):
    """How many batches of activations there are after each of three steps of two, and in all."""
    run, lm, blocks = inputs_on(device, tokens=3 * 64, micro_batch_tokens=32)
    made, seen = [], []
    with pytest.MonkeyPatch.context() as patch:
        gather = TextSource._gather
        patch.setattr(TextSource, "_gather", lambda *a: made.append(0) or gather(*a))
        train_on_text(run, lm, blocks, should_stop=lambda _: bool(seen.append(len(made))))
    return [*seen, len(made)]


@pytest.mark.parametrize(("device", "ahead"), [("pretend", 1), ("cpu", 0)])
def test_the_language_model_is_a_batch_ahead_of_a_device_and_never_past_the_end(
    there, device, ahead
):
    assert there(batches_made, device) == [1 + 2 + ahead, 1 + 4 + ahead, 1 + 6]


# --- measuring ----------------------------------------------------------------------------------


def compute(run, folder, names):
    """The numbers of some stages, computed anew with the dictionary that lies in the folder."""
    use_data(folder)
    session, found = pipeline.Session("force"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "PROMPTS", ("latent resid.", "milens"))
        for name in names:
            made = session.make(name, run, EvaluateSpec(tokens=1024))
            found[name] = test_pipeline.columns(made)
    return session.device.type, found


def settled(examples, expected):
    """All values, and the rest of those examples that rounding cannot exchange for another."""
    values = "examples.safetensors values"
    clear = np.diff(expected[values]) < -1e-4  # from the next one; the last's is not kept
    first = np.ones_like(clear[..., :1])
    chosen = clear & np.concatenate([first, clear[..., :-1]], -1)
    assert chosen.mean() > 0.5
    kept = {name: array[:, :, :-1][chosen] for name, array in examples.items()}
    return kept | {values: examples[values]}


def differing(there, inputs, data, monkeypatch):
    """The names of all numbers that are not the CPU's in another process; and its device."""
    generator = torch.Generator().manual_seed(0)
    lens = Lens(torch.randn(3, 16, 16, generator=generator) / 16, torch.ones(3, 16) / 8)
    lens.write(data / "lens")
    run = test_pipeline.run_of(inputs, basis=str(data / "lens"))
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        device, expected = compute(run, data, ("train", *ANALYSES))
    assert device == "cpu"
    device, found = there(compute, run, data, ANALYSES)
    for results in (expected, found):
        results["examples"] = settled(results["examples"], expected["examples"])
    apart = []
    for stage, numbers in found.items():
        assert numbers.keys() == expected[stage].keys()
        for name, column in expected[stage].items():
            if column.dtype.kind in "OTU":
                same = np.array_equal(numbers[name], column)
            else:
                same = np.allclose(numbers[name], column, **ROUNDING, equal_nan=True)
            apart += [] if same else [f"{stage}: {name}"]
    return device, apart


def test_every_analysis_gives_the_cpus_numbers(there, inputs, data, monkeypatch):
    """Their random numbers are the CPU's on every device but CUDA, where others are drawn."""
    assert differing(there, inputs, data, monkeypatch) == ("pretend", [])


@pytest.mark.gpu
def test_every_analysis_on_a_gpu_gives_the_cpus_numbers(processes, inputs, data, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with ProcessPoolExecutor(1, processes) as pool:
        device, apart = differing(lambda *a: pool.submit(*a).result(300), inputs, data, monkeypatch)
    # Of a file of text lines are compared, where a last digit counts.
    others = ("gaussian", "permuted", "random", "shuffled", ".json")
    assert device == "cuda"
    assert [name for name in apart if not any(word in name for word in others)] == []


def surrogate_tables(inputs, folder, conditions):
    use_data(folder)
    run, session = test_pipeline.run_of(inputs), pipeline.Session()
    made = {
        name: stages.surrogate(session, run, EvaluateSpec(tokens=1024), name) for name in conditions
    }
    tables = {name: pd.read_csv(made[name].file("surrogate.csv")) for name in made}
    return session.device.type, tables


def test_every_surrogate_gives_the_cpus_numbers(there, inputs, data, tmp_path, monkeypatch):
    conditions = surrogates.CONDITIONS[1:]  # the first is an analysis of the run's own dictionary
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        device, expected = surrogate_tables(inputs, data, conditions)
    assert device == "cpu"
    device, found = there(surrogate_tables, inputs, tmp_path, conditions)
    assert device == "pretend"
    for name in conditions:
        pd.testing.assert_frame_equal(
            found[name], expected[name], check_exact=False, obj=name, rtol=1e-2, atol=1e-3
        )


def test_cards_have_the_cpus_numbers(there, inputs, data, monkeypatch):
    """Places and tokens, too, but for the few that rounding exchanges for their equals."""
    run = test_pipeline.run_of(inputs)  # a lens has no cards
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        device, expected = compute(run, data, ("train", "cards"))
    assert device == "cpu"
    device, found = there(compute, run, data, ("cards",))
    assert device == "pretend"
    assert found["cards"].keys() == expected["cards"].keys()
    for name, numbers in expected["cards"].items():
        if numbers.dtype.kind == "f":
            np.testing.assert_allclose(found["cards"][name], numbers, **ROUNDING, err_msg=name)
        else:
            assert (found["cards"][name] == numbers).mean() > 0.99, name


def draw(device, generator):
    waits.clear()
    values = torch.arange(24.0).view(2, 3, 4).to(device, non_blocking=True)
    _, permuted = metrics.permute_layers(values.long(), values, generator.manual_seed(0))
    drawn = permuted, metrics.gaussian_like(values, generator)
    waited = sum(waits.values())
    return waited, [x.cpu().numpy() for x in drawn]


def draw_on_the_device():
    return draw("pretend", pretend_device.Generator()), draw("pretend", torch.Generator())


def test_null_models_are_drawn_on_the_device_of_their_generator(there):
    (waited, here), (waited_for_cpu, elsewhere) = there(draw_on_the_device)
    _, expected = draw("cpu", torch.Generator())
    assert (waited, waited_for_cpu) == (0, 2)
    for ours, moved, cpus in zip(here, elsewhere, expected, strict=True):
        np.testing.assert_allclose(ours, cpus, **ROUNDING)
        np.testing.assert_allclose(moved, cpus, **ROUNDING)


# --- checkpoints --------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Counts operations that copy a tensor."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count[name] += name in ("_to_copy", "clone", "copy_")
        return function(*args, **(kwargs or {}))


def write_checkpoint(path, device):
    tensor = torch.arange(6.0, device=device).view(2, 3)
    state = {"weights": {"a": tensor, "b": tensor[1:]}, "moments": [tensor + 1], "step": 3}
    waits.clear()
    with Copies() as copies:
        store.save_checkpoint(path, state)
    return sum(waits.values()), +copies.count


@pytest.mark.parametrize(("device", "copies"), [("pretend", 3), ("cpu", 0)])
def test_a_checkpoint_copies_every_tensor_of_a_device_once(there, tmp_path, device, copies):
    path = tmp_path / "checkpoint"
    assert there(write_checkpoint, path, device) == (copies, {"_to_copy": copies} if copies else {})
    read = store.load_checkpoint(path)
    assert read["weights"]["b"].tolist() == [[3, 4, 5]]
    assert read["step"] == 3
