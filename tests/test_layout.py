"""The house of the package: import order, sizes, names, docstrings, plain words."""

import ast
import io
import re
import tokenize
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

import replib

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "replib").rglob("*.py"))
MODULES = [file for file in FILES if file.stem not in ("__init__", "__main__")]
ROOMS = sorted({file.relative_to(ROOT / "replib").parts[0] for file in MODULES})
BANNED_MODULES = frozenset(
    "adapt anatomy answers asked besieged builders checks clouds commands_ depth directions fitting forced gap "
    "hardness holds interpolation keeper known lengths likelihood minimum moments needs optimised packed paired "
    "pairs parallel passes predictor prefix price processes ranking reading recipe references reinforced rerouting "
    "response_view results rivals scope scoring screen search sets shards shared shrinkage siege sieve sites sources "
    "standings store_ surface surface_views sweep_price tables utils views audit_views watch".split()
)
BANNED_NAMES = frozenset(
    "Anatomy Arsenal Aside Asked Assault Beginning Build Built Case Chosen Cloud Contender Drawn Forced Gauge Hardness "
    "Holds Keep Keeper Known Layout Lengths Packed Phase Price Recipe Relabelled Response Rival Schema Scorer Screen "
    "Siege Sieve Standings Surface Survivors SweepPrice Tap Watch besieged crossed crossed_rate foretold "
    "holding_curves in_stretches passed place_errors put_back read_once recomputing_nothing spelled whole".split()
)
NO_FIRST_WORD = frozenset("What That Which Those These Of Where Such None Nobody Nothing".split())
RIDDLES = [
    r"(?<![Tt]here )\bis no (number|string|list|refusal|prompt|integer|file|folder|model|text|tensor)\b",
    r"\bthat of what\b",
    r"\bwhat (it|they|he|she) (misses|knows|says|does|is|are|was|were|reads|holds)\b",
    r"\bnobody(’|')s\b",
    r"\bso that it is rather\b",
    r"\bthe (kept|told|asked|found|named) (of|and|or)\b",
    r"\b(are|is) none of\b.*\bbut\b",
    r"\bnot at all: give\b",
    r"\bat rest while\b",
    r"\bof what no\b",
]


def tree(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def described(file):
    """The file's place below the root, for messages."""
    return file.relative_to(ROOT).as_posix()


def top_level(file):
    """Names that a module defines, with the node that defines each."""
    for node in tree(file).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((n.id, node) for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))


def test_rooms_import_lower_floors_only_and_no_room_has_a_circle(capsys):
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True) == 0, (
        capsys.readouterr().out
    )


def test_a_folder_holds_twelve_modules_and_a_file_350_lines_at_most():
    crowded = {f: n for f, n in Counter(described(file.parent) for file in MODULES).items() if n > 12}
    long = {described(f): n for f in FILES if (n := f.read_text(encoding="utf-8").count("\n")) > 350}
    assert not crowded and not long


def test_sixteen_rooms():
    assert len(ROOMS) == 16


def test_no_module_has_a_name_that_nobody_guesses():
    assert not {file.stem for file in MODULES} & BANNED_MODULES


def test_no_definition_has_a_name_that_nobody_guesses():
    assert not [(described(file), name) for file in MODULES for name, _ in top_level(file) if name in BANNED_NAMES]


def test_a_public_name_is_defined_in_one_module():
    homes = {}
    for file in MODULES:
        for name, _ in top_level(file):
            if not name.startswith("_") and name != "log":
                homes.setdefault(name, set()).add(described(file))
    assert not {name: sorted(files) for name, files in homes.items() if len(files) > 1}


def test_the_public_names_are_the_rooms_and_about_thirty_five():
    assert set(ROOMS) <= set(replib.__all__)
    assert 30 <= len(set(replib.__all__) - set(ROOMS)) <= 36
    assert set(replib.__all__) <= set(dir(replib))


@pytest.mark.parametrize("room", [*ROOMS, "defences.repbend"])
def test_names_in_all_exist_and_are_described(room):
    module = import_module(f"replib.{room}")
    assert module.__doc__
    homes = {name: node for file in MODULES for name, node in top_level(file)}
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        if isinstance(value, type) or callable(value):
            assert value.__doc__, f"{room}.{name} has no docstring"
        else:
            assert follows_a_docstring(homes[name]), f"{room}.{name} has no docstring"


def follows_a_docstring(node):
    """Whether the statement after an assignment is its docstring."""
    for file in MODULES:
        body = tree(file).body
        for one, after in zip(body, body[1:], strict=False):
            if ast.dump(one) == ast.dump(node):
                return isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return False


def prose(file):
    """Docstrings, comments and messages of a module, each with its line."""
    text = file.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value.strip()


@pytest.mark.parametrize("file", FILES, ids=described)
def test_a_docstring_begins_with_its_noun_or_verb(file):
    documented = (n for n in ast.walk(tree(file)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
    texts = [text for node in documented if (text := ast.get_docstring(node))]
    assert not [text[:80] for text in texts if text.split()[0].strip(",.:") in NO_FIRST_WORD]


@pytest.mark.parametrize("file", FILES, ids=described)
def test_prose_is_plain(file):
    riddles = [
        (line, text[:100])
        for line, text in prose(file)
        for pattern in RIDDLES
        if re.search(pattern, text, re.MULTILINE)
    ]
    assert not riddles
