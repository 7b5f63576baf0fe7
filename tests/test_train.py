"""Training: exact repetition, exact continuation, accumulation, several processes, refusals."""

import contextlib
import hashlib
import itertools
import operator
import os
import shutil
import signal
import socket
import threading
import time
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
import workers
from accelerate import PartialState
from accelerate.state import AcceleratorState
from tiny_lm import EOS, VOCAB, read, tiny_lm, tiny_network, tiny_tokenizer, train_on_text

from mlsae_core import metrics, objective, spec, store, train
from mlsae_core.activations import TextSource
from mlsae_core.lm import LanguageModel
from mlsae_core.spec import SpecError
from mlsae_core.text import TokenBlocks

CONTEXT = 8


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def blocks():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, VOCAB, (40, CONTEXT), generator=generator)
    tokens[::3, 2] = EOS
    return TokenBlocks(tokens.int().numpy())


def run_of(**changes):
    fields = {
        "model": "tiny",
        "data": {"context_length": CONTEXT},
        "expansion_factor": 8,
        "k": 2,
        "tokens": 12 * 64,
        "batch_tokens": 64,
        "micro_batch_tokens": 32,
        "dead_tokens": 60,  # so that some latents die and AuxK is part of what must be exact
        "learning_rate": 1e-2,
    }
    return spec.run_from_dict(fields | changes)


def digest(trained):
    """Hash of all weights, counters, and of the log but its speed."""
    hashed = hashlib.sha256()
    for tensor in trained.sae.state_dict().values():
        hashed.update(tensor.numpy().tobytes())
    hashed.update(trained.log.drop(columns="tokens_per_second").to_csv().encode())
    return hashed.hexdigest()


@pytest.fixture(scope="module")
def uninterrupted(lm, blocks):
    return train_on_text(run_of(), lm, blocks)


@pytest.fixture
def elsewhere(monkeypatch):
    """A machine whose accelerator is not where the model of these tests is."""
    monkeypatch.setattr(PartialState, "default_device", torch.device("meta"))
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_same_run_gives_the_same_numbers_and_another_seed_others(lm, blocks, uninterrupted):
    assert digest(train_on_text(run_of(), lm, blocks)) == digest(uninterrupted)
    assert digest(train_on_text(run_of(seed=1), lm, blocks)) != digest(uninterrupted)


@pytest.mark.parametrize("kernel", ["dense", "candidates"])
def test_a_kernel_changes_nothing_but_the_rounding(lm, blocks, uninterrupted, kernel):
    other = train_on_text(run_of(), lm, blocks, kernel=kernel)
    assert other.sae.kernel == kernel
    assert other.log.fvu.to_numpy() == pytest.approx(uninterrupted.log.fvu.to_numpy(), rel=1e-3)
    with pytest.raises(ValueError, match="expected a kernel of"):
        train_on_text(run_of(), lm, blocks, kernel="magic")


def test_a_compiled_language_model_changes_nothing_but_the_rounding(lm, blocks, uninterrupted):
    other = train_on_text(run_of(), lm.compiled("aot_eager"), blocks).log
    kept = [log.drop(columns="tokens_per_second") for log in (other, uninterrupted.log)]
    pd.testing.assert_frame_equal(*kept, rtol=1e-5)


def test_tokens_are_moved_to_the_models_device_once(monkeypatch):
    """Special tokens are picked before, where they are: a device would have to be waited for."""
    seen = []

    class Elsewhere:
        n_layers, d_model, device = 1, 1, torch.device("meta")

        def capture(self, tokens, *_):
            seen.append(tokens)

        keep_mask = capture

    monkeypatch.setattr(TextSource, "_gather", lambda _, __, tokens, *___: seen.append(tokens))
    list(read(Elsewhere(), [torch.zeros(2, 3).long()]))
    assert [tokens.device.type for tokens in seen] == ["cpu", "meta", "meta"]
    assert seen[1] is seen[2]


