"""Keyed artefacts: where results are found, computed once, and written whole or not at all.

An artefact is a folder ``<stage>/<key>/`` that holds files plus ``spec.json`` (what it is a
function of) and ``meta.json`` (how it came to be, and the SHA-256 of every file). The key hashes
the spec, the stage's name and version and the keys of its parents. Lookup goes shipped results
(``data/shipped``, tracked) → this machine's store (``data/store``) → compute.

Torch is imported where tensors are read or written, so that looking results up does not wait for
it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlsae_core import __version__, formats
from mlsae_core.spec import SpecError, canonical

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("MLSAE_DATA") or ROOT / "data")
MODELS, SHIPPED, STORE = DATA / "models", DATA / "shipped", DATA / "store"

# The version of every stage: of models and text here, and whoever has others adds them. Raise one
# when its numbers change; tests/test_golden.py fails when they do without.
STAGES = {"models": 1, "tokens": 1}
#: Bytes of the name of a folder that is written; those that are made beside it have longer ones.
LONGEST_NAME = 200
#: Says how those of a folder under `data/dictionaries` were made.
DICTIONARY_MARK = "training.json"
_ASIDE: Path | None = None  # the store, while results are recomputed in another
#: Among the parents of a result: what it read was other than its text's and its model's keys say.
DIFFERS = "differs"


class StoreError(SpecError):
    """A damaged or missing result: the message names the file and the remedy."""


class Stopped(RuntimeError):
    """A computation that stopped before its end: the message says why, and what is kept."""


class Unavailable(Stopped):
    """Input that could be read at first, and no longer; all that was computed of it is good."""


def is_away(error: BaseException) -> bool:
    """Whether it comes of a hub that cannot be reached, or says that it fails or is asked too much.

    That is no fault of what was asked for, unless this process is to ask nobody.
    """
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    if is_offline_mode():
        return False
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code >= 500 or cause.response.status_code == 429
        if isinstance(cause, ConnectionError | TimeoutError | httpx.TransportError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_hash(path: Path) -> str:
    """SHA-256 of an input (weights, text), computed once per process while it does not change."""
    state = path.stat()
    if state.st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
        raise SpecError(f"{path}: is a Git LFS pointer, not the file; `git lfs pull` fetches it")
    return _source_hash(path, state.st_ino, state.st_mtime_ns, state.st_size)


@functools.cache
def _source_hash(path: Path, node: int, modified: int, size: int) -> str:
    return file_hash(path)


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
def atomic_folder(path: Path, replace: bool = True, mark: str = "meta.json") -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends without an error.

    Files have the permissions that the umask gives, however they were made.

    Args:
        replace: false leaves an artefact that another process finished meanwhile, since somebody
            may be reading it.
        mark: the file by which a folder is known as one that was written here.

    Raises:
        StoreError: something without that mark is there; it is not touched.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    settle(path)
    check_own(path, mark)
    _remove_leftovers(path)
    work, old = _beside(path), _set_aside(path)
    work.mkdir()
    mode = work.stat().st_mode & 0o666
    try:
        yield work
        for file in work.rglob("*"):
            if file.is_file():
                file.chmod(mode)
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
        while work.exists():
            try:
                work.rename(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                check_own(path, mark)
                if not replace:
                    break
                shutil.rmtree(old, ignore_errors=True)
                with contextlib.suppress(FileNotFoundError):
                    path.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_own(path: Path, mark: str = "meta.json"):
    """Refuse to write where something is that was not written here, an empty folder aside."""
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise StoreError(f"{path}: expected a name of at most {LONGEST_NAME} bytes, got more")
    if path.is_dir():
        if (path / mark).is_file() or not any(path.iterdir()):
            return
        raise StoreError(f"{path}: expected a folder with {mark}, as written here; move it away")
    for place in (path, *path.parents):
        if place.exists():
            if not place.is_dir():
                raise StoreError(f"{place}: expected a folder, got a file; move it away")
            return


def settle(path: Path):
    """Put back what a process left under another name that was killed between two renames."""
    old = _set_aside(path)
    if old.exists() and not path.exists():
        with contextlib.suppress(OSError):  # another process did
            old.rename(path)


def _set_aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _beside(path: Path) -> Path:
    """A new hidden name next to `path`, of it and this process."""
    return path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def _remove_leftovers(path: Path, before: float = math.inf):
    """Remove what killed processes left beside `path`, if it is not younger than `before`, in ns.

    Those of other machines that share the folder look as if they were killed.
    """
    prefix = f".{path.name}-"
    for left in path.parent.iterdir():
        process = left.name.removeprefix(prefix).partition("-")[0]
        if left.name.startswith(prefix) and process.isdecimal() and not _is_running(int(process)):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
                continue
            with contextlib.suppress(FileNotFoundError):  # another process did
                if left.stat().st_mtime_ns <= before:
                    left.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    return True


def provenance() -> dict:
    """Commit, versions and machine of this process, for meta.json and model cards.

    Read once, but for the card: long runs ask for it before they begin, since the commit may move
    on meanwhile.
    """
    return (found := _provenance()) | {"machine": found["machine"] + _card()}


@functools.cache
def _provenance() -> dict:
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


def _card() -> str:
    """The GPU that this process computes on, if it does."""
    torch = sys.modules.get("torch")
    return f", {torch.cuda.get_device_name()}" if torch and torch.cuda.is_initialized() else ""


def read(path: Path, check: bool = True) -> Artefact:
    """Read an artefact; check that it is the one of its place, and every file's recorded hash."""
    remedy = f"delete {path}; it is computed anew where it is needed"
    if shipped := path.is_relative_to(SHIPPED):
        remedy = f"restore it with `git checkout -- {path}`"
    try:
        content = (path / "spec.json").read_bytes()
        spec, digest = json.loads(content), hashlib.sha256(content).hexdigest()
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        files = dict(meta["files"])
        # In the store of a machine there may be results from before they carried these two.
        carried = ({} if shipped else {"key": path.name, "spec": digest}) | meta
        stage, own, of, _ = (carried[name] for name in ("stage", "key", "spec", "seconds"))
        spec.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StoreError(f"{path}: spec.json or meta.json is damaged; {remedy}") from None
    if (stage, own) != (path.parent.name, path.name):
        raise StoreError(f"{path}: holds another result, {stage} {own}; {remedy}")
    if of != digest:
        raise StoreError(f"{path / 'spec.json'}: damaged; {remedy}")
    for name, digest in files.items() if check else ():
        file = path / name
        if not file.is_file():
            raise StoreError(f"{file}: missing; {remedy}")
        if file_hash(file) != digest:
            raise StoreError(f"{file}: damaged (its hash differs from meta.json); {remedy}")
    return Artefact(path, spec, meta)


