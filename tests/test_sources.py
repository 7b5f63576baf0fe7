"""Sources of activations: a model with text, a folder, a planted world; training knows no other."""

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import blocks, digest, lm, run_of  # noqa: F401 (fixtures)

from mlsae_book.planted import PlantedSpec, World
from mlsae_core import activations, train
from mlsae_core.activations import SavedSource, TextSource
from mlsae_core.spec import SiteSpec, SpecError

TRANSCODER = {"source": "mlp_input", "target": "mlp_output"}


def saved(folder, lm, blocks, size=3, **site):  # noqa: F811
    """The activations of a whole text, some sequences a file."""
    source = TextSource(lm, blocks, SiteSpec(**site))
    return activations.save(source.batches(size), folder)


def same(one, other):
    for name in ("source", "target", "tokens", "sequence", "position"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.target is one.source) == (other.target is other.source)


@pytest.mark.parametrize("site", [{}, TRANSCODER])
@pytest.mark.parametrize("seed", [None, 0])
def test_saved_activations_are_read_as_they_were(lm, blocks, tmp_path, site, seed):  # noqa: F811
    text = TextSource(lm, blocks, SiteSpec(**site))
    folder = SavedSource(saved(tmp_path / "a", lm, blocks, **site), SiteSpec(**site))
    assert (folder.n_layers, folder.d_model) == (lm.n_layers, lm.d_model)
    pairs = zip(folder.batches(7, seed), text.batches(7, seed), strict=seed is None)
    read = [same(*pair) for pair in itertools.islice(pairs, 13)]
    assert len(read) == (6 if seed is None else 13)  # 40 sequences, or more than two passes


@pytest.mark.parametrize("kind", ["text", "saved", "planted"])
def test_every_source_deals_numbered_batches(lm, blocks, tmp_path, kind):  # noqa: F811
    source = {
        "text": lambda: TextSource(lm, blocks, SiteSpec()),
        "saved": lambda: SavedSource(saved(tmp_path / "a", lm, blocks)),
        "planted": lambda: World(PlantedSpec(n_features=8, active=2, context_length=4)),
    }[kind]()
    whole = list(itertools.islice(source.batches(4, seed=1), 9))
    for number, batch in zip((2, 5, 8), source.batches(4, 1, start=2, every=3), strict=False):
        same(batch, whole[number])
    for batch in whole[:2]:
        assert batch.source.shape == (source.n_layers, len(batch.tokens), source.d_model)
        assert batch.source.device == source.device


def test_training_on_saved_activations_is_training_on_the_text(lm, blocks, tmp_path):  # noqa: F811
    expected = digest(train.train(run_of(), lm, blocks))
    assert digest(train.train(run_of(), TextSource(lm, blocks, SiteSpec()))) == expected
    source = SavedSource(saved(tmp_path / "a", lm, blocks))
    assert digest(train.train(run_of(), source)) == expected


@pytest.mark.parametrize("site", [{"layers": (0, 2)}, {"stacked": True}])
def test_a_site_chooses_among_saved_layers(lm, blocks, tmp_path, site):  # noqa: F811
    source = SavedSource(saved(tmp_path / "a", lm, blocks), SiteSpec(**site))
    for pair in zip(
        source.batches(8), TextSource(lm, blocks, SiteSpec(**site)).batches(8), strict=True
    ):
        same(*pair)
    assert train.train(run_of(**site), source).log.fvu.iloc[-1] < 1
    with pytest.raises(SpecError, match="layers: expected block indices from 0 to 2"):
        SavedSource(tmp_path / "a", SiteSpec(layers=(3,)))


def test_identity_is_the_content_in_its_order(lm, blocks, tmp_path):  # noqa: F811
    first = saved(tmp_path / "a", lm, blocks)
    key = SavedSource(first).key
    moved = first.rename(tmp_path / "b")
    for number, file in enumerate(sorted(moved.iterdir())):
        file.rename(moved / f"part-{number:03}.safetensors")
    assert SavedSource(moved).key == key
    one, two = moved / "part-000.safetensors", moved / "part-001.safetensors"
    one.rename(tmp_path / "kept")
    two.rename(one)
    (tmp_path / "kept").rename(two)
    assert SavedSource(moved).key != key
    arrays = load_file(one)
    arrays["source"][0, 0, 0] += 1
    before = SavedSource(moved).key
    save_file(arrays, one)
    assert SavedSource(moved).key != before


def test_what_cannot_be_read_or_written_is_named(lm, blocks, tmp_path):  # noqa: F811
    folder = saved(tmp_path / "a", lm, blocks)
    with pytest.raises(SpecError, match=r"expected a new one for activations, got .*; remove it"):
        saved(tmp_path / "a", lm, blocks)
    with pytest.raises(SpecError, match=r"target: expected same, .* saved, got mlp_output"):
        SavedSource(folder, SiteSpec(**TRANSCODER))
    with pytest.raises(SpecError, match=r"expected \*.safetensors in .*b, got none"):
        SavedSource(tmp_path / "b")
    file = next(iter(folder.iterdir()))
    arrays = load_file(file)
    for changes, message in (
        ({"lengths": arrays["lengths"][:-1]}, r"expected lengths that make \d+ vectors, got"),
        ({"tokens": arrays["tokens"][:-1]}, r"expected tokens of \d+ vectors, got"),
        ({"source": arrays["source"][:2].contiguous()}, "expected files of the same layers and w"),
    ):
        save_file(arrays | changes, file)
        with pytest.raises(SpecError, match=message):
            SavedSource(folder)
    save_file({name: x for name, x in arrays.items() if name != "position"}, file)
    with pytest.raises(SpecError, match=r"safetensors: expected saved activations: .* position"):
        SavedSource(folder)
    save_file({"lengths": arrays["lengths"]}, file)
    with pytest.raises(SpecError, match="safetensors: expected saved activations: "):
        SavedSource(folder)
    file.write_bytes(b"damaged")
    with pytest.raises(SpecError, match="safetensors: expected saved activations: "):
        SavedSource(folder)
