import inspect
import math

import numpy as np
import pandas as pd
import pytest
import torch
from test_lens import random_lens
from tiny_lm import CONFIGS, D_MODEL, N_LAYERS, PAD, read, reading, tiny_lm, tiny_tokens

from mlsae_core import activations, analysis
from mlsae_core.lens import Lens
from mlsae_core.sae import MLSAE, Output, TopK
from mlsae_core.spec import SiteSpec, SpecError
from mlsae_core.text import TokenBlocks

BATCHES = [tiny_tokens(2, seed=0), tiny_tokens(3, seed=1)]
BATCHES[0][0, -1] = PAD


class Constant:
    """Not an autoencoder: returns what it is told and claims one active latent."""

    n_latents, dead_threshold = 8, 1e-3

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, x):
        index = torch.zeros(*x.shape[:2], 1, dtype=torch.int64)
        return Output(self.scale * x, TopK(torch.ones(*x.shape[:2], 1), index))


def tiny_sae(width=D_MODEL):
    generator = torch.Generator().manual_seed(0)
    return MLSAE(width, 64, 2, generator=generator)


def layers_of(site):
    return list(range(N_LAYERS)) if site.layers == "all" else list(site.layers)


def dense(sae, topk):
    """(layer, token, n_latents): every latent's activation."""
    shape = (*topk.indices.shape[:2], sae.n_latents)
    return torch.zeros(shape).scatter(-1, topk.indices, topk[0])


def brute_force(lm, sae, lens, site, batches):
    """One hooked pass of the whole model per layer, all logits at once, in float64."""
    layers = layers_of(site)
    point = site.source if site.target == "same" else site.target
    parts = list(read(lm, batches, site, lens))
    outputs = [sae(b.source) if b.target is b.source else sae(b.source, b.target) for b in parts]
    d = lm.d_model
    table = []
    for row, layer in enumerate(layers):

        def of_layer(x, row=row):
            return x[0, :, row * d : (row + 1) * d] if site.stacked else x[row]

        x = torch.cat([of_layer(b.target) for b in parts]).double()
        recon = torch.cat([of_layer(o.recon) for o in outputs]).double()
        slot = 0 if site.stacked else row
        codes = [dense(sae, o.topk)[slot] for o in outputs]
        used = torch.cat([dense(sae, o.topk).flatten(0, 1) for o in outputs]).gt(1e-3).any(0)
        error = (x - recon).square().sum()
        record = {
            "layer": layer,
            "tokens": len(x),
            "fvu_global": error / (x - x.mean()).square().sum(),
            "fvu_per_dimension": error / (x - x.mean(0)).square().sum(),
            "mse": error / x.numel(),
            "l1": sum(c.abs().sum().double() for c in codes) / len(x),
            "l0": sum((c != 0).sum() for c in codes) / len(x),
            "dead": 1 - used.double().mean(),
            "inactive": 1 - torch.cat(codes).gt(1e-3).any(0).double().mean(),
        }
        raw = torch.cat(
            [lm.capture(t, [layer], [point])[point][0][lm.keep_mask(t)] for t in batches]
        )
        sums = dict.fromkeys(("original", "replaced", "zero", "mean", "kl", "mse"), 0.0)
        predictions = 0
        for tokens, output in zip(batches, outputs, strict=True):
            keep = lm.keep_mask(tokens)
            back = lens.invert(of_layer(output.recon)[None], [layer])[0]
            full = lm.capture(tokens, [layer], [point])[point][0]
            choices = {"replaced": back, "zero": torch.zeros(d), "mean": raw.mean(0)}
            logits = {"original": lm.model(input_ids=tokens).logits}
            for name, choice in choices.items():
                replaced = full.clone()
                replaced[keep] = choice
                with lm._replaced(layer, point, replaced):
                    logits[name] = lm.model(input_ids=tokens).logits
            log_probs = {k: v[:, :-1].double().log_softmax(-1) for k, v in logits.items()}
            for name, values in log_probs.items():
                sums[name] -= values.gather(-1, tokens[:, 1:, None]).sum()
            p, q = log_probs["original"], log_probs["replaced"]
            sums["kl"] += (p.exp() * (p - q)).sum()
            squared = (logits["original"] - logits["replaced"])[:, :-1].double().square()
            sums["mse"] += squared.mean(-1).sum()
            predictions += tokens[:, 1:].numel()
        ce = {k: v / predictions for k, v in sums.items()}
        record |= {
            "predictions": predictions,
            "ce_original": ce["original"],
            "ce_replaced": ce["replaced"],
            "delta_ce": ce["replaced"] - ce["original"],
            "kl": ce["kl"],
            "logit_mse": ce["mse"],
        }
        record |= {f"ce_{name}": ce[name] for name in ("zero", "mean")}
        table.append({k: float(v) for k, v in record.items()})
    return pd.DataFrame(table)


