import warnings

import pytest
import torch
import torch._dynamo.utils
from tiny_lm import (
    CONFIGS,
    D_MODEL,
    EOS,
    N_LAYERS,
    PAD,
    VOCAB,
    tiny_lm,
    tiny_network,
    tiny_tokenizer,
    tiny_tokens,
)
from torch._inductor import compile_fx
from transformers import AutoModelForCausalLM, BertConfig, OPTConfig, masking_utils

from mlsae_core import modules
from mlsae_core.lm import LanguageModel
from mlsae_core.spec import ModelSpec, SpecError

ARCHITECTURES = list(CONFIGS)
POINTS = ("residual", "mlp_input", "mlp_output")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def lm(request):
    return tiny_lm(request.param)


@pytest.fixture
def folder(tmp_path):
    tiny_network().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def full_logits(lm, tokens):
    with torch.no_grad():
        return lm.model(input_ids=tokens).logits


def test_final_norm_and_head_of_last_captured_layer_are_the_logits(lm):
    tokens = tiny_tokens()
    captured = lm.capture(tokens, [0, N_LAYERS - 1])["residual"]
    assert captured.shape == (2, 2, 7, D_MODEL)
    torch.testing.assert_close(lm.logits(captured[-1]), full_logits(lm, tokens))


def test_capture_agrees_with_hidden_states_before_the_last(lm):
    tokens = tiny_tokens()
    with torch.no_grad():
        hidden = lm.model(input_ids=tokens, output_hidden_states=True).hidden_states
    captured = lm.capture(tokens, range(N_LAYERS))["residual"]
    for layer in range(N_LAYERS - 1):
        torch.testing.assert_close(captured[layer], hidden[layer + 1])


def test_capture_keeps_the_order_of_layers_and_runs_no_later_block(lm):
    called = []
    handles = [
        block.register_forward_pre_hook(lambda *_, i=i: called.append(i))
        for i, block in enumerate(lm.blocks)
    ]
    captured = lm.capture(tiny_tokens(), [1, 0])["residual"]
    for handle in handles:
        handle.remove()
    assert called == [0, 1]
    both = lm.capture(tiny_tokens(), [0, 1])["residual"]
    assert torch.equal(captured, both.flip(0))


@pytest.mark.parametrize("point", POINTS)
def test_resuming_with_the_unchanged_activation_reproduces_the_logits(lm, point):
    tokens = tiny_tokens()
    original = lm.original(tokens, POINTS)
    expected = full_logits(lm, tokens)
    for layer in range(N_LAYERS):
        logits = lm.resume(original, layer, original.activations[point][layer], point)
        torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("point", POINTS)
def test_growing_batch_equals_a_hooked_pass_per_layer(lm, point, batch):
    tokens = tiny_tokens(batch)
    original = lm.original(tokens, POINTS)
    noise = torch.randn(3, *original.residual.shape, generator=torch.Generator().manual_seed(1))
    replacements = {i: original.activations[point][i] + noise[:, i] for i in (0, 2)}
    logits = lm.logits(lm.resume_layers(original, replacements, point))
    assert logits.shape == (2, 3, batch, 7, VOCAB)
    for row, layer in enumerate(replacements):
        for m in range(3):
            with lm._replaced(layer, point, replacements[layer][m]):
                expected = full_logits(lm, tokens)
            torch.testing.assert_close(logits[row, m], expected, atol=1e-5, rtol=1e-4)


def test_mlp_output_is_what_the_mlp_adds_to_the_residual_stream(lm):
    tokens = tiny_tokens()
    original = lm.original(tokens, POINTS)
    zero = torch.zeros_like(original.embeddings)
    with lm._replaced(1, "mlp_output", zero):
        without = lm.capture(tokens, [1])["residual"][0]
    added = original.residual[1] - without
    torch.testing.assert_close(added, original.activations["mlp_output"][1], atol=1e-5, rtol=1e-4)


def test_mlp_output_is_the_mlp_of_mlp_input():
    lm = tiny_lm("llama")
    captured = lm.capture(tiny_tokens(), [1], POINTS)
    with torch.no_grad():
        expected = lm.blocks[1].mlp(captured["mlp_input"][0])
    torch.testing.assert_close(captured["mlp_output"][0], expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resume_in_bfloat16(architecture):
    lm = tiny_lm(architecture, dtype=torch.bfloat16)
    tokens = tiny_tokens()
    original = lm.original(tokens)
    expected = full_logits(lm, tokens)
    for layer in range(N_LAYERS):
        logits = lm.resume(original, layer, original.residual[layer].expand(2, -1, -1, -1))
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits[1], expected, atol=0.1, rtol=0.1)


