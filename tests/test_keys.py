"""Keys that live: results of every earlier commit are found, whatever fields specs got since.

`tests/fixtures/keys-COMMIT.json` holds what was shipped at a commit: how each artefact was keyed,
and which fields the specs had. `python tests/test_keys.py > tests/fixtures/keys-COMMIT.json`
records today's. A recorded file is never edited.
"""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import ClassVar, get_type_hints

import pytest
import torch
from tiny_lm import VOCAB, tiny_lm, train_on_text

from mlsae_book import planted, pretrain, stages, tune
from mlsae_book.tables.transfer import Target
from mlsae_core import keys, models, pipeline, spec, store, text
from mlsae_core.spec import DataSpec, EvaluateSpec, Removed, Renamed, Spec, SpecError, added

ROOT = Path(__file__).parents[1]
RECORDS = sorted((ROOT / "tests" / "fixtures").glob("keys-*.json"))


def subclasses(cls=Spec):
    """All specs of the project, by name; those that a test made are left out."""
    ours = [c for c in cls.__subclasses__() if c.__module__.startswith("mlsae")]
    return {c.__name__: c for c in ours} | {n: c for o in ours for n, c in subclasses(o).items()}


def began_with(cls):
    return [f.name for f in dataclasses.fields(cls) if "introduced" not in f.metadata]


def record():
    """What a later commit must find: see the head of this file."""
    artefacts = {}
    for path in sorted(store.SHIPPED.glob("*/*/meta.json")):
        found = store.read(path.parent, check=False)
        entry = {"version": found.meta["version"], "parents": found.meta["parents"]}
        artefacts.setdefault(found.meta["stage"], {})[found.key] = entry | {"spec": found.spec}
    hub = [DataSpec("owner/text"), DataSpec("owner/text", "en", "test", "abc", "body", 64)]
    recipes = sorted(path.parent.name for path in store.MODELS.glob("*/recipe.yml"))
    return {
        "fields": {name: began_with(cls) for name, cls in subclasses().items()},
        "prompts": stages.PROMPTS,
        "texts": [[spec.to_dict(d), pipeline._hash(text.data_key(d))] for d in hub],
        "recipes": {name: keys.keyed(pretrain.read_recipe(name)[0]) for name in recipes},
        "lenses": {
            path.parent.name: json.loads(path.read_text())["spec"]
            for path in sorted((store.DATA / "lenses").glob("*/training.json"))
        },
        "artefacts": artefacts,
    }


@pytest.fixture(params=RECORDS, ids=lambda path: path.stem)
def recorded(request):
    return json.loads(request.param.read_text())


def key_of(stage, entry, recorded, monkeypatch, **changes):
    """The key that today's code gives a recorded artefact: of its spec and recorded parents.

    changes: fields to set, by the part of the spec that has them.
    """
    content, parents = entry["spec"], entry["parents"]
    trained = recorded["artefacts"]["train"][parents["train"]] if "train" in parents else entry
    with monkeypatch.context() as patched:
        for name, of in (("train", trained), (stage, entry)):
            patched.setitem(store.STAGES, name, of["version"])
        patched.setattr(stages, "PROMPTS", recorded["prompts"])
        patched.setattr(pipeline, "input_parents", lambda run: trained["parents"])
        patched.setattr(models, "key", lambda *a: parents["model"])
        patched.setattr(pipeline, "_hash", lambda value: parents["data"])
        patched.setattr(store, "find", lambda stage, identity: identity)
        if stage == "planted":
            world = keys.stored(planted.PlantedSpec, content)
            return planted.find_or_compute(changed(world, changes, "planted"), "read-only")
        run = keys.stored_run(content.get("run", content))
        for section in ("model", "site", "sae", "train"):
            if section in changes:
                inner = changed(getattr(run, section), changes, section)
                run = dataclasses.replace(run, **{section: inner})
        run = changed(run, changes, "run")
        if stage == "train":
            return pipeline.run_key(run)[0]
        settings = keys.stored(EvaluateSpec, content[stage]) if stage in content else None
        if stage == "drift":
            return stages.drift_key(run, changed(settings, changes))[0]
        settings = settings and changed(settings, changes)
        if stage == "prompts":
            identity, _, found = stages.prompts_key(run)
        elif "target" in content:
            target = keys.stored(Target, content["target"])
            identity, _, found = stages.transfer_key(run, settings, target)
        else:
            identity, _, found = pipeline.analysis_key(stage, run, settings)
        assert changes or found == parents
        return identity


