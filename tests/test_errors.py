"""Every error that a user can run into: of our family, naming the value and what to do instead."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpd_fx
from gpd_fx.errors import (
    ArgumentError,
    CaptureError,
    FoldError,
    GPDError,
    InputError,
    VerificationError,
)
from gpd_fx.plan import plan
from gpd_fx.plan.parameter_plan import ParamPlan
from gpd_fx.rules import index, table
from gpd_fx.rules.site import Rule, Site, Value

Randomise = Callable[[nn.Module], nn.Module]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.body, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return self.head((x + self.body(x)).mean((2, 3)))


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


@pytest.fixture
def model(randomise: Randomise) -> nn.Module:
    return randomise(Net())


# ------------------------------------------------------------------------------------------------- arguments


def test_a_model_without_values_can_only_be_inspected() -> None:
    with torch.device("meta"):
        model, x = Net(), images()
    assert gpd_fx.inspect_model(model, 2.0, (x,)).coverage > 0.9
    with pytest.raises(ArgumentError, match=r"parameter 'conv\.weight' is on the meta device .* inspect_model"):
        gpd_fx.expand(model, 2.0, (x,))


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (0.5, r"ratio is 0\.5; an expansion ratio must be a finite number >= 1, such as 2\.0"),
        (0, r"ratio is 0; an expansion ratio must be"),
        (-2.0, r"ratio is -2\.0; an expansion ratio must be"),
        (float("nan"), r"ratio is nan; an expansion ratio must be a finite number"),
        (float("inf"), r"ratio is inf; an expansion ratio must be a finite number"),
        ("2", r"ratio is '2', a str; it must be a number >= 1, such as 2\.0"),
        (True, r"ratio is True, a bool; it must be a number"),
        (None, r"ratio is None, a NoneType; it must be a number"),
        ([2.0], r"ratio is \[2\.0\], a list; it must be a number"),
        (2 + 0j, r"ratio is \(2\+0j\), a complex; it must be a number"),
        ({}, r"ratio is an empty mapping; give a number >= 1 or"),
        ({"conv.*": 0.5}, r"ratio\['conv\.\*'\] is 0\.5; an expansion ratio must be"),
        ({"conv.*": "2"}, r"ratio\['conv\.\*'\] is '2', a str"),
        ({3: 2.0}, r"ratio has the key 3; keys are parameter-name globs"),
        (
            {"conv.*": 2.0, "layer9.*": 2.0},
            r"'layer9\.\*' matches no parameter; names look like conv\.weight, conv\.bias",
        ),
    ],
)
def test_ratios(model: nn.Module, ratio: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        gpd_fx.expand(model, ratio, (images(),))
    with pytest.raises(ArgumentError, match=message):
        gpd_fx.inspect_model(model, ratio, (images(),))


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ("3x3", r"branches: there is no branch '3x3'.*Known: orepa, kxk, 1x1"),
        (["1x1", "1x1_avg"], r"no branch '1x1_avg'; did you mean '1x1-avg'\?"),
        ([1], r"a branch is a name, got 1 \(int\)"),
        (["lowrank:0"], r"the width in 'lowrank:0' must be a whole number above 0, such as 'lowrank:16'"),
    ],
)
def test_branches(model: nn.Module, branches: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        gpd_fx.expand(model, 2.0, (images(),), branches=branches)


@pytest.mark.parametrize("given", ["resnet18", nn.Linear, None, {"weight": torch.ones(2)}])
def test_what_is_no_module(given: Any) -> None:
    with pytest.raises(ArgumentError, match=rf"model is a {type(given).__name__}; pass a torch\.nn\.Module"):
        gpd_fx.expand(given, 2.0, (images(),))


def test_a_teacher_is_not_expanded_again(model: nn.Module) -> None:
    teacher = gpd_fx.expand(model, 2.0, (images(),))
    with pytest.raises(ArgumentError, match="the model is a dynamic teacher already; fold it first"):
        gpd_fx.expand(teacher, 2.0, (images(),))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_wrapped_models(model: nn.Module) -> None:
    with pytest.raises(
        ArgumentError, match=r"the model is wrapped by DataParallel; expand model\.module, and wrap the"
    ):
        gpd_fx.expand(nn.DataParallel(model), 2.0, (images(),))
    scripted = torch.jit.trace(model.eval(), (images(),))
    assert isinstance(scripted, nn.Module)
    with pytest.raises(
        ArgumentError, match="the model is a TorchScript module, which cannot be captured; pass the one"
    ):
        gpd_fx.expand(scripted, 2.0, (images(),))


def test_a_teacher_is_not_pickled(model: nn.Module) -> None:
    teacher = gpd_fx.expand(model, 2.0, (images(),))
    with pytest.raises(ArgumentError, match=r"cannot be pickled.*use gpd_fx\.save\(teacher, path\) and gpd_fx\.load"):
        torch.save(teacher, io.BytesIO())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_parameters_that_are_not_finite(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        model.get_parameter("body.weight")[0, 0, 0, :2] = value
    with pytest.raises(
        ArgumentError, match=r"parameter 'body\.weight' has 2 values that are NaN or infinite; load sound"
    ):
        gpd_fx.expand(model, 2.0, (images(),))


def test_infinite_buffers_are_masks(randomise: Randomise) -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
            self.register_buffer("mask", torch.full((5, 5), -torch.inf).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.second((h @ h.transpose(1, 2) + self.get_buffer("mask")).softmax(-1) @ h)

    gpd_fx.expand(randomise(Causal()), 2.0, (torch.randn(2, 5, 3),))


def test_lazy_parameters() -> None:
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU())
    with pytest.raises(InputError, match="the model has lazy parameters; call it once on example inputs"):
        gpd_fx.expand(lazy, 2.0, (images(),))


# -------------------------------------------------------------------------------------------- example inputs


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.randn(2, 4, 8, 8),), r"Net cannot be called with the example inputs \[float32\[2, 4, 8, 8\] on cpu\]"),
        (
            (torch.randn(2, 3),),
            r"\[float32\[2, 3\] on cpu\]; its parameters are float32 on cpu. It raised .*Pass example",
        ),
        (
            (torch.randn(2, 3, 8, 8, dtype=torch.float64),),
            r"\[float64\[2, 3, 8, 8\] on cpu\]; its parameters are float32",
        ),
        ((torch.ones(2, 3, 8, 8, dtype=torch.int64),), r"\[int64\[2, 3, 8, 8\] on cpu\]; its parameters are float32"),
        (
            (torch.randn(2, 3, 8, 8, device="meta"),),
            r"\[float32\[2, 3, 8, 8\] on meta\]; its parameters are float32 on cpu",
        ),
        ((images(), images()), r"Net cannot be called with the example inputs .*TypeError.*positional argument"),
        ((), r"Net cannot be called with the example inputs \[\].*missing 1 required positional argument"),
        (("an image",), r"Net cannot be called with the example inputs \['an image'\]"),
        ((torch.randn(0, 3, 8, 8),), r"an example input of shape \[0, 3, 8, 8\] is empty; pass a batch of 2 or more"),
    ],
)
def test_inputs_that_do_not_fit(model: nn.Module, inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gpd_fx.expand(model, 2.0, inputs)


def test_inputs_of_the_wrong_form(model: nn.Module) -> None:
    with pytest.raises(
        InputError, match=r"example_inputs is a tensor; pass a tuple with one entry an argument, such as"
    ):
        gpd_fx.expand(model, 2.0, images())  # pyright: ignore[reportArgumentType]  that is the test
    with pytest.raises(InputError, match="example_inputs is a dict; pass a tuple"):
        gpd_fx.expand(model, 2.0, {"x": images()})  # pyright: ignore[reportArgumentType]  that is the test
    with pytest.raises(InputError, match="example_kwargs is a tuple; pass a dict of keyword arguments"):
        gpd_fx.expand(model, 2.0, example_kwargs=(images(),))  # pyright: ignore[reportArgumentType]  that is the test
    with pytest.raises(InputError, match="unexpected keyword argument 'y'"):
        gpd_fx.expand(model, 2.0, (images(),), example_kwargs={"y": images()})


def test_inputs_that_nobody_can_infer() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    with pytest.raises(InputError, match=r"cannot tell what Table takes as input; pass example_inputs=\(\.\.\.\)"):
        gpd_fx.expand(Table())

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x) + y

    with pytest.raises(InputError, match="cannot tell what Two takes as input"):
        gpd_fx.expand(Two())


def test_a_call_unlike_the_capture(randomise: Randomise) -> None:
    class Options(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, gain: float = 1.0, y: Tensor | None = None) -> Tensor:
            h = self.first(x) * gain
            return self.second(h if y is None else h + y)

    x = torch.randn(2, 3)
    teacher = gpd_fx.expand(randomise(Options()), 2.0, (x, 0.5))
    teacher(x, 0.5)
    teacher(x, gain=0.5)
    remedy = "expand the model with example inputs like those of this call"
    with pytest.raises(InputError, match=rf"input 'gain' is 0\.7, the dynamic teacher was made for 0\.5; {remedy}"):
        teacher(x, 0.7)
    with pytest.raises(
        InputError, match=rf"input 'x' is \[2, 4, 3\], the dynamic teacher was made for \[any, 3\]; {remedy}"
    ):
        teacher(torch.randn(2, 4, 3), 0.5)
    with pytest.raises(InputError, match=r"input 'x' is 'text', the dynamic teacher was made for \[any, 3\]"):
        teacher("text", 0.5)
    with pytest.raises(InputError, match=rf"does not take these inputs: it has no input 'y'; {remedy}"):
        teacher(x, 0.5, y=x)
    with pytest.raises(InputError, match="it lacks the input 'gain'"):
        teacher(x)
    with pytest.raises(InputError, match=r"it takes 2 inputs \(x, gain\), 3 were given"):
        teacher(x, 0.5, x)
    with pytest.raises(InputError, match="it was given the input 'gain' twice"):
        teacher(x, 0.5, gain=0.5)


# --------------------------------------------------------------------------------------------------- capture


class Branches(nn.Module):
    """Control flow on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if h.sum() > 0:
            h = -h
        return self.second(h)


