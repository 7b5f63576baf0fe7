"""`make lab`: the chapters in JupyterLab, as a working copy in which everything may be changed.

What is tracked stays as it is, whatever is executed and saved. The copy reads as the pages do: roles
that Sphinx understands and JupyterLab does not become links, names and numbers, and the code that a
page hides is folded.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

#: Folder of the copy, beside `book`; of what lies in it, and what it was copied from.
COPY, RECORD = "lab", ".copied.json"
#: What a chapter opens: notebooks, and what these read by a relative path.
FILES = ("book/*.ipynb", "book/*.csv", "book/experiments/**/*.yml", "benchmarks/*.json")
HIDDEN = {"hide-input", "hide-cell", "remove-input", "remove-cell"}


def copy(root: Path) -> list[Path]:
    """Bring the copy up to date; gives the files that stay as a reader has changed them."""
    record = root / COPY / RECORD
    known = json.loads(record.read_text()) if record.is_file() else {}
    kept = []
    for source in sorted({path for pattern in FILES for path in root.glob(pattern)}):
        name = source.relative_to(root).as_posix()
        target = root / COPY / name
        content = source.read_bytes()
        if source.suffix == ".ipynb":
            content = readable(root, source).encode()
        if target.is_file() and known.get(name) != _hash(target.read_bytes()):
            kept += [target] if content != target.read_bytes() else []
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        known[name] = _hash(content)
    (root / COPY / "jupytext.toml").write_text('formats = "ipynb"\n')  # no second half of a pair
    record.write_text(json.dumps(known, indent=1))
    return kept


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def readable(root: Path, chapter: Path) -> str:
    """A notebook as JupyterLab shows it best, with its outputs."""
    notebook = json.loads(chapter.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = markdown(root, chapter.stem, "".join(cell["source"]))
            cell["source"] = text.splitlines(keepends=True)
        elif HIDDEN & set(cell["metadata"].get("tags", ())):
            cell["metadata"]["jupyter"] = {"source_hidden": True}
    notebook["metadata"].pop("jupytext", None)
    return json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"


def markdown(root: Path, page: str, text: str) -> str:
    """Text of a cell in the Markdown that JupyterLab knows."""
    titles, equations, literature = _titles(root), _equations(root), _literature(root)

    def role(found: re.Match) -> str:
        name, target = found.groups()
        if name == "doc":
            return f"[{titles.get(target, target)}]({target}.ipynb)"
        if name == "eq":
            other, number = equations[target]
            return f"({number})" + (
                "" if other == page else f" of [{titles[other]}]({other}.ipynb)"
            )
        names = [literature[key.strip()] for key in target.split(",")]
        if name == "cite:p":
            return f"({'; '.join(f'{who}, {year}' for who, year, _ in names)})"
        return ", ".join(f"{who} ({year})" for who, year, _ in names)

    def numbered(found: re.Match) -> str:
        return f"{found[1].rstrip()}\n\\tag{{{equations[found[2]][1]}}}\n$$"

    text = re.sub(r"(\$\$(?:(?!\$\$).)*)\$\$ \((eq-[\w-]+)\)", numbered, text, flags=re.DOTALL)
    text = re.sub(r"\{(doc|eq|cite:[tp])\}`([^`]*)`", role, text)
    text = re.sub(r"^\([\w-]+\)=\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[([^]]*)\]\([\w-]+\)", r"\1", text)  # links to such marks
    if "```{bibliography}" in text:
        listed = "\n".join(f"- {whole}" for _, _, whole in _cited(root, page, literature))
        text = re.sub(r"```\{bibliography\}.*?```", lambda _: listed, text, flags=re.DOTALL)
    return text


def _source(notebook: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


@functools.cache
def _titles(root: Path) -> dict[str, str]:
    found = {path.stem: _source(path) for path in (root / "book").glob("*.ipynb")}
    return {page: re.search(r"^# (.*)", text, re.MULTILINE)[1] for page, text in found.items()}


@functools.cache
def _equations(root: Path) -> dict[str, tuple[str, int]]:
    """Label of an equation → its page and its number there."""
    found = {}
    for path in (root / "book").glob("*.ipynb"):
        labels = re.findall(r"\$\$ \((eq-[\w-]+)\)", _source(path))
        found |= {label: (path.stem, number) for number, label in enumerate(labels, 1)}
    return found


@functools.cache
def _literature(root: Path) -> dict[str, tuple[str, str, str]]:
    """Key → authors as one cites them, year, and the whole entry."""
    from pybtex.database import parse_file
    from pybtex.richtext import Text

    found = {}
    for key, entry in parse_file(str(root / "book/references.bib")).entries.items():
        people = [
            str(Text.from_latex(" ".join([*p.prelast_names, *p.last_names])))
            for p in entry.persons["author"]
        ]
        who = people[0] + (f" and {people[1]}" if len(people) == 2 else "")
        who += " et al." if len(people) > 2 else ""
        fields = {name: str(Text.from_latex(value)) for name, value in entry.fields.items()}
        where = fields.get("journal") or fields.get("booktitle") or fields.get("howpublished", "")
        parts = [f"{', '.join(people)} ({fields['year']})", f"*{fields['title']}*", where]
        parts.append(fields.get("note"))
        found[key] = who, fields["year"], ". ".join(filter(None, parts))
    return found


def _cited(root: Path, page: str, literature: dict) -> list[tuple[str, str, str]]:
    text = _source(root / "book" / f"{page}.ipynb")
    keys = {
        k.strip() for part in re.findall(r"\{cite:[tp]\}`([^`]*)`", text) for k in part.split(",")
    }
    return sorted(literature[key] for key in keys)


def main(arguments: list[str]) -> int:
    """Copy, and start JupyterLab at the first page; arguments are JupyterLab's."""
    root = Path.cwd()
    for path in copy(root):
        print(f"{path.relative_to(root)} is yours: it differs from the book's, and stays so")
    lab = [sys.executable, "-m", "jupyterlab", str(root / COPY / "book")]
    return subprocess.run(
        [*lab, "--LabApp.default_url=/lab/tree/intro.ipynb", *arguments]
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