def test_gradients_flow_through_resume_and_not_to_the_weights(lm):
    tokens = tiny_tokens()
    original = lm.original(tokens)
    residual = original.residual[0].clone().requires_grad_()

    def score(stream):
        return lm.resume(original, 0, stream)[..., -1, 5].sum()

    (gradient,) = torch.autograd.grad(score(residual), residual)
    direction = torch.randn(residual.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        step = 1e-2 * direction
        change = (score(original.residual[0] + step) - score(original.residual[0] - step)) / 2e-2
    torch.testing.assert_close((gradient * direction).sum(), change, rtol=0.02, atol=1e-3)
    assert not any(p.requires_grad or p.grad is not None for p in lm.model.parameters())


def test_captured_activations_can_be_trained_on():
    captured = tiny_lm().capture(tiny_tokens(), [0])["residual"]
    weight = torch.nn.Parameter(torch.ones(D_MODEL))
    (captured * weight).sum().backward()
    torch.testing.assert_close(weight.grad, captured.sum(dim=(0, 1, 2)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_blocks_capture_the_same_and_leave_the_model_as_it_was(architecture):
    # Not the model of other tests, on which `output_hidden_states` has left hooks.
    lm, tokens, counted = tiny_lm(architecture), tiny_tokens(), torch._dynamo.utils.counters
    original = lm.original(tokens)
    replaced = lm.resume(original, 1, 2 * original.residual[1])
    counted.clear()
    compiled = lm.compiled("aot_eager")
    for batch in (tokens, tiny_tokens(3, 5), tokens):
        captured = compiled.capture(batch, [2, 0])["residual"]
        expected = lm.capture(batch, [2, 0])["residual"]
        torch.testing.assert_close(captured, expected, rtol=1e-6, atol=1e-6)
    assert counted["stats"]["unique_graphs"] == 2  # one for each shape, none for each block
    assert not counted["graph_break"]
    assert torch.equal(lm.resume(original, 1, 2 * original.residual[1]), replaced)
    again = compiled.original(tokens)
    resumed = compiled.resume(again, 1, 2 * again.residual[1])
    torch.testing.assert_close(resumed, replaced, rtol=1e-5, atol=1e-5)
    with pytest.raises(SpecError, match=r"--compile: expected source .* residual, got mlp_input"):
        compiled.capture(tokens, [0], ["mlp_input"])


def test_every_compiled_model_has_a_limit_of_recompilation_of_its_own():
    counted = torch._dynamo.utils.counters
    models = [tiny_lm() for _ in range(3)]
    counted.clear()
    with torch._dynamo.config.patch(recompile_limit=1):
        for lm in models:
            captured = lm.compiled("eager").capture(tiny_tokens(), [0])["residual"]
            torch.testing.assert_close(captured, lm.capture(tiny_tokens(), [0])["residual"])
    assert counted["stats"]["unique_graphs"] == len(models)


def test_what_the_compiler_says_of_tf32_is_no_error_and_other_warnings_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    compile_fx._warn_tf32_disabled.__wrapped__()
    with pytest.raises(UserWarning, match="something else"):
        warnings.warn("something else", stacklevel=1)


@pytest.mark.gpu
def test_graphs_of_blocks_do_not_overwrite_what_was_captured():
    """The first passes warm up and record, later ones replay into the same memory."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    lm = LanguageModel(tiny_network().to("cuda"), tiny_tokenizer())
    compiled, batches = lm.compiled(), [tiny_tokens(seed=seed) for seed in range(5)]
    captured = [compiled.capture(batch, range(N_LAYERS))["residual"] for batch in batches]
    for batch, found in zip(batches, captured, strict=True):
        expected = lm.capture(batch, range(N_LAYERS))["residual"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_keep_mask_is_false_at_special_tokens():
    lm = tiny_lm()
    assert lm.special_ids.tolist() == [EOS, PAD]
    assert lm.keep_mask(torch.tensor([[5, EOS, PAD, 7]])).tolist() == [[True, False, False, True]]


def test_other_architectures_are_found_by_structure():
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        word_embed_proj_dim=D_MODEL,
        ffn_dim=24,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    lm = LanguageModel(AutoModelForCausalLM.from_config(config), tiny_tokenizer(), "opt")
    tokens = tiny_tokens()
    residual = lm.capture(tokens, [N_LAYERS - 1])["residual"][0]
    torch.testing.assert_close(lm.logits(residual), full_logits(lm, tokens))
    with pytest.raises(SpecError, match="needs an MLP module named one of mlp"):
        lm.capture(tokens, [0], ["mlp_input"])


def test_an_architecture_that_does_not_fit_says_what_was_looked_for():
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        is_decoder=True,
    )
    with pytest.raises(SpecError, match="looked for a ModuleList of num_hidden_layers = 2 blocks"):
        LanguageModel(AutoModelForCausalLM.from_config(config), tiny_tokenizer())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_load_gives_the_saved_weights(architecture, tmp_path):
    tiny_network(architecture).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    lm, tokens = LanguageModel.load(ModelSpec(str(tmp_path))), tiny_tokens()
    torch.testing.assert_close(full_logits(lm, tokens), full_logits(tiny_lm(architecture), tokens))


def test_load_from_a_folder(folder):
    lm = LanguageModel.load(ModelSpec(str(folder)))
    tokens = tiny_tokens()
    assert (lm.name, lm.n_layers, lm.d_model) == (folder.name, N_LAYERS, D_MODEL)
    half = LanguageModel.load(ModelSpec(str(folder), dtype="bfloat16"))
    assert half.capture(tokens, [0])["residual"].dtype == torch.bfloat16


def test_random_weights_depend_on_their_seed_and_leave_the_global_generator(folder):
    (folder / "model.safetensors").unlink()
    state = torch.get_rng_state()
    first, again, other = (
        LanguageModel.load(ModelSpec(str(folder), random_weights=seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    weights = [m.model.get_input_embeddings().weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.name == f"{folder.name}-random0"


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("model.safetensors", "has no weights; expected"),
        ("config.json", "has no config.json; expected"),
        ("tokenizer", "has no tokenizer; expected"),
    ],
)
def test_an_incomplete_folder_is_refused(folder, removed, message):
    for file in folder.glob(f"{removed}*"):
        file.unlink()
    with pytest.raises(SpecError, match=message):
        LanguageModel.load(ModelSpec(str(folder)))


def test_an_incomplete_checkpoint_is_refused(folder):
    network = tiny_network()
    state = {k: v for k, v in network.state_dict().items() if "layers.1.mlp" not in k}
    network.save_pretrained(folder, state_dict=state)
    with pytest.raises(SpecError, match=r"model.path: .* lacks weights for 4 parameters"):
        LanguageModel.load(ModelSpec(str(folder)))


def test_an_unreachable_hub_id_is_one_clear_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SpecError, match=r"model.path: expected .* 'nobody/nothing' could not be"):
        LanguageModel.load(ModelSpec("nobody/nothing"))


def test_unknown_folder_layer_hook_point_and_bad_tokens_are_refused():
    with pytest.raises(SpecError, match=r"model.path: expected a shipped name.* got ./nowhere"):
        LanguageModel.load(ModelSpec("./nowhere/at/all"))
    lm, tokens = tiny_lm(), tiny_tokens()
    with pytest.raises(SpecError, match=r"layers: expected .* from 0 to 2 of gpt_neox, got \[3\]"):
        lm.capture(tokens, [3])
    with pytest.raises(SpecError, match="expected one of residual, mlp_input, mlp_output, got 'at"):
        lm.capture(tokens, [0], ["attention"])
    with pytest.raises(ValueError, match=r"tokens: expected \(batch, position\) int64"):
        lm.capture(tokens[0], [0])
    with pytest.raises(SpecError, match=r"context_length: gpt_neox has 32 positions, got .* 33"):
        lm.capture(tiny_tokens(1, 33), [0])
    original = lm.original(tokens)
    with pytest.raises(ValueError, match="replacements: expected equal shapes"):
        lm.resume(original, 0, original.residual[0][:, :-1])


@pytest.mark.parametrize("present", [True, False])
def test_transformers_is_left_as_it_was_after_a_pass(monkeypatch, present):
    name = "find_packed_sequence_indices"
    if not present:  # as in other versions
        monkeypatch.delattr(masking_utils, name)
    before = dict(vars(masking_utils))
    with modules.unpacked():
        assert hasattr(masking_utils, name) == present
        assert not present or masking_utils.find_packed_sequence_indices(torch.zeros(1, 2)) is None
    assert vars(masking_utils) == before
