"""What all specs share: fields that are coerced by their annotations, and strict YAML."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import os
import reprlib
import types
import typing
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

import yaml


class SpecError(ValueError):
    """Bad input: the message names the field, what came and what is expected."""


def added(introduced, default=MISSING, **options):
    """A field that a spec got after there were results of it; they keep their keys.

    Args:
        introduced: what all earlier results have, written out; it never changes.
        default: of new specs, where that is another by now.
        options: of `dataclasses.field`.
    """
    default = introduced if default is MISSING else default
    return field(default=default, metadata={"introduced": introduced}, **options)


class Renamed(NamedTuple):
    """How a field that has another name today is read and hashed."""

    to: str


class Removed(NamedTuple):
    """How a field that is gone is read and hashed.

    value: the one that remained; specs with another are refused. introduced: where it was `added`.
    """

    value: Any
    introduced: Any = MISSING


@dataclass(frozen=True)
class Spec:
    """Base of all specs: fields are coerced by their annotations however a spec is built.

    So `1` and `1.0`, or a list and a tuple, cannot make two keys of one run. A field that comes
    after there are results is declared by `added`, one that goes stands in `_former`.
    """

    _prefix = ""  # of field names in messages
    _former: ClassVar[dict[str, Renamed | Removed]] = {}  # by former name, the oldest first

    def __post_init__(self):
        found = hints(type(self))
        for f in dataclasses.fields(self):
            value = coerce(self._prefix + f.name, getattr(self, f.name), found[f.name])
            object.__setattr__(self, f.name, value)

    def _require(self, holds: bool, name: str, expected: str):
        if not holds:
            raise SpecError(
                f"{self._prefix}{name}: expected {expected}, got {shown(getattr(self, name))}"
            )

    def _positive(self, *names: str):
        for name in names:
            value = getattr(self, name)
            self._require(value is None or value > 0, name, "a number above 0")

    def _path(self, name: str, expected: str):
        """Refuse a path that no file system takes, or that would break a message's line."""
        value = getattr(self, name)
        fine = value.strip() != "" and value.isprintable()
        fine = fine and max(len(os.fsencode(part)) for part in value.split("/")) < 256
        if fine:
            try:
                Path(value).expanduser()
            except RuntimeError:  # of a user who is not there
                fine = False
        self._require(fine, name, expected)

    def _seed(self, name: str):
        value = getattr(self, name)
        self._require(value is None or 0 <= value < 2**32, name, "a number from 0 to 2**32 - 1")


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error; plain YAML takes the last one."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise SpecError(f"{key.value}: given twice (line {key.start_mark.line + 1})")
                seen.add(key.value)
        return super().construct_mapping(node, deep=True)


class _TextLoader(_Loader):
    """Scalars stay text, for `coerce`: YAML 1.1 reads `on` as true, `032` as 26, `1e-4` as text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as in the base class)
        key: [(tag, pattern) for tag, pattern in rules if tag.rsplit(":")[-1] in ("null", "merge")]
        for key, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


def shown(value) -> str:
    """A value in a message: short, on one line."""
    return "nothing" if value is None else _repr.repr(value)


@functools.cache
def hints(cls) -> dict[str, Any]:
    return get_type_hints(cls)


def coerce(name: str, value, annotation):
    """`value` as `annotation` asks: numbers may be written 2_000_000, 1e-4 or 2e6."""
    origin, options = get_origin(annotation), get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        for option in options:
            try:
                return coerce(name, value, option)
            except SpecError:
                continue
    elif annotation is type(None):
        if value is None or value == "null":
            return None
    elif origin is Literal:
        if isinstance(value, str) and value in options:
            return value
    elif origin is tuple:
        items = value if isinstance(value, list | tuple | range) else [value]
        return tuple(coerce(name, item, options[0]) for item in items)
    elif annotation is bool:
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif annotation in (int, float):
        if (number := _number(value, annotation)) is not None:
            return number
    elif annotation is str and isinstance(value, str | os.PathLike):
        return os.fspath(value)
    elif annotation is dict and isinstance(value, dict):
        return value
    elif dataclasses.is_dataclass(annotation):
        return value if isinstance(value, annotation) else build(annotation, value, name)
    raise SpecError(f"{name}: expected {_describe(annotation)}, got {shown(value)}")


def _number(value, kind: type) -> int | float | None:
    """A finite number of that kind, whole ones below 2**63; nothing where `value` is not one."""
    if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
        return None
    digits = str(value).replace("_", "")
    try:
        whole = int(digits)
    except ValueError:
        try:
            number = float(digits)
        except ValueError:
            return None
        if not math.isfinite(number):
            return None
        if kind is float:
            return number
        if number != int(number):
            return None
        whole = int(number)
    if abs(whole) >= 2**63:
        return None
    return kind(whole)


def _describe(annotation) -> str:
    origin, options = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, options))
    if origin is tuple:
        return f"a list of {_describe(options[0])}s"
    if options:
        return " or ".join(_describe(o) for o in options)
    names = {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "true | false",
        type(None): "nothing",
    }
    return names.get(annotation, "fields")


def reject_unknown(values: dict, known, prefix: str = ""):
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(sorted(known))}"
            raise SpecError(f"{prefix}{name}: unknown field; {hint}")


def build(cls, values, name: str = ""):
    """A spec from a mapping of its fields; a bare string is its `path`.

    name: of the field that the spec stands in, for messages.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if isinstance(values, str | os.PathLike) and "path" in fields:
        values = {"path": values}
    if not isinstance(values, dict):
        expected = "a path or fields" if "path" in fields else "fields"
        raise SpecError(f"{name or cls.__name__}: expected {expected}, got {shown(values)}")
    reject_unknown(values, fields, cls._prefix)
    for f in fields.values():
        required = f.default is MISSING and f.default_factory is MISSING
        if required and f.name not in values:
            expected = _describe(hints(cls)[f.name])
            raise SpecError(f"{cls._prefix}{f.name}: missing; expected {expected}")
    return cls(**values)


#: Bytes; real ones have some hundreds, and whoever names another file by mistake is told at once.
LARGEST_YAML = 2**20


def read_yaml(path: str | Path, typed: bool = False) -> dict:
    """A YAML file as a mapping, with one clear error for whatever is wrong with it.

    typed: numbers and truth values as YAML reads them; otherwise they stay text, for `coerce`.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise SpecError(f"{path}: is a folder; expected a YAML file")
        if not path.is_file():
            raise SpecError(f"{path}: no such file; expected a YAML file")
        if path.stat().st_size > LARGEST_YAML:
            raise SpecError(f"{path}: expected a YAML file of at most {LARGEST_YAML} bytes")
        content = path.read_text(encoding="utf-8")
        values = yaml.load(content, Loader=_Loader if typed else _TextLoader)
    except SpecError:
        raise
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SpecError(f"{path}: expected `field: value` lines, got {shown(values)}")
    return values
