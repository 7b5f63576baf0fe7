"""Steering, ablation and importance against hooked passes of the whole model."""

import math

import pandas as pd
import pytest
import torch
from test_analysis import tiny_sae
from test_lens import random_lens
from tiny_lm import CONFIGS, N_LAYERS, reading, tiny_lm, tiny_tokens
from torch.nn import functional

from mlsae_book.tables import importance, interventions
from mlsae_core.lens import Lens
from mlsae_core.spec import SiteSpec, SpecError

TOKENS = tiny_tokens(3, 8)
IDENTITY = Lens.identity()


def encoded(lm, sae, lens, layer, tokens=TOKENS):
    """(batch, position, latent): dense activations after one block."""
    x = lm.capture(tokens, [layer])["residual"][0]
    values, indices = sae.encode(lens.apply(x.flatten(0, 1)[None], [layer])[0])
    dense = torch.zeros(len(values), sae.n_latents).scatter(-1, indices, values)
    return dense.view(*tokens.shape, -1).detach()


def busiest(lm, sae, lens, layer):
    return int(encoded(lm, sae, lens, layer).gt(0).sum((0, 1)).argmax())


def effect_of(lm, sae, layer, latent, changes, lens=IDENTITY, tokens=TOKENS):
    return interventions.intervene(lm, sae, lens, SiteSpec(), tokens, layer, latent, changes)


