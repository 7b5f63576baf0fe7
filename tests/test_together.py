"""Several layers at once, chains of single layers, surrogates: dense versions and planted cases."""

import itertools
from dataclasses import replace

import pytest
import torch
from test_analysis import tiny_sae
from tiny_lm import D_MODEL, N_LAYERS, VOCAB, reading, tiny_lm, tiny_tokens

from mlsae_book import surrogates, toys
from mlsae_book.tables import carried, interventions, lifetimes, together
from mlsae_core import analysis
from mlsae_core.activations import TextSource
from mlsae_core.lm import LanguageModel
from mlsae_core.metrics import cross_entropy, kl_divergence
from mlsae_core.sae import MLSAE
from mlsae_core.spec import SiteSpec, SpecError, run_from_dict
from mlsae_core.text import TokenBlocks

BATCHES = [tiny_tokens(3, seed=0), tiny_tokens(2, seed=1)]


def saes():
    """One for each layer, none like another."""
    return [
        MLSAE(D_MODEL, 64, 2, generator=torch.Generator().manual_seed(layer))
        for layer in range(N_LAYERS)
    ]


@torch.no_grad()
def by_resuming(lm, dictionaries, layers, tokens):
    """Logits, the layers replaced one after another by passes resumed from each."""
    keep, original = lm.keep_mask(tokens), lm.original(tokens)
    stream = original.residual[layers[0]]
    for layer in layers:
        x = stream.clone()
        x[keep] = dictionaries[layer](x[keep]).recon
        later = interventions.resume(lm, original, layer, x)
        stream = later[1] if len(later) > 1 else x
    return lm.logits(lm.resume_layers(original, {layers[-1]: x})[0])


@torch.no_grad()
def test_several_layers_are_replaced_by_what_reaches_them():
    lm, dictionaries = tiny_lm(), saes()
    source = reading(lm, BATCHES, SiteSpec())
    table = together.together(source, dictionaries, mean_tokens=8, replicates=20, progress=False)
    table = table[table.of == "reconstruction"].set_index(["first", "last"])
    assert len(table) == N_LAYERS * (N_LAYERS + 1) // 2
    deltas = {}
    for first, last in table.index:
        ce, kl = [], []
        for tokens in BATCHES:
            before = lm.logits(lm.original(tokens).residual[-1])[:, :-1]
            layers = list(range(first, last + 1))
            after = by_resuming(lm, dictionaries, layers, tokens)[:, :-1]
            targets = tokens[:, 1:]
            ce.append((cross_entropy(after, targets) - cross_entropy(before, targets)).flatten())
            kl.append(kl_divergence(before, after).flatten())
        row = table.loc[first, last]
        deltas[first, last] = torch.cat(ce).mean().item()
        assert row.delta_ce == pytest.approx(deltas[first, last], abs=1e-5)
        assert row.kl == pytest.approx(torch.cat(kl).mean().item(), abs=1e-5)
        single = sum(deltas[layer, layer] for layer in range(first, last + 1))
        assert row.single == pytest.approx(single, abs=1e-5)
        assert row.excess == pytest.approx(deltas[first, last] - single, abs=1e-5)
        assert row.delta_ce_low <= row.delta_ce_high
    assert abs(table.loc[0, N_LAYERS - 1].excess) > 1e-3


@torch.no_grad()
def test_what_is_shown_begins_with_the_first_layer_and_means_stand_apart():
    source = reading(tiny_lm(), BATCHES, SiteSpec())
    table = together.together(source, saes(), replicates=20, progress=False)
    shown = together.from_the_first(table.assign(dictionary="x"))
    assert set(shown.dictionary) == {"x", "means of the layers"}
    assert len(shown) == 2 * N_LAYERS * len(together.SHOWN)
    row = shown[(shown.dictionary == "x") & (shown.layers == 2) & (shown.what == "difference")]
    [expected] = table[
        (table.of == "reconstruction") & (table["last"] == 1) & (table.layers == 2)
    ].excess
    assert row.value.item() == expected


def test_one_layer_at_a_time_is_the_evaluation():
    lm, sae = tiny_lm(), tiny_sae()
    source = reading(lm, BATCHES, SiteSpec())
    table = together.together(source, [sae] * N_LAYERS, replicates=20, progress=False)
    alone = table[(table.layers == 1) & (table.of == "reconstruction")]
    expected = analysis.evaluate(source, sae, progress=False)
    assert alone.delta_ce.tolist() == pytest.approx(expected.delta_ce.tolist(), abs=1e-5)
    assert alone.kl.tolist() == pytest.approx(expected.kl.tolist(), abs=1e-5)
    again = together.together(
        reading(lm, [torch.cat(BATCHES)], SiteSpec()),
        [sae] * N_LAYERS,
        replicates=20,
        progress=False,
    )
    again = again[again.of == "reconstruction"]
    by_batch = table[table.of == "reconstruction"]
    for column in ("delta_ce", "delta_ce_low", "delta_ce_high", "excess_low", "excess_high"):
        assert again[column].tolist() == pytest.approx(by_batch[column].tolist(), abs=1e-5)
    means = table[(table.layers == 1) & (table.of == "mean")].delta_ce
    mean = (expected.ce_mean - expected.ce_original).tolist()
    assert means.tolist() == pytest.approx(mean, abs=1e-4)
    assert (alone.excess == 0).all()