def find(stage: str, identity: str) -> Artefact | None:
    """The shipped artefact with this key, else this machine's, else nothing."""
    path = place(stage, identity)
    return path and read(path)


def place(stage: str, identity: str) -> Path | None:
    """The folder that `find` would read."""
    fetched = (_ASIDE,) if _ASIDE and stage == "models" else ()
    for root in (SHIPPED, STORE, *fetched):
        path = root / stage / identity
        settle(path)
        if (path / "meta.json").is_file():
            return path
    return None


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """Within it nothing is shipped, and the store is another one, under ``reproduced``.

    Language models that were fetched are no results, and are found as before.
    """
    global SHIPPED, STORE, _ASIDE
    before = SHIPPED, STORE, _ASIDE
    STORE, _ASIDE = STORE / "reproduced", STORE
    SHIPPED = STORE / "shipped"  # which is never written
    try:
        yield
    finally:
        SHIPPED, STORE, _ASIDE = before


def stages() -> list[str]:
    """Names of the stages of which there is a result."""
    found = (path for root in (SHIPPED, STORE) for path in root.glob("*/*/meta.json"))
    return sorted({path.parents[1].name for path in found})


def is_shipped(stage: str, identity: str) -> bool:
    """Whether there is a shipped result with this key; its files are not checked."""
    path = SHIPPED / stage / identity
    settle(path)
    return (path / "meta.json").is_file()


def artefacts(stage: str) -> list[Artefact]:
    """All artefacts of a stage, shipped ones first, files not checked."""
    found = []
    for root in (SHIPPED, STORE):
        for path in sorted((root / stage).glob("*/meta.json")):
            if not path.parent.name.startswith("."):  # of a run that was killed
                with contextlib.suppress(StoreError):
                    found.append(read(path.parent, check=False))
    return found


