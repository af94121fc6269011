"""Pipelines as text, as in `normalize,widen{ratio=2},branch,merge`.

    pipeline   pass, pass, ...
    pass       name, or name{option=value option=value ...}
    value      a number, true, false, none, a word, 'quoted text', [value, ...] or {name: value, ...}

A name is that of the class in lower case, words separated by `-`; options are the fields of the class.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from gpd_fx.errors import PassError
from gpd_fx.fxtools.unknown_names import did_you_mean
from gpd_fx.passes.base import IN_CODE_ONLY, Pass
from gpd_fx.passes.branch import Branch
from gpd_fx.passes.fold import Fold
from gpd_fx.passes.fuse import FuseDepthwise
from gpd_fx.passes.merge import Merge
from gpd_fx.passes.normalize import Normalize
from gpd_fx.passes.propagate import Propagate
from gpd_fx.passes.widen import Widen

Reader: TypeAlias = Callable[[str], Any]
_OPEN, _CLOSE = "{[(", "}])"
_WORDS = {"true": True, "false": False, "none": None}


def text_name(kind: type[Pass]) -> str:
    """What a pass is called in a pipeline's text."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", kind.__name__).lower()


PASSES: dict[str, type[Pass]] = {
    text_name(kind): kind for kind in (Normalize, Propagate, Widen, Branch, Merge, Fold, FuseDepthwise)
}
"""The passes that a text may name."""


def options_of(kind: type[Pass]) -> dict[str, tuple[str, str]]:
    """The options of a pass that a text can give: the type and the default of each, as they are written."""
    hints = typing.get_type_hints(kind)
    return {
        field.name: (
            _type_name(hints[field.name]),
            "" if field.default is dataclasses.MISSING else written(field.default),
        )
        for field in dataclasses.fields(kind)  # pyright: ignore[reportArgumentType]  every pass is a dataclass
        if not field.metadata.get(IN_CODE_ONLY)
    }


def _type_name(hint: Any) -> str:
    """A type as a user may read it."""
    inner = typing.get_args(hint)
    if not inner:
        return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type_name, inner))
    if issubclass(origin, Mapping):
        return f"{{{_type_name(inner[0])}: {_type_name(inner[1])}, ...}}"
    return f"[{_type_name(inner[0])}, ...]"


def written(value: Any) -> str:
    """A value as a pipeline's text has it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(written, value))}]"  # pyright: ignore[reportUnknownArgumentType]  any value
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def parse_pipeline(text: str, readers: Mapping[str, Reader] | None = None) -> tuple[Pass, ...]:
    """The passes that a text stands for.

    Args:
        text: as this module describes it.
        readers: for an option by its name what makes its value from a text, such as the name of a file.

    Raises:
        PassError: the text cannot be read; it names the pass or the option, and what there is.

    Example:
        >>> Pipeline(parse_pipeline("normalize,widen{ratio=1.5 exclude=['head.*']},merge"))
    """
    steps = _split(text, ",")
    if not any(steps):
        raise PassError(f"the pipeline {text!r} names no pass; write one, such as 'normalize,widen{{ratio=2}}'")
    return tuple(_parse_pass(step, text, readers or {}) for step in steps)


def _parse_pass(text: str, whole: str, readers: Mapping[str, Reader]) -> Pass:
    found = re.fullmatch(r"([\w-]*)\s*(?:\{(.*)\})?", text, re.DOTALL)
    if found is None or not found[1]:
        raise PassError(f"cannot read {text!r} in the pipeline {whole!r}; write name or name{{option=value ...}}")
    name, given = found[1], found[2] or ""
    kind = PASSES.get(name)
    if kind is None:
        raise PassError(f"there is no pass {name!r}{did_you_mean(name, PASSES)}")
    hints, known = typing.get_type_hints(kind), options_of(kind)
    values: dict[str, Any] = {}
    for item in _split(given, " \t\n,"):
        option, equals, value = item.partition("=")
        if not equals or not value:
            raise PassError(f"{name}: cannot read {item!r}; options are written option=value")
        if option not in known:
            there = f"its options are {', '.join(known)}" if known else "it has none"
            raise PassError(f"{name}: there is no option {option!r}; {there}")
        if option in values:
            raise PassError(f"{name}: {option!r} is given twice")
        read = readers.get(option)
        values[option] = _value(value) if read is None else read(_unquoted(value))
        if read is None and not _fits(values[option], hints[option]):
            raise PassError(f"{name}: {option}={value} is not of the type {known[option][0]}")
    return kind(**values)


def _split(text: str, separators: str) -> list[str]:
    """The parts of a text between separators that stand in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in _OPEN:
            depth += 1
        elif letter in _CLOSE:
            depth -= 1
            if depth < 0:
                raise PassError(f"{text!r} closes a bracket that it does not open")
        elif letter in separators and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    if depth or quote:
        raise PassError(f"{text!r} lacks a closing {'quote' if quote else 'bracket'}")
    stripped = [part.strip() for part in parts]
    return [part for part in stripped if part] if " " in separators else stripped


def _value(text: str) -> Any:
    """A value from its text."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if text.startswith("[") and text.endswith("]"):
        return tuple(_value(part) for part in _split(text[1:-1], ",") if part)
    if text.startswith("{") and text.endswith("}"):
        pairs = [part.partition(":")[::2] for part in _split(text[1:-1], ",") if part]
        return {_unquoted(key.strip()): _value(value.strip()) for key, value in pairs}
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, dict) and all(
            _fits(item, each)
            for pair in value.items()
            for item, each in zip(pair, inner, strict=True)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType, reportUnknownArgumentType]  any dict
        )
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, tuple) and all(_fits(item, inner[0]) for item in value)  # pyright: ignore[reportUnknownVariableType]  any tuple
    return isinstance(value, hint)