def test_a_model_on_the_cpu_is_trained_on_there_whatever_the_machine_has(
    lm, blocks, uninterrupted, elsewhere, tmp_path
):
    assert train.process_state().device.type == "meta"
    with pytest.raises(store.Stopped):
        train_on_text(run_of(), lm, blocks, checkpoint=tmp_path / "c", should_stop={5}.__contains__)
    assert train.process_state().device.type == "meta"  # another model may be there
    done = train_on_text(run_of(), lm, blocks, checkpoint=tmp_path / "c")
    assert digest(done) == digest(uninterrupted)
    accelerator = train.make_accelerator(run_of())
    with pytest.raises(SpecError, match=r"accelerator: expected .* device cpu, got meta; move"):
        train_on_text(run_of(), lm, blocks, accelerator=accelerator)


def test_a_state_that_fits_is_kept(monkeypatch):
    """What was prepared with it goes on."""
    device = train.process_state(cpu=True).device
    monkeypatch.setattr(AcceleratorState, "_reset_state", None)  # must not be asked
    assert train.process_state(cpu=True).device == device


def test_training_learns_and_says_so_in_documented_columns(uninterrupted):
    log = uninterrupted.log
    assert log.fvu.iloc[-1] < 0.8 * log.fvu.iloc[0]
    assert list(log.tokens) == [64 * step for step in range(1, 13)]
    assert (log.auxk > 0).any()  # dead latents took part
    np.testing.assert_allclose(log.fvu, log[["fvu_0", "fvu_1", "fvu_2"]].mean(axis=1))
    np.testing.assert_allclose(log.loss, log.fvu + log.auxk / 32, rtol=1e-5)
    documented = train.train.__doc__
    for column in log:
        assert f"``{'fvu_<layer>' if column.startswith('fvu_') else column}``" in documented


@pytest.mark.parametrize("stops", [{5}, {1, 2, 11}, {12}])
def test_a_stopped_run_continues_exactly(lm, blocks, uninterrupted, tmp_path, stops):
    checkpoint = tmp_path / "checkpoint"
    for stop in sorted(stops - {12}):
        with pytest.raises(store.Stopped, match=f"stopped as asked, after step {stop} of 12; the"):
            train_on_text(
                run_of(), lm, blocks, checkpoint=checkpoint, should_stop=stops.__contains__
            )
        assert checkpoint.exists()
    done = train_on_text(run_of(), lm, blocks, checkpoint=checkpoint, should_stop={12}.__contains__)
    assert digest(done) == digest(uninterrupted)


def test_log_intervals_survive_a_stop_inside_one(lm, blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LOG_ROWS", 3)  # intervals of 4 steps
    whole = train_on_text(run_of(tokens=14 * 64), lm, blocks)
    assert list(whole.log.step) == [4, 8, 12, 14]
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(store.Stopped):
        train_on_text(
            run_of(tokens=14 * 64), lm, blocks, checkpoint=checkpoint, should_stop={6}.__contains__
        )
    assert digest(
        train_on_text(run_of(tokens=14 * 64), lm, blocks, checkpoint=checkpoint)
    ) == digest(whole)


def test_an_interrupt_in_the_middle_of_a_step_loses_no_exactness(
    lm, blocks, uninterrupted, tmp_path, monkeypatch
):
    checkpoint, real, calls = tmp_path / "checkpoint", objective.loss, itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == 10:  # the second micro-batch of step 5
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(objective, "loss", interrupted)
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 0)
    with pytest.raises(KeyboardInterrupt):
        train_on_text(run_of(), lm, blocks, checkpoint=checkpoint, checkpoint_seconds=0)
    assert store.load_checkpoint(checkpoint)["state"]["step"] == 4
    done = train_on_text(run_of(), lm, blocks, checkpoint=checkpoint)
    assert digest(done) == digest(uninterrupted)


def test_a_run_that_was_stopped_behind_its_last_step_is_there(
    lm, blocks, uninterrupted, tmp_path, monkeypatch
):
    """As when a process ends while the result is stored: a checkpoint holds all of it."""
    checkpoint = tmp_path / "checkpoint"
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 0)
    train_on_text(run_of(), lm, blocks, checkpoint=checkpoint, checkpoint_seconds=0)
    assert store.load_checkpoint(checkpoint)["state"]["step"] == 12
    monkeypatch.setattr(train._Loop, "step", None)  # must not be asked
    done = train_on_text(run_of(), lm, blocks, checkpoint=checkpoint)
    assert digest(done) == digest(uninterrupted)