def write(
    stage: str,
    identity: str,
    spec: dict,
    parents: dict[str, str],
    fill: Callable[[Path], dict],
    replace: bool = False,
) -> Artefact:
    """Compute an artefact: `fill(folder)` writes its files, returns what to note in meta.json.

    If another process finishes the same one first, that one is kept, unless `replace`.
    """
    start = time.perf_counter()
    path = STORE / stage / identity
    with atomic_folder(path, replace) as folder:
        notes = fill(folder)
        files = {f.relative_to(folder).as_posix(): file_hash(f) for f in sorted(folder.rglob("*"))}
        (folder / "spec.json").write_text(json.dumps(spec, indent=1, sort_keys=True) + "\n")
        meta = {
            "stage": stage,
            "key": identity,
            "spec": file_hash(folder / "spec.json"),
            "version": STAGES[stage],
            "parents": parents,
            "files": files,
            "seconds": round(time.perf_counter() - start, 1),
            "written": time.strftime("%Y-%m-%d", time.gmtime()),
            **notes,
            **provenance(),
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return read(path, check=False)


def ship(artefact: Artefact, only: tuple[str, ...] | None = None) -> Path:
    """Copy an artefact (or some of its files) into the tracked results; returns where it lies.

    What is shipped already with the same content stays, and more of its files if there are any.

    Raises:
        StoreError: it read other text than its key says.
    """
    check_read(str(artefact.path), artefact.meta["parents"])
    target = SHIPPED / artefact.meta["stage"] / artefact.key
    kept = artefact.meta["files"] if only is None else {n: artefact.meta["files"][n] for n in only}
    if (target / "meta.json").is_file():
        held = read(target, check=False).meta["files"]
        if kept.items() <= held.items():
            return target
    with atomic_folder(target) as folder:
        for name in kept:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artefact.path / name, folder / name)
        shutil.copyfile(artefact.path / "spec.json", folder / "spec.json")
        _carry(artefact, folder, files=kept)
    return target


def check_read(what: str, parents: dict[str, str]):
    """Refuse to ship what reads other text than its key says, or was made of such."""
    if found := parents.get(DIFFERS):
        raise StoreError(
            f"{what}: cannot be shipped, expected the text and the model that are pinned, "
            f"got others ({found}); install those releases and compute it again"
        )


def _carry(artefact: Artefact, folder: Path, **changed):
    """Write what a copy of an artefact carries: its facts, its key and the hash of its spec."""
    carried = {"key": artefact.key, "spec": file_hash(folder / "spec.json")} | changed
    (folder / "meta.json").write_text(json.dumps(artefact.meta | carried, indent=1) + "\n")


def ship_half(artefact: Artefact, costs: dict) -> Path:
    """Copy a dictionary into the tracked results, its weights rounded to half precision.

    costs: what that changes, which is noted as ``half`` beside it with the hash of the weights as
    they were.
    """
    from safetensors.torch import load_file, save_file

    check_read(str(artefact.path), artefact.meta["parents"])
    name, target = "model.safetensors", SHIPPED / artefact.meta["stage"] / artefact.key
    before = {"float32": artefact.meta["files"][name]}
    if (target / "meta.json").is_file():
        held = read(target, check=False).meta.get("half", {})
        if before.items() <= held.items():
            return target
    tensors = {key: tensor.half() for key, tensor in load_file(artefact.path / name).items()}
    with atomic_folder(target) as folder:
        shutil.copytree(artefact.path, folder, dirs_exist_ok=True)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        files = artefact.meta["files"] | {name: file_hash(folder / name)}
        _carry(artefact, folder, files=files, half=before | costs)
    return target


# --- checkpoints ------------------------------------------------------------------------------


_DIGEST_BYTES = hashlib.sha256().digest_size


