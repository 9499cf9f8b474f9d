"""What README.md and test/README.md say of the code and the tests, against both."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from daemon import ROOT
from messages import syntax_trees

TESTS = ROOT / "test"
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES, FAULTS = (TESTS / "README.md").read_text(encoding="utf-8").split("## Faults")

# In a row of a table of faults: a file, and some of its tests.
HOLDERS = re.compile(r"`([\w/.]+)`: (`\w+`(?: \[soak\])?(?:, `\w+`(?: \[soak\])?)*)")


def floors() -> dict[str, int]:
    """Return the floor of each module, as README.md has them."""
    table = README.split("| floor | module |")[1].split("\n\n")[0]
    found = {}
    floor = -1
    for row in table.splitlines()[2:]:
        number, modules, _ = (cell.strip() for cell in row.strip("|").split("|"))
        floor = int(number) if number else floor
        found.update(dict.fromkeys(re.findall(r"`(\w+)\.py`", modules), floor))
    return found


def imported(tree: ast.Module) -> set[str]:
    """Return which modules of the program a module imports when it runs."""
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {str(node.module) for node in nodes if str(node.module).startswith("kvmd")}


def functions_of(name: str) -> set[str]:
    """Return the functions in a file of tests, named as the table of faults has it."""
    path = TESTS / (name if name.endswith(".py") else f"{name}.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_module_has_its_floor() -> None:
    assert floors().keys() | {"kvmd_version"} == syntax_trees().keys()


def test_a_module_imports_from_its_own_floor_and_from_below() -> None:
    floor = {**floors(), "kvmd_version": 0}
    for module, tree in syntax_trees().items():
        above = {name for name in imported(tree) if floor[name] > floor[module]}
        assert above == set(), module


def test_no_module_and_no_class_is_too_large() -> None:
    for module, tree in syntax_trees().items():
        assert len((ROOT / f"{module}.py").read_text().splitlines()) <= 550, module
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                methods = [one for one in node.body if isinstance(one, ast.FunctionDef)]
                assert len(methods) <= 25, node.name


def test_no_module_imports_itself_by_way_of_others() -> None:
    imports = {module: imported(tree) for module, tree in syntax_trees().items()}
    while imports:
        free = [one for one, names in imports.items() if not names & imports.keys()]
        assert free, f"a circle among {sorted(imports)}"
        for module in free:
            del imports[module]


def test_every_file_of_tests_is_in_the_table() -> None:
    named = set(re.findall(r"`(test_\w+\.py)`", FILES))
    assert named == {path.name for path in Path(TESTS).glob("test_*.py")}


def test_every_test_for_a_fault_is_there() -> None:
    holders = HOLDERS.findall(FAULTS)
    assert len(holders) > 50
    for name, tests in holders:
        there = functions_of(name)
        for test in re.findall(r"`(\w+)`", tests):
            assert {test, f"test_{test}"} & there, f"{name}: {test}"