def changed(value, changes, name="settings"):
    return dataclasses.replace(value, **changes[name]) if name in changes else value


def lost(recorded, monkeypatch):
    """Recorded artefacts whose specs give other keys today."""
    artefacts = recorded["artefacts"]
    assert sum(map(len, artefacts.values())) > 100
    return [
        (stage, key)
        for stage, entries in artefacts.items()
        for key, entry in entries.items()
        if key_of(stage, entry, recorded, monkeypatch) != key
    ]


# --- what was shipped is found ------------------------------------------------------------------


def test_every_recorded_artefact_has_its_key_still(recorded, monkeypatch):
    assert not lost(recorded, monkeypatch)


def test_recorded_texts_recipes_and_lenses_are_the_same_still(recorded):
    for fields, digest in recorded["texts"]:
        assert pipeline._hash(text.data_key(keys.stored(DataSpec, fields))) == digest
    for name, fields in recorded["recipes"].items():
        assert keys.keyed(pretrain.read_recipe(name)[0]) == fields
    for fields in recorded["lenses"].values():
        assert keys.stored(tune.TuneSpec, fields) == tune.TuneSpec()


# --- fields that come -----------------------------------------------------------------------------


@contextlib.contextmanager
def in_place(new):
    """Within it every module has the new classes in the place of the old ones."""
    modules = [m for n, m in sys.modules.items() if n.startswith("mlsae") or n == __name__]
    with pytest.MonkeyPatch.context() as patched:
        for module in modules:
            for name, value in list(vars(module).items()):
                if isinstance(value, type) and value in new:
                    patched.setattr(module, name, new[value])
        for section, cls in list(spec.SECTIONS.items()):
            if cls in new:
                patched.setitem(spec.SECTIONS, section, new[cls])
                for f in dataclasses.fields(new[cls]):
                    patched.setitem(spec._OWNER, f.name, section)
        spec._hints.cache_clear()
        try:
            yield
        finally:
            spec._hints.cache_clear()


def later(default):
    """All specs as they would be after a commit that adds a field to each: class → new class."""
    new = {}
    for name, cls in subclasses().items():
        fields = [(f"later_{name.lower()}", int, added(7, default))]
        for f in dataclasses.fields(cls):
            if f.default_factory in new:
                made = new[f.default_factory]
                fields.append((f.name, made, dataclasses.field(default_factory=made)))
        new[cls] = dataclasses.make_dataclass(name, fields, bases=(cls,), frozen=True)
    return new


@pytest.fixture(params=[7, 8], ids=["default-as-introduced", "default-changed-since"])
def grown(request):
    """The default that the new field of every spec has today; it was introduced with 7."""
    with in_place(later(request.param)):
        yield request.param


def test_an_added_field_changes_no_key(recorded, grown, monkeypatch):
    assert not lost(recorded, monkeypatch)


def declared():
    """Keys of all runs that the book's experiments declare."""
    paths = sorted((ROOT / "book" / "experiments").glob("*.yml"))
    runs = [run for path in paths for _, run in spec.load_experiment(path).runs]
    return [pipeline.run_key(run)[0] for run in runs]


def test_declared_runs_are_found_until_a_default_changes(monkeypatch):
    """Of 66 declared runs 59 were shipped when keys were frozen."""
    monkeypatch.chdir(ROOT / "book")
    before, shipped = declared(), {path.name for path in (store.SHIPPED / "train").iterdir()}
    assert sum(key in shipped for key in before) >= 59
    with in_place(later(7)):
        assert declared() == before
    with in_place(later(8)):
        assert not set(declared()) & set(before)


