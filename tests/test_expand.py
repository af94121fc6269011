"""What `expand` promises to its caller: structure, ties, modes, dtypes, and that the given model stays as it was."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import gpd_fx
from gpd_fx.errors import ArgumentError, GPDWarning
from gpd_fx.teacher.dynamic_teacher import DynamicTeacher
from gpd_fx.verify.verification import relative_error

Randomise = Callable[[nn.Module], nn.Module]
D = torch.float64


class Net(nn.Module):
    """A small residual conv net."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head((x + F.relu(self.body(x))).mean((2, 3)))


def images(batch: int = 2, dtype: torch.dtype = D) -> Tensor:
    return torch.randn(batch, 3, 8, 8, dtype=dtype)


def agree(model: nn.Module, teacher: DynamicTeacher, *inputs: Any, tolerance: float = 1e-9, **kwargs: Any) -> Any:
    """Both networks of the teacher give what the model gives; returns the model's output."""
    model, teacher = copy.deepcopy(model).eval(), copy.deepcopy(teacher).eval()
    with torch.no_grad():
        expected = model(*inputs, **kwargs)
        for output in teacher.both(*inputs, **kwargs):
            assert relative_error(expected, output) <= tolerance
    return expected


def step(teacher: DynamicTeacher, *inputs: Any, **kwargs: Any) -> None:
    """One training step with both losses."""
    teacher.train()
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05)
    for output in teacher.both(*inputs, **kwargs):
        output.square().mean().backward(retain_graph=True)
    optimizer.step()


# ------------------------------------------------------------------------------------------ inputs and outputs


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 4, 3, padding=1)
        self.vector = nn.Linear(6, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor, *, gain: float = 1.0, mask: Tensor | None = None, **rest: Tensor) -> Tensor:
        h = self.image(x) + gain * self.vector(y)[:, :, None, None]
        if mask is not None:
            h = h * mask
        for value in rest.values():
            h = h + value
        return self.head(h.amax((2, 3)))


def test_several_inputs_keywords_and_free_keywords(randomise: Randomise) -> None:
    model = randomise(TwoInputs()).double()
    x, y, mask = images(), torch.randn(2, 6, dtype=D), torch.rand(2, 1, 8, 8, dtype=D)
    agree(model, gpd_fx.expand(model, 2.0, (x, y)), images(3), torch.randn(3, 6, dtype=D))
    kwargs: dict[str, Any] = {"gain": 0.5, "mask": mask, "more": torch.randn(2, 1, 1, 1, dtype=D)}
    agree(model, gpd_fx.expand(model, 2.0, (x, y), example_kwargs=kwargs), x, y, **kwargs)
    agree(model, gpd_fx.expand(model, 2.0, (x,), example_kwargs={"y": y, **kwargs}), x, y=y, **kwargs)
    agree(model, gpd_fx.expand(model, 2.0, example_kwargs={"x": x, "y": y}), x=x, y=y)


def test_inputs_may_be_nested(randomise: Randomise) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, batch: dict[str, Any], flag: bool, nothing: None) -> Tensor:
            x, (y, _) = batch["x"], batch["pair"]
            return self.second(F.relu(self.first(x if flag else y)))

    model = randomise(Nested()).double()
    batch = {"x": torch.randn(2, 3, dtype=D), "pair": (torch.randn(2, 3, dtype=D), [1, 2])}
    agree(model, gpd_fx.expand(model, 2.0, (batch, True, None)), batch, True, None)


@dataclass
class Output:
    logits: Tensor
    features: list[Tensor]


class Pair(NamedTuple):
    logits: Tensor
    features: Tensor