@torch.no_grad()
def hooked(lm, layer, change, tokens=TOKENS):
    """Logits and residual streams of a whole pass in which a hook changes one block's output."""
    streams = {}

    def replace(_, __, output):
        x = output[0] if isinstance(output, tuple) else output
        x = change(x)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def keep(i):
        return lambda _, __, out: streams.update(
            {i: (out[0] if isinstance(out, tuple) else out).clone()}
        )

    handles = [lm.blocks[layer].register_forward_hook(replace)]
    handles += [lm.blocks[i].register_forward_hook(keep(i)) for i in range(layer, N_LAYERS)]
    logits = lm.model(input_ids=tokens, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits, torch.stack([streams[i] for i in range(layer, N_LAYERS)])


def in_raw_units(lm, sae, layer, latent, change):
    """x + Δh σ w, one vector at a time, for `hooked`."""

    keep, h = lm.keep_mask(TOKENS), encoded(lm, sae, IDENTITY, layer)

    def apply(x):
        y = x.clone()
        for place in keep.nonzero().tolist():
            at = tuple(place)
            amount = -h[(*at, latent)] if change == "ablate" else change
            y[at] += amount * x[at].std() * sae.decoder[latent].detach()
        return y

    return apply


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("layer", [0, 1])
def test_effects_agree_with_a_hooked_pass(architecture, layer):
    lm, sae = tiny_lm(architecture), tiny_sae()
    latent, changes = busiest(lm, sae, IDENTITY, layer), (3.0, "ablate", -1.5)
    effect = effect_of(lm, sae, layer, latent, changes)
    torch.testing.assert_close(effect.logits, lm.model(input_ids=TOKENS).logits)
    for i, change in enumerate(changes):
        logits, streams = hooked(lm, layer, in_raw_units(lm, sae, layer, latent, change))
        assert (logits - effect.logits).abs().max() > 1e-3
        close = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(effect.logits_after[i], logits, **close)
        torch.testing.assert_close(effect.residual_after[i], streams, **close)


def test_ablating_an_inactive_latent_and_steering_by_nothing_change_nothing():
    lm, sae = tiny_lm(), tiny_sae()
    inactive = int(encoded(lm, sae, IDENTITY, 1).sum((0, 1)).eq(0).nonzero()[0])
    for latent, change in ((inactive, "ablate"), (busiest(lm, sae, IDENTITY, 1), 0.0)):
        effect = effect_of(lm, sae, 1, latent, [change])
        assert torch.equal(effect.logits_after[0], effect.logits)
        assert torch.equal(effect.residual_after[0], effect.residual)
        assert interventions.losses(effect).loc[0, ["delta_ce", "kl", "changed"]].eq(0).all()
        assert interventions.promoted(effect, lm.tokenizer).empty
        assert interventions.most_changed(effect, sae, IDENTITY).empty
        later = interventions.later_layers(effect, sae, IDENTITY)
        assert later.drop(columns=["change", "layer"]).isna().all(axis=None)


def test_tokens_before_the_first_active_one_are_not_touched():
    lm, sae = tiny_lm(), tiny_sae()
    h = encoded(lm, sae, IDENTITY, 1)
    late = h.gt(0).any(0).any(-2)  # latents that are active somewhere
    first = h.gt(0).any(0).int().argmax(0)  # …, and the first position where in any sequence
    latent = int((first * late).argmax())
    assert first[latent] > 0
    effect = effect_of(lm, sae, 1, latent, ["ablate"])
    before = slice(None, int(first[latent]))
    assert torch.equal(effect.logits_after[0, :, before], effect.logits[:, before])
    assert not torch.equal(effect.logits_after[0], effect.logits)


def test_at_the_last_layer_the_effect_is_the_final_norm_and_the_unembedding():
    lm, sae = tiny_lm("llama"), tiny_sae()
    latent = busiest(lm, sae, IDENTITY, N_LAYERS - 1)
    effect = effect_of(lm, sae, N_LAYERS - 1, latent, [2.0])
    keep = lm.keep_mask(TOKENS)
    x = lm.capture(TOKENS, [N_LAYERS - 1])["residual"][0]
    y = x + 2.0 * x.std(-1, keepdim=True) * sae.decoder[latent].detach() * keep[..., None]
    norm, head = lm.base.norm, lm.model.get_output_embeddings().weight
    for got, vectors in ((effect.logits_after[0], y), (effect.logits, x)):
        scale = vectors.square().mean(-1, keepdim=True).add(norm.variance_epsilon).rsqrt()
        torch.testing.assert_close(
            got, vectors * scale * norm.weight @ head.T, atol=1e-4, rtol=1e-4
        )


def test_in_a_lens_space_the_step_is_mapped_back():
    lm, sae, lens = tiny_lm(), tiny_sae(), random_lens()
    latent = busiest(lm, sae, lens, 1)
    effect = effect_of(lm, sae, 1, latent, [2.0, "ablate"], lens)
    z = lens.apply(effect.residual[0].flatten(0, 1)[None], [1]).unflatten(1, TOKENS.shape)[0]
    h, keep = encoded(lm, sae, lens, 1)[..., latent], effect.keep
    for after, amount in zip(effect.residual_after[:, 0], (2.0, -h), strict=True):
        step = (amount * z.std(-1))[..., None] * sae.decoder[latent].detach()
        moved = lens.apply(after.flatten(0, 1)[None], [1]).unflatten(1, TOKENS.shape)[0]
        torch.testing.assert_close(moved[keep], (z + step)[keep], atol=1e-4, rtol=1e-4)
    assert torch.equal(
        effect.residual_after[:, 0, ~keep], effect.residual[0, ~keep].expand(2, -1, -1)
    )


def test_losses_and_tokens_by_hand():
    lm, sae = tiny_lm(), tiny_sae()
    latent = busiest(lm, sae, IDENTITY, 0)
    effect = effect_of(lm, sae, 0, latent, [4.0, "ablate"])
    table = interventions.losses(effect)
    assert table.change.tolist() == [4.0, "ablate"]
    targets = TOKENS[:, 1:].flatten()
    before = effect.logits[:, :-1].flatten(0, 1).double().log_softmax(-1)
    for i, row in table.iterrows():
        after = effect.logits_after[i, :, :-1].flatten(0, 1).double().log_softmax(-1)
        ce = functional.nll_loss(after, targets) - functional.nll_loss(before, targets)
        assert row.delta_ce == pytest.approx(float(ce), abs=1e-5)
        kl = (before.exp() * (before - after)).sum(-1).mean()
        assert row.kl == pytest.approx(float(kl), abs=1e-5)
    assert table.changed.tolist()[0] == 1
    h = encoded(lm, sae, IDENTITY, 0)[..., latent][effect.keep]
    assert table.changed.tolist()[1] == pytest.approx(float(h.gt(0).double().mean()))
    words = interventions.promoted(effect, lm.tokenizer, most=1)
    difference = (effect.logits_after[0] - effect.logits)[effect.keep].mean(0)
    difference = difference - difference.mean()
    mine = words[words.change == 4.0].set_index("direction")
    assert mine.token["promoted"] == lm.tokenizer.decode([int(difference.argmax())])
    assert mine.token["suppressed"] == lm.tokenizer.decode([int(difference.argmin())])
    assert mine.logit_change["promoted"] == pytest.approx(float(difference.max()), abs=1e-5)


@torch.no_grad()
def test_later_layers_by_hand():
    lm, sae = tiny_lm(), tiny_sae()
    latent = busiest(lm, sae, IDENTITY, 1)
    effect = effect_of(lm, sae, 1, latent, [6.0])
    table = interventions.later_layers(effect, sae, IDENTITY)
    assert table.layer.tolist() == list(range(1, N_LAYERS))
    changed = interventions.most_changed(effect, sae, IDENTITY, most=2)
    for offset, row in enumerate(table.itertuples()):
        x, y = effect.residual[offset][effect.keep], effect.residual_after[0, offset][effect.keep]
        assert row.relative_change == pytest.approx(
            float(((y - x).norm(dim=-1) / x.norm(dim=-1)).mean()), rel=1e-5
        )
        h = [torch.zeros(len(v), sae.n_latents).scatter(-1, *sae.encode(v)[::-1]) for v in (x, y)]
        assert row.activation_before == pytest.approx(float(h[0][:, latent].mean()), abs=1e-6)
        assert row.activation_after == pytest.approx(float(h[1][:, latent].mean()), rel=1e-5)
        most = (h[1] - h[0]).abs().mean(0).topk(2).indices.tolist()
        assert changed[changed.layer == row.layer].latent.tolist() == most
    assert table.active_after[0] == 1  # steered this far, it is among the k everywhere


def test_only_dictionaries_of_the_residual_stream_are_steered():
    arguments = tiny_lm(), tiny_sae(), IDENTITY
    with pytest.raises(SpecError, match="residual stream"):
        interventions.intervene(*arguments, SiteSpec(source="mlp_output"), TOKENS, 0, 0, [1.0])
    with pytest.raises(SpecError, match="latent: expected 0 to 63, got 64"):
        interventions.intervene(*arguments, SiteSpec(), TOKENS, 0, 64, [1.0])


# --- importance -------------------------------------------------------------------------------


def importance_by_hand(lm, sae, lens, layer, sequence, position):
    """r_L0 of one vector by finite differences of the activations' contributions."""
    tokens = TOKENS[sequence : sequence + 1]
    x = lm.capture(tokens, [layer])["residual"][0]
    values, indices = sae.encode(lens.apply(x[:, position][None], [layer])[0, 0])
    z = lens.apply(x[:, position][None], [layer])[0, 0].detach()
    y = []
    for h, j in zip(values.tolist(), indices.tolist(), strict=True):
        moved = []
        for sign in (-1, 1):
            step = z + sign * 1e-3 * sae.decoder[j].detach()

            def put(stream, step=step):
                stream = stream.clone()
                stream[0, position] = lens.invert(step[None, None], [layer])[0, 0]
                return stream

            logits, _ = hooked(lm, layer, put, tokens)
            logits = logits[0, position].double()
            moved.append(float(logits[tokens[0, position + 1]] - logits.mean()))
        y.append(h * (moved[1] - moved[0]) / 2e-3)
    total = sum(map(abs, y))
    p = [abs(v) / total for v in y if v != 0]
    return math.exp(-sum(v * math.log(v) for v in p)) / len(p)


@pytest.mark.parametrize("lens", [IDENTITY, random_lens()], ids=["identity", "tuned lens"])
def test_importance_agrees_with_finite_differences(lens):
    lm, sae = tiny_lm(), tiny_sae()
    lm.model.double()
    sae.double()
    if not lens.is_identity:
        lens = Lens(lens.weight.double(), lens.bias.double(), lens.alignment)
    # All positions that can be drawn, so nothing depends on the draw.
    source = reading(lm, TOKENS.split(2), SiteSpec(), lens)
    table = own(importance.importance(source, sae, positions=99, progress=False))
    keep = lm.keep_mask(TOKENS)[:, :-1]
    assert table.vectors.eq(int(keep.sum())).all()
    assert table.sequences.eq(len(TOKENS)).all()
    for row in table.itertuples():
        means = torch.tensor(
            [
                [importance_by_hand(lm, sae, lens, row.layer, s, int(p)) for p in places.nonzero()]
                for s, places in enumerate(keep)
            ]
        ).mean(1)
        assert row.r_l0 == pytest.approx(float(means.mean()), abs=2e-3)
        half = 1.96 * float(means.std()) / len(means) ** 0.5
        assert row.high - row.r_l0 == pytest.approx(half, abs=2e-3)
        assert row.r_l0 - row.low == pytest.approx(half, abs=2e-3)
        assert 1 / sae.k <= row.r_l0 <= 1


def own(table):
    return table[table.gradient == "own"].reset_index(drop=True)


def test_importance_reads_no_more_sequences_than_it_is_told():
    lm, sae = tiny_lm(), tiny_sae()
    options = {"sequences": 2, "positions": 99, "progress": False}
    one = importance.importance(reading(lm, TOKENS.split(1)), sae, 1, **options)
    two = importance.importance(reading(lm, [TOKENS]), sae, len(TOKENS), **options)
    assert one.sequences.eq(2).all()
    pd.testing.assert_frame_equal(own(one), own(two), rtol=1e-4)
    # There is no other sequence from which to take a gradient.
    assert one[one.gradient == "another"].r_l0.isna().all()
    assert two.r_l0.notna().all()
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert sae.encoder.grad is None


def test_null_models_of_importance_are_of_the_same_vectors_with_another_gradient():
    lm, sae = tiny_lm(), tiny_sae()
    table = importance.importance(reading(lm, [TOKENS]), sae, 8, positions=99, progress=False)
    by_kind = {kind: rows.reset_index(drop=True) for kind, rows in table.groupby("gradient")}
    assert list(table.gradient.unique()) == ["own", "another", "random"]
    first = by_kind["own"]
    assert first.difference.eq(0).all()
    for kind in ("another", "random"):
        rows = by_kind[kind]
        assert rows.difference.tolist() == pytest.approx((first.r_l0 - rows.r_l0).tolist())
        assert (rows.difference_low < rows.difference).all()
        assert rows.difference.abs().min() > 1e-4
        for same in ("r_activation", "l0", "vectors"):
            assert rows[same].equals(first[same])


def test_tables_of_importance_say_what_the_stage_measured():
    ends = {"low": 0.3, "high": 0.5, "difference_low": -0.1, "difference_high": 0.3}
    rows = [
        {"k": k, "layer": layer, "gradient": kind, "r_l0": r + layer / 10, "difference": 0.1}
        | ends
        | {"r_activation": 0.9, "l0": float(k)}
        for k in (4, 8)
        for layer in (0, 1)
        for kind, r in (("own", 0.4), ("another", 0.5), ("random", 0.6))
    ]
    table = pd.DataFrame(rows)
    means = importance.by_gradient(table, "k")
    assert means.loc[4].tolist() == pytest.approx([0.45, 0.55, 0.65, 0.9])
    assert list(means) == ["own", "another", "random", "alone"]
    long = importance.beside_activations(table)
    assert len(long) == 16
    found = long.set_index(["k", "layer", "of"])
    assert found.latents[8, 1, "own"] == pytest.approx(4.0)
    assert found.latents_high[8, 1, "own"] == pytest.approx(4.0)
    assert found.latents[8, 1, "alone"] == pytest.approx(7.2)
    assert found.latents_low[:, :, "alone"].isna().all()
    shown = importance.beside_null_models(table, ["k", "layer"])
    assert shown.loc[(4, 0)].tolist() == ["0.100 [-0.100, 0.300]"] * 2
    assert list(shown) == ["another", "random"]


@torch.no_grad()
def test_ties_go_to_the_first_token_and_the_first_latent():
    lm, sae = tiny_lm(), tiny_sae()
    effect = effect_of(lm, sae, N_LAYERS - 1, busiest(lm, sae, IDENTITY, 0), [4.0])
    change = torch.tensor([0.0, 1.0, -1.0]).repeat(effect.logits.shape[-1] // 3 + 1)
    tied = effect._replace(
        logits=torch.zeros_like(effect.logits),
        logits_after=change[: effect.logits.shape[-1]].expand_as(effect.logits_after),
        residual_after=effect.residual[None],
    )
    words = interventions.promoted(tied, lm.tokenizer, most=3)
    expected = [lm.tokenizer.decode([i]) for i in (1, 4, 7, 2, 5, 8)]
    assert words.token.tolist() == expected
    unchanged = interventions.most_changed(tied, sae, IDENTITY, most=6)
    assert unchanged.latent.tolist() == list(range(6))