PARTS = {"run": "RunSpec", "model": "ModelSpec", "site": "SiteSpec", "sae": "SaeSpec"}
PARTS |= {"train": "TrainSpec", "settings": "EvaluateSpec", "planted": "PlantedSpec"}


@pytest.mark.parametrize(
    ("stages", "parts", "count"),
    [
        (("train", "geometry", "prompts"), ("run", "model", "site", "sae", "train"), True),
        (
            ("evaluate", "distributions", "transfer", "examples", "importance", "duplicates"),
            ("run", "model", "site", "sae", "train", "settings"),
            True,
        ),
        (("drift",), ("run", "model", "site", "settings"), True),
        (("drift",), ("sae", "train"), False),  # no dictionary is needed
        (("planted",), ("planted",), True),
    ],
)
def test_another_value_of_an_added_field_is_another_result(
    recorded, grown, monkeypatch, stages, parts, count
):
    for stage in stages:
        key, entry = next(iter(recorded["artefacts"][stage].items()))
        for part in parts:
            change = {part: {f"later_{PARTS[part].lower()}": 9}}
            differs = key_of(stage, entry, recorded, monkeypatch, **change) != key
            assert differs == count, (stage, part)


def test_added_fields_of_text_and_target_count_at_other_values(grown, tmp_path):
    (tmp_path / "t.txt").write_text("a\n\nb")
    for path in ("docstrings", "docstring-questions", str(tmp_path / "t.txt"), "owner/text"):
        as_introduced, other = (text.data_key(DataSpec(path, later_dataspec=v)) for v in (7, 9))
        assert "later_dataspec" not in as_introduced
        assert other == as_introduced | {"later_dataspec": 9}
    for rollouts in ("given", "rollouts"):
        model = spec.ModelSpec("m", later_modelspec=7)
        target = Target(model, text=rollouts, later_target=7)
        settings = target.settings()
        assert not any(name.startswith("later") for name in settings)
        others = (
            dataclasses.replace(target, later_target=9),
            dataclasses.replace(target, model=spec.ModelSpec("m", later_modelspec=9)),
        )
        for other in others:
            assert other.settings().keys() - settings.keys() <= {"later_target", "later_modelspec"}
            assert other.settings() != settings


def test_recipes_and_lenses_are_the_same_after_an_added_field(recorded, grown):
    for name, fields in recorded["recipes"].items():
        same = keys.keyed(pretrain.read_recipe(name)[0]) == fields
        assert same == (grown == 7)
    as_introduced = tune.TuneSpec(later_tunespec=7, data=DataSpec(later_dataspec=7))
    assert (tune.TuneSpec() == as_introduced) == (grown == 7)
    for name, fields in recorded["lenses"].items():
        assert keys.stored(tune.TuneSpec, fields) == as_introduced
        made_of = tune._made_of(store.DATA / "lenses" / name)
        assert made_of["spec"] == spec.to_dict(as_introduced)


def test_an_old_spec_is_completed_as_it_was_meant(recorded, grown):
    entry = next(iter(recorded["artefacts"]["transfer"].values()))
    old, read = entry["spec"]["run"], keys.stored_run(entry["spec"]["run"])
    fields = [f for f in spec.flat(read) if f.startswith("later")]
    assert len(fields) == 4  # of the run, its site, its dictionary and its training
    assert {spec.flat(read)[f] for f in fields} == {7}
    assert (read.model.later_modelspec, read.data.later_dataspec) == (7, 7)
    assert keys.stored_run(spec.flat(read)) == read
    written_today = spec.run_from_dict(old)
    assert {written_today.sae.later_saespec, written_today.model.later_modelspec} == {grown}