class Structured(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        features = F.relu(self.first(x))
        logits = self.second(features)
        pooled = features.mean(1, keepdim=True)
        return {
            "tuple": lambda: (logits, pooled),
            "one": lambda: (logits,),
            "list": lambda: [logits, {"deep": pooled}],
            "dict": lambda: {"logits": logits, "more": (pooled, None)},
            "ordered": lambda: OrderedDict(b=logits, a=pooled),
            "dataclass": lambda: Output(logits, [pooled]),
            "named": lambda: Pair(logits, pooled),
            "constant": lambda: (logits, 3, None, "text"),
        }[self.form]()


@pytest.mark.parametrize("form", ["tuple", "one", "list", "dict", "ordered", "dataclass", "named", "constant"])
def test_outputs_keep_structure_and_class(randomise: Randomise, form: str) -> None:
    model = randomise(Structured(form)).double().eval()
    x = torch.randn(3, 3, dtype=D)
    teacher = gpd_fx.expand(model, 2.0, (torch.randn(2, 3, dtype=D),))
    expected = agree(model, teacher, x)

    def form_of(value: Any) -> Any:
        if isinstance(value, dict):
            return type(value), [(key, form_of(item)) for key, item in value.items()]
        if isinstance(value, list | tuple):
            return type(value), [form_of(item) for item in value]
        if isinstance(value, Output):
            return type(value), form_of(value.logits), form_of(value.features)
        return "tensor" if isinstance(value, Tensor) else value

    for output in teacher.both(x):
        assert form_of(output) == form_of(expected)


def test_a_sequence_in_front_of_the_batch(randomise: Randomise) -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.position = nn.Linear(3, 4), nn.Parameter(torch.zeros(5, 1, 4))
            self.layer = nn.MultiheadAttention(4, 2)
            self.second = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:  # time, batch, channels; as many steps as positions
            x = F.relu(self.first(x)) + self.position
            return self.second(x + self.layer(x, x, x, need_weights=False)[0])

    model = randomise(TimeFirst()).double()
    agree(model, gpd_fx.expand(model, 2.0, (torch.randn(5, 2, 3, dtype=D),)), torch.randn(5, 2, 3, dtype=D))


def test_inputs_without_a_common_leading_size(randomise: Randomise) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
            return self.second(weights @ F.relu(self.first(x)) * scale)

    model = randomise(Table()).double()
    inputs = torch.randn(6, 3, dtype=D), torch.randn(4, 6, dtype=D), torch.tensor(0.5, dtype=D)
    agree(model, gpd_fx.expand(model, 2.0, inputs), *inputs)


def test_an_example_batch_of_one(randomise: Randomise) -> None:
    model = randomise(Net()).double().eval()
    agree(model, gpd_fx.expand(model, 2.0, (images(1),)), images(4))


def test_example_inputs_are_inferred(randomise: Randomise) -> None:
    model = randomise(Net())
    agree(model, gpd_fx.expand(model), torch.randn(3, 3, 224, 224), tolerance=1e-5)


# --------------------------------------------------------------------------------------------------- ratios


def widths(teacher: DynamicTeacher) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in teacher.composition.weights.named_parameters()}


@pytest.mark.parametrize("ratio", [2, 2.0, 3.0, 1.5, 1.3, 4.25])
def test_ratios_whole_and_not(randomise: Randomise, ratio: float) -> None:
    model = randomise(Net(6)).double()
    teacher = gpd_fx.expand(model, ratio, (images(),))
    agree(model, teacher, images(3))
    wide = round(6 * ratio)
    assert widths(teacher)["stem.weight"] == (wide, 3, 3, 3)
    assert widths(teacher)["body.weight"] == (wide, wide, 3, 3)
    assert widths(teacher)["head.weight"] == (5, wide)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_ratios_by_glob(randomise: Randomise) -> None:
    model = randomise(Stack()).double()
    x = torch.randn(2, 4, dtype=D)
    teacher = gpd_fx.expand(model, {"layers.*": 2.0, "layers.1.*": 3, "layers.2.weight": 1}, (x,))
    agree(model, teacher, x)
    sizes = widths(teacher)
    assert sizes["layers.0.weight"] == (8, 4)
    assert sizes["layers.1.weight"] == (12, 8)
    assert sizes["layers.2.weight"] == (8, 12)  # its bias matches the first glob, and they share their channels
    teacher = gpd_fx.expand(model, {"layers.0.*": 2.0}, (x,))
    agree(model, teacher, x)
    assert widths(teacher)["layers.1.weight"] == (4, 8)
    assert widths(teacher)["layers.2.weight"] == (4, 4)


def test_ratio_one_is_a_teacher_of_the_same_width(randomise: Randomise) -> None:
    model = randomise(Net()).double()
    teacher = gpd_fx.expand(model, 1, (images(),))
    agree(model, teacher, images(3))
    assert widths(teacher) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert teacher.report().branch_parameters > 0


def test_without_branches(randomise: Randomise) -> None:
    model = randomise(Net()).double()
    teacher = gpd_fx.expand(model, 2.0, (images(),), branches=None)
    agree(model, teacher, images(3))
    assert teacher.report().branch_parameters == 0
    assert not list(teacher.composition.branches.parameters())


def test_the_seed_decides(randomise: Randomise) -> None:
    model = randomise(Net()).double()
    first, second, third = (gpd_fx.expand(model, 2.0, (images(),), seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters(), strict=True))


def test_torchs_random_numbers_are_left_alone(randomise: Randomise) -> None:
    model, inputs = randomise(Net()).double(), (images(),)
    state = torch.get_rng_state()
    gpd_fx.expand(model, 2.0, inputs)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------- ties


class TiedWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(F.gelu(self.mix(self.embed(ids))))


class TiedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.again = self.body
        self.other = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.other.weight = self.body.weight
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.body(self.stem(x)))
        return self.head(F.relu(self.again(x)) + self.other(x) + self.body(x))


@pytest.mark.parametrize(
    ("make", "inputs", "names"),
    [
        (TiedWords, torch.randint(7, (2, 5)), ("embed.weight", "out.weight")),
        (TiedConv, images(), ("body.weight", "again.weight", "other.weight")),
    ],
)
def test_tied_parameters_stay_tied(
    randomise: Randomise, make: type[nn.Module], inputs: Tensor, names: tuple[str, ...]
) -> None:
    model = randomise(make()).double()
    teacher = gpd_fx.expand(model, 2.0, (inputs,))
    agree(model, teacher, inputs)
    assert len(list(teacher.composition.weights.parameters())) == len(list(model.parameters()))
    step(teacher, inputs)
    student = gpd_fx.fold(teacher)
    first, *others = (student.get_parameter(name) for name in names)
    assert all(other is first for other in others)
    assert list(student.state_dict()) == list(model.state_dict())
    assert relative_error(teacher.eval().student(inputs), student.eval()(inputs)) <= 1e-12


def test_calls_leave_nothing_in_a_module_that_is_there_twice(randomise: Randomise) -> None:
    model = randomise(TiedConv()).double()
    teacher = gpd_fx.expand(model, 2.0, (images(),))
    str(teacher.report())
    step(teacher, images())
    assert not list(teacher.skeleton.parameters())
    copy.deepcopy(teacher)
    teacher.eval()
    x = images(3)
    assert relative_error(teacher.student(x), gpd_fx.fold(teacher)(x)) <= 1e-12


def test_a_parameter_that_no_call_uses(randomise: Randomise) -> None:
    model = randomise(Net()).double()
    model.unused = nn.Linear(3, 3).double()
    teacher = gpd_fx.expand(model, 2.0, (images(),))
    agree(model, teacher, images(3))
    step(teacher, images())
    student = gpd_fx.fold(teacher)
    assert torch.equal(student.get_parameter("unused.weight"), model.get_parameter("unused.weight"))
    assert any("unused.weight" in entry.channels for entry in teacher.report().frozen)


def test_frozen_parameters_stay_frozen(randomise: Randomise) -> None:
    model = randomise(Net()).double()
    model.get_parameter("stem.weight").requires_grad_(False)
    model.get_parameter("norm.bias").requires_grad_(False)
    teacher = gpd_fx.expand(model, 2.0, (images(),))
    agree(model, teacher, images(3))
    before = teacher.composition.weights.get_parameter("stem.weight").clone()
    step(teacher, images())
    weights = teacher.composition.weights
    assert torch.equal(weights.get_parameter("stem.weight"), before)
    assert not any(name.startswith("stem") for name, _ in teacher.composition.branches.named_parameters())
    student = gpd_fx.fold(teacher)
    assert {n: p.requires_grad for n, p in student.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


def test_buffers_persistent_and_not(randomise: Randomise) -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
            self.register_buffer("kept", torch.rand(4))
            self.register_buffer("passing", torch.rand(4), persistent=False)
            self.register_buffer("count", torch.tensor(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) * self.get_buffer("kept") + self.get_buffer("passing"))

    model = randomise(Buffered()).double()
    x = torch.randn(2, 3, dtype=D)
    teacher = gpd_fx.expand(model, 2.0, (x,))
    agree(model, teacher, x)
    keys = list(teacher.state_dict())
    assert "wide_buffers.kept" in keys
    assert "skeleton.kept" in keys
    assert not any("passing" in key for key in keys)
    assert teacher.wide_buffers.get_buffer("passing").shape == (8,)
    assert list(gpd_fx.fold(teacher).state_dict()) == list(model.state_dict())


# -------------------------------------------------------------------------------------- the model is not changed


@pytest.mark.parametrize("training", [True, False])
def test_the_given_model_is_never_changed(randomise: Randomise, training: bool) -> None:
    model = randomise(Net()).double().train(training)
    model.get_submodule("norm").eval()
    model.get_parameter("head.weight").requires_grad_(False)
    calls: list[str] = []
    handle = model.register_forward_hook(lambda *_: calls.append("hook"))
    model(images()).sum().backward()
    calls.clear()
    twin = copy.deepcopy(model)
    grads = {name: p.grad for name, p in model.named_parameters()}
    storage = {name: p.data_ptr() for name, p in model.state_dict().items()}
    teacher = gpd_fx.expand(model, 2.0, (images(),))
    str(teacher.report())
    step(teacher, images())
    gpd_fx.fold(teacher)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    assert {name: p.data_ptr() for name, p in model.state_dict().items()} == storage
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in twin.parameters()]
    assert all(p.grad is grads[name] for name, p in model.named_parameters())
    assert len(model._forward_hooks) == 1  # pyright: ignore[reportPrivateUsage]  no public view of hooks
    handle.remove()


