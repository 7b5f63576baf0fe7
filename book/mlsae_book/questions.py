"""Questions and answers about a docstring, all of it in its own words.

The parameters are read in the three usual styles: numpydoc's underlined sections, Google's `Args:`,
and Sphinx's `:param name:`. Docstrings in which none is documented give no question.
"""

from __future__ import annotations

import re

PARAMETERS_ASKED = 2  # of one docstring, so that long signatures do not fill the text
_SENTENCE = re.compile(r"(?<=[.!?])\s")
_SIGNATURE = re.compile(r"[\w.]+\(.*\)(\s*->.*)?")
_GOOGLE = re.compile(r"(?:Args|Arguments|Parameters):\s*")
_GOOGLE_ENTRY = re.compile(r"\*{0,2}(\w+)\s*(?:\([^:]*\))?:\s*(.*)")
_NUMPY_ENTRY = re.compile(r"\*{0,2}(\w+)\s*(?::.*)?")
_SPHINX_ENTRY = re.compile(r":param(?:eter)?\s+(?:[^:]*\s)?\*{0,2}\\?(\w+)\s*:\s*(.*)")


def questions(docstring: str) -> list[str]:
    """Question and answer pairs as documents, `Q: …` and `A: …` on lines of their own.

    What a function of these parameters does; which parameters a function that does this has; and
    what the first ones that are described mean.
    """
    does, found = summary(docstring), parameters(docstring)
    if not does or not found:
        return []
    names = ", ".join(found)
    asked = [
        (f"What does a function of {names} do?", does),
        (f"{does} Which parameters does it have?", f"{names}."),
    ]
    described = [(name, meaning) for name, meaning in found.items() if meaning]
    asked += [(f"{does} What is {name}?", text) for name, text in described[:PARAMETERS_ASKED]]
    return [f"Q: {question}\nA: {answer}" for question, answer in asked]


def summary(docstring: str) -> str:
    """The first sentence of the first paragraph that is no signature; empty if it is a heading."""
    for paragraph in re.split(r"\n\s*\n", docstring.strip()):
        line = " ".join(paragraph.split())
        if not _SIGNATURE.fullmatch(line):
            short = _first_sentence(line)
            return short if 12 <= len(short) <= 160 and short[0].isalpha() else ""
    return ""


def parameters(docstring: str) -> dict[str, str]:
    """Parameter → the first sentence of its description (empty where there is none), in order."""
    lines = docstring.splitlines()
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines):
        if _GOOGLE.fullmatch(line):
            _entries(_section(lines[number + 1 :], indented=True), _GOOGLE_ENTRY, found)
        elif line.strip() == "Parameters" and _is_underline(lines[number + 1 : number + 2]):
            _entries(_section(lines[number + 2 :], indented=False), _NUMPY_ENTRY, found)
    if not found:
        start = next((n for n, line in enumerate(lines) if line.startswith(":param")), len(lines))
        _entries(lines[start:], _SPHINX_ENTRY, found)
    return {name: _first_sentence(" ".join(" ".join(t).split())) for name, t in found.items()}


def _first_sentence(text: str) -> str:
    return _SENTENCE.split(text, maxsplit=1)[0]


def _is_underline(lines: list[str]) -> bool:
    return bool(lines) and re.fullmatch(r"\s*-{3,}\s*", lines[0]) is not None


def _section(lines: list[str], indented: bool) -> list[str]:
    """The lines that belong to a section, without their common indentation."""
    kept = []
    for number, line in enumerate(lines):
        heading = _is_underline(lines[number + 1 : number + 2])
        if heading or (indented and line.strip() and not line.startswith(" ")):
            break
        kept.append(line)
    indents = [len(line) - len(line.lstrip()) for line in kept if line.strip()]
    return [line[min(indents, default=0) :] for line in kept]


def _entries(lines: list[str], pattern: re.Pattern, found: dict[str, list[str]]):
    """Add the entries, which stand at the margin; indented lines continue the one before."""
    name = None
    for line in lines:
        entry = pattern.fullmatch(line)
        if entry:
            name = entry[1]
            found[name] = [*entry.groups()[1:]]
        elif line.strip() and not line.startswith(" "):
            name = None  # text between entries, or another kind of field
        elif name is not None:
            found[name].append(line)
