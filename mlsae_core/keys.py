"""What of a spec is hashed, and how specs of earlier commits are read: fields come, keys stay.

Fields that a spec began with are always hashed, one that was `added` only where it differs from
what it was introduced with, and a former one (`Renamed`, `Removed`) as if it were still there. So
no result that exists loses its key, and its spec is read as if it had been written today.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_args, get_type_hints

from mlsae_core.spec import (
    GivenSpec,
    Removed,
    Renamed,
    Spec,
    SpecError,
    SubjectSpec,
    build,
    kind_of,
    run_from_dict,
    sections,
)

S = TypeVar("S", bound=Spec)


def keyed(spec: Spec) -> dict[str, Any]:
    """The fields of a spec that its results' keys hash, nested, as plain JSON values."""
    return {
        name: _plain(value)
        for name, value, introduced in _entries(spec)
        if introduced is MISSING or _plain(value) != _plain(introduced)
    }


def later(spec: Spec) -> dict[str, Any]:
    """Those of `keyed` that came after the first results.

    Whatever hashes some fields of a spec hashes these as well: it cannot know that they do not
    count.
    """
    began = {name for name, _, introduced in _entries(spec) if introduced is MISSING}
    return {name: value for name, value in keyed(spec).items() if name not in began}


def _entries(spec: Spec) -> Iterator[tuple[str, Any, Any]]:
    """Name in keys, value, and what it was introduced with, of each field and each former one."""
    former = spec._former.items()
    first = {how.to: old for old, how in reversed(former) if isinstance(how, Renamed)}
    for f in fields(spec):
        introduced = f.metadata.get("introduced", MISSING)
        yield first.get(f.name, f.name), getattr(spec, f.name), introduced
    for old, how in former:
        if isinstance(how, Removed):
            yield old, how.value, how.introduced


def _plain(value):
    """A field's value as JSON has it."""
    if isinstance(value, Spec):
        return keyed(value)
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def run_settings(run: SubjectSpec) -> dict[str, Any]:
    """The fields of a run that count by themselves; what is read counts by its content."""
    settings = keyed(run.model) | later(run)
    for section in sections(type(run)):
        settings |= keyed(getattr(run, section))
    if isinstance(run, GivenSpec):
        settings |= later(run.dictionary)
    for name in ("path", "revision", "folders", "basis"):
        settings.pop(name, None)
    return settings | {"context_length": run.data.context_length}


# --- specs of earlier commits -------------------------------------------------------------------


def stored(cls: type[S], values: dict[str, Any]) -> S:
    """A spec from the fields that were written beside a result, by whichever commit.

    Raises:
        SpecError: a field that no longer exists has a value of which there are no results any more.
    """
    return build(cls, _completed(cls, values))


def stored_run(values: dict[str, Any]) -> SubjectSpec:
    """`stored` for a run, whose fields stand flat."""
    kind = kind_of(values)
    for cls in (kind, *sections(kind).values()):
        values = _completed(cls, values)
    return run_from_dict(values)


def _completed(cls: type[Spec], values):
    """The fields that `cls` has today, of a spec in which some are missing or have former names."""
    if not isinstance(values, dict):
        return values  # reading it says what is wrong with it
    values = dict(values)
    for old, how in cls._former.items():
        if old not in values:
            continue
        value = values.pop(old)
        if isinstance(how, Renamed):
            values[how.to] = value
        elif value != _plain(how.value):
            raise SpecError(
                f"{cls._prefix}{old}: expected {how.value}, since that is all there is now, got "
                f"{value}"
            )
    hints = get_type_hints(cls)
    for f in fields(cls):
        if "introduced" in f.metadata:
            values.setdefault(f.name, f.metadata["introduced"])
        for inner in (hints[f.name], *get_args(hints[f.name])):
            if isinstance(inner, type) and issubclass(inner, Spec) and f.name in values:
                values[f.name] = _completed(inner, values[f.name])
    return values
