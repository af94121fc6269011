"""What a run is made of: one dataclass, read from and written to YAML.

A value of None stands for what the recipe says. `complete` fills these in, so the file that a run writes holds every
value that it ran with, and starts the same run again.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Final, Literal, Union, cast, get_args, get_origin, get_type_hints

from gpd_fx.distill.losses.weights import check_weight
from gpd_fx.errors import ArgumentError
from gpd_fx.io.extras import need
from gpd_fx.io.files import write_text

LOSSES: Final = ("task_student", "task_teacher", "distill", "static", "features")
_DEFAULT_WEIGHTS: Final = {"task_student": 1.0, "task_teacher": 1.0, "distill": 1.0, "static": 1.0, "features": 1.0}


@dataclass(frozen=True)
class DistillConfig:
    """The options of `gpd-fx distill`. Defaults but `weights` are those of the method for CNNs on ImageNet.

    Attributes:
        student: the model, as `torchvision:NAME`, `timm:NAME` or `package.module:factory`, with options after commas;
            where the model itself is given, a title.
        data: folder with `train` and `val` (or `valid`, `validation`, `test`) of one folder a class; the root of
            `dataset` where that is given.
        dataset: name of a data set that timm reads, such as `torch/cifar10` or `hfds/NAME`; empty: image folders.
        download: let timm download it.
        student_weights: fine-tuning: a safetensors file with the student's state_dict to begin with.
        static_teacher: an ordinary pretrained model to learn from as well: a name as for `student`, or an ONNX file.
        static_weights: its state_dict, as a safetensors file.
        static_compile: compile it.
        static_loss: how both networks learn from it: "dkd" or "kd".
        static_options: of that loss: `alpha`, `beta`, `temperature` for dkd; `temperature`, `smoothing` for kd.
        features: pairs (of the student, of the static teacher) of names of modules or nodes whose outputs are compared
            as well (ReviewKD), from shallow to deep.
        alone: train the student without a dynamic teacher, as a baseline.
        ratio: how many times wider the dynamic teacher is, or such numbers by parameter-name glob.
        branches: "orepa", none, or a list of branch names.
        exclude: globs of parameter names to leave as they are.
        recipe: "cnn" or "transformer": what the values that are None mean.
        input_size: channels, height and width of an image; the student's own where None.
        transforms: options of timm's `create_transform` for the training images.
        test_transforms: the same for evaluation.
        mixup: strength of mixup; 0 is none.
        cutmix: strength of cutmix; 0 is none.
        label_smoothing: of the task loss.
        epochs: passes over the training images.
        batch_size: images in an update, over all processes together.
        test_batch_size: images that are evaluated at once; as many as in an update where None.
        optimizer: name of one of timm's optimizers.
        learning_rate: its highest value.
        momentum: of optimizers that have one.
        weight_decay: for parameters with two or more dimensions.
        optimizer_options: further options of the optimizer.
        schedule: name of one of timm's schedules; its steps are updates.
        schedule_options: options of timm's `create_scheduler_v2`, with times in epochs; `multistep` falls to a tenth
            after 30, 60 and 90 % of them where it is given no `decay_milestones`.
        warmup_epochs: epochs during which the learning rate rises.
        clip_grad: largest norm of the gradient; None: any.
        ema_decay: of the moving average of all weights (timm's ModelEmaV3); 0 is none.
        ema_warmup: begin with a faster average; for short runs.
        weights: of the losses by name, each a number or numbers by epoch; 1 where not given. The method was published
            with 3 for `distill`; the reason is in docs/cifar.md.
        temperature: of the distillation from the dynamic teacher.
        smoothing: of its target.
        precision: "no", "bf16" or "fp16".
        device: "auto" or "cpu".
        sync_batch_norm: batch-norm statistics over all processes.
        channels_last: lay images out with the channels last.
        workers: processes that load images; the images do not depend on it.
        seed: of everything random.
        evaluate_every: epochs between two evaluations.
        log_every: updates between two lines of metrics; 0: only those of the epochs.
        checkpoint_every: updates between two checkpoints; 0: one an epoch.
        keep: how many checkpoints stay.
        recalibrate: training batches to measure the folded student's batch-norm statistics on anew; 0: none.
        onnx: export the student at the end.
    """

    student: str = ""
    data: str | None = None
    dataset: str = ""
    download: bool = False
    student_weights: str | None = None
    static_teacher: str | None = None
    static_weights: str | None = None
    static_compile: bool = False
    static_loss: Literal["dkd", "kd"] = "dkd"
    static_options: dict[str, Any] = field(default_factory=dict[str, Any])
    features: list[list[str]] = field(default_factory=list[list[str]])
    alone: bool = False
    ratio: float | dict[str, float] = 2.0
    branches: str | list[str] | None = "orepa"
    exclude: list[str] = field(default_factory=list[str])
    recipe: Literal["cnn", "transformer"] = "cnn"
    input_size: list[int] | None = None
    transforms: dict[str, Any] = field(default_factory=dict[str, Any])
    test_transforms: dict[str, Any] = field(default_factory=dict[str, Any])
    mixup: float | None = None
    cutmix: float | None = None
    label_smoothing: float = 0.0
    epochs: int | None = None
    batch_size: int = 512
    test_batch_size: int | None = None
    optimizer: str | None = None
    learning_rate: float | None = None
    momentum: float = 0.9
    weight_decay: float | None = None
    optimizer_options: dict[str, Any] = field(default_factory=dict[str, Any])
    schedule: str | None = None
    schedule_options: dict[str, Any] = field(default_factory=dict[str, Any])
    warmup_epochs: int | None = None
    clip_grad: float | None = None
    ema_decay: float = 0.99996
    ema_warmup: bool = False
    weights: dict[str, float | dict[float, float]] = field(default_factory=dict[str, float | dict[float, float]])
    temperature: float = 1.0
    smoothing: float = 0.1
    precision: Literal["no", "bf16", "fp16"] = "no"
    device: Literal["auto", "cpu"] = "auto"
    sync_batch_norm: bool = False
    channels_last: bool = False
    workers: int = 4
    seed: int = 0
    evaluate_every: int = 1
    log_every: int = 50
    checkpoint_every: int = 0
    keep: int = 2
    recalibrate: int = 0
    onnx: bool = True

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ArgumentError: a value that cannot work, by name.
        """
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, kind):
                raise ArgumentError(f"{name} is {value!r}; it must be {_describe(kind)}")
        for names, wanted, holds in _BOUNDS:
            for name in names:
                value = getattr(self, name)
                if value is not None and not (math.isfinite(value) and holds(value)):
                    raise ArgumentError(f"{name} is {value!r}; it must be {wanted}")
        for name, weight in self.weights.items():
            _known("weight", name, LOSSES)
            check_weight(name, weight)
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.input_size is not None and (len(self.input_size) != 3 or min(self.input_size) < 1):
            raise ArgumentError(f"input_size is {self.input_size!r}; it must be channels, height, width")
        for pair in self.features:
            if len(pair) != 2:
                raise ArgumentError(f"features has {pair!r}; each entry is a pair: student's module, static teacher's")
        for names in zip(*self.features, strict=True):
            if len(set(names)) < len(names):
                raise ArgumentError(f"features names {names} on one side; each may be there once")
        if self.static_weights is not None and self.static_teacher is None:
            raise ArgumentError("static_weights are those of a static teacher; name it (static_teacher)")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ArgumentError(f"mixup and cutmix pair images up: batch_size {self.batch_size} must be even")

    def complete(self) -> DistillConfig:
        """The same with a value in the place of every None that the recipe has one for."""
        tuned = self.student_weights is not None
        values: dict[str, Any]
        if self.recipe == "cnn":
            epochs = self.epochs or (50 if tuned else 100)
            values = {"epochs": epochs, "optimizer": "momentum", "learning_rate": 0.01 if tuned else 0.1}
            values |= {"weight_decay": 1e-4, "schedule": "multistep", "warmup_epochs": 0, "mixup": 0.0, "cutmix": 0.0}
        else:
            values = {"epochs": 300, "optimizer": "adamw", "learning_rate": 5e-4 * self.batch_size / 512}
            values |= {"weight_decay": 0.05, "schedule": "cosine", "warmup_epochs": 5, "mixup": 0.8, "cutmix": 1.0}
        missing = {name: value for name, value in values.items() if getattr(self, name) is None}
        return replace(self, **missing, weights={**_DEFAULT_WEIGHTS, **self.weights})

    def to_dict(self) -> dict[str, Any]:
        """All values, in a form that YAML and JSON hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DistillConfig:
        """A configuration from values by name.

        Raises:
            ArgumentError: a name is unknown, `student` is missing, or a value cannot work.
        """
        names = [each.name for each in fields(cls)]
        for name in values:
            _known("option", name, names)
        if not values.get("student"):
            raise ArgumentError("no student is named; give a model such as torchvision:resnet18")
        kinds = get_type_hints(cls)
        return cls(**{name: _number(value, kinds[name]) for name, value in values.items()})

    def save(self, path: Path) -> None:
        """Write all values to a YAML file, whole or not at all."""
        yaml = need("yaml", "a configuration file")
        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False))


def read_values(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values that a YAML file gives, unchecked.

    Raises:
        ArgumentError: the file cannot be read, or is no mapping of names to values.
    """
    yaml = need("yaml", "a configuration file")
    try:
        values: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArgumentError(f"configuration {str(path)!r} cannot be read: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in cast("dict[Any, Any]", values)):
        raise ArgumentError(f"configuration {str(path)!r} must hold names with values, such as 'epochs: 10'")
    return cast("dict[str, Any]", values)


def load_config(path: str | os.PathLike[str]) -> DistillConfig:
    """The configuration in a YAML file.

    Raises:
        ArgumentError: the file cannot be read, or holds a name or value that cannot work.
    """
    return DistillConfig.from_dict(read_values(path))


def _known(kind: str, name: str, names: tuple[str, ...] | list[str]) -> None:
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"
        raise ArgumentError(f"unknown {kind} {name!r}; {hint}")


_BOUNDS: Final[tuple[tuple[tuple[str, ...], str, Callable[[float], bool]], ...]] = (
    (("epochs", "batch_size", "test_batch_size", "evaluate_every", "keep"), "1 or more", lambda value: value >= 1),
    (("learning_rate", "temperature", "clip_grad"), "a finite number above 0", lambda value: value > 0),
    (
        (
            "mixup",
            "cutmix",
            "weight_decay",
            "warmup_epochs",
            "workers",
            "seed",
            "log_every",
            "checkpoint_every",
            "recalibrate",
        ),
        "0 or more",
        lambda value: value >= 0,
    ),
    (
        ("label_smoothing", "smoothing", "momentum", "ema_decay"),
        "at least 0 and below 1",
        lambda value: 0 <= value < 1,
    ),
)


def _number(value: Any, kind: Any) -> Any:
    """YAML takes 1e-4 for text; where a number is wanted and no text, it is one."""
    wanted = (kind, *get_args(kind))
    if not isinstance(value, str) or float not in wanted or str in wanted:
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value that YAML gave is of a type; whole numbers stand for real ones too."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in cast("list[Any]", value))
    if origin is dict:
        if not isinstance(value, dict):
            return False
        pairs = cast("dict[Any, Any]", value).items()
        return all(_fits(key, inner[0]) and _fits(item, inner[1]) for key, item in pairs)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _describe(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_describe(each) for each in inner)
    if origin is Literal:
        return " or ".join(repr(each) for each in inner)
    if origin is list:
        return f"a list, each {_describe(inner[0])}"
    if origin is dict:
        return "names with values"
    plain = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "nothing"}
    return plain.get(kind, str(kind))