CASES = {
    "all layers": (SiteSpec(), Lens.identity()),
    "two layers": (SiteSpec(layers=(0, 2)), Lens.identity()),
    "tuned lens": (SiteSpec(), random_lens()),
    "MLP output": (SiteSpec(source="mlp_output"), Lens.identity()),
    "transcoder": (SiteSpec(source="mlp_input", target="mlp_output"), Lens.identity()),
    "stacked tuned lens": (SiteSpec(layers=(1, 2), stacked=True), random_lens()),
    "stacked": (SiteSpec(stacked=True), Lens.identity()),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ["gpt_neox", "gemma2"])
@torch.no_grad()
def test_evaluate_agrees_with_a_hooked_pass_per_layer(architecture, case, monkeypatch):
    monkeypatch.setitem(activations.LOGITS_AT_ONCE, "cpu", 1000)  # three predictions at a time
    lm, (site, lens) = tiny_lm(architecture), CASES[case]
    sae = tiny_sae(D_MODEL * (len(layers_of(site)) if site.stacked else 1))
    options = {"layers_at_once": 2} if case == "all layers" else {}
    source = reading(lm, BATCHES, site, lens)
    table = analysis.evaluate(source, sae, progress=False, **options)
    expected = brute_force(lm, sae, lens, site, BATCHES)
    assert table["inactive"].gt(table["dead"]).any() or site.stacked
    pd.testing.assert_frame_equal(
        table[expected.columns].astype(float), expected, atol=1e-5, rtol=1e-5
    )
    for name in ("zero", "mean"):
        cost = table[f"ce_{name}"] - table["ce_original"]
        recovered = 1 - table["delta_ce"] / cost
        assert table[f"ce_recovered_{name}"].tolist() == pytest.approx(recovered.tolist())


@pytest.mark.parametrize("architecture", CONFIGS)
def test_replacing_with_the_identity_changes_nothing(architecture):
    source = reading(tiny_lm(architecture), BATCHES)
    table = analysis.evaluate(source, Constant(1.0), progress=False)
    assert table["fvu_global"].eq(0).all()
    for column in ("delta_ce", "kl", "logit_mse"):
        assert table[column].abs().max() < 1e-6
    assert (table["ce_recovered_zero"] - 1).abs().max() < 1e-4


def test_replacing_with_zero_recovers_nothing_and_explains_nothing():
    table = analysis.evaluate(reading(tiny_lm(), BATCHES), Constant(0.0), progress=False)
    assert table["ce_recovered_zero"].abs().max() < 1e-6
    assert table["kl"].min() > 0.01
    assert (table["fvu_global"] >= 1).all()


@pytest.mark.parametrize("massive", ["kept", "excluded"])
def test_the_last_layer_is_replaced_at_kept_positions_only(monkeypatch, massive):
    """After the last block a position's prediction depends on nothing but its own vector."""
    monkeypatch.setattr(activations, "MASSIVE", 1)  # above the median: many are
    lm, tokens = tiny_lm(), tiny_tokens(1)
    source = reading(lm, [tokens], SiteSpec(layers=(N_LAYERS - 1,), massive=massive))
    table = analysis.evaluate(source, Constant(0.5), progress=False)
    plain = analysis.evaluate(source, Constant(0.5), ablations=False, progress=False)
    pd.testing.assert_frame_equal(plain, table[list(plain)])
    assert not any(column.startswith("ce_recovered") for column in plain)
    original = lm.original(tokens).residual[-1]
    keep = lm.keep_mask(tokens)
    if massive == "excluded":
        keep &= ~activations.massive(original[None]).any(0)
    assert table["tokens"][0] == keep.sum() == (6 if massive == "kept" else 3)
    mean = original[keep].mean(0).expand_as(original)
    ce = []
    for x in (original, original / 2, torch.zeros_like(original), mean):
        logits = lm.logits(torch.where(keep[..., None], x, original))[0, :-1]
        ce.append(float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:])))
    names = ["ce_original", "ce_replaced", "ce_zero", "ce_mean"]
    assert table.loc[0, names].tolist() == pytest.approx(ce, abs=1e-6)
    assert table["delta_ce"][0] == pytest.approx(ce[1] - ce[0], abs=1e-6)


