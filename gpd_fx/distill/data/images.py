"""Images: folders or timm's data sets, timm's augmentation, and batches in an order that is known beforehand.

An update's batch is a slice of its epoch's permutation, of which each process takes its part; what augmentation does to
an image depends on the seed, the epoch and the image. So a run can be taken up at any update without loading what came
before, and several processes train on what one would have trained on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, default_collate

from gpd_fx.distill.config import DistillConfig
from gpd_fx.distill.data.seeds import derive, permutation, restored, set_all
from gpd_fx.errors import ArgumentError
from gpd_fx.io.extras import need

_TEST_FOLDERS: Final = ("val", "valid", "validation", "test")
Key = tuple[int, int]  # epoch (from 0), number of the image


@dataclass(frozen=True)
class Images:
    """What a run trains on and is evaluated on; both give pairs of an image (or whatever) and a class number."""

    train: Dataset[Any]
    test: Dataset[Any]
    classes: int
    input_size: tuple[int, ...]


def load_images(config: DistillConfig, student: nn.Module) -> Images:
    """The images that the configuration names.

    Raises:
        ArgumentError: there are none, they cannot be read, or the two parts have other classes.
    """
    if config.data is None:
        raise ArgumentError("no data is named; give a folder with train/ and val/ in it, of one folder a class each")
    timm_data = need("timm.data", "training")
    cfg: dict[str, Any] = timm_data.resolve_data_config({}, model=student)
    size = tuple(config.input_size or cfg["input_size"])
    common = {"mean": cfg["mean"], "std": cfg["std"]} if len(cfg["mean"]) == size[0] else {}
    if size[0] == 1:  # grey: mean and deviation of ImageNet's brightness
        common = {"mean": (0.449,), "std": (0.226,)}
    learnt = _transform(timm_data, "transforms", config.transforms, {"input_size": size, "is_training": True, **common})
    shown = {"input_size": size, "interpolation": cfg["interpolation"], "crop_pct": cfg["crop_pct"], **common}
    seen = _transform(timm_data, "test_transforms", config.test_transforms, shown)
    colours = {1: "L", 3: "RGB"}.get(size[0])
    if colours is None:
        raise ArgumentError(f"input_size is {list(size)}; images have 1 or 3 channels, so pass data sets of your own")
    train, test = _named(config, colours) if config.dataset else _folders(Path(config.data), colours)
    names = _class_names(train), _class_names(test)
    if names[0] != names[1]:
        odd = sorted(set(names[0] or ()) ^ set(names[1] or ()))
        raise ArgumentError(f"training and test images of {config.data!r} have other classes: {odd[:8]}")
    cast("Any", train).transform, cast("Any", test).transform = learnt, seen
    return Images(train, test, len(names[0]) if names[0] else _count_classes(train), size)


def _folders(root: Path, colours: str) -> tuple[Dataset[Any], Dataset[Any]]:
    vision = need("torchvision.datasets", "training on image folders")
    test = next((root / name for name in _TEST_FOLDERS if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        raise ArgumentError(
            f"data {str(root)!r} must be a folder with train/ and one of {', '.join(_TEST_FOLDERS)} in it, each with "
            "one folder of images a class"
        )
    try:
        loader = _Opener(colours)
        return vision.ImageFolder(str(root / "train"), loader=loader), vision.ImageFolder(str(test), loader=loader)
    except (FileNotFoundError, OSError) as error:
        raise ArgumentError(f"data {str(root)!r}: {error}") from error


@dataclass(frozen=True)
class _Opener:
    """Opens an image file with the channels that the student takes; an object, so that other processes get it."""

    colours: str

    def __call__(self, path: str) -> Any:
        image = need("PIL.Image", "training on image folders")
        with Path(path).open("rb") as file:
            return image.open(file).convert(self.colours)


def _named(config: DistillConfig, colours: str) -> tuple[Dataset[Any], Dataset[Any]]:
    timm_data = need("timm.data", "training")
    parts: list[Dataset[Any]] = []
    for split in ("train", "validation"):
        options = {} if config.dataset.startswith("torch/") else {"input_img_mode": colours}
        try:
            part = timm_data.create_dataset(
                config.dataset, root=config.data, split=split, download=config.download, **options
            )
        except Exception as error:
            raise ArgumentError(
                f"dataset {config.dataset!r} of {config.data!r}: timm cannot read its part {split!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not hasattr(part, "__len__") or not hasattr(part, "__getitem__"):
            raise ArgumentError(
                f"dataset {config.dataset!r} is a stream, which has no order that a run could be taken up in; "
                "give one with numbered images, such as folders, torch/NAME or hfds/NAME"
            )
        parts.append(part)
    return parts[0], parts[1]


def _transform(timm_data: Any, name: str, given: dict[str, Any], defaults: dict[str, Any]) -> Any:
    known = set(inspect.signature(timm_data.create_transform).parameters)
    unknown = sorted(set(given) - known)
    if unknown:
        raise ArgumentError(f"{name} has {unknown[0]!r}, which timm's create_transform does not take: {sorted(known)}")
    try:
        return timm_data.create_transform(**{**defaults, **given})
    except Exception as error:
        raise ArgumentError(f"{name}: timm's create_transform refuses {given}: {error}") from error


def _class_names(dataset: Any) -> list[str] | None:
    named = getattr(dataset, "classes", None)
    if named is None:
        named = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    return None if not named else [str(name) for name in named]


def _count_classes(dataset: Any) -> int:
    targets = getattr(dataset, "targets", None)
    if targets is None:
        targets = [target for _, target in dataset.reader] if hasattr(dataset, "reader") else None
    if targets is None:
        raise ArgumentError("the data set does not say how many classes it has; pass gpd_fx.distill.Images")
    return int(max(targets)) + 1


class Keyed(Dataset[Any]):
    """A data set by (epoch, number), every item with random numbers of its own."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitems__(self, keys: Sequence[Key]) -> list[Any]:
        items: list[Any] = []
        with restored():
            for epoch, number in keys:
                set_all(derive(self.seed, "image", epoch, number))
                items.append(self.dataset[number])
        return items

    def __getitem__(self, key: Key) -> Any:
        return self.__getitems__([key])[0]