def save_checkpoint(path: Path, state):
    """Write nested dicts and lists of tensors and plain values as one file, atomically.

    It holds the SHA-256 of the rest, and then what `torch.save` writes.
    """
    import torch
    from accelerate.utils import send_to_device

    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb+") as file:
            file.write(bytes(_DIGEST_BYTES))
            torch.save(send_to_device(state, "cpu"), file)
            file.seek(_DIGEST_BYTES)
            digest = hashlib.file_digest(file, "sha256").digest()
            file.seek(0)
            file.write(digest)
        os.replace(temporary, path)
    except RuntimeError as error:  # torch's, where a write fails
        raise OSError(f"{path}: cannot be written; is the disk full? {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def restoring(path: Path, kind: str) -> Iterator[dict]:
    """What a checkpoint holds; where it does not fit whatever it is put in, `kind` was expected.

    Raises:
        StoreError: it does not fit, as one that another version of the code wrote, or is damaged.
    """
    content = load_checkpoint(path)
    try:
        yield content
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise StoreError(f"{path}: expected {kind}; {reason}; delete it to start anew") from error


def forget_checkpoint(path: Path, result: Path):
    """Remove the checkpoint of a result that is there; a kill between the two leaves it behind.

    One that is younger than the file `result` belongs to a computation of it anew. The same goes
    for what a process left that was killed while it wrote one.
    """
    with contextlib.suppress(FileNotFoundError):
        written = result.stat().st_mtime_ns
        _remove_leftovers(path, written)
        if path.stat().st_mtime_ns <= written:
            path.unlink()


def load_checkpoint(path: Path):
    """What `save_checkpoint` wrote, tensors on the CPU; where a bit differs, the file is named."""
    import torch

    with open(path, "rb") as file:
        digest = file.read(_DIGEST_BYTES)
        if digest != hashlib.file_digest(file, "sha256").digest():
            raise StoreError(
                f"{path}: damaged checkpoint (its hash differs from its content); delete it to "
                "start anew"
            )
        file.seek(_DIGEST_BYTES)
        return torch.load(file, map_location="cpu", weights_only=True)


# --- lenses and dictionaries, by name -----------------------------------------------------------


def _named(kind: str, name: str, mark: str) -> Path | None:
    """The folder of that name under ``data/<kind>``, where one with its mark is; no path is one."""
    folder = DATA / kind / name
    if Path(name).name != name or name == "..":
        return None
    settle(folder)
    return folder if (folder / mark).is_file() else None


def lens_folder(basis: str) -> Path:
    """The tuned lens of that name under ``data/lenses``, else the folder `basis` itself."""
    return _named("lenses", basis, "config.json") or Path(basis).expanduser()


def dictionary_folder(
    path: str | os.PathLike[str], revision: str | None = None, folders: Sequence[str] = ()
) -> Path:
    """The folder of a dictionary; of a hub id the local copy, which is made where there is none.

    path: a name under ``data/dictionaries``, a folder or a hub id. folders: patterns of the folders
    of a repository that are copied; by default none is.

    Raises:
        SpecError: none of the three, or a repository that cannot be had.
        Stopped: the hub cannot be reached.
    """
    if isinstance(path, str) and (named := _named("dictionaries", path, DICTIONARY_MARK)):
        return named
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not isinstance(path, str) or path.count("/") != 1 or path.startswith((".", "/", "~")):
        marks = sorted(DATA.glob(f"dictionaries/*/{DICTIONARY_MARK}"))
        known = ", ".join(mark.parent.name for mark in marks) or "none yet"
        raise SpecError(
            f"dictionary.path: expected a folder or a hub id `owner/name`, or a name under "
            f"data/dictionaries ({known}), got {os.fspath(path)}; relative folders start at "
            f"{Path.cwd()}"
        )
    from huggingface_hub import snapshot_download

    names = sorted({name for known in formats.FORMATS.values() for name in known.files})
    chosen = {"allow_patterns": [f"{folder}/{name}" for folder in folders for name in names]}
    if not folders:
        chosen = {"allow_patterns": names, "ignore_patterns": ["*/*"]}
    try:
        return Path(snapshot_download(path, revision=revision, **chosen))
    except Exception as error:  # of many kinds; the reader needs one line
        kind = Stopped if is_away(error) else SpecError
        raise kind(
            f"dictionary.path: {path} is no folder (from {Path.cwd()}), and as a hub id it cannot "
            f"be had: {' '.join(str(error).split())[:300]}"
        ) from error


def dictionary_files(
    path: str | os.PathLike[str], revision: str | None = None, folders: Sequence[str] = ()
) -> dict[int | None, list[Path]]:
    """The files of a dictionary, under None; of one for each layer, those of each under its layer.

    Raises:
        SpecError: a folder that holds no dictionary, or of a layer more than one.
    """
    folder = dictionary_folder(path, revision, folders)
    if not folders and (files := formats.files_of(folder)):
        return {None: files}
    try:
        found = formats.layers(folder, folders)
    except ValueError as error:
        raise SpecError(f"dictionary.path: {error}") from None
    if not found:
        known = "; ".join(" and ".join(known.files) for known in formats.FORMATS.values())
        there = sorted(file.name for file in folder.iterdir())[:8]
        raise SpecError(
            f"dictionary.path: expected {known}, in {folder} or in folders for each layer"
            f"{' as ' + ', '.join(folders) if folders else ''}, got {', '.join(there) or 'nothing'}"
        )
    return {layer: formats.files_of(below) for layer, below in found.items()}


def dictionary_key(
    path: str | os.PathLike[str], revision: str | None = None, folders: Sequence[str] = ()
) -> str:
    """Identity of a dictionary: the hash of its configuration and weights, wherever they lie."""
    found = {
        layer: sorted([file.suffix, source_hash(file)] for file in files)
        for layer, files in dictionary_files(path, revision, folders).items()
    }
    digests = found.get(None) or sorted(found.items())
    return hashlib.sha256(canonical(digests).encode()).hexdigest()[:16]