class Counts(Branches):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for _ in range(int(h.abs().sum().item()) % 3):
            h = h * 2
        return self.second(h)


class RandomDepth(Branches):
    """Control flow on a random number, in train mode only."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.training and torch.rand(()) < 0.5:
            return self.second(h)
        return self.second(F.relu(h))


@pytest.mark.parametrize("make", [Branches, Counts])
def test_control_flow_on_values(make: type[nn.Module]) -> None:
    with pytest.raises(CaptureError) as caught:
        gpd_fx.expand(make(), 2.0, (torch.randn(2, 3),))
    message = str(caught.value)
    assert f"torch.export cannot capture {make.__name__} in eval mode" in message
    assert "test_errors.py" in message
    assert "in forward" in message
    assert "rewrite control flow that depends on tensor values (torch.where, torch.cond)" in message


def test_control_flow_on_random_numbers_in_train_mode() -> None:
    with pytest.raises(CaptureError) as caught:
        gpd_fx.expand(RandomDepth(), 2.0, (torch.randn(2, 3),))
    message = str(caught.value)
    assert "torch.export cannot capture RandomDepth in train mode" in message
    assert "test_errors.py" in message
    assert "if only train mode fails, switch off what is random there" in message


def test_a_submodule_with_a_name_that_graphs_reserve() -> None:
    model = nn.Sequential()
    model.add_module("code", nn.Linear(3, 4))
    with pytest.raises(CaptureError, match=r"code.*rename it"):
        gpd_fx.expand(model, 2.0, (torch.randn(2, 3),))


def test_a_model_that_cannot_be_copied() -> None:
    model = Branches()
    vars(model)["lock"] = threading.Lock()
    with pytest.raises(CaptureError, match=r"Branches cannot be copied \(copy\.deepcopy raised TypeError.*; remove"):
        gpd_fx.expand(model, 2.0, (torch.randn(2, 3),))


def test_a_model_with_hidden_state(randomise: Randomise) -> None:
    """What capture cannot see is found when the capture is compared with the model."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.second(self.first(x) * self.calls)

    with pytest.raises(VerificationError, match=r"Hidden.*state"):
        gpd_fx.expand(randomise(Hidden()), 2.0, (torch.randn(2, 3),))


