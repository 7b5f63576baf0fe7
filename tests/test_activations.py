import pytest
import torch
from test_lens import random_lens
from tiny_lm import D_MODEL, EOS, N_LAYERS, PAD, read, tiny_lm, tiny_tokens

from mlsae_core import activations
from mlsae_core.activations import MASSIVE, ActivationError, massive
from mlsae_core.spec import SiteSpec, SpecError


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


def test_special_tokens_are_removed_at_every_layer(lm):
    tokens = tiny_tokens()
    tokens[1, -1] = PAD
    (batch,) = read(lm, [tokens], SiteSpec())
    captured = lm.capture(tokens, range(N_LAYERS))["residual"]
    kept = [(s, p) for s in range(2) for p in range(7) if tokens[s, p] not in (EOS, PAD)]
    assert len(kept) == 11
    assert batch.source.shape == (N_LAYERS, 11, D_MODEL)
    for i, (s, p) in enumerate(kept):
        assert torch.equal(batch.source[:, i], captured[:, s, p])
    assert batch.tokens.tolist() == [int(tokens[s, p]) for s, p in kept]
    assert list(zip(batch.sequence.tolist(), batch.position.tolist(), strict=True)) == kept


def test_nothing_is_removed_where_nothing_is_special(lm):
    tokens = torch.full((2, 7), 5)
    (batch,) = read(lm, [tokens], SiteSpec(layers=(1,)))
    captured = lm.capture(tokens, [1])["residual"]
    assert torch.equal(batch.source, captured.flatten(1, 2))


def test_autoencoder_target_is_the_source_itself(lm):
    for site in (SiteSpec(), SiteSpec(source="mlp_output", target="mlp_output")):
        (batch,) = read(lm, [tiny_tokens()], site)
        assert batch.target is batch.source


def test_transcoder_has_source_and_target(lm):
    site = SiteSpec(layers=(0, 2), source="mlp_input", target="mlp_output")
    (batch,) = read(lm, [tiny_tokens()], site)
    for row, layer in enumerate(site.layers):
        with torch.no_grad():
            expected = lm.blocks[layer].mlp(batch.source[row])
        torch.testing.assert_close(batch.target[row], expected)


def test_stacked_concatenates_the_layers_of_a_token(lm):
    (batch,) = read(lm, [tiny_tokens()], SiteSpec(stacked=True))
    (plain,) = read(lm, [tiny_tokens()], SiteSpec())
    assert batch.source.shape == (1, 12, N_LAYERS * D_MODEL)
    for token in range(12):
        assert torch.equal(batch.source[0, token], torch.cat(list(plain.source[:, token])))


def test_lens_is_applied_to_the_layers_of_the_site(lm):
    lens, site = random_lens(), SiteSpec(layers=(1, 2))
    (batch,) = read(lm, [tiny_tokens()], site, lens)
    (plain,) = read(lm, [tiny_tokens()], site)
    torch.testing.assert_close(batch.source, lens.apply(plain.source, [1, 2]))


def test_half_precision_models_give_float32():
    lm = tiny_lm(dtype=torch.bfloat16)
    (batch,) = read(lm, [tiny_tokens()], SiteSpec())
    assert batch.source.dtype == torch.float32


def test_batches_follow_the_order_of_the_text_and_leave_no_hooks(lm):
    batches = [tiny_tokens(seed=0), tiny_tokens(seed=1)]
    first, second = read(lm, batches, SiteSpec())
    (alone,) = read(lm, batches[1:], SiteSpec())
    assert torch.equal(second.source, alone.source)
    assert not torch.equal(first.source, second.source)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_activations_name_the_batch_and_the_layers(value):
    lm = tiny_lm()
    batches = [torch.full((1, 4), 5), torch.full((1, 4), 6)]
    with torch.no_grad():
        lm.blocks[1].mlp.dense_4h_to_h.bias[0] = value
    message = r"batch 0: residual has NaN or infinite values at layers \[1, 2\]"
    with pytest.raises(ActivationError, match=message):
        list(read(lm, batches, SiteSpec()))
    lm = tiny_lm()
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[6] = value
    batches_read = read(lm, batches, SiteSpec(layers=(2,)))
    next(batches_read)
    with pytest.raises(ActivationError, match=r"batch 1: residual .* at layers \[2\]"):
        next(batches_read)


def test_a_batch_of_special_tokens_and_unknown_layers_are_refused(lm):
    with pytest.raises(ActivationError, match="batch 0: all 6 tokens are special"):
        next(read(lm, [torch.full((2, 3), EOS)], SiteSpec()))
    with pytest.raises(SpecError, match=r"layers: expected .* from 0 to 2"):
        next(read(lm, [tiny_tokens()], SiteSpec(layers=(2, 3))))


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(("sequence", "position"), [(0, 0), (1, 4)])
def test_planted_massive_activations_are_found_wherever_they_stand(lm, layer, sequence, position):
    x = lm.capture(torch.full((2, 7), 5), range(N_LAYERS))["residual"]
    assert not massive(x).any()
    x[layer, sequence, position] *= 2 * MASSIVE
    assert massive(x).nonzero().tolist() == [[layer, sequence, position]]
    assert not massive(x.flip(0) * 1e-3)[:, 1 - sequence].any()  # no scale, no other sequence
    assert massive(x[:, sequence : sequence + 1]).nonzero().tolist() == [[layer, 0, position]]


def test_excluded_massive_activations_are_left_out_at_every_layer(lm, monkeypatch):
    tokens = tiny_tokens()
    (every,) = read(lm, [tokens], SiteSpec())
    capture = lm.capture

    def with_sinks(*arguments):
        captured = capture(*arguments)
        captured["residual"][-1, :, 0] *= 100  # at one layer alone
        return captured

    monkeypatch.setattr(lm, "capture", with_sinks)
    (kept,) = read(lm, [tokens], SiteSpec())
    (batch,) = read(lm, [tokens], SiteSpec(massive="excluded"))
    rest = every.position > 0
    assert torch.equal(kept.position, every.position)
    assert torch.equal(batch.position, every.position[rest])
    assert torch.equal(batch.source, every.source[:, rest])


def test_what_is_on_a_card_already_is_not_pinned():
    class There:
        device = torch.device("cuda", 0)

        def pin_memory(self):
            raise RuntimeError("only dense CPU tensors can be pinned")

        def to(self, device, non_blocking):
            return device, non_blocking

    wanted = torch.device("cuda", 0)
    assert activations.to_device(There(), wanted) == (wanted, True)