class KeyedTensors(Dataset[Any]):
    """The same of tensors, of which nothing is drawn: a batch is cut out of them in one piece."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: Sequence[Key]) -> list[Tensor]:
        return list(self.dataset[[number for _, number in keys]])

    def __getitem__(self, key: Key) -> Any:
        return self.dataset[key[1]]


@dataclass(frozen=True)
class Order(Sampler[list[Key]]):
    """The batches of an epoch for one of several processes, from some update on.

    Attributes:
        count: images in the data set.
        batch_size: images in an update, over all processes.
        seed: of the order.
        rank: of this process.
        world: number of processes.
        epoch: from 0.
        start: updates of this epoch that are left out, since they are done.
    """

    count: int
    batch_size: int
    seed: int
    rank: int
    world: int
    epoch: int
    start: int = 0

    def __iter__(self) -> Iterator[list[Key]]:
        order = permutation(self.seed, self.epoch, self.count)
        part = self.batch_size // self.world
        for update in range(self.start, self.count // self.batch_size):
            first = update * self.batch_size + self.rank * part
            yield [(self.epoch, number) for number in order[first : first + part]]

    def __len__(self) -> int:
        return self.count // self.batch_size - self.start


def training_batches(dataset: Dataset[Any], order: Order, workers: int, pin: bool) -> DataLoader[Any]:
    """The rest of an epoch; a last batch that is not full is left out."""
    return _loader(dataset, order, order.seed, workers, pin)


def held_out_batches(
    dataset: Dataset[Any], batch_size: int, rank: int, world: int, workers: int, pin: bool
) -> DataLoader[Any]:
    """Every image once over all processes."""
    numbers = range(rank, len(cast("Any", dataset)), world)
    keys = [[(0, number) for number in numbers[at : at + batch_size]] for at in range(0, len(numbers), batch_size)]
    return _loader(dataset, cast("Sampler[list[Key]]", keys), 0, workers, pin)


def _loader(dataset: Dataset[Any], batches: Sampler[list[Key]], seed: int, workers: int, pin: bool) -> DataLoader[Any]:
    if type(dataset) is TensorDataset:  # a class made of it may draw; and no process cuts faster than this one
        return DataLoader(KeyedTensors(dataset), batch_sampler=batches, pin_memory=pin, collate_fn=_as_it_is)
    keyed = Keyed(dataset, seed)
    return DataLoader(keyed, batch_sampler=batches, num_workers=workers, pin_memory=pin, collate_fn=default_collate)


def _as_it_is(batch: Any) -> Any:
    return batch


def mixing(config: DistillConfig, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """timm's mixup and cutmix of a batch, which make shares of classes of the class numbers; None for neither."""
    if not config.mixup and not config.cutmix:
        return None
    return need("timm.data", "mixup").Mixup(
        mixup_alpha=config.mixup or 0.0,
        cutmix_alpha=config.cutmix or 0.0,
        label_smoothing=config.label_smoothing,
        num_classes=classes,
    )