def test_checkpoints_are_written_as_often_as_asked_but_take_a_twentieth_of_the_time(
    lm, blocks, tmp_path, monkeypatch
):
    """By a clock on which a step takes 1 second and a checkpoint 0.25."""
    now, written = [0.0], []

    def step(real=train._Loop.step):
        def timed(*arguments):
            now[0] += 1
            return real(*arguments)

        return timed

    def save(_, content):
        now[0] += 0.25
        written.append(content["state"]["step"])

    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(train._Loop, "step", step())
    monkeypatch.setattr(store, "save_checkpoint", save)
    for seconds, steps in ((1.5, [2, 8]), (7.5, [8])):
        written.clear()
        train_on_text(run_of(), lm, blocks, checkpoint=tmp_path / "c", checkpoint_seconds=seconds)
        assert written == steps


def test_speed_is_tokens_over_seconds_of_training_with_stops_left_out(
    lm, blocks, tmp_path, monkeypatch
):
    """By a clock on which step n takes n seconds."""
    now, steps = [0.0], itertools.count(1)

    def timed(*arguments, real=train._Loop.step):
        now[0] += next(steps)
        return real(*arguments)

    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(train._Loop, "step", timed)
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(store.Stopped):
        train_on_text(run_of(), lm, blocks, checkpoint=checkpoint, should_stop={5}.__contains__)
    now[0] += 1000
    done = train_on_text(run_of(), lm, blocks, checkpoint=checkpoint)
    seconds = [n * (n + 1) / 2 for n in range(1, 13)]
    expected = [round(64 * n / t) for n, t in zip(range(1, 13), seconds, strict=True)]
    assert done.log.tokens_per_second.tolist() == expected
    assert done.seconds == seconds[-1]


def test_a_steps_gradient_is_the_mean_over_its_micro_batches(lm, blocks):
    run = run_of(tokens=64)
    trained = train_on_text(run, lm, blocks).sae
    expected = train.build_sae(run, lm)
    micro_batches = list(itertools.islice(TextSource(lm, blocks, run.site).batches(4, seed=0), 2))
    scaled, _ = expected.standardise(micro_batches[0].source)
    with torch.no_grad():
        expected.pre_bias.copy_(metrics.geometric_median(scaled.flatten(0, 1)))
    optimizer = expected.make_optimizer(run.train.learning_rate, run.train.adam_eps)
    losses = [objective.loss(expected, batch.source) for batch in micro_batches]
    (sum(loss.total for loss in losses) / 2).backward()
    optimizer.step()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), parameter, rtol=1e-4, atol=1e-6)
    kept = sum(len(batch.tokens) for batch in micro_batches)  # special tokens do not count
    assert set(trained.tokens_since_active.tolist()) <= {0, kept}
    assert kept < 64


def test_a_batch_is_cut_into_steps_and_micro_batches_as_documented(lm):
    accelerator = train.make_accelerator(run_of())
    plan = train._Plan.of(run_of(), accelerator)
    assert (plan.sequences, plan.micro_batches, plan.step_tokens, plan.steps) == (4, 2, 64, 12)
    odd = run_of(tokens=1000, batch_tokens=80, micro_batch_tokens=20)  # 16 whole tokens of 20
    plan = train._Plan.of(odd, accelerator)
    assert (plan.sequences, plan.micro_batches, plan.step_tokens, plan.steps) == (2, 5, 80, 12)