def test_a_missing_result_is_compared_with_completed_specs(recorded, grown):
    for stage in ("train", "evaluate", "transfer", "drift"):
        wanted = pipeline._as_today(store.artefacts(stage)[0].spec)
        (wanted if stage == "train" else wanted["run"])["adam_eps"] = 0.25
        message = pipeline._missing(stage, "0", wanted)
        assert "differs in adam_eps (0.25, there 6.25e-10);" in message


def test_a_checkpoint_is_continued_after_an_added_field(tmp_path):
    generator = torch.Generator().manual_seed(0)
    blocks = text.TokenBlocks(torch.randint(2, VOCAB, (40, 8), generator=generator).int().numpy())
    fields = {"model": "tiny", "data": {"context_length": 8}, "expansion_factor": 2, "k": 2}
    fields |= {"tokens": 4 * 64, "batch_tokens": 64}
    lm, checkpoint = tiny_lm(), tmp_path / "checkpoint"
    whole = train_on_text(spec.run_from_dict(fields), lm, blocks).sae.state_dict()
    with pytest.raises(store.Stopped):
        train_on_text(
            spec.run_from_dict(fields),
            lm,
            blocks,
            checkpoint=checkpoint,
            should_stop={2}.__contains__,
        )
    with in_place(later(7)):
        other = spec.run_from_dict(fields | {"later_saespec": 9})
        with pytest.raises(store.StoreError, match="belongs to another run"):
            train_on_text(other, lm, blocks, checkpoint=checkpoint)
        run = spec.run_from_dict(fields)
        assert run.sae.later_saespec == 7
        steps = []
        rest = train_on_text(run, lm, blocks, checkpoint=checkpoint, should_stop=steps.append)
    assert steps == [3]  # asked after every step but the last
    for name, tensor in rest.sae.state_dict().items():
        assert torch.equal(tensor, whole[name]), name


# --- fields that go -------------------------------------------------------------------------------


def test_renamed_and_removed_fields_are_read_and_keyed_as_before(recorded, monkeypatch):
    """A commit that calls `k` another name and no longer knows `standardize: false`."""
    hints = get_type_hints(spec.SaeSpec)
    fields = [
        (
            "active" if f.name == "k" else f.name,
            hints[f.name],
            dataclasses.field(default=f.default, metadata=f.metadata),
        )
        for f in dataclasses.fields(spec.SaeSpec)
        if f.name != "standardize"
    ]
    former = {"_former": {"k": Renamed("active"), "standardize": Removed(True)}}
    migrated = dataclasses.make_dataclass(
        "Sae", fields, bases=(Spec,), frozen=True, namespace=former
    )
    old = next(iter(recorded["artefacts"]["train"].values()))["spec"]
    with in_place({spec.SaeSpec: migrated}):
        orphans = lost(recorded, monkeypatch)
        run = keys.stored_run(old)
        with pytest.raises(SpecError, match=r"standardize: expected True, since .*, got False"):
            keys.stored_run(old | {"standardize": False})
        monkeypatch.setitem(former["_former"], "standardize", Removed(False))
        there = [a for a in store.artefacts("train") if a.spec["standardize"]]
        monkeypatch.setattr(store, "artefacts", lambda stage: there)
        wanted = {"k": 1, **spec.flat(run)}
        assert "nothing of this stage exists" in pipeline._missing("train", "0", wanted)
    assert not orphans
    assert run.sae.active == old["k"]


@dataclasses.dataclass(frozen=True)
class Before(Spec):
    width: int
    mode: str = "plain"
    depth: int = added(1)
    heads: int = added(1)
    tied: bool = added(False)
    inner: DataSpec = added(DataSpec("a"))


@dataclasses.dataclass(frozen=True)
class After(Spec):
    size: int
    layers: int = added(1)
    inner: DataSpec | None = added(DataSpec("a"), None)

    _former: ClassVar = {
        "width": Renamed("size"),
        "wide": Renamed("size"),  # what it was called in between
        "mode": Removed("plain"),
        "depth": Renamed("layers"),
        "heads": Removed(1, introduced=1),
        "tied": Removed(True, introduced=False),
    }


