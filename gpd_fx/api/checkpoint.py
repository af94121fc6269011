"""Save a dynamic teacher to one safetensors file, and load it again; nothing is ever unpickled.

The file holds the teacher's state (wide parameters, branches, buffers of both networks). Its metadata holds one JSON
description: the recipe of `expand` and `grow`, the student's parameters, the layout of the example inputs, and a digest
of the plan. `load` expands the given model by the recipe, so that the graphs always come from the code that runs them,
and refuses where the result is not the network that was saved.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from gpd_fx.api.expansion import make_teacher
from gpd_fx.errors import ArgumentError, CheckpointError
from gpd_fx.fxtools.flat_module import draw
from gpd_fx.io.files import output_path, publish, staging
from gpd_fx.plan.parameter_plan import ParamPlan
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher
from gpd_fx.teacher.study import draft_by, study_model
from gpd_fx.version import __version__

_FORMAT: Final = 2  # since 2 a recipe has the steps in which a teacher grew
_KEY: Final = "gpd_fx"  # of the description in the file's metadata


def save(teacher: DynamicTeacher, path: str | os.PathLike[str]) -> None:
    """Write `teacher` to `path`; an interruption at any point leaves an older file there as it was.

    Raises:
        ArgumentError: `teacher` is none, or `path` cannot be written.
        CheckpointError: the teacher's state holds something that is not a tensor.
    """
    if not isinstance(teacher, DynamicTeacher):  # pyright: ignore[reportUnnecessaryIsInstance]  users call this
        raise ArgumentError(f"save takes what gpd_fx.expand returned, got {type(teacher).__name__}")
    target = output_path(path)
    tensors: dict[str, Tensor] = {}
    for name, value in teacher.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name!r} in the teacher's state is a {type(value).__name__}; only tensors can be saved, so keep it "
                "in a buffer, or drop the get_extra_state that returns it"
            )
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # no two share their memory
    args, kwargs = teacher.example
    description = {
        "format": _FORMAT,
        "gpd_fx": __version__,
        "torch": torch.__version__,
        "model": _class_name(teacher.skeleton),
        "recipe": teacher.recipe,
        "student": _signature(_values(teacher)),
        "plan": plan_digest(teacher.composition.plans),
        "example": [_encode(args), _encode(dict(kwargs))],
        "coverage": teacher.report().coverage,
    }
    with staging(target) as folder:
        file = folder / target.name
        safetensors.torch.save_file(tensors, file, metadata={_KEY: json.dumps(description)})
        publish(file, target)


@torch.inference_mode(mode=False)  # or the teacher's parameters could not be trained
def load(path: str | os.PathLike[str], model: nn.Module, example_inputs: Sequence[Any] | None = None) -> DynamicTeacher:
    """The dynamic teacher saved at `path`, built anew around `model`, which is not changed.

    Args:
        path: a file that `save` wrote.
        model: a model of the class that was expanded; its values do not matter.
        example_inputs: for the capture; random ones of the saved shapes where not given.

    Raises:
        CheckpointError: the file is missing, cut off, not written by `save`, written by a newer version, or belongs to
            another model.
    """
    source = Path(path)
    description = _read_description(source)
    signature = _signature(dict(model.named_parameters()))
    _compare(description["student"], signature, f"{str(source)!r} was saved from another model: {description['model']}")
    args, kwargs = _examples(description["example"], model, example_inputs, source)
    recipe = description["recipe"]
    study = study_model(model, args, kwargs, recipe.get("frozen", ()))
    teacher = make_teacher(draft_by(recipe, study), recipe["branches"], verify=False)
    if plan_digest(teacher.composition.plans) != description["plan"]:
        here = f"gpd_fx {__version__}, torch {torch.__version__}"
        raise CheckpointError(
            f"{str(source)!r} was saved with gpd_fx {description['gpd_fx']} and torch {description['torch']}, where "
            f"this model widens in another way than here ({here}); load it with those versions, fold it there and save "
            "the student's state_dict"
        )
    try:
        tensors = safetensors.torch.load_file(source)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{str(source)!r} cannot be read to its end: {error}; copy or save it again") from error
    state = teacher.state_dict()
    if state.keys() != tensors.keys():  # load_state_dict lets a module fill in what it thinks an old version lacked
        odd = sorted(state.keys() ^ tensors.keys())
        raise CheckpointError(
            f"{str(source)!r} does not fit this model: {odd} are in one of the two only; load it "
            "into a model with the same buffers as the one that was expanded"
        )
    state.update(tensors)
    try:
        teacher.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{str(source)!r} does not fit this model: {error}") from error
    return teacher


def _read_description(source: Path) -> dict[str, Any]:
    """The JSON description, after checking that the file is whole and ours."""
    if not source.exists():
        raise CheckpointError(f"{str(source)!r} does not exist; check the path")
    if source.is_dir():
        raise CheckpointError(f"{str(source)!r} is a folder; give the file that gpd_fx.save wrote")
    try:
        with safetensors.safe_open(source, framework="pt") as file:
            metadata = cast("dict[str, str]", file.metadata() or {})
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{str(source)!r} {_diagnose(source)} ({error})") from error
    if _KEY not in metadata:
        raise CheckpointError(
            f"{str(source)!r} is a safetensors file, but gpd_fx.save did not write it; load its tensors into the model "
            "with safetensors.torch.load_file and expand the model"
        )
    try:
        description = cast("dict[str, Any]", json.loads(metadata[_KEY]))
        if description["format"] > _FORMAT:
            raise CheckpointError(
                f"{str(source)!r} has format {description['format']}, written by gpd_fx {description['gpd_fx']}; this "
                f"version ({__version__}) reads up to format {_FORMAT}, so upgrade gpd_fx"
            )
        missing = {"model", "recipe", "student", "plan", "example", "torch"} - description.keys()
        if missing:
            raise KeyError(f"no {', '.join(sorted(missing))}")
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the description in {str(source)!r} is damaged ({error}); save it again") from error
    return description


def _diagnose(source: Path) -> str:
    """What is wrong with a file that safetensors does not open: 8 bytes of header length, JSON, then the data."""
    with source.open("rb") as file:
        start = file.read(9)
    size = source.stat().st_size
    if size == 0:
        return "is empty; save it again"
    if start.startswith((b"PK", b"\x80")):
        return "is a pickle or a file of torch.save, which gpd_fx never reads; give a file that gpd_fx.save wrote"
    if start[8:] == b"{":
        return "is cut off or damaged; copy or save it again"
    return "is not a safetensors file; give a file that gpd_fx.save wrote"


def _compare(saved: Mapping[str, Any], given: Mapping[str, Any], message: str) -> None:
    """Raise with the first parameter that differs."""
    for name in saved:
        if name not in given:
            raise CheckpointError(f"{message}, whose parameter {name!r} {saved[name]} the given model lacks")
        if saved[name] != given[name]:
            raise CheckpointError(
                f"{message}, whose parameter {name!r} is {saved[name]}, the given model's is {given[name]}; "
                "build the model with the options (and dtype) that it had when it was expanded"
            )
    for name in given:
        if name not in saved:
            raise CheckpointError(f"{message}, which lacks the given model's parameter {name!r} {given[name]}")


def _signature(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Name to "dtype[shape]", in a form that survives JSON."""
    return {name: f"{_dtype(tensor)}{list(tensor.shape)}" for name, tensor in parameters.items()}