# ------------------------------------------------------------------------------------------------------ fold


@pytest.mark.parametrize("given", [Net(), nn.Sequential(Net()), "teacher", None, {"weights": 1}])
def test_folding_what_is_no_teacher(given: Any) -> None:
    message = rf"cannot fold a {type(given).__name__}; pass what gpd_fx\.expand or gpd_fx\.load returned"
    with pytest.raises(FoldError, match=message):
        gpd_fx.fold(given)


# ---------------------------------------------------------------------------------------------- verification


def test_shares_that_do_not_sum_to_one(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(gather: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.ones(len(gather), dtype=torch.float64)

    monkeypatch.setattr(plan, "_shares", ones)
    with pytest.raises(VerificationError) as caught:
        gpd_fx.expand(model, 2.0, (images(),))
    message = str(caught.value)
    assert "in eval mode the expanded graph differs from the model by" in message
    assert "The first node that differs is 'conv2d_1' (aten.conv2d.default, [3, 4, 8, 8] -> [3, 8, 8, 8])" in message
    assert "Nothing is returned; please report this model" in message


def without_effects(rule: Rule) -> Rule:
    """A rule that says nothing of what must be multiplied."""

    def broken(site: Site) -> Value:
        value = rule(site)
        site.effects.clear()
        return value

    return broken


@pytest.mark.parametrize(
    ("op", "rule", "node"),
    [
        ("softmax.int", without_effects(table.RULES["softmax.int"]), "softmax"),
        ("logsumexp.default", without_effects(table.RULES["logsumexp.default"]), "logsumexp"),
        ("cumsum.default", index.pointwise, "cumsum"),
    ],
)
def test_a_wrong_rule(randomise: Randomise, monkeypatch: pytest.MonkeyPatch, op: str, rule: Rule, node: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.first(x)).log_softmax(-1)  # what widening puts behind a right node is part of it
            h = h + (h.logsumexp(-1, keepdim=True) if node == "logsumexp" else getattr(h, node)(-1))
            return self.second(h)

    monkeypatch.setitem(table.RULES, op, rule)
    table.rule_of.cache_clear()
    try:
        with pytest.raises(VerificationError, match=rf"in eval mode .*The first node that differs is '{node}"):
            gpd_fx.expand(randomise(Net()), 2.0, (torch.randn(2, 3),))
    finally:
        monkeypatch.undo()
        table.rule_of.cache_clear()


def test_a_graph_that_does_not_run(randomise: Randomise, monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)).view(-1, 2, 2).flatten(1))

    monkeypatch.setitem(table.RULES, "view.default", without_effects(table.RULES["view.default"]))
    table.rule_of.cache_clear()
    try:
        with pytest.raises(
            VerificationError,
            match=r"in eval mode the expanded graph does not run \(RuntimeError: .*first node that fails is 'view'",
        ):
            gpd_fx.expand(randomise(Net()), 1.5, (torch.randn(2, 3),))
    finally:
        monkeypatch.undo()
        table.rule_of.cache_clear()


