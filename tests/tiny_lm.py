"""Tiny random language models of four architectures, and a tokenizer, built in memory."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from mlsae_core import train
from mlsae_core.activations import TextSource
from mlsae_core.lm import LanguageModel
from mlsae_core.spec import SiteSpec

N_LAYERS, D_MODEL, VOCAB = 3, 16, 40
EOS, PAD = 0, 1

_SHARED = {"vocab_size": VOCAB, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
_SIZES = {
    **_SHARED,
    "hidden_size": D_MODEL,
    "intermediate_size": 24,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}

CONFIGS = {
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES, use_parallel_residual=True),
    "gpt2": lambda: GPT2Config(**_SHARED, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=2),
    "llama": lambda: LlamaConfig(**_SIZES, num_key_value_heads=1),
    # Windows of 4 tokens and low caps, so that each of Gemma 2's peculiarities changes the logits.
    "gemma2": lambda: Gemma2Config(
        **_SIZES,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=1.5,
    ),
}


def tiny_tokenizer():
    words = {"<eos>": EOS, "<pad>": PAD, **{f"w{i}": i for i in range(2, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>", pad_token="<pad>"
    )


def tiny_network(architecture="gpt_neox", seed=0, dtype=torch.float32):
    """A network whose weights are large enough that attention and norms matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(CONFIGS[architecture](), dtype=dtype)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def tiny_lm(architecture="gpt_neox", seed=0, dtype=torch.float32):
    return LanguageModel(tiny_network(architecture, seed, dtype), tiny_tokenizer(), architecture)


def tiny_tokens(batch=2, position=7, seed=0):
    """Random tokens with an end-of-sentence token at position 3 of every sequence."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCAB, (batch, position), generator=generator)
    tokens[:, 3] = EOS
    return tokens


class Given:
    """A text in batches that are there, whatever size is asked for."""

    def __init__(self, batches):
        self.given = list(batches)

    def batches(self, size, seed=None, start=0):
        yield from self.given


def reading(lm, batches, site=SiteSpec(), lens=None):  # noqa: B008 (frozen)
    """The activations of a language model that reads these batches of tokens."""
    return TextSource(lm, Given(batches), site, lens)


def read(*arguments):
    """Their batches."""
    return reading(*arguments).batches(1)


def train_on_text(run, lm, blocks, **options):
    """A dictionary trained on a language model that reads this text."""
    return train.train(run, TextSource(lm, blocks, run.site), **options)