def test_a_transcoder_predicts_the_target(lm, blocks):
    """The first row of the log is of the untrained dictionary and the first batch."""
    run = run_of(tokens=32, batch_tokens=32, source="mlp_input", target="mlp_output")
    log = train_on_text(run, lm, blocks).log
    [batch] = itertools.islice(TextSource(lm, blocks, run.site).batches(4, seed=0), 1)
    expected = train.build_sae(run, lm)
    with torch.no_grad():
        scaled = expected.standardise(batch.source)[0].flatten(0, 1)
        expected.pre_bias.copy_(metrics.geometric_median(scaled))
        error = expected(batch.source, batch.target).recon - batch.target
    variance = batch.target.var((1, 2), correction=0)
    fvu = error.square().mean((1, 2)) / variance
    np.testing.assert_allclose(log[["fvu_0", "fvu_1", "fvu_2"]].iloc[0], fvu, rtol=1e-5)


class Bar:
    """In the place of tqdm, whose `total` and `initial` these are."""

    made: ClassVar = []

    def __init__(self, total, initial, disable, **_):
        self.total, self.done, self.disable, self.shown = total, initial, disable, []
        self.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, tokens):
        self.done += tokens

    def set_postfix(self, **shown):
        self.shown.append((self.done, shown))


@pytest.fixture
def bars(monkeypatch):
    monkeypatch.setattr(train, "tqdm", Bar)
    monkeypatch.setattr(Bar, "made", [])
    return Bar.made


def test_progress_is_counted_in_tokens_from_where_a_run_continues(lm, blocks, tmp_path, bars):
    with pytest.raises(store.Stopped):
        train_on_text(run_of(), lm, blocks, checkpoint=tmp_path / "c", should_stop={5}.__contains__)
    log = train_on_text(run_of(), lm, blocks, checkpoint=tmp_path / "c").log
    assert [(bar.total, bar.done, bar.disable) for bar in bars] == [
        (12 * 64, 5 * 64, False),
        (12 * 64, 12 * 64, False),
    ]
    assert [shown for bar in bars for shown in bar.shown] == [
        (row.tokens, {"fvu": f"{row.fvu:.4f}", "dead": f"{100 * row.dead_fraction:.1f}%"})
        for row in log.itertuples()
    ]


def test_products_are_in_tensorfloat_where_the_run_says_so_and_only_then():
    setting = torch.backends.cuda.matmul
    for precision in ("fp32", "tf32", "fp16", "bf16"):
        for before in (False, True):
            setting.allow_tf32 = before
            with contextlib.suppress(KeyError), train._products(precision):
                assert setting.allow_tf32 == (precision == "tf32")
                raise KeyError
            assert setting.allow_tf32 == before
    setting.allow_tf32 = False


def test_a_device_is_waited_for_while_the_next_batch_is_made(lm, blocks, monkeypatch):
    """But none is made that no step needs."""
    events = []

    class Queued:
        device = torch.device("cuda")

        def cpu(self):
            events.append("wait")
            return torch.zeros(2 + 3 + 2)

    class Source(TextSource):
        def batches(self, *arguments):
            for batch in super().batches(*arguments):
                events.append("batch")
                yield batch

    def step(loop, batches, _, dead):
        list(itertools.islice(batches, 2))
        return Queued(), torch.arange(8 * 8)

    monkeypatch.setattr(train._Loop, "step", step)
    run = run_of(tokens=3 * 64)
    train.train(run, Source(lm, blocks, run.site))
    bias, two, ahead = ["batch"], ["batch", "batch"], ["batch", "wait", "batch"]
    assert events == [*bias, *two, *ahead, *ahead, "wait"]


# --- several processes --------------------------------------------------------------------------


class Member:
    """An accelerator as it is in one of several processes, which here are threads."""

    num_processes = 2

    def __init__(self, rank, given, barrier):
        self.process_index, self.is_main_process = rank, rank == 0
        self._accelerator, self._given, self._barrier = (
            train.make_accelerator(run_of()),
            given,
            barrier,
        )

    def __getattr__(self, name):
        return getattr(self._accelerator, name)

    def reduce(self, tensor, how):
        self._given[self.process_index] = tensor
        self._barrier.wait()
        total = sum(self._given)
        self._barrier.wait()
        return total / self.num_processes if how == "mean" else total