def test_a_rule_that_fails_costs_width_only(randomise: Randomise, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(site: Any) -> Any:
        raise ZeroDivisionError("by zero")

    monkeypatch.setitem(table.RULES, "batch_norm.default", faulty)
    table.rule_of.cache_clear()
    try:
        with pytest.warns(gpd_fx.GPDWarning):
            report = gpd_fx.expand(randomise(Net()), 2.0, (images(),)).report()
    finally:
        monkeypatch.undo()
        table.rule_of.cache_clear()
    assert any(entry.reason == "its rule failed (ZeroDivisionError: by zero)" for entry in report.frozen)


def test_a_wrong_slice(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finished teacher is compared too, not only its graphs."""

    def last(plan: ParamPlan) -> tuple[Tensor | None, ...]:
        return tuple(None if keep is None else keep + 1 for keep in plan.keep)

    monkeypatch.setattr(ParamPlan, "slices", property(last))
    with pytest.raises(GPDError):
        gpd_fx.expand(model, 2.0, (images(),))


def test_without_verification_nothing_is_checked(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(gather: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.ones(len(gather), dtype=torch.float64)

    monkeypatch.setattr(plan, "_shares", ones)
    teacher = gpd_fx.expand(model, 2.0, (images(),), verify=False)
    assert gpd_fx.verify(copy.deepcopy(model), teacher) > 0.01


def test_a_failed_expansion_leaves_the_model_as_it_was(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    before = copy.deepcopy(model.train())

    def ones(gather: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.ones(len(gather), dtype=torch.float64)

    monkeypatch.setattr(plan, "_shares", ones)
    with pytest.raises(VerificationError):
        gpd_fx.expand(model, 2.0, (images(),))
    assert model.training
    for (name, value), old in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(value, old), name


def test_every_error_is_of_the_family() -> None:
    names = [name for name in dir(gpd_fx) if name.endswith("Error")]
    assert len(names) >= 8
    assert all(issubclass(getattr(gpd_fx, name), GPDError) for name in names)


def test_the_default_device_of_the_caller_changes_nothing(model: nn.Module) -> None:
    x = images()
    expected = gpd_fx.expand(model, 1.5, (x,)).state_dict()
    with torch.device("meta"):
        teacher = gpd_fx.expand(model.eval(), 1.5, (x,))
        outputs = teacher.both(x)
        student = gpd_fx.fold(teacher)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in teacher.state_dict().items())
    assert {tensor.device.type for tensor in (*outputs, *student.state_dict().values())} == {"cpu"}