def test_sparsity_and_dead_latents_are_counted_by_layer():
    class Three:
        """At layer l the active latents are l and l + 1; a third is below the threshold."""

        n_latents, dead_threshold = 8, 1e-3

        def __call__(self, x):
            first = torch.arange(N_LAYERS)[:, None, None].expand(*x.shape[:2], 1)
            indices = torch.cat([first, first + 1, first + 2], -1)
            values = torch.tensor([2.0, 0.5, 0.0]).expand(indices.shape)
            return Output(x, TopK(values, indices))

    options = {"progress": False, "ablations": False}
    table = analysis.evaluate(reading(tiny_lm(), BATCHES), Three(), **options)
    assert table["l0"].tolist() == [2.0] * N_LAYERS
    assert table["l1"].tolist() == [2.5] * N_LAYERS
    assert table["inactive"].tolist() == [6 / 8] * N_LAYERS
    assert table["dead"].tolist() == [4 / 8] * N_LAYERS
    assert table["tokens"].tolist() == [29] * N_LAYERS
    assert table["predictions"].tolist() == [30] * N_LAYERS


def test_results_do_not_depend_on_how_the_text_is_batched_nor_change_the_autoencoder():
    lm, sae = tiny_lm(), tiny_sae()
    before = {k: v.clone() for k, v in sae.state_dict().items()}
    one = analysis.evaluate(reading(lm, [torch.cat(BATCHES)]), sae, progress=False)
    rows = torch.cat(BATCHES).split(1)
    other = analysis.evaluate(reading(lm, rows), sae, progress=False)
    pd.testing.assert_frame_equal(one, other, atol=1e-5, rtol=1e-5)
    some = [  # whose means are of the first three sequences
        analysis.evaluate(reading(lm, text), sae, mean_tokens=3 * rows[0].numel(), progress=False)
        for text in ([torch.cat(BATCHES)], rows, BATCHES)
    ]
    for table in some:
        pd.testing.assert_frame_equal(table, some[0], atol=1e-5, rtol=1e-5)
        assert (table.ce_mean - one.ce_mean).abs().max() > 1e-3
    assert all(torch.equal(v, before[k]) for k, v in sae.state_dict().items())
    assert not any(math.isnan(v) for v in one.to_numpy().ravel())


def test_layers_are_replaced_in_some_sequences_spread_evenly():
    lm, sae, text = tiny_lm(), tiny_sae(), torch.cat(BATCHES)

    def evaluate(rows, size, **options):
        blocks = activations.First(TokenBlocks(rows.numpy()), len(rows))
        source = activations.TextSource(lm, blocks, SiteSpec())
        options = {"ablations": False, "progress": False} | options
        return analysis.evaluate(source, sae, size, **options)

    whole, zero = evaluate(text, 5), evaluate(text[[2, 4]], 2, ablations=True).ce_zero
    one, other = (evaluate(text[[row]], 1) for row in (2, 4))
    halves = [evaluate(text[rows], 5) for rows in ([0, 2, 4], [1, 3])]
    for size in (1, 2, 5):
        table = evaluate(text, size, replaced=2, ablations=True)
        for name in ("tokens", "fvu_global", "l1", "dead", "inactive"):
            assert table[name].tolist() == pytest.approx(whole[name].tolist(), rel=1e-5)
        assert table.predictions.eq(12).all()
        assert table.ce_zero.tolist() == pytest.approx(zero.tolist(), abs=1e-5)
        for name in ("ce_original", "delta_ce", "kl", "logit_mse"):
            pair = np.sort([one[name], other[name]], 0)
            assert table[name].tolist() == pytest.approx(pair.mean(0).tolist(), abs=1e-5)
            if name in ("delta_ce", "kl"):  # of two draws of one of two, either twice
                for end, expected in zip(("low", "high"), pair, strict=True):
                    assert table[f"{name}_{end}"].tolist() == pytest.approx(expected, abs=1e-5)
        for name in ("fvu_global", "fvu_per_dimension", "mse"):  # of every other sequence, twice
            most, least = np.sort([half[name] for half in halves], 0)[::-1]
            for end, drawn in (("low", most), ("high", least)):
                expected = 2 * whole[name] - drawn
                assert table[f"{name}_{end}"].tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert not any(name.endswith("_low") for name in whole)
    with pytest.raises(SpecError, match="replaced: expected a text that ends"):
        analysis.evaluate(reading(lm, BATCHES), sae, replaced=1, progress=False)


