"""Export a module to ONNX, and hand the file over only when ONNX Runtime agrees with torch.

The exporters of torch have open reports of wrong results, so none of them is trusted. Each attempt is compared with
the module itself on random batches of several sizes; an attempt that fails or differs makes way for the next:

    dynamo                 torch.export, then onnxscript's graph optimizer
    dynamo, unoptimized    the same without the optimizer
    torchscript            the older exporter, by tracing

The file is written in a temporary folder beside its place and moved there after the comparison, so that a failure
leaves no file, and leaves an older file as it was.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn

from gpd_fx.capture.example_inputs import prepare
from gpd_fx.errors import ArgumentError, ExportError, InputError
from gpd_fx.fxtools.flat_module import FlatModule, draw
from gpd_fx.io.files import output_path, publish, staging
from gpd_fx.verify.verification import relative_error

_ATTEMPTS: Final[tuple[tuple[str, dict[str, bool]], ...]] = (
    ("dynamo", {"dynamo": True, "optimize": True}),
    ("dynamo, unoptimized", {"dynamo": True, "optimize": False}),
    ("torchscript", {"dynamo": False}),
)
_EXTERNAL_BYTES: Final = (
    1_900_000_000  # a protobuf message holds at most 2 GiB: larger weights go into a file beside it
)
_PREFIX: Final = "module."  # what FlatModule adds to the names of the parameters


@dataclass(frozen=True)
class OnnxReport:
    """What was written, and how far ONNX Runtime is from the module."""

    path: str
    exporter: str  # one of "dynamo", "dynamo, unoptimized", "torchscript"
    opset: int
    nodes: int
    bytes: int
    parameters: int  # of the module
    max_error: float | None  # max |difference| / max |output| over all outputs and batches; None: not compared
    batches: tuple[int, ...]  # the batch sizes compared
    failed: tuple[str, ...]  # one line for each attempt before the one that worked

    def to_dict(self) -> dict[str, Any]:
        """The report as values that JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        error = "not compared" if self.max_error is None else f"ONNX Runtime differs by at most {self.max_error:.1e}"
        sizes = f" (batches of {', '.join(map(str, self.batches))})" if self.batches else ""
        return (
            f"{self.path}: opset {self.opset}, {self.nodes} nodes, {self.bytes / 1e6:.2f} MB, "
            f"{self.parameters:,} parameters, exporter {self.exporter}; {error}{sizes}"
        )


@dataclass(frozen=True)
class _Batch:
    """Random inputs and what the module makes of them."""

    size: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def export_onnx(
    student: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Sequence[Any] | None = None,
    *,
    verify: bool = True,
    tolerance: float = 1e-4,
    example_kwargs: Mapping[str, Any] | None = None,
) -> OnnxReport:
    """Write `student`, in eval mode and with a free batch size, to the ONNX file `path`.

    Args:
        student: any module; it is copied to the CPU and itself left unchanged.
        path: the file to write; weights of more than 2 GB go into `<path>.data` beside it.
        example_inputs: the arguments of one call; inferred where not given.
        verify: compare with ONNX Runtime on random batches of several sizes.
        tolerance: the largest max |difference| / max |output| that passes.
        example_kwargs: keyword arguments of the call.

    Raises:
        ExportError: no exporter gave a file that ONNX's checker accepts and ONNX Runtime agrees with, or a package is
            missing. No file is written then, and an older one is left alone.
        ArgumentError: `student` is no module, or `path` or `tolerance` cannot be used.
        InputError: the example inputs do not fit the module, hold no tensor, or cannot be inferred.
    """
    if not isinstance(student, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]  users call this
        raise ArgumentError(
            f"student is a {type(student).__name__}; pass a torch.nn.Module, such as gpd_fx.fold(teacher)"
        )
    if not 0 < tolerance < float("inf"):
        raise ArgumentError(f"tolerance={tolerance!r} must be a positive finite number, such as 1e-4")
    target = output_path(path)
    _need("onnx", "onnxscript", *(["onnxruntime"] if verify else []))
    flat, inputs = _prepare(student, example_inputs, example_kwargs)
    batches = _batches(flat) if verify else ()
    failed: list[str] = []
    with staging(target) as folder:
        for number, (exporter, options) in enumerate(_ATTEMPTS):
            candidate = folder / str(number) / target.name  # a folder each: no attempt sees another's files
            candidate.parent.mkdir()
            try:
                opset, nodes = _write(flat, inputs, candidate, options)
                error = _compare(candidate, flat, batches, tolerance) if verify else None
            except Exception as reason:  # noqa: BLE001  exporters and runtimes raise anything; all of it is reported
                failed.append(f"{exporter}: {_one_line(reason)}")
                continue
            data = candidate.with_name(f"{target.name}.data")
            files = [file for file in (data, candidate) if file.exists()]
            size = sum(file.stat().st_size for file in files)
            for file in files:
                publish(file, target.with_name(file.name))
            return OnnxReport(
                path=str(target),
                exporter=exporter,
                opset=opset,
                nodes=nodes,
                bytes=size,
                parameters=sum(parameter.numel() for parameter in student.parameters()),
                max_error=error,
                batches=tuple(batch.size for batch in batches),
                failed=tuple(failed),
            )
    reasons = "".join(f"\n  {line}" for line in failed)
    raise ExportError(
        f"{type(student).__name__} could not be exported to {str(target)!r}; no file was written.{reasons}\n"
        f"Where only the difference is too large, check that the module is deterministic in eval mode, "
        f"or pass a larger tolerance than {tolerance:g}."
    )