def test_two_ranks_take_turns_and_train_what_one_does(blocks, uninterrupted, bars, tmp_path):
    given, barrier, done = [None, None], threading.Barrier(2, timeout=60), {}
    members = [Member(rank, given, barrier) for rank in (0, 1)]
    models = [tiny_lm(), tiny_lm()]

    def work(rank, stop):
        arguments = {"accelerator": members[rank], "checkpoint": tmp_path / "c"}
        try:
            done[rank] = train_on_text(
                run_of(), models[rank], blocks, should_stop=stop, **arguments
            )
        except store.Stopped:
            done[rank] = None
        except BaseException:
            barrier.abort()
            raise

    for stop in ({5}.__contains__, lambda step: False):
        threads = [threading.Thread(target=work, args=(rank, stop)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert digest(done[0]) == digest(done[1])
    for name, tensor in uninterrupted.sae.state_dict().items():
        torch.testing.assert_close(done[0].sae.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    logs = [trained.log.drop(columns="tokens_per_second") for trained in (done[0], uninterrupted)]
    pd.testing.assert_frame_equal(*logs, rtol=1e-3)
    assert sorted(bar.disable for bar in bars) == [False, False, True, True]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def spec_text(inputs, **changes):
    fields = {
        "model": inputs / "gpt_neox",
        "data": f"{{path: {inputs / 'text.jsonl'}, context_length: {CONTEXT}}}",
        "expansion_factor": 8,
        "k": 2,
        "tokens": 12 * 64,
        "batch_tokens": 64,
        "micro_batch_tokens": 32,
        "dead_tokens": 60,
        "learning_rate": 0.01,
    }
    return "".join(f"{name}: {value}\n" for name, value in (fields | changes).items())


def results(data):
    (folder,) = (data / "store" / "train").iterdir()
    return store.read(folder), pd.read_csv(folder / "log.csv").drop(columns="tokens_per_second")


def weights(data):
    from mlsae_core.sae import MLSAE

    return MLSAE.from_pretrained(results(data)[0].path)


def test_two_processes_train_what_one_does_and_one_of_them_writes(inputs, processes, tmp_path):
    (tmp_path / "spec.yml").write_text(spec_text(inputs))
    alone, both = tmp_path / "alone", tmp_path / "both"
    port, arguments = free_port(), ["train", str(tmp_path / "spec.yml")]
    started = [
        processes.Process(target=workers.command, args=(arguments, both, (rank, 2, port)))
        for rank in (0, 1)
    ] + [processes.Process(target=workers.command, args=(arguments, alone))]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    assert [process.exitcode for process in started] == [0, 0, 0]
    for name, parameter in weights(alone).named_parameters():
        other = weights(both).get_parameter(name)
        torch.testing.assert_close(other, parameter, rtol=1e-3, atol=1e-4)
    pd.testing.assert_frame_equal(results(alone)[1], results(both)[1], rtol=1e-3)
    assert sorted(path.name for path in both.glob("*-by-*")) == ["tokens-by-0", "train-by-0"]
    assert not [path for path in both.rglob(".*") if path.suffix != ".lock"]  # no leftovers
    said = [path.read_text().count("dead latents") for path in sorted(tmp_path.rglob("*.out"))]
    assert said == [1, 1, 0]  # alone, rank 0, rank 1: one line for each command


def test_a_killed_process_is_continued_exactly(inputs, processes, tmp_path):
    (tmp_path / "spec.yml").write_text(spec_text(inputs))
    arguments = ["train", str(tmp_path / "spec.yml")]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    first = processes.Process(target=workers.slow_command, args=(arguments, killed, 5))
    other = processes.Process(target=workers.command, args=(arguments, whole))
    first.start()
    other.start()
    for _ in range(6000):
        if (killed / "ready").exists():
            break
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.join(300)
    assert first.exitcode == -signal.SIGKILL
    assert list((killed / "store" / "checkpoints").glob("*.pt"))
    assert not (killed / "store" / "train").exists()
    again = processes.Process(target=workers.command, args=(arguments, killed))
    again.start()
    again.join(300)
    other.join(300)
    assert (again.exitcode, other.exitcode) == (0, 0)
    mine, theirs = results(killed), results(whole)
    assert (
        mine[0].meta["files"]["model.safetensors"] == theirs[0].meta["files"]["model.safetensors"]
    )
    pd.testing.assert_frame_equal(mine[1], theirs[1], check_exact=True)
    assert not list((killed / "store" / "checkpoints").iterdir())


def test_processes_stop_together_where_one_is_told_to(inputs, processes, tmp_path):
    """Else the others would wait for it in the next step, and nobody would keep anything."""
    (tmp_path / "spec.yml").write_text(spec_text(inputs))
    arguments, both = ["train", str(tmp_path / "spec.yml")], tmp_path / "both"

    def run(step):
        port = free_port()
        started = [
            processes.Process(
                target=workers.told_command, args=(arguments, both, (rank, 2, port), step)
            )
            for rank in (0, 1)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(300)
        return [process.exitcode for process in started]

    assert run(step=5) == [143, 143]
    (checkpoint,) = (both / "store" / "checkpoints").glob("*.pt")
    assert store.load_checkpoint(checkpoint)["state"]["step"] == 6  # in which they settled it
    assert run(step=0) == [0, 0]
    assert list(results(both)[1].step) == list(range(1, 13))
    shutil.rmtree(both)
    assert run(step=12) == [1, 143]  # told after the last: the other waits for nobody
    assert list(results(both)[1].step) == list(range(1, 13))
    assert run(step=0) == [0, 0]


# --- refusals -----------------------------------------------------------------------------------


def test_text_of_nothing_but_special_tokens_stops_with_a_message(lm):
    blocks = TokenBlocks(np.full((8, CONTEXT), EOS, np.int32))
    with pytest.raises(store.Stopped, match=r"tokens are special.*after step 0 of 12; no checkpoi"):
        train_on_text(run_of(), lm, blocks)


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(lm, blocks, tmp_path, monkeypatch):
    checkpoint, real, calls = tmp_path / "checkpoint", objective.loss, itertools.count(1)

    def broken(*arguments):
        loss = real(*arguments)
        return loss._replace(total=loss.total * float("nan")) if next(calls) > 6 else loss

    monkeypatch.setattr(objective, "loss", broken)
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 0)
    with pytest.raises(store.Stopped, match=r"loss is nan, after step 3 of 12; the last good"):
        train_on_text(run_of(), lm, blocks, checkpoint=checkpoint, checkpoint_seconds=0)
    assert store.load_checkpoint(checkpoint)["state"]["step"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 129}, r"k: expected at most the 128 latents.*got 129"),
        ({"layers": [3]}, r"layers: expected block indices from 0 to 2.*got 3"),
        ({"precision": "fp16"}, r"precision: expected fp32 on cpu, got fp16, which needs"),
    ],
)
def test_what_does_not_fit_is_refused(lm, blocks, changes, message):
    with pytest.raises(SpecError, match=message):
        train_on_text(run_of(**changes), lm, blocks)


