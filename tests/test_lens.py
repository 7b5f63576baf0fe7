import json
import zipfile

import pytest
import torch
from tiny_lm import D_MODEL, N_LAYERS, tiny_network

from mlsae_core.lens import Lens
from mlsae_core.spec import SiteSpec, SpecError


def random_lens(alignment="aligned", n_layers=N_LAYERS, d_model=D_MODEL, scale=0.1):
    generator = torch.Generator().manual_seed(0)
    weight = scale * torch.randn(n_layers, d_model, d_model, generator=generator)
    bias = torch.randn(n_layers, d_model, generator=generator)
    return Lens(weight, bias, alignment, "tiny")


def vectors(n_layers=N_LAYERS, tokens=5):
    return torch.randn(n_layers, tokens, D_MODEL, generator=torch.Generator().manual_seed(1))


def test_aligned_takes_the_next_translator_and_the_identity_after_the_last_block():
    lens, x = random_lens(), vectors()
    y = lens.apply(x)
    for layer in range(N_LAYERS - 1):
        for token in range(5):
            v = x[layer, token]
            expected = v + lens.weight[layer + 1] @ v + lens.bias[layer + 1]
            torch.testing.assert_close(y[layer, token], expected)
    torch.testing.assert_close(y[-1], x[-1])


def test_as_released_takes_the_translator_of_the_same_index():
    lens, x = random_lens("as-released"), vectors()
    expected = x + torch.einsum("lij,ltj->lti", lens.weight, x) + lens.bias[:, None]
    torch.testing.assert_close(lens.apply(x), expected)


@pytest.mark.parametrize("alignment", ["aligned", "as-released"])
def test_invert_undoes_apply(alignment):
    lens, x = random_lens(alignment), vectors()
    torch.testing.assert_close(lens.invert(lens.apply(x)), x, atol=1e-5, rtol=1e-5)
    some = lens.apply(x[[2, 0]], [2, 0])
    assert torch.equal(some, lens.apply(x)[[2, 0]])
    torch.testing.assert_close(lens.invert(some, [2, 0]), x[[2, 0]], atol=1e-5, rtol=1e-5)


def test_identity_returns_its_argument():
    lens, x = Lens.load(SiteSpec()), vectors()
    assert lens.is_identity
    assert lens.apply(x) is x
    assert lens.invert(x, [0, 1, 2]) is x


def test_condition_numbers_are_those_of_the_whole_map():
    weight = torch.diag(torch.tensor([3.0, 0.0, -0.5])).expand(2, 3, 3)
    lens = Lens(weight, torch.zeros(2, 3))
    assert lens.condition_numbers.tolist() == pytest.approx([8.0, 1.0])


def test_a_near_singular_lens_is_refused_with_its_condition_number(tmp_path):
    weight = torch.zeros(2, 3, 3)
    weight[1, 0, 0] = -1 + 1e-7
    lens = Lens(weight, torch.zeros(2, 3))
    message = r"basis: .* up to 1e\+06; I \+ W is near-singular at layers 0 \(.*e\+0[67]\)"
    with pytest.raises(SpecError, match=message):
        lens.invert(torch.zeros(2, 1, 3))
    lens.write(tmp_path)
    with pytest.raises(SpecError, match=message):
        Lens.load(SiteSpec(basis=str(tmp_path)))


@pytest.mark.parametrize("safetensors", [False, True])
def test_folder_round_trip(tmp_path, safetensors):
    lens = random_lens()
    lens.write(tmp_path, safetensors)
    again = Lens.load(SiteSpec(basis=str(tmp_path), alignment="as-released"))
    assert torch.equal(again.weight, lens.weight)
    assert torch.equal(again.bias, lens.bias)
    assert (again.alignment, again.model_name) == ("as-released", "tiny")


def test_folders_are_those_of_the_tuned_lens_package(tmp_path):
    from tuned_lens.nn.lenses import TunedLens

    network = tiny_network()
    theirs = TunedLens.from_model(network)
    with torch.no_grad():
        for parameter in theirs.layer_translators.parameters():
            parameter.normal_(std=0.1)
    theirs.save(tmp_path / "theirs")
    ours = Lens.read(tmp_path / "theirs")
    x = vectors()
    with torch.no_grad():
        expected = theirs.transform_hidden(x[0], 1)  # hidden state 1 is the output of block 0
    torch.testing.assert_close(ours.apply(x)[0], expected)

    ours.write(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config.keys() == json.loads((tmp_path / "theirs" / "config.json").read_text()).keys()
    theirs.layer_translators.load_state_dict(
        torch.load(tmp_path / "ours" / "params.pt", weights_only=True)
    )
    assert torch.equal(theirs.layer_translators[2].weight, ours.weight[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[:1, :1].expand(10**6, 10**6), r"numbers as 1\.weight in .*, got fewer"),
        (lambda w: w.to_sparse(), r"expected plain numbers as 1\.weight in .*, got torch.sparse"),
        (lambda w: w.int(), r"numbers as 1\.weight in .*, got torch.int32: quantised"),
        (lambda w: [w], r"expected tensors by name in .*params.pt, got other things"),
        (lambda w: ..., r"not compressed in .*params.pt, got others"),
    ],
)
def test_a_lens_asks_for_no_more_memory_than_its_file_has_numbers(tmp_path, change, message):
    random_lens().write(tmp_path)
    state = torch.load(tmp_path / "params.pt")
    state["1.weight"] = change(state["1.weight"])
    if state["1.weight"] is ...:  # a bomb
        with zipfile.ZipFile(tmp_path / "params.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(10**6))
    else:
        torch.save(state, tmp_path / "params.pt")
    with pytest.raises(ValueError, match=message):
        Lens.read(tmp_path)


def test_bad_folders_and_shapes_are_refused(tmp_path):
    with pytest.raises(SpecError, match=r"basis: .* has no config.json"):
        Lens.read(tmp_path)
    random_lens().write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"d_model": 99}))
    with pytest.raises(SpecError, match=r"says 3 layers of 99 dimensions, the weights are"):
        Lens.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "3"}))
    with pytest.raises(ValueError, match=r"an integer num_hidden_layers in .*config.json, got '3'"):
        Lens.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(SpecError, match=r"of 4 layers in .* \(6 tensors\)"):
        Lens.read(tmp_path)
    (tmp_path / "params.pt").unlink()
    with pytest.raises(SpecError, match=r"has no params.pt or params.safetensors"):
        Lens.read(tmp_path)
    lens = random_lens()
    with pytest.raises(ValueError, match=r"expected \(3 layers, token, 16\) .* got \(2, 5, 16\)"):
        lens.apply(vectors(2))
    with pytest.raises(SpecError, match=r"layers: the tuned lens has layers 0 to 2, got \[0, 7\]"):
        lens.apply(vectors(2), [0, 7])