def test_a_model_whose_inputs_are_inferred_is_not_changed_either() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn, self.head = nn.Embedding(9, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 9)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.rnn(self.embed(ids))[0])

    model = Recurrent().eval()
    ids = torch.randint(9, (2, 5))
    expected = model(ids)
    assert gpd_fx.expand(model).report().coverage > 0.95
    assert torch.equal(model(ids), expected)
    copy.deepcopy(model)


def test_the_mode_is_the_models(randomise: Randomise) -> None:
    model = randomise(Net()).double()
    assert gpd_fx.expand(model.eval(), 2.0, (images(),)).training is False
    assert gpd_fx.expand(model.train(), 2.0, (images(),)).training is True


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.05)]
)
def test_dtypes_are_kept(randomise: Randomise, dtype: torch.dtype, tolerance: float) -> None:
    model = randomise(Net()).to(dtype)
    teacher = gpd_fx.expand(model, 2.0, (images(dtype=dtype),))
    agree(model, teacher, images(3, dtype), tolerance=tolerance)
    assert {p.dtype for p in teacher.parameters()} == {dtype}
    assert all(output.dtype == dtype for output in teacher.both(images(2, dtype)))
    step(teacher, images(2, dtype))
    assert {p.dtype for p in gpd_fx.fold(teacher).parameters()} == {dtype}


def test_a_teacher_can_be_cast(randomise: Randomise) -> None:
    """Tensors that the model makes inside follow the parameters."""

    class Makes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.second(torch.cat([h, torch.ones(x.shape[0], 4, dtype=x.dtype, device=x.device)], 1))

    model = randomise(Makes())
    x = torch.randn(2, 3)
    teacher = gpd_fx.expand(model, 2.0, (x,)).double()
    agree(copy.deepcopy(model).double(), teacher, x.double())
    assert teacher(x.double()).dtype == D
    assert teacher.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    meta = copy.deepcopy(teacher).to("meta")
    assert meta(x.bfloat16().to("meta")).device.type == "meta"


def test_mixed_dtypes_and_integers(randomise: Randomise) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.first, self.second = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            h = F.softmax(self.first(self.embed(ids)).float(), -1).to(self.first.weight.dtype)
            return self.second(torch.where(mask[..., None], h, 0.0))

    model = randomise(Mixed())
    ids, mask = torch.randint(6, (2, 5)), torch.rand(2, 5) > 0.5
    agree(model, gpd_fx.expand(model, 2.0, (ids, mask)), ids, mask, tolerance=1e-5)


# ----------------------------------------------------------------------------------------------- training


def test_roles(randomise: Randomise) -> None:
    model = randomise(Net()).double().eval()
    teacher = gpd_fx.expand(model, 2.0, (images(),))
    x = images(3)
    wide, narrow = teacher(x, role="both")
    assert torch.equal(wide, teacher(x))
    assert torch.equal(wide, teacher(x, role="teacher"))
    assert torch.equal(narrow, teacher.student(x))
    assert torch.equal(narrow, teacher(x, role="student"))
    with pytest.raises(ArgumentError, match=r"role is 'wide'; it must be 'teacher', 'student' or 'both'"):
        teacher(x, role="wide")  # pyright: ignore[reportArgumentType]  that is the test


def test_one_composition_serves_both(randomise: Randomise) -> None:
    teacher = gpd_fx.expand(randomise(Net()).double(), 2.0, (images(),))
    with torch.autograd.profiler.profile(use_cpu=True) as profile:
        teacher.both(images())
    assert profile is not None
    assert sum(event.name == "gpd_fx::compose" for event in profile.function_events or ()) == 1


def test_each_network_has_its_own_statistics(randomise: Randomise) -> None:
    model = randomise(Net()).double()
    teacher = gpd_fx.expand(model, 2.0, (images(),)).train()
    norm = teacher.skeleton.get_submodule("norm")
    wide = dict(teacher.wide_buffers.named_buffers())
    narrow = {f"norm.{name}": buffer for name, buffer in norm.named_buffers()}
    before = {name: (wide[name].clone(), narrow[name].clone()) for name in narrow}

    def changed() -> dict[str, tuple[bool, bool]]:
        return {n: (not torch.equal(wide[n], b[0]), not torch.equal(narrow[n], b[1])) for n, b in before.items()}

    teacher(images())
    assert set(changed().values()) == {(True, False)}
    teacher.student(images())
    assert set(changed().values()) == {(True, True)}
    state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    teacher.eval().both(images())
    assert all(torch.equal(tensor, state[name]) for name, tensor in teacher.state_dict().items())
    assert torch.equal(gpd_fx.fold(teacher).get_buffer("norm.running_mean"), narrow["norm.running_mean"])