@pytest.mark.parametrize("of", [1, 5, 64, 97])
def test_what_is_spread_evenly_is_as_many_as_asked_however_it_is_cut(of):
    for chosen in (1, of // 3, of - 1, of):
        whole = activations.spread(chosen, of, 0, of + 3)
        assert len(whole) == chosen
        assert not chosen or max(np.diff(whole), default=1) <= math.ceil(of / chosen)
        cut = [
            first + n for first in range(0, of, 4) for n in activations.spread(chosen, of, first, 4)
        ]
        assert cut == whole


def test_layers_share_as_large_a_batch_as_there_is_room_for(monkeypatch):
    lm, sae, rows = tiny_lm(), tiny_sae(), []
    lm.blocks[-1].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    tables = []
    for vectors, most in ((2**24, (N_LAYERS - 1) * 9), (2 * 9 * 7 * D_MODEL, 2 * 9), (1, 9)):
        monkeypatch.setitem(analysis.VECTORS_AT_ONCE, "cpu", vectors)
        rows.clear()
        tables.append(analysis.evaluate(reading(lm, BATCHES[1:]), sae, progress=False))
        assert max(rows) == most
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0], atol=1e-5, rtol=1e-5)


def test_the_bar_moves_within_a_batch_as_the_work_is_done(monkeypatch):
    moves = []
    monkeypatch.setattr(activations.Work, "done", lambda _, part: moves.append(part))
    options = {"layers_at_once": 1, "ablations": False, "progress": False}
    analysis.evaluate(reading(tiny_lm(), BATCHES[:1]), tiny_sae(), **options)
    assert moves == sorted(moves)
    assert len(moves) == N_LAYERS + 1
    assert moves[-2:] == [1.0, 1.0]
    # The first layer runs all blocks above it, the last one none.
    parts = np.diff([0.0, *moves[:-1]])
    assert (parts[:-1] - parts[1:]).tolist() == pytest.approx([parts[0] - parts[1]] * 2)
    assert parts[0] > parts[-1] > 0


def test_no_batches_are_refused():
    for measure in (analysis.evaluate, analysis.distributions):
        with pytest.raises(ValueError, match="source: expected at least one sequence, got none"):
            measure(reading(tiny_lm(), []), tiny_sae(), progress=False)
    with pytest.raises(ValueError, match="source: expected at least one sequence, got none"):
        analysis.drift(reading(tiny_lm(), []), progress=False)


def test_progress_is_shown_unless_it_is_not_wanted(capsys):
    sae, batches = tiny_sae(), BATCHES[:1]
    measurements = {
        "evaluate": lambda **progress: analysis.evaluate(
            reading(tiny_lm(), batches), sae, **progress
        ),
        "distributions": lambda **progress: analysis.distributions(
            reading(tiny_lm(), batches), sae, replicates=2, **progress
        ),
        "drift": lambda **progress: analysis.drift(reading(tiny_lm(), batches), **progress),
    }
    for name, measure in measurements.items():
        measure(progress=False)
        assert not capsys.readouterr().err
        measure()
        assert name in capsys.readouterr().err


def test_what_numbers_depend_on_is_by_default_as_the_shipped_ones_were_made():
    defaults = {
        (analysis.evaluate, "mean_tokens"): 8192,
        (analysis.evaluate, "start"): 0,
        (analysis.distributions, "replicates"): 1000,
        (analysis.distributions, "size"): 8,  # the null models are drawn batch by batch
    }
    for (function, name), value in defaults.items():
        assert inspect.signature(function).parameters[name].default == value
