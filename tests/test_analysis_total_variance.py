"""Every term of the law of total variance, by hand and by plain loops; a broken law is seen."""

import math

import pandas as pd
import pytest
import torch
from test_analysis import BATCHES, tiny_sae
from tiny_lm import read, reading, tiny_lm

from mlsae_book.tables import total_variance

N_LAYERS, N_LATENTS = 4, 9


def random_codes(seed=0, tokens=40, k=3):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(N_LAYERS, tokens, N_LATENTS, generator=generator)
    values, indices = scores.topk(k)
    # two layers in three are silent for some latents, and some activations are exactly zero
    values = values * (torch.rand(values.shape, generator=generator) > 0.3)
    return indices, values


def plain_loops(indices, values):
    """The definitions, in plain Python: P(L | t, j), its means over tokens and over latents."""

    def moments(p):
        mean = math.fsum(i * x for i, x in enumerate(p))
        return mean, math.fsum((i - mean) ** 2 * x for i, x in enumerate(p))

    def average(rows):
        return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]

    at = {}
    for layer, tokens in enumerate(zip(indices.tolist(), values.tolist(), strict=True)):
        for t, (latents, hs) in enumerate(zip(*tokens, strict=True)):
            for j, h in zip(latents, hs, strict=True):
                at.setdefault((j, t), [0.0] * N_LAYERS)[layer] += h
    by_latent = {}
    for (j, _), h in at.items():
        if sum(h) > 0:
            by_latent.setdefault(j, []).append([x / math.fsum(h) for x in h])
    rows = {}
    for j, ps in sorted(by_latent.items()):
        mean, var = moments(average(ps))
        inner = [moments(p) for p in ps]
        within = math.fsum(v for _, v in inner) / len(ps)
        between = math.fsum((m - mean) ** 2 for m, _ in inner) / len(ps)
        rows[j] = (mean, var, within, between)
    overall = moments(average([average(ps) for ps in by_latent.values()]))
    centre = overall[0]
    n = len(rows)
    return {
        "var": overall[1],
        "exp_var_j": math.fsum(r[1] for r in rows.values()) / n,
        "var_exp_j": math.fsum((r[0] - centre) ** 2 for r in rows.values()) / n,
        "exp_var_jt": math.fsum(r[2] for r in rows.values()) / n,
        "exp_var_exp_jt": math.fsum(r[3] for r in rows.values()) / n,
    }, rows


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_terms_are_those_of_plain_loops(seed):
    indices, values = random_codes(seed)
    found = total_variance.terms(indices, values, N_LATENTS)
    expected, rows = plain_loops(indices, values)
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value), name
    assert found.latents["latent"].tolist() == list(rows)
    for column, place in (("var", 1), ("within", 2), ("between", 3)):
        assert found.latents[column].tolist() == pytest.approx([r[place] for r in rows.values()])


def test_terms_by_hand():
    """Latent 0 at layer 0 of one token and at layer 2 of another; latent 1 at 0 and 2 of one."""
    indices = torch.tensor([[[0], [1]], [[2], [2]], [[1], [0]]])
    values = torch.tensor([[[5.0], [3.0]], [[0.0], [0.0]], [[0.0], [1.0]]])
    found = total_variance.terms(indices, values, 3)
    assert found.latents["latent"].tolist() == [0, 1]
    assert found.latents["tokens"].tolist() == [2, 1]
    assert found.latents["var"].tolist() == [1, 0]
    assert found.latents["between"].tolist() == [1, 0]
    values[2] = torch.tensor([[3.0], [1.0]])  # latent 1: layer 2 of token 0, layer 0 of token 1
    indices[0, 1] = 1
    indices[2, 1] = 1  # at token 1, three quarters at layer 0 and one at layer 2
    found = total_variance.terms(indices, values, 3)
    one = found.latents.set_index("latent").loc[1]
    assert one["within"] == pytest.approx((0 + 4 * 0.75 * 0.25) / 2)
    assert one["between"] == pytest.approx(0.75**2)  # means 2 and 1/2 about 5/4
    with pytest.raises(ValueError, match="above 0"):
        total_variance.terms(indices, 0 * values, 3)


def test_both_sides_agree_and_a_broken_term_is_seen():
    indices, values = random_codes()
    found = total_variance.terms(indices, values, N_LATENTS)
    table = total_variance.both_sides(found)
    assert table["difference"].max() < 1e-9
    broken = found._replace(exp_var_jt=found.exp_var_jt * 0.99)
    assert total_variance.both_sides(broken)["difference"].max() > 1e-3
    latents = found.latents.assign(within=found.latents["within"] + (found.latents["latent"] == 4))
    broken = total_variance.both_sides(found._replace(latents=latents)).iloc[2]
    assert broken["difference"] == pytest.approx(1)  # the largest, whichever latent is shown
    frequent = found.latents.sort_values("tokens", kind="stable", ascending=False).iloc[0]
    assert frequent["latent"] != 4
    assert broken["left"] == frequent["var"]


def test_the_sums_of_one_pass_are_the_same():
    indices, values = random_codes()
    found = total_variance.terms(indices, values, N_LATENTS)
    table = total_variance.beside_the_sums(found, indices, values, N_LATENTS)
    assert table["difference"].max() < 1e-9
    other = total_variance.beside_the_sums(found, indices, values.flip(0), N_LATENTS)
    assert other["difference"].max() > 1e-3


def test_codes_are_the_dictionarys_at_all_tokens():
    lm, sae = tiny_lm("gpt_neox"), tiny_sae()
    indices, values = total_variance.codes(reading(lm, BATCHES), sae)
    parts = [sae.encode(batch.source) for batch in read(lm, BATCHES)]
    assert indices.shape == values.shape == (3, sum(p.indices.shape[1] for p in parts), 2)
    assert torch.equal(indices[:, : parts[0].indices.shape[1]], parts[0].indices)
    torch.testing.assert_close(values[:, -parts[-1][0].shape[1] :], parts[-1][0])


def test_ranks_keep_the_order_and_the_ends():
    latents = pd.DataFrame(
        {"latent": range(10), "var": [9.0 - i for i in range(10)], "within": 0.25, "between": 0.5}
    )
    table = total_variance.by_rank(latents, most=4)
    assert table.query("part == 'at one token'")["latent"].tolist() == [9, 6, 3, 0]
    assert table["rank"].tolist() == [0, 1, 2, 3] * 2
    assert set(table.query("part == 'between tokens'")["variance"]) == {0.5}
