"""Pairs of latents, by hand and against loops."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from test_analysis import dense, tiny_sae
from tiny_lm import N_LAYERS, read, reading, tiny_lm, tiny_tokens
from torch.nn import functional

from mlsae_book import stages  # noqa: F401 (registered)
from mlsae_book.tables import examples, latents
from mlsae_core import pipeline, spec
from mlsae_core.sae import TopK
from mlsae_core.spec import SiteSpec, SpecError


class Planted:
    """Latents 0 and 1 point the same way: 0 is active at layer 0, 1 takes over at layer 1.

    Four tokens, two layers, two latents a vector. Latent 3 is never active, but near latent 2,
    which is active everywhere.
    """

    n_latents = 4
    decoder = torch.tensor([[1.0, 0.1, 0], [1, 0, 0], [0, 0, 1], [0, 0.5, 1]])

    def encode(self, source):
        first = torch.tensor([[0, 0, 0, 1], [1, 1, 0, 0]])  # layer token
        indices = torch.stack([first, torch.full_like(first, 2)], -1)
        values = torch.ones(indices.shape)
        values[0, 3, 0] = 0  # not active
        return TopK(values, indices)


@pytest.fixture
def planted():
    sizes = {"site": SiteSpec(), "n_layers": 2, "device": torch.device("cpu"), "n_sequences": 1}
    source = SimpleNamespace(**sizes, batches=lambda *_: iter([SimpleNamespace(source=None)]))
    return latents.duplicates(source, Planted(), progress=False).set_index("latent")


def test_a_planted_handover_is_found(planted):
    assert planted.index.tolist() == [0, 1, 2]  # the fourth is never active
    assert planted.partner.tolist() == [1, 0, 3]
    first, second, third = (planted.loc[i] for i in range(3))
    assert first.cosine == pytest.approx(1 / 1.01**0.5)
    # Latent 0: at layer 0 of tokens 0, 1, 2 and at layer 1 of tokens 2, 3.
    assert first.mean_layer == pytest.approx((0 + 0 + 0.5 + 1) / 4)
    assert (first.peak_layer, first.peak) == (0, pytest.approx(2.5 / 4))
    assert (first.partner_peak_layer, first.partner_peak) == (1, 1)
    assert first.next == pytest.approx(2 / 3)
    assert first.self_next == pytest.approx(1 / 3)
    assert (first.previous, first.same, first.active) == (0, 0, 5)
    # Latent 1: at layer 1 of tokens 0, 1, both times after latent 0.
    assert second.previous == 1
    assert torch.tensor(second.next).isnan()  # it is never at a layer that has a next one
    assert (third.next, third.previous, third.same, third.active) == (0, 0, 0, 8)
    assert torch.tensor(third.partner_mean_layer).isnan()


@torch.no_grad()
def test_pairs_and_their_null_agree_with_loops():
    lm, sae = tiny_lm(), tiny_sae()
    batches = [tiny_tokens(2, 12), tiny_tokens(3, 12, seed=1)]
    table = latents.duplicates(reading(lm, batches), sae, null_draws=3, progress=False)
    flags = [dense(sae, sae.encode(b.source)) > 0 for b in read(lm, batches)]
    flags = torch.cat(flags, 1)  # layer token latent
    cosines = functional.normalize(sae.decoder) @ functional.normalize(sae.decoder).T
    nearest = cosines.fill_diagonal_(-2).argmax(1)
    generator = torch.Generator().manual_seed(0)
    dealt = [nearest[torch.randperm(sae.n_latents, generator=generator)] for _ in range(3)]
    assert set(table.latent) == set(flags.any(0).any(0).nonzero()[:, 0].tolist())
    compared = 0
    for row in table.itertuples():
        a = row.latent
        assert row.partner == nearest[a]
        assert row.active == flags[..., a].sum()
        for name, offset in (("next", 1), ("previous", -1), ("same", 0)):
            shares = []
            for partner in (nearest, *dealt):
                both = base = 0
                for layer in range(N_LAYERS):
                    if 0 <= layer + offset < N_LAYERS:
                        mine, other = flags[layer, :, a], flags[layer + offset, :, partner[a]]
                        both, base = both + int((mine & other).sum()), base + int(mine.sum())
                shares.append(both / base if base else float("nan"))
            assert getattr(row, name) == pytest.approx(shares[0], nan_ok=True)
            expected = sum(shares[1:]) / 3
            assert getattr(row, f"null_{name}") == pytest.approx(expected, nan_ok=True)
            compared += shares[0] > 0
    assert compared > 5


def test_latents_are_chosen_by_their_distributions():
    arrays = {
        "probs": torch.tensor([[0.9, 0.2, 0.5, 1.0], [0.1, 0.8, 0.5, 0.0]]),
        "mean_layer": torch.tensor([0.1, 0.8, 0.5, 0.0]),
        "active_tokens": torch.tensor([500, 500, 2000, 1]),
    }
    assert latents.sharpest(arrays, 0, least=100) == 0
    assert latents.sharpest(arrays, 0, least=1000) == 2


def test_the_summary_counts_concentrated_latents_by_hand(planted):
    table = latents.drift_summary(planted.reset_index(), cosines=(0.0, 0.9))
    assert table.latents.tolist() == [0, 2]
    assert table.neighbouring[1] == 1
    # Latents peak at layers 0 and 1, their partners at 1 and 0: of the four pairs two agree.
    assert (table.null_neighbouring[1], table.null_same_layer[1]) == (0.5, 0.5)
    assert table.next[1] == pytest.approx(2 / 3)  # latent 1 has no next layer
    assert table.previous[1] == pytest.approx(0.5)
    long = latents.handover_table(table)
    one = long[(long.cosine == "0.9 and more") & (long["where"] == "next layer")]
    assert one.set_index("pair").fraction["most similar latent"] == pytest.approx(2 / 3)


def test_stacked_sites_and_no_batches_are_refused():
    with pytest.raises(SpecError, match="stacked: expected false for the layers of a latent"):
        latents.duplicates(reading(tiny_lm(), [], SiteSpec(stacked=True)), tiny_sae())
    with pytest.raises(ValueError, match="source: expected at least one sequence, got none"):
        latents.duplicates(reading(tiny_lm(), []), tiny_sae(), progress=False)


def test_a_session_writes_each_result_once(inputs, data):
    run = spec.run_from_dict(
        {
            "model": str(inputs / "gpt_neox"),
            "data": {"path": str(inputs / "text.jsonl"), "context_length": 16},
            "expansion_factor": 4,
            "k": 2,
            "tokens": 256,
            "batch_tokens": 128,
            "micro_batch_tokens": 128,
        }
    )
    settings, session = spec.EvaluateSpec(tokens=128), pipeline.Session()
    found = session.make("examples", run, settings)
    arrays = examples.load(found.file("examples.safetensors"))
    n_latents = session.sae(run).n_latents
    assert arrays["tokens"].shape == (N_LAYERS, n_latents, 3, 16)
    assert int(arrays["sequence"].max()) < 128 // 16
    pairs = pd.read_csv(session.make("duplicates", run, settings).file("duplicates.csv"))
    live = (arrays["sequence"] >= 0).any(-1).any(0).nonzero()[:, 0]
    assert pairs.latent.tolist() == live.tolist()
    table = pd.read_csv(session.make("importance", run, settings).file("importance.csv"))
    assert table.layer.tolist() == [*range(N_LAYERS)] * 3  # with each gradient
    again = pipeline.Session("read-only")
    assert again.make("examples", run, settings).key == found.key