def _need(*packages: str) -> list[ModuleType]:
    """Import the optional packages, or say how to install them."""
    import importlib

    modules: list[ModuleType] = []
    for package in packages:
        try:
            modules.append(importlib.import_module(package))
        except ImportError as error:
            raise ExportError(
                f"ONNX export needs the package {package!r}, which cannot be imported ({error}); "
                "install it with: pip install 'gpd_fx[onnx]'"
            ) from error
    return modules


def _prepare(
    student: nn.Module, example_inputs: Sequence[Any] | None, example_kwargs: Mapping[str, Any] | None
) -> tuple[FlatModule, tuple[Tensor, ...]]:
    """A copy of the module on the CPU in eval mode with flat inputs, and an example with a batch of 2 or 3."""
    args, kwargs = prepare(student, example_inputs, example_kwargs)
    try:
        duplicate = copy.deepcopy(student).cpu().eval()
    except Exception as error:
        raise ExportError(
            f"{type(student).__name__} cannot be copied ({_one_line(error)}); every tensor in it must be a parameter, "
            "a buffer or free of gradient history"
        ) from error
    flat = FlatModule(duplicate, args, kwargs)
    if not flat.example:
        raise InputError("the example inputs hold no tensor; pass the arguments of one call, such as (images,)")
    inputs = flat.resize(_rows(flat))
    _call(flat, inputs)
    return flat, inputs


def _rows(flat: FlatModule) -> int:
    """The batch size to export with: torch.export would take 1 for a constant, and more only costs time."""
    return min(max(flat.batch, 2), 3)


def _call(flat: FlatModule, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The module's outputs; raises `InputError` with the shapes where it does not take them."""
    try:
        with torch.no_grad():
            return flat(*(tensor.clone() for tensor in inputs))  # clones: a model may write into its inputs
    except Exception as error:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in zip(flat.input_names, inputs, strict=True))
        raise InputError(
            f"{type(flat.module).__name__} cannot be called with {shapes} ({_one_line(error)}); pass example inputs of "
            "the right shape and type, and note that the exported model must take every batch size"
        ) from error


