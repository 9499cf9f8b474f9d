"""What the program may log or say on standard error, taken from its source."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from daemon import ROOT

# All modules of the program; those that print reports are not the daemon's.
MODULES = {path.stem: path for path in sorted(ROOT.glob("kvmd*.py"))}
REPORTS = {"kvmd_check", "kvmd_status"}

# Who logs a message, or raises what is logged, and with which level.
LEVELS = {
    "info": "INFO",
    "warning": "WARNING",
    "begin_trouble": "WARNING",
    "error": "ERROR",
    "exception": "ERROR",
    "StartError": "ERROR",
    "write_to_stderr": "stderr",
    "exit": "stderr",
}
# A finding about a setting is logged as this, if it is.
FINDINGS = {"WARN": "WARNING", "FAIL": "INFO", "BROKEN": "ERROR"}

# What stands for a value, that of the version for one, and for the instance that a
# message is about.
VALUE = ".+"
CHANGING = "VERSION"
INSTANCE = "INSTANCE: "

Names = dict[str, list[ast.expr]]


class Message(NamedTuple):
    """What may be said: its level, and a regular expression for its text."""

    level: str
    pattern: str


def syntax_trees() -> dict[str, ast.Module]:
    """Return each module's syntax tree, by its name."""
    return {
        name: ast.parse(path.read_text(encoding="utf-8"))
        for name, path in MODULES.items()
    }


def name_of(node: ast.expr) -> str:
    """Return the last part of a name, empty if it is none."""
    return str(getattr(node, "attr", getattr(node, "id", "")))


def assigned_names(body: list[ast.AST]) -> Names:
    """Return what is assigned to each simple name."""
    names: Names = {}
    for node in body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    names.setdefault(target.id, []).append(node.value)
    return names


def texts(node: ast.expr, names: Names) -> list[str]:
    """Return regular expressions for all that an expression may be as a string."""
    if isinstance(node, ast.Constant):
        return [re.escape(str(node.value))]
    if isinstance(node, ast.JoinedStr):
        parts = [texts(value, names) for value in node.values]
        return ["".join(chosen) for chosen in itertools.product(*parts)]
    if isinstance(node, ast.FormattedValue) and node.format_spec is None:
        return texts(node.value, names)
    if isinstance(node, ast.IfExp):
        return texts(node.body, names) + texts(node.orelse, names)
    if isinstance(node, ast.Name) and node.id in names and node.id != CHANGING:
        others = {name: names[name] for name in names if name != node.id}
        return [text for value in names[node.id] for text in texts(value, others)]
    return [VALUE]


def says_something(pattern: str) -> bool:
    """Tell whether there are words in a message, not values alone."""
    return any(map(str.isalpha, pattern.replace(VALUE, "")))


def messages_of_call(call: ast.Call, names: Names) -> Iterator[Message]:
    """Yield what a call may log or say."""
    function, arguments = name_of(call.func), [*call.args]
    if function not in {"_put", *LEVELS}:
        return
    if isinstance(call.args[0], ast.Starred):
        (value,) = names[name_of(call.args[0].value)]
        assert isinstance(value, ast.Tuple)
        arguments = value.elts
    parts = [texts(argument, names) for argument in arguments]
    if function == "_put" and isinstance(arguments[0], ast.Constant):
        level, patterns = str(arguments[0].value), parts[1]
    elif function == "begin_trouble":
        level = LEVELS[function]
        patterns = [": ".join(chosen) for chosen in itertools.product(*parts)]
    else:
        level, patterns = LEVELS.get(function, ""), parts[0]
    is_of_instance = len(parts) > (2 if function == "exception" else 1)
    prefix = INSTANCE if function in {"info", "warning", "error", "exception"} else ""
    for pattern in filter(says_something, patterns):
        yield Message(level, prefix * is_of_instance + pattern)


def messages_and_findings() -> tuple[set[Message], set[Message]]:
    """Return what is logged or said, and the findings that are a part of that."""
    messages: set[Message] = set()
    findings: set[Message] = set()
    trees = syntax_trees()
    everywhere = assigned_names([node for tree in trees.values() for node in tree.body])
    for module, tree in trees.items():
        own = assigned_names([*tree.body])
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            names = {**everywhere, **own, **assigned_names([*ast.walk(function)])}
            for node in ast.walk(function):
                if not isinstance(node, ast.Call) or not node.args:
                    continue
                if name_of(node.func) == "Finding" and module not in REPORTS:
                    level = FINDINGS.get(name_of(node.args[0]))
                    said = texts(node.args[1], names) if level else []
                    findings |= {Message(str(level), text) for text in said}
                else:
                    messages |= {*messages_of_call(node, names)}
    return messages, {one for one in findings if says_something(one.pattern)}
