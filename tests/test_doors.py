"""Remote code is run by no command: every door of transformers says so."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("mlsae_core/**/*.py"), *ROOT.glob("book/mlsae_book/**/*.py")])


def doors(source):
    """Calls of `from_pretrained` of transformers' Auto classes and tokenizers."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.endswith(".from_pretrained") and ("Auto" in name or "Tokenizer" in name):
                yield node


def is_shut(call, source):
    words = {word.arg: word.value for word in call.keywords}
    if "trust_remote_code" in words:
        return (
            isinstance(words["trust_remote_code"], ast.Constant)
            and not words["trust_remote_code"].value
        )
    # Options that are named before, in the same file.
    return None in words and '"trust_remote_code": False' in source


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_door_is_shut(path):
    source = path.read_text(encoding="utf-8")
    for call in doors(source):
        assert is_shut(call, source), f"line {call.lineno}: pass trust_remote_code=False"


def test_an_open_door_is_found():
    for call, shut in (
        ("AutoConfig.from_pretrained(x)", False),
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", False),
        ("AutoModel.from_pretrained(x, trust_remote_code=y)", False),
        ("AutoModel.from_pretrained(x, trust_remote_code=False)", True),
    ):
        [found] = doors(call)
        assert is_shut(found, call) == shut
