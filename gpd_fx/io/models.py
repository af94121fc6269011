"""Models by name (`torchvision:NAME`, `timm:NAME`, or `package.module:factory`) and their weights in safetensors files.

Options of a model follow its name after commas, as in `timm:resnet18,num_classes=10`; values are JSON, or else text.
Nothing is downloaded and nothing is unpickled: the zoos' models come with random weights, and a factory is ordinary
code of the caller's own.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gpd_fx.errors import ArgumentError, CheckpointError
from gpd_fx.io.extras import need
from gpd_fx.io.files import output_path, publish, staging

_FORMS: Final = "torchvision:NAME, timm:NAME or package.module:factory"
_DOWNLOADS: Final = ("pretrained", "weights", "weights_backbone", "checkpoint_path")


def resolve(spec: str) -> nn.Module:
    """The model that `spec` names, in train mode, with fresh random weights.

    Raises:
        ArgumentError: the form is none of the three, a package is missing, or the name or factory cannot be used.
    """
    source, colon, rest = spec.partition(":")
    name, *given = rest.split(",")
    options = _options(spec, given)
    if not colon or not source or not name:
        close = f"; did you mean {source}:{name or 'NAME'}?" if source in ("torchvision", "timm") else ""
        raise ArgumentError(f"model {spec!r} is not of the form {_FORMS}{close}")
    if source == "torchvision":
        return _torchvision(spec, name, options)
    if source == "timm":
        return _timm(spec, name, options)
    return _factory(spec, source, name, options)


def _options(spec: str, given: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ArgumentError(f"model {spec!r}: {item!r} is no option; write NAME=VALUE, such as num_classes=10")
        if name.strip() in _DOWNLOADS:
            raise ArgumentError(
                f"model {spec!r}: {name.strip()!r} would download or unpickle; save the weights with "
                "safetensors.torch.save_file(model.state_dict(), path) once, and load that file"
            )
        try:
            options[name.strip()] = json.loads(value)
        except ValueError:
            options[name.strip()] = value
    return options


def _torchvision(spec: str, name: str, options: dict[str, Any]) -> nn.Module:
    models = need("torchvision.models", f"model {spec!r}", "zoo")
    names: list[str] = models.list_models()
    if name.lower() not in names:
        raise ArgumentError(_unknown(spec, "torchvision", name, names))
    builder = models.get_model_builder(name)
    # Some models fetch a backbone's weights unless told not to.
    backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # some models announce another initialisation
        return _build(spec, lambda: builder(**{"weights": None, **backbone, **options}))


def _timm(spec: str, name: str, options: dict[str, Any]) -> nn.Module:
    timm = need("timm", f"model {spec!r}", "zoo")
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):  # also what points at a hub or a folder: those would download or unpickle
        raise ArgumentError(_unknown(spec, "timm", architecture, timm.list_models()))
    return _build(spec, lambda: timm.create_model(name, **{"pretrained": False, **options}))


def _unknown(spec: str, package: str, name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=5, cutoff=0.5)
    hint = f"close to it: {', '.join(close)}" if close else "no name is close to it"
    return f"model {spec!r}: {package} has no model {name!r} ({hint})"


def _factory(spec: str, module: str, path: str, options: dict[str, Any]) -> nn.Module:
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        known = " (the part before the colon is a Python module, torchvision or timm)" if "." not in module else ""
        raise ArgumentError(
            f"model {spec!r}: importing {module!r} failed with {type(error).__name__}: {error}{known}"
        ) from error
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            close = difflib.get_close_matches(part, [name for name in dir(found) if not name.startswith("_")], n=5)
            hint = f"; close to it: {', '.join(close)}" if close else ""
            where = getattr(found, "__name__", module)
            raise ArgumentError(f"model {spec!r}: {where} has no {part!r}{hint}") from None
    if isinstance(found, nn.Module) and not options:
        return found
    if not callable(found):
        raise ArgumentError(
            f"model {spec!r} names a {type(found).__name__}; it must be a module class, a function without arguments "
            "that returns a module, or a module"
        )
    return _build(spec, lambda: found(**options))


def _build(spec: str, factory: Callable[[], Any]) -> nn.Module:
    try:
        model = factory()
    except Exception as error:
        raise ArgumentError(f"model {spec!r}: building it failed with {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model {spec!r} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's state_dict to the safetensors file `path`, whole or not at all.

    Raises:
        ArgumentError: `path` cannot be written, or the state_dict holds something that is not a tensor.
    """
    target = output_path(path)
    tensors: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ArgumentError(f"state_dict entry {key!r} is a {type(value).__name__}; safetensors holds only tensors")
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # tied ones may not share
    with staging(target) as folder:
        draft = folder / target.name
        save_file(tensors, draft, metadata={"format": "pt"})
        publish(draft, target)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the safetensors file `path` into the model; every key and shape must fit.

    Raises:
        CheckpointError: the file cannot be read as safetensors, or belongs to another model.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read as safetensors ({error}); write it with `gpd-fx fold` or "
            "safetensors.torch.save_file(model.state_dict(), path)"
        ) from error
    state = model.state_dict()  # keeps the versions of its modules, which some need to load
    if state.keys() != tensors.keys():
        odd = sorted(state.keys() ^ tensors.keys())
        raise CheckpointError(f"{str(path)!r} does not fit the model: {', '.join(odd[:8])} are in one of the two only")
    state.update(tensors)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{str(path)!r} does not fit the model: {error}") from error
