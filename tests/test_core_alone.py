"""`mlsae_core` trains and computes every metric with nothing but what it declares.

The work is done by a Python whose packages are `mlsae_core`, the distributions to which its
requirements lead, and pytest: what is there after `pip install mlsae-core` without extras.
"""

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TESTING = ("pytest", "hypothesis", "packaging")  # for the metrics' own tests and this file


def add_needed(found, requirements):
    """Add the installed distributions to which requirements lead, directly or through others."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, requirements):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        marker = requirement.marker
        if name in found or not (marker is None or marker.evaluate({"extra": ""})):
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # of another platform or version
            continue
        add_needed(found, found[name].requires or [])


def lay_out(packages):
    """Fill a folder with links to `mlsae_core` and to what it needs."""
    packages.mkdir()
    (packages / "mlsae_core").symlink_to(ROOT / "mlsae_core")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {}
    add_needed(found, [*project["dependencies"], *TESTING])
    for distribution in found.values():
        for name in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (packages / name).exists():
                (packages / name).symlink_to(distribution.locate_file(name))


def work(spec):
    """Import every module, train, evaluate, and run the tests of the metrics."""
    for name in ("altair", "ipywidgets", "sphinx", "tuned_lens", "mlsae_book"):
        assert importlib.util.find_spec(name) is None, f"{name} can be imported"
    import mlsae_core

    for module in pkgutil.walk_packages(mlsae_core.__path__, "mlsae_core."):
        if not module.name.endswith("triton_kernels"):  # which a GPU's torch brings triton for
            importlib.import_module(module.name)
    from mlsae_core import pipeline
    from mlsae_core.__main__ import main
    from mlsae_core.spec import EvaluateSpec, load_run

    assert main(["evaluate", spec, "--tokens", "128"]) == 0
    pipeline.Session().distributions(load_run(spec), EvaluateSpec(tokens=128))
    tests = map(str, sorted(ROOT.glob("tests/test_metrics_*.py")))
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-o", "addopts=", *tests]))


@pytest.mark.slow
def test_the_core_needs_only_what_it_declares(inputs, tmp_path):
    spec, packages = tmp_path / "spec.yml", tmp_path / "packages"
    values = {
        "model": str(inputs / "llama"),
        "data": {"path": str(inputs / "text.jsonl"), "context_length": 8},
        "layers": "all",
        "expansion_factor": 2,
        "k": 4,
        "tokens": 256,
        "seed": 0,
        "batch_tokens": 64,
    }
    spec.write_text(yaml.safe_dump(values))
    lay_out(packages)
    ran = subprocess.run(
        [sys.executable, "-S", __file__, str(spec)],
        env={
            "PYTHONPATH": str(packages),
            "MLSAE_DATA": str(tmp_path / "data"),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # anyio is imported before pytest
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"\d+ passed", ran.stdout)


if __name__ == "__main__":
    work(*sys.argv[1:])