def test_fields_that_were_added_migrate_like_others():
    for depth in (1, 2):
        before = Before(3, depth=depth, tied=True)
        after = keys.stored(After, spec.to_dict(before))
        assert after == After(3, layers=depth, inner=DataSpec("a"))
        assert keys.keyed(after) == keys.keyed(before)
        assert keys.later(after) == keys.later(before)
    assert keys.keyed(after) == {"width": 3, "mode": "plain", "depth": 2, "tied": True}
    assert keys.later(after) == {"depth": 2, "tied": True}
    assert keys.stored(After, {"wide": 3}) == After(3, inner=DataSpec("a"))
    assert "inner" in keys.keyed(After(3))
    with pytest.raises(SpecError, match="heads: expected 1, since that is all there is now, got 2"):
        keys.stored(After, {"width": 3, "heads": 2})


# --- fields that nobody declared ------------------------------------------------------------------


def complaints(classes):
    """What about the fields of specs would orphan results, one line each."""
    records = [json.loads(path.read_text())["fields"] for path in RECORDS]
    for name, cls in classes.items():
        frozen = [set(fields[name]) for fields in records if name in fields]
        if not frozen:
            yield (
                f"{name} is in no record of fields; make one as the head of tests/test_keys.py says"
            )
            continue
        known = cls._former.keys()
        renamed = {how.to for how in cls._former.values() if isinstance(how, Renamed)}
        today, began = {f.name for f in dataclasses.fields(cls)}, set(began_with(cls))
        for field in sorted(began - set.intersection(*frozen) - renamed):
            yield (
                f"{name}.{field} changes the key of every result; declare it as "
                f"`{field}: ... = added(WHAT_ALL_RESULTS_HAVE_SO_FAR)`, see mlsae_core.spec.added"
            )
        for field in sorted(set.union(*frozen) - today - known):
            yield (
                f"{name}.{field} is gone and with it every result; put Renamed or Removed for "
                f"`{field}` into {name}._former"
            )
        for field in sorted(today & known):
            yield f"{name}.{field} had another meaning once; take another name"
        for field in sorted((today - began) & set.union(*frozen)):
            yield f"{name}.{field} was there from the beginning: it cannot be `added`"


def test_every_field_is_declared():
    assert not list(complaints(subclasses()))


@dataclasses.dataclass(frozen=True)
class Undeclared(EvaluateSpec):
    part: int = 0


@dataclasses.dataclass(frozen=True)
class Gone(Spec):
    tokens: int = 1
    split: str = "test"


@dataclasses.dataclass(frozen=True)
class Reused(EvaluateSpec):
    _former: ClassVar = {"split": Removed("test")}


@dataclasses.dataclass(frozen=True)
class Late(EvaluateSpec):
    split: str = added("test")


@dataclasses.dataclass(frozen=True)
class Fine(Gone):
    ablate: bool = True
    part: int = added(0)
    _former: ClassVar = {"ablations": Renamed("ablate")}


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (
            Undeclared,
            "EvaluateSpec.part changes the key of every result; declare it as `part: ... = ",
        ),
        (Gone, "EvaluateSpec.ablations is gone and with it every result; put Renamed or Removed"),
        (Reused, "EvaluateSpec.split had another meaning once; take another name"),
        (Late, "EvaluateSpec.split was there from the beginning: it cannot be `added`"),
        (Fine, ""),
    ],
)
def test_what_would_orphan_results_is_named_with_the_remedy(cls, expected):
    found = list(complaints({"EvaluateSpec": cls}))
    assert len(found) == bool(expected)
    assert not expected or found[0].startswith(expected)


def test_a_spec_that_is_in_no_record_is_named():
    (message,) = complaints({"Late": Late})
    assert message.startswith("Late is in no record")


if __name__ == "__main__":
    print(spec.canonical(record()))