def test_a_dictionary_for_each_layer_is_needed():
    source = reading(tiny_lm(), BATCHES, SiteSpec())
    with pytest.raises(SpecError, match="expected 3 of the residual stream"):
        together.together(source, saes()[:2], progress=False)


# --- lifetimes ------------------------------------------------------------------------------------


def chains(kind):
    toy = toys.Toy(kind, 64)
    alike = [toy.dictionary] * toys.LAYERS
    return lifetimes.lifetimes(toy, alike, {1: toy.dictionary}, toy.dictionary, 16, progress=False)


def share(table, of, least=0.3, **where):
    table = table[(table.of == of) & (table.least == least)]
    for name, value in where.items():
        table = table[table[name] == value]
    return table


def test_features_that_are_carried_live_long_and_those_of_other_tokens_do_not():
    tables = chains("amplified")
    assert share(tables["chains"], "next layer", layers=toys.LAYERS).share.item() > 0.9
    assert share(tables["chains"], "other tokens", layers=1).share.item() > 0.9
    assert (share(tables["matches"], "another seed").share == 1).all()
    again = share(tables["matches"], "another seed")  # the same dictionary once more
    assert again.correlation.tolist() == pytest.approx([1.0] * len(again))
    assert (share(tables["matches"], "MLSAE").same == 1).all()


def test_what_is_handed_over_is_found_under_another_latent():
    matches = chains("rewritten")["matches"]
    found = share(matches, "MLSAE", layer=0)
    assert found.share.item() > 0.9
    assert found.same.item() < 0.1


# --- surrogates -----------------------------------------------------------------------------------


def text_source(seed=0, sequences=40):
    lm = tiny_lm("gpt_neox")
    tokens = torch.randint(2, VOCAB, (sequences, 16), generator=torch.Generator().manual_seed(seed))
    return TextSource(lm, TokenBlocks(tokens.numpy()), SiteSpec())


def joined(source, **options):
    parts = []
    for _, batch in zip(range(40), source.batches(8, **options), strict=False):
        parts.append(batch.source)
    return torch.cat(parts, 1)


