"""Keyed artefacts: where results are found, computed once, and written whole or not at all.

An artefact is a folder ``<stage>/<key>/`` that holds files plus ``spec.json`` (what it is a
function of) and ``meta.json`` (how it came to be, and the SHA-256 of every file). The key hashes
the spec, the stage's name and version and the keys of its parents. Lookup goes shipped results
(``data/shipped``, tracked) → this machine's store (``data/store``) → compute.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mlsae_core import __version__
from mlsae_core.spec import SpecError, canonical

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("MLSAE_DATA", ROOT / "data"))
MODELS, SHIPPED, STORE = DATA / "models", DATA / "shipped", DATA / "store"

# Raise a stage's version when its numbers change; tests/test_golden.py fails when they do without.
STAGES = {"documents": 1, "tokens": 1, "train": 1, "evaluate": 1, "distributions": 1, "norms": 1}


class StoreError(RuntimeError):
    """A damaged or missing artefact: the message names the file and the remedy."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key(stage: str, spec: dict, parents: dict[str, str]) -> str:
    """The identity of a result: 16 hex digits of SHA-256 over spec, stage, version and parents."""
    identity = {"stage": stage, "version": STAGES[stage], "spec": spec, "parents": parents}
    return hashlib.sha256(canonical(identity).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Artefact:
    """A finished result: its folder, and what spec.json and meta.json say."""

    path: Path
    spec: dict
    meta: dict

    @property
    def key(self) -> str:
        return self.path.name

    def file(self, name: str) -> Path:
        """Path of one of its files."""
        if name not in self.meta["files"]:
            raise StoreError(
                f"{self.path}: holds no {name}; it has {', '.join(self.meta['files'])}"
            )
        return self.path / name


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that replaces it when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield work
        for file in work.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
        work.chmod(0o755)
        old = None
        if path.exists():
            old = path.with_name(f".{path.name}-old-{os.getpid()}")
            path.rename(old)
        work.rename(path)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_text(path: Path, text: str):
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def provenance() -> dict:
    """Commit, versions and machine of this process, for meta.json and model cards."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    packages = ("torch", "transformers", "accelerate", "numpy")
    return {
        "commit": commit,
        "mlsae_core": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name).split("+")[0] for name in packages},
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
    }


def read(path: Path, check: bool = True) -> Artefact:
    """Read an artefact and check every file against its recorded hash."""
    try:
        spec = json.loads((path / "spec.json").read_text())
        meta = json.loads((path / "meta.json").read_text())
        files = dict(meta["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(
            f"{path}: spec.json or meta.json is missing or damaged; delete the folder to recompute"
        ) from None
    for name, digest in files.items() if check else ():
        file = path / name
        if not file.is_file():
            raise StoreError(f"{file}: missing; delete {path} to recompute it")
        if file_hash(file) != digest:
            raise StoreError(f"{file}: damaged (hash differs); delete {path} to recompute it")
    return Artefact(path, spec, meta)


def find(stage: str, identity: str) -> Artefact | None:
    """The shipped artefact with this key, else this machine's, else nothing."""
    for root in (SHIPPED, STORE):
        path = root / stage / identity
        if (path / "meta.json").is_file():
            return read(path)
    return None


def artefacts(stage: str) -> list[Artefact]:
    """All artefacts of a stage, shipped ones first, files not checked."""
    found = []
    for root in (SHIPPED, STORE):
        for path in sorted((root / stage).glob("*/meta.json")):
            with contextlib.suppress(StoreError):
                found.append(read(path.parent, check=False))
    return found


def write(
    stage: str,
    identity: str,
    spec: dict,
    parents: dict[str, str],
    fill: Callable[[Path], dict],
) -> Artefact:
    """Compute an artefact: `fill(folder)` writes its files, returns what to note in meta.json."""
    start = time.perf_counter()
    path = STORE / stage / identity
    with atomic_folder(path) as folder:
        notes = fill(folder)
        files = {f.relative_to(folder).as_posix(): file_hash(f) for f in sorted(folder.rglob("*"))}
        meta = {
            "stage": stage,
            "version": STAGES[stage],
            "parents": parents,
            "files": files,
            "seconds": round(time.perf_counter() - start, 1),
            "written": time.strftime("%Y-%m-%d", time.gmtime()),
            **notes,
            **provenance(),
        }
        (folder / "spec.json").write_text(json.dumps(spec, indent=1, sort_keys=True) + "\n")
        (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return read(path, check=False)


def ship(artefact: Artefact, only: tuple[str, ...] | None = None) -> Path:
    """Copy an artefact (or some of its files) into the tracked results; returns where it lies."""
    target = SHIPPED / artefact.meta["stage"] / artefact.key
    kept = artefact.meta["files"] if only is None else {n: artefact.meta["files"][n] for n in only}
    with atomic_folder(target) as folder:
        for name in kept:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artefact.path / name, folder / name)
        shutil.copyfile(artefact.path / "spec.json", folder / "spec.json")
        meta = {**artefact.meta, "files": kept}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return target


# --- checkpoints ------------------------------------------------------------------------------


def save_checkpoint(path: Path, state):
    """Write nested dicts and lists of tensors and plain values as one file, atomically."""
    tensors: dict[str, torch.Tensor] = {}

    def plain(value):
        if isinstance(value, torch.Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous().clone()
            return {"tensor": name}
        if isinstance(value, dict):
            return {"items": [[key, plain(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {"list": [plain(item) for item in value]}
        return {"value": value}

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    save_file(tensors, temporary, metadata={"state": json.dumps(plain(state))})
    os.replace(temporary, path)


def load_checkpoint(path: Path):
    """What `save_checkpoint` wrote; a damaged file is named."""
    try:
        with safe_open(path, "pt") as file:
            structure = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors has its own exception type, json another
        raise StoreError(f"{path}: damaged checkpoint ({error}); delete it to start anew") from None

    def nested(node):
        (kind, content), *_ = node.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "items":
            return {key: nested(item) for key, item in content}
        return [nested(item) for item in content] if kind == "list" else content

    return nested(structure)


# --- language models --------------------------------------------------------------------------


def shipped_models() -> list[str]:
    """Names of the language models under ``data/models``."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.json"))


def model_folder(path: str) -> Path | None:
    """The folder of a shipped name or a path; nothing if `path` can only be a hub id."""
    if (MODELS / path / "config.json").is_file():
        return MODELS / path
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SpecError(f"model: {path} has no config.json; expected a Hugging Face folder")
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise SpecError(f"model: no folder {path}; shipped models: {', '.join(shipped_models())}")
    return None


def model_key(path: str, revision: str | None) -> str:
    """Identity of a model: the hash of a folder's weights, config and tokenizer, or id@revision."""
    folder = model_folder(path)
    if folder is None:
        return f"{path}@{revision or 'main'}"
    patterns = ("config.json", "*.safetensors", "tokenizer.json", "tokenizer.model")
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    digests = {file.name: file_hash(file) for file in files}
    return hashlib.sha256(canonical(digests).encode()).hexdigest()[:16]
