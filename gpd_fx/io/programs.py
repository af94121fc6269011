"""Exported programs (`.pt2` files), read without running any code that lies in them.

`torch.export.load` alone runs code of a file that was made for that: it unpickles tensors of unusual kinds, objects and
example inputs, evaluates the text of sizes, calls any function below `torch` that a node names, and executes the text
of guards. So a file is read through here first. What is left to trust is torch's own reading of JSON and of plain
tensors, and the operators that are installed.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from gpd_fx.errors import ArgumentError
from gpd_fx.fxtools.torch_internals import HigherOrderOperator, OpOverload
from gpd_fx.io.files import output_path, publish, staging

_ON_SIZES = (
    *("add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "le", "lt", "mod", "mul", "ne", "neg", "not_", "or_"),
    *("pow", "sub", "truediv"),
)
_OF_MATH = ("ceil", "floor", "sqrt", "trunc")
_REGIONS = ("wrap_with_autocast", "wrap_with_set_grad_enabled", "cond", "map_impl", "scan", "while_loop")
_EXPRESSION = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Call, ast.Name, ast.Load, ast.Constant),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.keyword),
)
_FUNCTIONS = frozenset(
    (
        *("Add", "Float", "Integer", "Mul", "Pow", "Rational", "Symbol"),
        *("Eq", "Ge", "Gt", "Le", "Lt", "Ne", "And", "Not", "Or", "Max", "Min", "Abs", "ceiling", "floor", "sqrt"),
        *("Equality", "Unequality", "GreaterThan", "LessThan", "StrictGreaterThan", "StrictLessThan"),
        *("CeilDiv", "CeilToInt", "CleanDiv", "FloatPow", "FloatTrueDiv", "FloorDiv", "FloorToInt", "Identity"),
        *("IntTrueDiv", "LShift", "Mod", "ModularIndexing", "PowByNatural", "PythonMod", "RShift", "RoundToInt"),
        *("ToFloat", "TruncToInt", "Where"),
    )
)
"""Of sympy and of torch, on sizes."""


def read_program(path: str | os.PathLike[str]) -> ExportedProgram:
    """An exported program from a file that `torch.export.save` wrote.

    Raises:
        ArgumentError: the file cannot be read, or reading it would run code that lies in it.

    Example:
        >>> program = read_program("model.pt2")
    """
    source = Path(path)
    try:
        data = source.read_bytes()
    except OSError as error:
        raise ArgumentError(f"{str(source)!r} cannot be read: {error.strerror}") from error
    try:
        program = torch.export.load(_checked(data))
    except _UnsafeError as error:
        raise ArgumentError(f"{str(source)!r} is not read, since {error}, which would run code of the file") from None
    except Exception as error:  # torch raises many kinds on a damaged file
        said = next(iter(str(error).splitlines()), "")
        raise ArgumentError(
            f"{str(source)!r} is no program that torch.export.save of a like version of torch wrote "
            f"({type(error).__name__}: {said})"
        ) from error
    program._guards_code = []  # pyright: ignore[reportPrivateUsage]  torch executes them as text
    return program


def write_program(program: ExportedProgram, path: str | os.PathLike[str]) -> Path:
    """Write a program by `torch.export.save`; a file that is there is replaced in one step.

    Raises:
        ArgumentError: the file cannot be written.
    """
    target = output_path(path)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    with staging(target) as folder:
        made = folder / target.name
        made.write_bytes(buffer.getvalue())
        publish(made, target)
    return target


class _UnsafeError(Exception):
    """What in a file would run."""


def _checked(data: bytes) -> io.BytesIO:
    """The same archive, written anew from what was checked, so that torch reads nothing else."""
    made = io.BytesIO()
    seen: set[str] = set()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(made, "w") as copy:
        for name in archive.namelist():
            if name.lower() in seen:  # torch's reader ignores case
                raise _UnsafeError(f"it holds {name!r} twice")
            seen.add(name.lower())
            content = archive.read(name)
            _check(name.lower().partition("/")[2], content)
            copy.writestr(name, content)
    made.seek(0)
    return made


def _check(name: str, content: bytes) -> None:
    """Raise where a file of the archive holds code."""
    if name.startswith("data/aotinductor"):
        raise _UnsafeError(f"it holds compiled code ({name})")
    if name.startswith(("data/weights/", "data/constants/")):
        if name.endswith(".pt"):
            raise _UnsafeError(f"its tensors are pickled ({name})")
        if name.endswith(".json"):
            _check_tensors(name, json.loads(content))
    elif name.startswith("data/sample_inputs/"):
        _check_inputs(name, content)
    elif name.startswith("models/"):
        _check_graph(json.loads(content))


def _check_tensors(name: str, config: dict[str, Any]) -> None:
    for entry, about in config["config"].items():
        plain = str(about["path_name"]).startswith(("weight_", "tensor_"))
        if about["use_pickle"] or not plain:
            raise _UnsafeError(f"{entry!r} in {name} is pickled")


def _check_inputs(name: str, data: bytes) -> None:
    try:
        if data:
            torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:  # torch would read it again, without the restriction
        raise _UnsafeError(f"{name} holds more than tensors and plain values") from error


def _check_graph(program: dict[str, Any]) -> None:
    for key, value in _items(program):
        called = [node["target"] for node in value] if key == "nodes" else [value] if key == "as_operator" else []
        for target in called:
            if not _is_operator(str(target)):
                raise _UnsafeError(f"a node calls {target!r}, which is no operator")
        if key == "expr_str" and not _is_arithmetic(str(value)):
            raise _UnsafeError(f"a size is the text {value!r}, which is no arithmetic")


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys with their values, at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():  # pyright: ignore[reportUnknownVariableType]  JSON
            yield str(key), item  # pyright: ignore[reportUnknownArgumentType]  JSON
            yield from _items(item)
    elif isinstance(value, list):
        for item in value:  # pyright: ignore[reportUnknownVariableType]  JSON
            yield from _items(item)


def _is_operator(target: str) -> bool:
    """Whether what torch finds by a node's target is an operator, or a function on sizes."""
    names = target.split(".")[1:]
    if target.startswith("_operator"):
        return len(names) == 1 and names[0] in _ON_SIZES
    if target.startswith("math"):
        return len(names) == 1 and names[0] in _OF_MATH
    if not target.startswith("torch") or not names:
        return False
    if len(names) == 1:
        return names[0].startswith(("sym_", "_sym_"))
    found: Any = torch
    for name in names:
        found = getattr(found, name, None)
    region = isinstance(found, HigherOrderOperator) and names[-1] in _REGIONS
    return names[0] == "ops" and (isinstance(found, OpOverload) or region)


def _is_arithmetic(text: str) -> bool:
    """Whether a text is an expression of sizes and numbers, and of the functions on them that torch writes."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    if not all(isinstance(call.func, ast.Name) and call.func.id in _FUNCTIONS for call in calls):
        return False
    names = {id(call.args[0]) for call in calls if call.args and getattr(call.func, "id", "") in ("Symbol", "Float")}
    return all(isinstance(node, _EXPRESSION) and _is_plain(node, id(node) in names) for node in ast.walk(tree))


def _is_plain(node: ast.AST, named: bool) -> bool:
    """Whether a constant is a number, or the text of a name or number where one is due; and no name is internal."""
    if isinstance(node, ast.Constant):
        text = node.value if named and isinstance(node.value, str) else ""
        return isinstance(node.value, bool | int | float) or re.fullmatch(r"\w+|-?[\d.]+(e[+-]?\d+)?", text) is not None
    return not (isinstance(node, ast.Name) and "__" in node.id)