def test_a_gaussian_surrogate_has_the_moments_and_nothing_of_the_token():
    source = text_source()
    mean, covariance = surrogates.joint_moments(source)
    x = joined(source).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(mean, x.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(covariance, x.T.cov(correction=0), atol=1e-4, rtol=1e-3)
    drawn = surrogates.Changed(source, surrogates.gaussian(mean, covariance, N_LAYERS), "gaussian")
    y = joined(drawn, seed=0).transpose(0, 1).flatten(1).double()
    assert len(y) > 4000
    error = (y.T.cov() - covariance).norm() / covariance.norm()
    assert error < 0.1
    torch.testing.assert_close(y.mean(0), mean, atol=0.1, rtol=0.1)
    first = joined(source, seed=0).transpose(0, 1).flatten(1).double() - mean
    alike = torch.cosine_similarity(first, y - mean, dim=1)  # of the same tokens
    assert alike.mean().abs() < 4 * alike.std() / len(alike) ** 0.5


def test_changed_batches_are_a_function_of_seed_and_number():
    source = text_source()
    noisy = surrogates.Changed(source, lambda x, g: x + torch.randn(x.shape, generator=g), "noise")
    third = [b.source for _, b in zip(range(3), noisy.batches(8, seed=5), strict=False)][2]
    assert torch.equal(next(noisy.batches(8, seed=5, start=2)).source, third)
    assert not torch.equal(next(noisy.batches(8, seed=6, start=2)).source, third)
    assert noisy.site is source.site
    passes = [{}, {"seed": 0}, {"seed": 1}, {"seed": 2**32}]
    alone = surrogates.Changed(source, lambda x, g: torch.rand(3, generator=g).to(x), "drawn")
    again = replace(alone, draw=1)
    drawn = [
        tuple(batch.source.tolist())
        for one in (alone, again)
        for options in passes
        for _, batch in zip(range(3), one.batches(8, **options), strict=False)
    ]
    assert len(set(drawn)) == len(drawn) == 24
    with pytest.raises(AttributeError):
        noisy.passes  # noqa: B018 (what is changed cannot be put back)


def test_random_updates_are_scaled_until_layers_turn_as_asked():
    source = text_source()
    tokens = next(iter(source.blocks.batches(16)))
    lm = LanguageModel(source.lm.model, source.lm.tokenizer)
    before = surrogates.adjacent_cosines(
        lm.capture(tokens, range(N_LAYERS))["residual"].flatten(1, 2)
    )
    wanted = torch.tensor([0.9, 0.6])
    surrogates.match_drift(lm, tokens, wanted)
    x = lm.capture(tokens, range(N_LAYERS))["residual"][:, lm.keep_mask(tokens)]
    torch.testing.assert_close(surrogates.adjacent_cosines(x), wanted, atol=1e-3, rtol=0)
    assert (before - wanted).abs().max() > 0.02
    with pytest.raises(SpecError, match="GPT-NeoX"):
        surrogates.match_drift(tiny_lm("llama"), tokens, wanted)


@torch.no_grad()
def test_conditions_are_what_they_say():
    source = text_source()
    opening = next(iter(source.blocks.batches(16)))
    run = run_from_dict({"model": "m", "data": "d", "expansion_factor": 2, "k": 4, "tokens": 4096})
    x = joined(source)
    scaled = surrogates.standardised(x)
    expected = {
        surrogates.REAL: x,
        surrogates.RAW: x,
        surrogates.CENTRED: x - x.mean(1, keepdim=True),
        surrogates.BIASES: scaled - scaled.mean(1, keepdim=True),
    }
    for condition, wanted in expected.items():
        own, read = surrogates.prepared(condition, run, source, opening)
        torch.testing.assert_close(joined(read), wanted, atol=1e-4, rtol=1e-4)
        standard = condition in (surrogates.REAL, surrogates.CENTRED)
        assert own == (run if standard else replace(run, sae=replace(run.sae, standardize=False)))
    with pytest.raises(SpecError, match="condition"):
        surrogates.prepared("none", run, source, opening)


@torch.no_grad()
def test_random_weights_are_those_of_the_seed_and_turn_as_the_trained_ones_where_asked(monkeypatch):
    drawn = []

    def load(spec, device):
        drawn.append(spec.random_weights)
        return tiny_lm("gpt_neox", seed=spec.random_weights)

    monkeypatch.setattr(surrogates.LanguageModel, "load", load)
    source = text_source()
    opening = next(iter(source.blocks.batches(16)))
    run = {"model": "m", "data": "d", "expansion_factor": 2, "k": 4, "tokens": 4096, "seed": 7}
    run = run_from_dict(run)
    plain, matched = (
        surrogates.prepared(condition, run, source, opening)[1]
        for condition in (surrogates.RANDOM, surrogates.MATCHED)
    )
    assert drawn == [7, 7]
    expected = replace(source, lm=tiny_lm("gpt_neox", seed=7))
    torch.testing.assert_close(joined(plain), joined(expected))
    cosines = {}
    for name, of in (("trained", source), ("random", plain), ("matched", matched)):
        x = of.lm.capture(opening, range(N_LAYERS))["residual"][:, of.lm.keep_mask(opening)]
        cosines[name] = surrogates.adjacent_cosines(x)
        centred = x - x.mean(1, keepdim=True)
        by_hand = [
            (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
            for a, b in itertools.pairwise(centred)
        ]
        torch.testing.assert_close(cosines[name], torch.stack(by_hand).mean(1))
    torch.testing.assert_close(cosines["matched"], cosines["trained"], atol=1e-3, rtol=0)
    assert (cosines["random"] - cosines["trained"]).abs().max() > 0.02


def test_what_is_measured_of_a_toy_is_what_it_is():
    toy = toys.Toy("carried", 48)
    table = surrogates.measured(toy, toy.dictionary, replicates=20, progress=False)
    found = table.set_index("measure").value
    other = toys.measured("carried", 48)
    pairs = other["pairs"].set_index("of").loc["measured"]
    assert found["single"] == pytest.approx(pairs.single)
    assert found["mean layers"] == pytest.approx(pairs["mean"])
    ratios = other["ratios"]
    ratios = ratios[(ratios.of == "measured") & ratios.corrected & (ratios.weighting == "tokens")]
    assert found["Eq. 11, tokens"] == pytest.approx(ratios.value.iloc[0])
    assert abs(found["survival"] - found["survival, shuffled"]) < 0.02
    assert found["mmcs"] == 0


@pytest.mark.parametrize("kind", ["amplified", "erased"])
def test_what_is_measured_of_blocks_that_treat_features_is_what_survival_is(kind):
    toy = toys.Toy(kind, 48)
    found = surrogates.measured(toy, toy.dictionary, replicates=2, progress=False)
    found = found.set_index("measure").value
    survived = toys.measured(kind, 48, 2)["survival"]
    survived = survived[(survived.gap == 1)].groupby("of").rate.mean()
    assert found["survival"] == pytest.approx(survived[carried.MEASURED])
    shuffled = survived[next(iter(carried.UPDATES))]
    assert found["survival, shuffled"] == pytest.approx(shuffled, abs=0.01)
    assert abs(found["survival"] - shuffled) > 0.05
    stream = torch.cat([batch.source for batch in toy.batches(8)], 1).double()
    rest = (stream - toy.dictionary(stream.float()).recon).square().sum((1, 2))
    variance = (stream - stream.mean(1, keepdim=True)).square().sum((1, 2))
    expected = (rest / variance).mean()
    assert found["fvu"] == pytest.approx(expected.item(), rel=1e-4)
