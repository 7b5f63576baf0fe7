"""What is installed beside this project: all of it is needed, pinned, and free to be used."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("book", "test", "browser", "gpu")  # of which CI installs all
BUILDERS = {"setuptools", "wheel"}  # of whatever has no wheel
#: Words of licences under which a package may be used and passed on by anybody, of a file's own
#: copyleft (MPL) at most.
FREE = re.compile(
    r"\b(MIT|MIT-0|BSD|0BSD|Apache|ISC|PSF-2.0|Python Software Foundation|MPL|Mozilla|Zlib)\b"
)
OTHER = re.compile(r"GPL|Affero|Commercial|Proprietary|Non-?Commercial", re.I)
#: Looked at by hand: its one file under the GPL is a mode for Emacs.
BY_HAND = {"docutils"}


def pins(text: str = CONSTRAINTS) -> dict[str, str]:
    pairs = [line.split("==") for line in text.splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def needed() -> dict[str, set[str]]:
    """The packages that the project needs, directly or not, with their extras."""
    found: dict[str, set[str]] = {}
    optional = (line for extra in EXTRAS for line in PROJECT["optional-dependencies"][extra])
    pending = [Requirement(line) for line in (*PROJECT["dependencies"], *optional)]
    while pending:
        wanted = pending.pop()
        name = canonicalize_name(wanted.name)
        if name in found and wanted.extras <= found[name]:
            continue
        extras = found.setdefault(name, set())
        extras |= wanted.extras
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            if name not in BUILDERS:
                pytest.skip(f"{name} is not installed, so nobody knows what it needs")
            continue
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in ("", *extras)):
                pending.append(requirement)
    return found


def licence(name: str) -> str:
    """What a package says of itself, the most exact first."""
    about = importlib.metadata.metadata(name)
    classified = [c for c in about.get_all("Classifier", []) if c.startswith("License ::")]
    said = about.get("License-Expression") or "; ".join(classified)
    return said or (about.get("License") or "").partition("\n")[0]


def test_every_pinned_package_is_needed_and_every_needed_one_pinned():
    own, _, mutants = CONSTRAINTS.partition("# For `make mutants` alone.")
    found = needed()
    assert sorted(pins(own).keys() - found.keys()) == []
    # Of torch for CUDA many more, in the versions that it asks for.
    unpinned = found.keys() - pins(own).keys() - BUILDERS
    assert sorted(name for name in unpinned if not name.startswith(("nvidia", "cuda"))) == []
    assert "cosmic-ray" in pins(mutants)
    assert not pins(own).keys() & pins(mutants).keys()


def test_versions_are_the_pinned_ones():
    names = needed().keys() & pins().keys()
    versions = {name: importlib.metadata.version(name).split("+")[0] for name in names}
    assert versions == {name: pins()[name] for name in names}


def test_every_package_is_free_to_be_used_and_passed_on():
    said = {name: licence(name) for name in needed().keys() - BY_HAND - BUILDERS}
    assert {n: text for n, text in said.items() if not FREE.search(text)} == {}
    assert {n: text for n, text in said.items() if OTHER.search(text)} == {}


def test_every_requirement_has_a_pin_within_its_range():
    extras = PROJECT["optional-dependencies"].values()
    for line in [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]:
        requirement = Requirement(line)
        version = pins()[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, line
    assert pins()["torch"] == "2.13.0"


def test_pins_hold_on_every_platform():
    assert not {"pip", "setuptools", "wheel", PROJECT["name"]} & pins().keys()
    assert not [version for version in pins().values() if "+" in version]


def test_conda_environment_declares_no_version_but_pythons():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, nested = environment["dependencies"]
    assert (python, pip) == (f"python{PROJECT['requires-python']}", "pip")
    constraints, project = nested["pip"]
    assert constraints == "-c constraints.txt"
    extras = re.fullmatch(r"-e \.\[(.*)\]", project)[1].split(",")
    assert set(extras) == {"book", "test"} <= set(PROJECT["optional-dependencies"])