def test_statistics_are_those_of_copies_after_equal_batches(randomise: Randomise) -> None:
    model = randomise(Net()).double()
    teacher = gpd_fx.expand(model, 1.5, (images(),)).train()
    teacher.both(images(4))
    for name in ("running_mean", "running_var"):
        wide, narrow = teacher.wide_buffers.get_buffer(f"norm.{name}"), teacher.skeleton.get_buffer(f"norm.{name}")
        assert torch.allclose(wide, torch.cat([narrow, narrow[:2]]), rtol=1e-12)


def test_every_parameter_gets_a_gradient_from_both_losses(randomise: Randomise) -> None:
    model = randomise(Net(8)).double()
    teacher = gpd_fx.expand(model, 2.0, (images(),))
    step(teacher, images())  # branch tensors behind a scale of zero have no gradient before
    for role in ("teacher", "student"):
        teacher.zero_grad()
        teacher(images(4), role=role).square().mean().backward()
        missing = [name for name, p in teacher.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not missing, role


def test_copies_part_in_training(randomise: Randomise) -> None:
    teacher = gpd_fx.expand(randomise(Net()).double(), 2.0, (images(),), branches=None)
    weight = teacher.composition.weights.get_parameter("body.weight")
    assert torch.equal(weight[:4, :4], weight[4:, :4])
    assert torch.equal(weight[:4, :4], weight[:4, 4:])
    step(teacher, images())
    step(teacher, images())
    assert not torch.allclose(weight[:4, :4], weight[4:, :4], rtol=1e-6)
    assert not torch.allclose(weight[:4, :4], weight[:4, 4:], rtol=1e-6)


def test_the_students_weights_are_a_slice_of_the_teachers(randomise: Randomise) -> None:
    teacher = gpd_fx.expand(randomise(Net()).double(), 2.0, (images(),), branches=None)
    step(teacher, images())
    student = gpd_fx.fold(teacher)
    for name, wide in teacher.composition.weights.named_parameters():
        narrow = student.get_parameter(name)
        assert torch.equal(wide[tuple(slice(0, n) for n in narrow.shape)], narrow)


# --------------------------------------------------------------------------------------- modules of other kinds


class Linears(nn.Module):
    """Two linear layers, with something of `how` between them."""

    def __init__(self, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.how(self.first, x))


def under_autocast(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return layer(x).float().relu()


def without_autocast(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return layer(x.float()).relu()


def without_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x).relu()


def checkpointed(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda y: layer(y).relu(), x, use_reentrant=False)  # pyright: ignore[reportReturnType]  untyped


def in_frequencies(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(layer(x)) * torch.polar(torch.ones(3), torch.ones(3)), n=4)


@pytest.mark.parametrize(
    "how",
    [under_autocast, without_autocast, without_gradient, checkpointed, in_frequencies, lambda f, x: f(x).detach()],
)
@pytest.mark.filterwarnings("ignore:nothing in Linears widens")
def test_regions_of_their_own(randomise: Randomise, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = randomise(Linears(how))
    x = torch.randn(2, 3)
    teacher = gpd_fx.expand(model, 2.0, (x,))
    agree(model, teacher, torch.randn(5, 3), tolerance=1e-2 if how is under_autocast else 1e-5)
    if how is not checkpointed:  # torch recomputes in backward, when the student's tensors are gone from their places
        step(teacher, x)
    assert relative_error(teacher.student(x), gpd_fx.fold(teacher)(x)) <= 1e-6


def test_complex_parameters(randomise: Randomise) -> None:
    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
            self.filter = nn.Parameter(torch.randn(3, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.relu(self.second_order(self.first(x))))

        def second_order(self, h: Tensor) -> Tensor:
            return torch.fft.irfft(torch.fft.rfft(h) * self.filter, n=4)

    with pytest.warns(GPDWarning, match="nothing in Filter widens"):
        teacher = gpd_fx.expand(model := randomise(Filter()), 2.0, (torch.randn(2, 3),))
    agree(model, teacher, torch.randn(4, 3), tolerance=1e-5)


def test_lists_of_parameters(randomise: Randomise) -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(2, 4))])
            self.named = nn.ParameterDict({"gain": nn.Parameter(torch.ones(4))})

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.weights[0]) * self.named["gain"], self.weights[1])

    model = randomise(Lists()).double()
    x = torch.randn(2, 3, dtype=D)
    teacher = gpd_fx.expand(model, 2.0, (x,))
    agree(model, teacher, x)
    assert teacher.report().coverage == 1
    step(teacher, x)
    assert relative_error(teacher.student(x), gpd_fx.fold(teacher)(x)) <= 1e-12


