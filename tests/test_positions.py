"""Metrics by position, and of planted attention sinks: where they are and what they do."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_lm import D_MODEL, N_LAYERS, tiny_lm

from mlsae_book.tables import positions
from mlsae_core import analysis, store
from mlsae_core.activations import First, TextSource
from mlsae_core.sae import MLSAE
from mlsae_core.spec import SiteSpec, SpecError
from mlsae_core.text import TokenBlocks

CONTEXT, SEQUENCES, FROM = 16, 6, 1


@pytest.fixture
def lm():
    """The first token of each sequence, and in the last one the tenth, is massive after FROM."""
    model = tiny_lm()
    capture = model.capture

    def with_sinks(tokens, *arguments):
        found = capture(tokens, *arguments)
        for x in found.values():
            x[FROM:, :, 0] *= 1000
            x[FROM:, (tokens == 7).nonzero()[:, 0], 9] *= 1000
        return found

    model.capture = with_sinks
    return model


def source(lm, massive="kept", **site):
    text = torch.full((SEQUENCES, CONTEXT), 5) + torch.arange(CONTEXT) % 2
    text[-1, 9] = 7
    return TextSource(
        lm, First(TokenBlocks(text.numpy()), SEQUENCES), SiteSpec(massive=massive, **site)
    )


def sae(n_latents=64):
    return MLSAE(D_MODEL, n_latents, 2, generator=torch.Generator().manual_seed(0)).eval()


@pytest.mark.parametrize("context", [1, 2, 3, 16, 100])
def test_every_position_is_in_one_group(context):
    ends = positions.bins(context)
    places = [p for first, last in ends for p in range(first, last + 1)]
    assert places == list(range(context))


@pytest.mark.parametrize("massive", ["kept", "excluded"])
@torch.no_grad()
def test_planted_sinks_are_reported_where_they_stand_whatever_the_site_excludes(lm, massive):
    groups, found = positions.by_position(source(lm, massive), sae(), 4, progress=False)
    there = np.arange(N_LAYERS) >= FROM
    assert found.vectors.tolist() == [7 * x for x in there]
    assert found.at_first.tolist() == found.sequences.tolist() == [6 * x for x in there]
    assert found.of.eq(SEQUENCES).all()
    assert found.tokens.eq(SEQUENCES * CONTEXT).all()
    assert (found.norm / found.norm_of_others)[there].min() > 300
    assert found.norm[~there].isna().all()
    kept, excluded = (groups[groups.massive == name] for name in ("kept", "excluded"))
    first = kept.query("first == 0 and last == 0 and layer >= @FROM")
    assert first.share.min() > 0.8
    # They are left out at every layer.
    assert excluded.query("first == 0 and last == 0").tokens.eq(0).all()
    place = "first == 8 and last == 15"
    assert kept.query(place).tokens.eq(48).all()
    assert excluded.query(place).tokens.eq(47).all()


@torch.no_grad()
def test_all_positions_together_are_the_evaluation_with_and_without_them(lm):
    groups, _ = positions.by_position(source(lm), sae(), 4, progress=False)
    together = groups[(groups["first"] == 0) & (groups["last"] == CONTEXT - 1)]
    for massive in ("kept", "excluded"):
        own = TextSource(lm, source(lm).blocks, SiteSpec(massive=massive))
        batches = [*own.batches(4)]
        table = together[together.massive == massive]
        evaluated = _evaluated(batches)
        for name in ("tokens", "fvu", "l1", "l0"):
            assert table[name].tolist() == pytest.approx(evaluated[name].tolist()), name


def _evaluated(batches):
    """What `analysis.evaluate` says of batches that it cannot put back."""

    class Saved:
        site, n_layers, d_model, device = SiteSpec(), N_LAYERS, D_MODEL, torch.device("cpu")
        n_sequences, key = SEQUENCES, "planted"

        def batches(self, size, seed=None, start=0, every=1):
            yield from batches

    table = analysis.evaluate(Saved(), sae(), 4, progress=False)
    return table.rename(columns={"fvu_global": "fvu"})


def test_metrics_stand_beside_each_other_both_ways():
    one = pd.DataFrame({"layer": [0, 1, 2], "fvu": [1.0, 2.0, 6.0], "alone": 0.0})
    other = one.assign(fvu=one.fvu * 10).drop(columns="alone")
    table = positions.both_ways(one, other, [2], ["fvu", "alone", "neither"])
    expected = {
        "metric": ["fvu"],
        "mean, excluded": [3.0],
        "mean, kept": [30.0],
        "layer 2, excluded": [6.0],
        "layer 2, kept": [60.0],
    }
    assert table.to_dict("list") == expected


def test_drift_stands_beside_itself_both_ways(tmp_path):
    made = []
    for scale in (1, 10):
        folder = tmp_path / str(scale)
        folder.mkdir()
        layers = pd.DataFrame({"layer": [0, 1, 2], "norm": [1.0 * scale, 2.0 * scale, 3.0 * scale]})
        pairs = pd.DataFrame({"layer": [0, 0, 1], "other": [1, 2, 2], "centred": [1.0, 9.0, 3.0]})
        pairs = pairs.assign(centred=scale * pairs.centred, raw=0.5)
        layers.to_csv(folder / "layers.csv", index=False)
        pairs.to_csv(folder / "pairs.csv", index=False)
        files = {"files": {"layers.csv": "", "pairs.csv": ""}}
        made.append(store.Artefact(folder, {}, files))
    table = positions.drift_both_ways(*made, [1]).set_index("metric")
    assert list(table.index) == ["norm", "centred", "raw"]
    assert table.loc["norm"].tolist() == [2.0, 20.0, 2.0, 20.0]
    assert table.loc["centred"].tolist() == [2.0, 20.0, 3.0, 30.0]
    assert table.loc["raw"].tolist() == [0.5] * 4


def test_stacked_layers_are_refused(lm):
    with pytest.raises(SpecError, match="stacked: expected false for metrics by position"):
        positions.by_position(source(lm, stacked=True), sae(), progress=False)