def _batches(flat: FlatModule) -> tuple[_Batch, ...]:
    """Random batches as the module computes them: of the example's size, of one row, and larger ones."""
    rows = _rows(flat)
    sizes = (rows, 1, rows + 1, 2 * rows + 1) if any(flat.batched) else (rows,)
    generator = torch.Generator().manual_seed(0)
    batches: list[_Batch] = []
    for size in sizes:
        drawn = tuple(draw(tensor, generator) for tensor in flat.resize(size))
        outputs = _call(flat, drawn)
        for name, output in zip(flat.output_names, outputs, strict=True):
            if output.isnan().any():
                raise ExportError(
                    f"output {name!r} of {type(flat.module).__name__} is NaN on a random batch of {size}; "
                    "check its parameters and buffers, or give example inputs in the range that it expects"
                )
        batches.append(_Batch(size, drawn, outputs))
    return tuple(batches)


def _write(flat: FlatModule, inputs: tuple[Tensor, ...], path: Path, options: Mapping[str, bool]) -> tuple[int, int]:
    """Run one exporter, tidy and check its file; returns the opset and the number of nodes."""
    onnx = _need("onnx")[0]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*flat.parameters(), *flat.buffers()))
    axes = [{0: "batch"} if batched else {} for batched in flat.batched]
    shapes: dict[str, Any] = (
        {"dynamic_shapes": (tuple(axis or None for axis in axes),)}
        if options["dynamo"]
        else {"dynamic_axes": dict(zip(flat.input_names, axes, strict=True))}
    )
    shapes |= options
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecations inside the exporters, and traces of constants: the check decides
        torch.onnx.export(
            copy.deepcopy(flat),  # an exporter may leave the module changed
            inputs,
            path,
            input_names=list(flat.input_names),
            output_names=list(flat.output_names),
            external_data=weights > _EXTERNAL_BYTES,
            verbose=False,
            **shapes,
        )
    model = onnx.load(path, load_external_data=False)
    _tidy(model.graph)
    onnx.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    opset = max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return opset, len(model.graph.node)


def _tidy(graph: Any) -> None:
    """Give the weights the names that they have in the module, and drop the stack traces with the paths in them."""
    names = {weight.name for weight in graph.initializer}
    rename = {name: name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX)}
    taken = names | {value for node in graph.node for value in (*node.input, *node.output)}
    rename = {old: new for old, new in rename.items() if new not in taken}
    for weight in (*graph.initializer, *graph.value_info):
        weight.name = rename.get(weight.name, weight.name)
    for node in graph.node:
        node.input[:] = [rename.get(value, value) for value in node.input]
        kept = [(entry.key, entry.value) for entry in node.metadata_props if "stack_trace" not in entry.key]
        del node.metadata_props[:]
        for key, value in kept:
            node.metadata_props.add(key=key, value=value)
        node.doc_string = ""


def _compare(path: Path, flat: FlatModule, batches: tuple[_Batch, ...], tolerance: float) -> float:
    """The largest relative difference between ONNX Runtime and the module; raises where it exceeds `tolerance`."""
    session = _session(path)
    worst = 0.0
    for batch in batches:
        results = _run(session, dict(zip(flat.input_names, batch.inputs, strict=True)))
        if len(results) != len(batch.outputs):
            raise ExportError(f"{len(results)} outputs instead of the module's {len(batch.outputs)}")
        for name, ours, theirs in zip(flat.output_names, batch.outputs, results, strict=True):
            error = relative_error(ours, theirs)
            if not error <= tolerance:
                raise ExportError(
                    f"output {name!r} differs from the module's by {error:.3g} relative to its largest value "
                    f"on a batch of {batch.size} (tolerance {tolerance:g})"
                )
            worst = max(worst, error)
    return worst


def _session(path: Path) -> Any:
    ort: Any = _need("onnxruntime")[0]
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only: they are raised as well
    options.intra_op_num_threads = torch.get_num_threads()
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run(session: Any, feeds: dict[str, Tensor]) -> list[Tensor]:
    wanted = {entry.name for entry in session.get_inputs()}  # an exporter may drop an input that nothing reads
    results = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items() if name in wanted})
    return [torch.as_tensor(result) for result in results]


def _one_line(error: BaseException) -> str:
    """The first lines of a message, joined: exporters append pages of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:3]) or "no message"
    return f"{type(error).__name__}: {text[:400]}"
