"""What a hook point is, is measured: exactly what is added, for any architecture, or a refusal."""

import pytest
import torch
from tiny_lm import D_MODEL, N_LAYERS, tiny_lm, tiny_network, tiny_tokenizer, tiny_tokens
from transformers import AutoConfig, AutoModelForCausalLM

from mlsae_core.lm import LanguageModel
from mlsae_core.spec import SpecError

POINTS = ("residual", "mlp_input", "mlp_output")
SIZES = {
    "vocab_size": 40,
    "hidden_size": D_MODEL,
    "intermediate_size": 24,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
GROUPED = {"num_key_value_heads": 1}
# Parallel attention that is added to the MLP's output in place; norms after the MLP, under several
# names; experts; attention biases with rows for every head of every sequence.
EXACT = {
    "falcon": {
        "parallel_attn": True,
        "multi_query": True,
        "new_decoder_architecture": False,
        "ffn_hidden_size": 24,
    },
    "glm4": GROUPED | {"head_dim": 8},
    "gemma3_text": GROUPED | {"head_dim": 8},
    "olmo2": GROUPED,
    "mixtral": GROUPED | {"num_local_experts": 2},
    "gptj": {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 2, "rotary_dim": 4},
    "cohere": GROUPED,
}
SCALED = {"granite": GROUPED | {"residual_multiplier": 0.22}}
# Their MLPs add the residual stream themselves.
WITH_RESIDUAL = {
    "bloom": {"n_layer": N_LAYERS, "n_head": 2},
    "mpt": {"d_model": D_MODEL, "n_layers": N_LAYERS, "n_heads": 2, "max_seq_len": 32},
}
FLAT = {
    "llama4_text": GROUPED
    | {
        "head_dim": 8,
        "intermediate_size_mlp": 24,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
}
ALL = EXACT | SCALED | WITH_RESIDUAL | FLAT


def loaded(kind, dtype=torch.float32):
    config = AutoConfig.for_model(kind, **SIZES | ALL[kind])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return LanguageModel(network, tiny_tokenizer(), kind)


def logits(lm, tokens):
    with torch.no_grad():
        return lm.model(input_ids=tokens).logits


@pytest.mark.parametrize("kind", EXACT)
def test_mlp_output_is_what_is_added_and_is_harmless_to_put_back(kind):
    lm, tokens = loaded(kind), tiny_tokens()
    original, expected = lm.original(tokens, POINTS), logits(lm, tokens)
    zero = torch.zeros_like(original.embeddings)
    for layer in range(N_LAYERS):
        found = original.activations["mlp_output"][layer]
        with lm._replaced(layer, "mlp_output", zero):
            without = lm.capture(tokens, [layer])["residual"][0]
        added = original.residual[layer] - without
        torch.testing.assert_close(added, found, atol=1e-5, rtol=1e-4)
        for point in POINTS[1:]:
            same = original.activations[point][layer]
            kept = same.clone()
            resumed = lm.resume(original, layer, same.expand(2, -1, -1, -1), point)
            torch.testing.assert_close(resumed[1], expected, atol=1e-5, rtol=1e-4)
            assert torch.equal(same, kept)  # no block has written to it


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("granite", r"'mlp' in block 0 is not what the block adds .* difference 0\.78"),
        ("bloom", "'mlp' in block 0 is not what the block adds"),
        ("mpt", "'ffn' in block 0 is not what the block adds"),
        ("llama4_text", r"'feed_forward' in block 0 has \(6, 16\) there, not"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_what_is_added_is_refused_and_the_rest_works(kind, message, dtype):
    lm, tokens = loaded(kind, dtype), tiny_tokens()
    with pytest.raises(SpecError, match=rf"source/target: 'mlp_output' cannot be had .*{message}"):
        lm.capture(tokens, [0], ["mlp_output"])
    original = lm.original(tokens, POINTS[:2])
    rough = {"atol": 0.1, "rtol": 0.1} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-4}
    for point in POINTS[:2]:
        same = original.activations[point][1]
        resumed = lm.resume(original, 1, same.expand(3, -1, -1, -1), point)
        torch.testing.assert_close(resumed[2], logits(lm, tokens), **rough)


@pytest.mark.parametrize("kind", ["bloom", "mpt", "falcon"])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_arguments_with_rows_for_every_head_are_repeated_as_the_batch_is(kind, batch):
    """Two heads: a batch of two looks like heads, one of four like heads of two sequences."""
    lm, tokens = loaded(kind), tiny_tokens(batch)
    original = lm.original(tokens)
    noise = torch.randn(3, *original.residual.shape, generator=torch.Generator().manual_seed(1))
    changed = {i: original.residual[i] + noise[:, i] for i in (0, 1)}
    found = lm.logits(lm.resume_layers(original, changed))
    for row, layer in enumerate(changed):
        for m in range(3):
            handle = lm.blocks[layer].register_forward_hook(
                lambda _, __, output, new=changed[layer][m]: (
                    (new, *output[1:]) if isinstance(output, tuple) else new
                )
            )
            expected = logits(lm, tokens)
            handle.remove()
            torch.testing.assert_close(found[row, m], expected, atol=1e-4, rtol=1e-3)


def test_nan_weights_are_called_that():
    network = tiny_network("llama")
    with torch.no_grad():
        network.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(SpecError, match=r"1 weights of model have NaN .*\.1\.mlp\.up_proj"):
        LanguageModel(network, tiny_tokenizer())


def test_an_overflow_is_called_that():
    network = tiny_network("llama")
    with torch.no_grad():
        network.model.layers[1].mlp.down_proj.weight.fill_(3e4)
        network.model.layers[1].mlp.up_proj.weight.mul_(50)
    LanguageModel(network, tiny_tokenizer())
    LanguageModel(network.bfloat16(), tiny_tokenizer())
    message = r"overflows in float16, after block 1; expected a model\.dtype .* bfloat16 or float32"
    with pytest.raises(SpecError, match=message):
        LanguageModel(network.half(), tiny_tokenizer())


def test_a_block_that_cannot_be_called_again_is_one_line(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("the size of tensor a\nmust match")

    monkeypatch.setattr(LanguageModel, "resume_layers", broken)
    with pytest.raises(SpecError, match="GPTNeoXForCausalLM cannot be resumed after its blocks"):
        tiny_lm()