def _values(teacher: DynamicTeacher) -> dict[str, Tensor]:
    """The student's parameters by name, with the values they have now."""
    with torch.no_grad():
        return teacher.composition.student()


def plan_digest(plans: Sequence[ParamPlan]) -> str:
    """A hash of what the tensors' shapes do not show: which copy is whose, and with which share."""
    digest = hashlib.sha256()
    for plan in sorted(plans, key=lambda plan: plan.name):
        digest.update(f"{plan.name}{plan.wide_shape}".encode())
        for index in (*plan.gather, *plan.keep):
            digest.update(b"-" if index is None else index.numpy().tobytes())
        for alpha in plan.alpha:  # rounded: the last bits may differ between machines
            digest.update(b"-" if alpha is None else (alpha * 1e9).round().long().numpy().tobytes())
    return digest.hexdigest()


def _encode(value: Any) -> dict[str, Any] | None:
    """The layout of example inputs as JSON, without their values; None for what is no plain type."""
    if isinstance(value, Tensor):
        layout: dict[str, Any] = {"tensor": list(value.shape), "dtype": _dtype(value)}
        if value.numel() and not value.is_floating_point() and not value.is_complex():
            layout["range"] = [int(value.min()), int(value.max())]  # indices must stay inside their tables
        return layout
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, (list, tuple)):
        items = [_encode(item) for item in cast("Sequence[Any]", value)]
        kind = "list" if isinstance(value, list) else "tuple"
        return None if None in items else {kind: items}
    if isinstance(value, dict):
        pairs = {key: _encode(item) for key, item in cast("dict[Any, Any]", value).items()}
        plain = all(isinstance(key, str) for key in pairs) and None not in pairs.values()
        return {"dict": pairs} if plain else None
    return None


def _decode(layout: Mapping[str, Any], device: torch.device, generator: torch.Generator) -> Any:
    """Random example inputs of the saved layout."""
    if "tensor" in layout:
        dtype = getattr(torch, layout["dtype"])
        example = torch.zeros(layout["tensor"], dtype=dtype)
        if example.numel() and "range" in layout:
            flat = example.view(-1)
            flat[0], flat[-1] = layout["range"]
        return draw(example, generator).to(device)
    if "dict" in layout:
        return {key: _decode(item, device, generator) for key, item in layout["dict"].items()}
    for kind in (list, tuple):
        if kind.__name__ in layout:
            return kind(_decode(item, device, generator) for item in layout[kind.__name__])
    return layout["value"]


def _examples(
    layouts: Sequence[Mapping[str, Any] | None], model: nn.Module, given: Sequence[Any] | None, source: Path
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs and keyword inputs: the given ones, else random ones of the saved layout."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    args, kwargs = layouts
    if kwargs is None or (given is None and args is None):
        raise CheckpointError(
            f"{str(source)!r} was expanded with inputs that are not plain tensors, numbers, lists and dicts; pass them "
            "as example_inputs=(...)"
        )
    inputs = _decode(args, device, generator) if given is None and args is not None else tuple(given or ())
    return inputs, _decode(kwargs, device, generator)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _class_name(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"