def test_batches_that_cannot_be_dealt_evenly_are_refused():
    class Three:
        num_processes, process_index = 3, 0

    message = (
        "batch_tokens: expected a multiple of 3 micro-batches, one for each process, got 2 "
        "micro-batches of 32 tokens"
    )
    with pytest.raises(SpecError, match=message):
        train._Plan.of(run_of(), Three())


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(lm, blocks, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(store.Stopped):
        train_on_text(run_of(), lm, blocks, checkpoint=checkpoint, should_stop=lambda step: True)
    with pytest.raises(store.StoreError, match="belongs to another run; delete it to start anew"):
        train_on_text(run_of(seed=1), lm, blocks, checkpoint=checkpoint)
    content = store.load_checkpoint(checkpoint)
    for step in (-5, 10**9, 0.5, "1"):
        edited = content | {"state": content["state"] | {"step": step}}
        store.save_checkpoint(checkpoint, edited)
        with pytest.raises(store.StoreError, match=rf"its step is {step} of 12; delete it"):
            train_on_text(run_of(), lm, blocks, checkpoint=checkpoint)
    del content["sae"]["pre_bias"]
    store.save_checkpoint(checkpoint, content)
    with pytest.raises(store.StoreError, match="expected a checkpoint of this run"):
        train_on_text(run_of(), lm, blocks, checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-10])
    with pytest.raises(store.StoreError, match="damaged checkpoint"):
        train_on_text(run_of(), lm, blocks, checkpoint=checkpoint)