def test_a_traced_model(randomise: Randomise) -> None:
    model = torch.fx.symbolic_trace(randomise(Net()).double().eval())
    agree(model, gpd_fx.expand(model, 2.0, (images(),)), images(3))


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def test_hooks_are_part_of_the_model(randomise: Randomise) -> None:
    model = randomise(Net()).double().eval()
    model.get_submodule("body").register_forward_hook(doubled)
    plain = copy.deepcopy(model)
    plain.get_submodule("body")._forward_hooks.clear()  # pyright: ignore[reportPrivateUsage]  there is no public way
    teacher = gpd_fx.expand(model, 2.0, (images(),))
    x = images(3)
    agree(model, teacher, x)
    assert relative_error(plain(x), teacher(x)) > 1e-3
    assert relative_error(model(x), gpd_fx.fold(teacher)(x)) <= 1e-12


def test_under_autocast(randomise: Randomise) -> None:
    model = randomise(Net()).eval()
    teacher = gpd_fx.expand(model, 2.0, (images(dtype=torch.float32),))
    x = images(3, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
        for output in teacher.both(x):
            assert output.dtype == expected.dtype == torch.bfloat16
            assert relative_error(expected, output) <= 0.1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_teacher_made_without_gradients_trains(randomise: Randomise, context: Callable[[], Any]) -> None:
    model = randomise(Net()).double()
    with context():
        teacher = gpd_fx.expand(model, 2.0, (images(),))
    step(teacher, images())
    assert all(p.grad is not None for p in teacher.composition.weights.parameters())


def test_channels_last(randomise: Randomise) -> None:
    model = randomise(Net()).double().eval().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  torch's stub lacks it
    teacher = gpd_fx.expand(model, 2.0, (images(),)).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  likewise
    agree(model, teacher, images(3).to(memory_format=torch.channels_last))


def test_dropout_and_stochastic_depth(randomise: Randomise) -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 2)
            self.drop, self.planes = nn.Dropout(0.5), nn.Dropout2d(0.5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.drop(F.relu(self.first(x)))
            h = self.planes(h[:, :, None, None])[:, :, 0, 0]
            if self.training:
                h = h * torch.empty(h.shape[0], 1, dtype=h.dtype, device=h.device).bernoulli_(0.8)
            return self.second(h)

    model = randomise(Drops()).double()
    x = torch.randn(64, 3, dtype=D)
    teacher = gpd_fx.expand(model, 2.0, (x[:2],))
    agree(model, teacher, x)
    teacher.train()
    assert not torch.equal(teacher(x), teacher(x))
    assert not torch.equal(teacher.student(x), teacher.student(x))
    step(teacher, x)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.filterwarnings("ignore:nothing in Noisy widens")
def test_what_is_random_in_eval_mode_is_no_obstacle(randomise: Randomise, noise: float) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h = h + noise * torch.randn_like(h) if noise else h
            return self.second(F.dropout(h, 0.5, training=True))

    teacher = gpd_fx.expand(randomise(Noisy()).double().eval(), 2.0, (torch.randn(2, 3, dtype=D),))
    x = torch.ones(2, 3, dtype=D)
    assert not torch.equal(teacher(x), teacher(x))


class Wrapped(nn.Module):
    """A layer between two linear ones, on a sequence."""

    def __init__(self, layer: nn.Module, width: int = 4, outputs: int | None = None) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(3, width), layer
        self.second = nn.Linear(outputs or width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.second(self.layer(h, h, h)[0])
        out = self.layer(h)
        return self.second(out[0] if isinstance(out, tuple) else out)


@pytest.mark.parametrize("name", ["weight_norm", "orthogonal", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:nothing in Wrapped widens")
def test_parametrised_modules(randomise: Randomise, name: str) -> None:
    layer = getattr(parametrizations, name)(nn.Linear(4, 4))
    model = randomise(Wrapped(layer)).double().eval()
    x = torch.randn(2, 5, 3, dtype=D)
    teacher = gpd_fx.expand(model, 2.0, (x,))
    agree(model, teacher, x)
    step(teacher, x)
    teacher.eval()
    student = gpd_fx.fold(teacher)
    assert list(student.state_dict()) == list(model.state_dict())
    assert relative_error(teacher.student(x), student(x)) <= 1e-12
    assert type(student) is Wrapped


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(randomise: Randomise, kind: type[nn.LSTM | nn.GRU | nn.RNN]) -> None:
    model = randomise(Wrapped(kind(4, 5, num_layers=2, batch_first=True, bidirectional=True), outputs=10)).double()
    x = torch.randn(2, 6, 3, dtype=D)
    teacher = gpd_fx.expand(model, 1.5, (x,))
    assert teacher.report().coverage > 0.99
    agree(model, teacher, x)
    step(teacher, x)
    teacher.eval()
    student = gpd_fx.fold(teacher)
    fresh = copy.deepcopy(model).eval()
    fresh.load_state_dict(student.state_dict())
    expected = teacher.student(x)
    assert relative_error(expected, student(x)) <= 1e-12
    assert relative_error(expected, fresh(x)) <= 1e-12
    again = copy.deepcopy(teacher)
    assert relative_error(expected, again.student(x)) == 0
    assert teacher.float().student(x.float()).dtype == torch.float32
    assert relative_error(expected, teacher.student(x.float())) <= 1e-4


@pytest.mark.parametrize(
    ("make", "coverage"),
    [
        (lambda: nn.MultiheadAttention(4, 2, batch_first=True), 0.8),
        (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 0.9),
        (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=True, activation="gelu"), 0.9),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2), 0.9),
    ],
)
def test_torchs_attention(randomise: Randomise, make: Callable[[], nn.Module], coverage: float) -> None:
    model = randomise(Wrapped(make())).double().eval()
    x = torch.randn(2, 5, 3, dtype=D)
    teacher = gpd_fx.expand(model, 2.0, (x,))
    agree(model, teacher, torch.randn(3, 5, 3, dtype=D), tolerance=1e-9)
    assert teacher.report().coverage >= coverage
    step(teacher, x)
    teacher.eval()
    assert relative_error(teacher.student(x), gpd_fx.fold(teacher)(x)) <= 1e-9


def test_attention_in_train_mode(randomise: Randomise) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    model = randomise(Wrapped(layer)).double().train()
    x = torch.randn(2, 5, 3, dtype=D)
    teacher = gpd_fx.expand(model, 2.0, (x,))
    expected = model(x)
    for output in teacher.both(x):
        assert relative_error(expected, output) <= 1e-9


# ---------------------------------------------------------------------------------------------------- report


class Odd(nn.Module):
    """Two ops that cannot be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cumsum(self.first(x), 1)
        h = self.second(h)
        q = torch.linalg.matrix_exp(h[:, :, None] * h[:, None] * 0.1)
        return self.third(q.sum(1))


def test_ops_without_a_rule_cost_width_and_are_named(randomise: Randomise) -> None:
    model = randomise(Odd()).double()
    x = torch.randn(2, 3, dtype=D)
    with pytest.warns(GPDWarning, match=r"nothing in Odd widens; see report\(\)"):
        teacher = gpd_fx.expand(model, 2.0, (x,))
    agree(model, teacher, torch.randn(3, 3, dtype=D))
    report = teacher.report()
    assert report.coverage == 0
    found = {entry.op: entry for entry in report.frozen}
    scan = found["aten.cumsum.default"]
    assert scan.node == "cumsum"
    assert "scanned" in scan.reason
    assert "first.weight[0]" in scan.channels
    unknown = found["aten.linalg_matrix_exp.default"]
    assert unknown.reason == "this op has no rule"
    assert "second.weight[0]" in unknown.channels
    assert sum(entry.cost for entry in report.frozen) == report.student_parameters
    assert "aten.linalg_matrix_exp.default at linalg_matrix_exp: this op has no rule" in str(report)


def test_a_model_with_nothing_to_widen(randomise: Randomise) -> None:
    model = randomise(nn.Linear(3, 2)).double()
    x = torch.randn(2, 3, dtype=D)
    with pytest.warns(GPDWarning, match=r"nothing in Linear widens"):
        teacher = gpd_fx.expand(model, 2.0, (x,))
    agree(model, teacher, torch.randn(5, 3, dtype=D))
    assert teacher.report().branches == {"weight": ("kxk", "lowrank")}
    assert any("nothing widens" in note for note in teacher.report().notes)
    assert "nothing widens" in str(teacher.report())
    step(teacher, x)
    assert not torch.equal(gpd_fx.fold(teacher).get_parameter("weight"), model.get_parameter("weight"))


def test_a_model_without_parameters() -> None:
    with pytest.warns(GPDWarning, match="nothing in ReLU widens"):
        teacher = gpd_fx.expand(nn.ReLU(), 2.0, (torch.randn(2, 3),))
    assert torch.equal(teacher(torch.tensor([[-1.0, 2.0, 0.5]])), torch.tensor([[0.0, 2.0, 0.5]]))
    assert teacher.report().coverage == 0
    assert isinstance(gpd_fx.fold(teacher), nn.ReLU)


def test_the_report_says_what_happened(randomise: Randomise) -> None:
    model = randomise(Net()).double()
    teacher = gpd_fx.expand(model, 2.0, (images(),))
    report = teacher.report()
    text = str(report)
    assert report.model == "Net"
    assert report.ratio == 2.0
    assert 0.9 < report.coverage <= 1
    assert report.student_parameters == sum(p.numel() for p in model.parameters())
    wide = sum(p.numel() for p in teacher.composition.weights.parameters())
    assert report.teacher_parameters == wide
    assert report.branch_parameters == sum(p.numel() for p in teacher.composition.branches.parameters())
    assert report.max_error is not None
    assert report.max_error <= 1e-9
    assert report.teacher_flops > report.student_flops > 0
    (group,) = report.groups
    assert (group.name, group.channels, group.wide) == ("stem.weight[0]", 4, 8)
    assert {name.split(".")[0] for name in group.parameters} == {"stem", "norm", "body", "head"}
    assert "body.bias" in group.parameters
    assert report.branches["stem.weight"][0] == "kxk"
    for expected in ("Net, ratio 2.0", "student", "dynamic teacher", "coverage", "4 -> 8", "stem.weight[0]", "FLOPs"):
        assert expected in text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["coverage"] == report.coverage
    assert data["groups"][0]["wide"] == 8
    assert data["frozen"] == [] or {"op", "node", "reason", "channels", "cost"} <= set(data["frozen"][0])


def test_the_report_without_verification(randomise: Randomise) -> None:
    teacher = gpd_fx.expand(randomise(Net()).double(), 2.0, (images(),), verify=False)
    assert teacher.report().max_error is None
    assert "verification not run" in str(teacher.report())


def test_inspecting_builds_nothing(randomise: Randomise) -> None:
    model = randomise(Net()).double()
    inspected = gpd_fx.inspect_model(model, 2.0, (images(),))
    built = gpd_fx.expand(model, 2.0, (images(),)).report()
    assert inspected.groups == built.groups
    assert inspected.frozen == built.frozen
    assert inspected.coverage == built.coverage
    assert inspected.teacher_parameters == built.teacher_parameters
    assert (inspected.student_flops, inspected.teacher_flops) == (built.student_flops, built.teacher_flops)
    assert inspected.branch_parameters == 0


# --------------------------------------------------------------------------------------------------- the rest


def test_the_state_dict_round_trips(randomise: Randomise) -> None:
    model = randomise(Net()).double()
    trained = gpd_fx.expand(model, 2.0, (images(),))
    step(trained, images())
    fresh = gpd_fx.expand(model, 2.0, (images(),))
    fresh.load_state_dict(trained.state_dict())
    x = images(3)
    for ours, theirs in zip(trained.eval().both(x), fresh.eval().both(x), strict=True):
        assert torch.equal(ours, theirs)


def test_a_deep_copy_is_independent(randomise: Randomise) -> None:
    teacher = gpd_fx.expand(randomise(Net()).double(), 2.0, (images(),)).eval()
    x = images(3)
    expected = teacher(x)
    twin = copy.deepcopy(teacher)
    assert torch.equal(twin(x), expected)
    step(twin, images())
    assert torch.equal(teacher(x), expected)
    assert not torch.equal(twin.eval()(x), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_teacher_compiles(randomise: Randomise, backend: str) -> None:
    teacher = gpd_fx.expand(randomise(Net()).double(), 2.0, (images(),)).eval()
    x = images(3)
    expected = teacher.both(x)
    compiled = torch.compile(teacher, backend=backend)
    for ours, theirs in zip(compiled(x, role="both"), expected, strict=True):
        assert relative_error(theirs, ours) <= 1e-9
    teacher.train()
    torch.stack([output.sum() for output in compiled(x, role="both")]).sum().backward()
    assert isinstance(compiled, nn.Module)
    student = gpd_fx.fold(compiled).eval()
    assert type(student) is Net
    teacher.eval()
    assert relative_error(teacher.student(x), student(x)) <= 1e-12


def test_verify_measures(randomise: Randomise) -> None:
    model = randomise(Net()).double()
    teacher = gpd_fx.expand(model, 2.0, (images(),))
    assert gpd_fx.verify(model, teacher) <= 1e-12
    assert gpd_fx.verify(model, teacher, (images(3),)) <= 1e-12
    assert gpd_fx.verify(copy.deepcopy(model).float(), copy.deepcopy(teacher).float(), dtype=torch.float32) <= 1e-4
    with torch.no_grad():
        teacher.composition.weights.get_parameter("body.weight")[5, 1] += 0.1
    assert gpd_fx.verify(model, teacher) > 1e-6
