"""The two floors: a stage imports wsss only, a shared module imports nothing of this repo; and the house rules that a grep can hold."""
import ast
from pathlib import Path

import pytest
from conftest import ROOT

STAGES, SHARED = sorted(ROOT.glob("*.py")), sorted((ROOT / "wsss").glob("*.py"))
OURS = {path.stem for path in STAGES} | {"wsss"}


def imported(path):
    """First parts of every imported name, relative imports as "."."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else node.module.split(".")[0]


@pytest.mark.parametrize("path", STAGES, ids=lambda p: p.name)
def test_a_stage_imports_no_stage(path):
    assert set(imported(path)) & OURS <= {"wsss"}


@pytest.mark.parametrize("path", SHARED, ids=lambda p: p.name)
def test_a_shared_module_imports_no_shared_module(path):
    assert not set(imported(path)) & (OURS | {"."})


@pytest.mark.parametrize("path", STAGES + SHARED, ids=lambda p: p.name)
def test_house_rules(path):
    tree = ast.parse(path.read_text())
    assert path.stat().st_size == 0 or ast.get_docstring(tree), "the docstring is the manual"
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{path.name}:{node.lineno}: bare except"
        if isinstance(node, ast.keyword) and node.arg == "type":
            assert not (isinstance(node.value, ast.Name) and node.value.id == "bool"), f"{path.name}: type=bool"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name != "main":
            assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name} is over 60 lines"


def test_no_name_of_an_installed_module():
    import importlib.util
    import sys
    for path in STAGES:
        found = importlib.util.find_spec(path.stem)
        assert found is None or Path(found.origin).resolve() == path.resolve(), path.name
        assert path.stem not in sys.stdlib_module_names