@pytest.mark.parametrize(
    "damage",
    [
        *(operator.methodcaller("pop", part) for part in ("run", "sae", "optimizer", "state")),
        lambda content: content["state"].update(unknown=1),
        lambda content: content["optimizer"].clear(),
    ],
)
def test_a_checkpoint_with_other_contents_is_refused(lm, blocks, tmp_path, damage):
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(store.Stopped):
        train_on_text(run_of(), lm, blocks, checkpoint=checkpoint, should_stop=lambda step: True)
    content = store.load_checkpoint(checkpoint)
    damage(content)
    store.save_checkpoint(checkpoint, content)
    with pytest.raises(store.StoreError, match=r"expected a checkpoint of this run; .*; delete it"):
        train_on_text(run_of(), lm, blocks, checkpoint=checkpoint)


@pytest.mark.parametrize(("written", "read"), [(True, True), (True, False), (False, True)])
def test_the_scale_of_a_loss_in_half_precision_is_part_of_a_checkpoint(
    lm, blocks, tmp_path, written, read
):
    """Where there is one: also a run that had none continues on a device that needs it."""

    class Scaler:
        scale = 7

        def state_dict(self):
            return {"scale": self.scale}

        def load_state_dict(self, state):
            self.scale = state["scale"]

    class Half:
        def __init__(self, scaler):
            self.scaler, self._accelerator = scaler, train.make_accelerator(run_of())

        def __getattr__(self, name):
            return getattr(self._accelerator, name)

    first, second = Scaler(), Scaler()
    first.scale = 5
    arguments = {"checkpoint": tmp_path / "c", "should_stop": {5}.__contains__}
    before, after = Half(first if written else None), Half(second if read else None)
    with pytest.raises(store.Stopped):
        train_on_text(run_of(), lm, blocks, accelerator=before, **arguments)
    train_on_text(run_of(), lm, blocks, accelerator=after, **arguments)
    assert second.scale == (5 if written and read else 7)


def test_a_checkpoint_of_another_text_is_refused(lm, blocks, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(store.Stopped):
        train_on_text(run_of(), lm, blocks, checkpoint=checkpoint, should_stop={3}.__contains__)
    other = TokenBlocks(blocks.blocks[::-1].copy())
    with pytest.raises(store.StoreError, match="trained on other activations; delete it"):
        train_on_text(run_of(), lm, other, checkpoint=checkpoint)


def test_a_checkpoint_does_not_depend_on_where_model_and_text_lie(lm, blocks, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(store.Stopped):
        train_on_text(run_of(), lm, blocks, checkpoint=checkpoint, should_stop={3}.__contains__)
    moved = run_of(model="/elsewhere/tiny", data={"path": "t.jsonl", "context_length": CONTEXT})
    assert digest(train_on_text(moved, lm, blocks, checkpoint=checkpoint)) == digest(
        train_on_text(run_of(), lm, blocks)
    )


def test_trackers_must_be_known_and_installed():
    with pytest.raises(SpecError, match=r"--track: expected one of .*tensorboard.*, got sheet"):
        train.check_trackers(("sheet",))
    missing = [
        name
        for name in ("tensorboard", "wandb", "aim", "mlflow", "comet_ml")
        if name not in train.get_available_trackers()
    ]
    if not missing:
        pytest.skip("all trackers are installed")
    with pytest.raises(SpecError, match=rf"got {missing[0]}, whose package is missing; `pip inst"):
        train.check_trackers((missing[0],))


@pytest.mark.gpu
def test_runs_of_different_precisions_in_one_process(blocks):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    lm = LanguageModel(tiny_network().to("cuda"), tiny_tokenizer())
    logs = [
        train_on_text(run_of(precision=name), lm, blocks).log for name in ("fp32", "bf16", "fp16")
    ]
    assert all(log.fvu.iloc[-1] < log.fvu.iloc[0] for log in logs)
