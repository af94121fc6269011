"""Plans and the composition: what holds at the start, for any weights, and for gradients."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from gpd_fx.composition.branches import KINDS
from gpd_fx.composition.composition import Composition
from gpd_fx.errors import ArgumentError
from gpd_fx.kernels.compose.compose import compose
from gpd_fx.kernels.compose.layout import Cut, KernelLayout, take
from gpd_fx.plan.parameter_plan import ParamPlan

ALL = tuple(KINDS)


def originals_anywhere(n: int, wide: int) -> tuple[Tensor, Tensor, Tensor]:
    """A random gather that covers all of 0..n-1, where the originals lie, and random shares of one."""
    gather = torch.cat([torch.arange(n), torch.randint(n, (wide - n,))])[torch.randperm(wide)]
    keep = torch.stack([torch.nonzero(gather == j)[0, 0] for j in range(n)])
    return gather, keep, shares(gather)


def originals_first(n: int, wide: int) -> tuple[Tensor, Tensor, Tensor]:
    gather = torch.cat([torch.arange(n), torch.arange(wide - n) % n])
    return gather, torch.arange(n), shares(gather)


def shares(gather: Tensor) -> Tensor:
    alpha = torch.rand(len(gather), dtype=torch.float64) + 0.1
    return alpha / torch.zeros(int(gather.max()) + 1, dtype=torch.float64).index_add(0, gather, alpha)[gather]


def grouped(parts: tuple[Tensor, Tensor, Tensor], groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same widening in each of several groups."""
    gather, keep, alpha = parts
    n, wide = len(keep), len(gather)
    block = torch.arange(groups)[:, None]
    return (gather + block * n).flatten(), (keep + block * wide).flatten(), alpha.repeat(groups)


def plan(
    name: str,
    shape: Sequence[int],
    first: tuple[Tensor, Tensor, Tensor] | None,
    second: tuple[Tensor, Tensor, Tensor] | None,
    kernel: KernelLayout | None,
    scaled: int | None,
) -> ParamPlan:
    dims = [first, second, *[None] * len(shape)][: len(shape)]
    return ParamPlan(
        name,
        tuple(shape),
        tuple(d and d[0] for d in dims),
        tuple(d and d[1] for d in dims),
        tuple(d[2] if d and axis == scaled else None for axis, d in enumerate(dims)),
        kernel,
    )


def example_plans() -> list[ParamPlan]:
    """Layers of every kind, at uneven ratios, with the originals first and elsewhere."""
    some, every = originals_anywhere, originals_first
    return [
        plan("stem.weight", (5, 3, 3, 3), every(5, 8), None, KernelLayout(), None),
        plan("stem.bias", (5,), every(5, 8), None, None, None),
        plan("block.0.conv.weight", (4, 5, 3, 2), some(4, 7), some(5, 8), KernelLayout(), 1),
        plan("block.0.grouped.weight", (6, 2, 3), grouped(every(3, 4), 2), every(2, 5), KernelLayout(2, False, 2), 1),
        plan("block.1.depthwise.weight", (4, 1, 3, 3), some(4, 7), None, KernelLayout(7, False, 4), None),
        plan("block.1.up.weight", (4, 3, 4, 4), some(4, 7), some(3, 4), KernelLayout(1, True, 1), 0),
        plan("block.1.up3.weight", (4, 3, 2, 3, 2), grouped(every(2, 3), 2), some(3, 4), KernelLayout(2, True, 2), 0),
        plan("one.weight", (9, 4, 1, 1), some(9, 19), every(4, 9), KernelLayout(), 1),
        plan("head.weight", (9, 8), None, some(8, 21), KernelLayout(), 1),
        plan("embedding.weight", (7, 8), None, every(8, 11), None, None),
        plan("scale", (), None, None, None, None),
    ]


def example_tensors(plans: Sequence[ParamPlan]) -> dict[str, Tensor]:
    return {p.name: torch.randn(p.shape, dtype=torch.float64) for p in plans}


def example(branches: Sequence[str] | str | None = ALL, seed: int = 0) -> tuple[Composition, dict[str, Tensor]]:
    torch.manual_seed(0)
    plans = example_plans()
    tensors = example_tensors(plans)
    return Composition(plans, tensors, {}, branches, seed), tensors


def randomise(composition: Composition) -> None:
    for parameter in composition.parameters():
        nn.init.normal_(parameter)


def test_cuts() -> None:
    assert Cut.of_index(torch.arange(5), 8) == Cut(1, 1, 5)
    assert Cut.of_index(torch.tensor([0, 1, 4, 5]), 8) == Cut(2, 2, 2)
    assert Cut.of_index(torch.tensor([0, 1, 4, 5]), 12) == Cut(3, 2, 2)
    assert Cut.of_index(torch.tensor([0, 4]), 8) == Cut(2, 2, 1)
    assert Cut.of_index(torch.tensor([0, 1, 3, 4]), 8) is None  # blocks of 3 do not divide 8
    for irregular in ([1, 2], [0, 2, 1], [0, 1, 4], [0, 1, 0, 1], [0, 0], [0, 1, 4, 6]):
        assert Cut.of_index(torch.tensor(irregular), 8) is None


@pytest.mark.parametrize("size", [1, 2, 6, 12])
def test_a_cut_takes_what_its_index_takes(size: int) -> None:
    wide = torch.randn(3, size, 2)
    found = 0
    for bits in range(1, 2**size):
        keep = torch.tensor([j for j in range(size) if bits >> j & 1])
        cut = Cut.of_index(keep, size)
        if cut is not None:
            found += 1
            assert torch.equal(take(wide, (None, cut, None), (3, len(keep), 2)), wide[:, keep])
    assert found >= size


def test_plan_laws() -> None:
    for p in example_plans():
        student = torch.randn(p.shape, dtype=torch.float64)
        wide = p.widen(student)
        assert wide.shape == p.wide_shape
        assert torch.equal(p.student(wide), student)
        scaled = p.scale(wide)
        if all(a is None for a in p.alpha):
            assert scaled is wide
        else:  # the shares of the copies of each index sum to one
            dim = next(d for d, a in enumerate(p.alpha) if a is not None)
            gather = p.gather[dim]
            assert gather is not None
            folded = torch.zeros(p.shape, dtype=torch.float64)
            for d, g in enumerate(p.gather):  # sum over the copies along `dim`, take the originals along the others
                if g is not None and d != dim:
                    keep = p.keep[d]
                    assert keep is not None
                    scaled = scaled.index_select(d, keep)
            torch.testing.assert_close(folded.index_add(dim, gather, scaled), student, rtol=1e-14, atol=1e-14)


def test_plan_with_a_missing_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="w: gather has 1 entries"):
        ParamPlan("w", (2, 2), (None,), (None, None), (None, None))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bit_exact_at_the_start(dtype: torch.dtype) -> None:
    plans = example_plans()
    tensors = {name: t.to(dtype) for name, t in example_tensors(plans).items()}
    composition = Composition(plans, tensors, {}, ALL)
    teacher, student = composition()
    merged = composition.merged()
    for p in plans:
        wide = p.widen(tensors[p.name])
        assert torch.equal(merged[p.name], wide)
        assert torch.equal(teacher[p.name], p.scale(wide))
        assert torch.equal(student[p.name], tensors[p.name])
        assert student[p.name].dtype == teacher[p.name].dtype == dtype
        assert student[p.name].is_contiguous()
        assert teacher[p.name].is_contiguous()


def test_teacher_and_student_come_from_the_merged_kernel() -> None:
    composition, _ = example()
    randomise(composition)
    teacher, student = composition()
    merged = composition.merged()
    for p in composition.plans:
        torch.testing.assert_close(teacher[p.name], p.scale(merged[p.name]), rtol=0, atol=0)
        torch.testing.assert_close(student[p.name], p.student(merged[p.name]), rtol=0, atol=0)
        if p.kernel is not None:
            weight = composition.weights.get_parameter(p.name)
            assert (merged[p.name] - weight).abs().max() > 0.1  # the branches do contribute
    for alone, both in ((composition.teacher(), teacher), (composition.student(), student)):
        assert list(alone) == list(both)
        assert all(torch.equal(alone[name], both[name]) for name in both)


def test_the_student_uses_the_same_parameters() -> None:
    """Gradients of both networks meet in the shared weight; copies get gradients from the teacher alone."""
    composition, _ = example()
    randomise(composition)
    name = "block.0.conv.weight"
    p = next(p for p in composition.plans if p.name == name)
    shared = composition.weights.get_parameter(name)
    both = composition()
    of_teacher, of_student = (
        torch.autograd.grad(side[name].sin().sum(), shared, retain_graph=True)[0] for side in both
    )
    originals = torch.zeros_like(shared)
    rows, columns = p.keep[:2]
    assert rows is not None
    assert columns is not None
    originals[rows[:, None], columns] = 1
    assert torch.equal(of_student != 0, originals != 0)
    assert (of_teacher != 0).all()
    sum(side[name].sin().sum() for side in composition()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(shared.grad, of_teacher + of_student)


def test_state_dict_keys() -> None:
    composition, tensors = example("orepa")
    keys = set(composition.state_dict())
    assert {f"weights.{name}" for name in tensors} == {key for key in keys if key.startswith("weights.")}
    mine = {key for key in keys if key.startswith("branches.stem.")}
    assert mine == {
        "branches.stem.weight.b1x1.v",
        "branches.stem.weight.b1x1.point",
        "branches.stem.weight.b1x1_kxk.v",
        "branches.stem.weight.b1x1_kxk.point",
        "branches.stem.weight.b1x1_kxk.kernel",
        "branches.stem.weight.b1x1_avg.v",
        "branches.stem.weight.b1x1_avg.point",
        "branches.stem.weight.dwsep.v",
        "branches.stem.weight.dwsep.filters",
        "branches.stem.weight.dwsep.point",
        "branches.stem.weight.prior.v",
        "branches.stem.weight.prior.point",
    }
    assert {key for key in keys if ".head." in key} == {
        "weights.head.weight",
        "branches.head.weight.lowrank.v",
        "branches.head.weight.lowrank.down",
        "branches.head.weight.lowrank.up",
    }
    assert set(dict(composition.named_parameters())) == keys  # constants are no state
    assert not list(composition.buffers())


def test_load_restores_everything() -> None:
    composition, _ = example(seed=0)
    randomise(composition)
    other, _ = example(seed=1)
    other.load_state_dict(composition.state_dict())
    for mine, theirs in zip(composition(), other(), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_random_tensors_depend_on_seed_name_and_branch_only() -> None:
    plans = example_plans()
    tensors = example_tensors(plans)
    first = Composition(plans, tensors, {}, ALL, seed=3).state_dict()
    torch.manual_seed(17)
    reverse = Composition(plans[::-1], tensors, {}, ALL[::-1], seed=3).state_dict()
    fewer = Composition(plans[3:], tensors, {}, ("dwsep",), seed=3).state_dict()
    other = Composition(plans, tensors, {}, ALL, seed=4).state_dict()
    assert first.keys() == reverse.keys() >= fewer.keys()
    assert all(torch.equal(first[key], reverse[key]) for key in first)
    assert all(torch.equal(first[key], fewer[key]) for key in fewer)
    random = [key for key in first if key.startswith("branches.") and not key.endswith(".v")]
    assert all(not torch.equal(first[key], other[key]) for key in random)
    values = [first[key].flatten()[0].item() for key in random]
    assert len(set(values)) == len(values)  # no two tensors repeat each other
    assert all((first[key] == 0).all() for key in first if key.endswith(".v"))


def test_first_step_moves_v_and_the_second_theta() -> None:
    composition, _ = example()
    composition = composition.float()
    targets = {name: torch.randn_like(t) for name, t in composition.teacher().items()}

    def step() -> None:
        composition.zero_grad()
        sum((t - targets[name]).square().sum() for name, t in composition.teacher().items()).backward()  # pyright: ignore[reportAttributeAccessIssue]
        with torch.no_grad():
            for p in composition.parameters():
                assert p.grad is not None
                p -= 1e-3 * p.grad

    step()
    for name, p in composition.branches.named_parameters():
        assert p.grad is not None
        assert bool(p.grad.any()) is name.endswith(".v"), name
    step()
    for name, p in composition.branches.named_parameters():
        assert p.grad is not None
        assert p.grad.any(), name


@pytest.mark.parametrize("index", range(len(example_plans())))
def test_gradients(index: int) -> None:
    """Finite differences through both outputs, for every branch and every kind of layer."""
    torch.manual_seed(0)
    full = example_plans()[index]
    composition = Composition([full], example_tensors([full]), {}, ALL)
    randomise(composition)
    names = [name for name, _ in composition.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in composition.parameters())

    def both(*given: Tensor) -> tuple[Tensor, Tensor]:
        teacher, student = torch.func.functional_call(composition, dict(zip(names, given, strict=True)), ())
        return teacher[full.name], student[full.name]

    assert torch.autograd.gradcheck(both, values, fast_mode=True)


def test_a_frozen_weight_gets_no_branches() -> None:
    plans = example_plans()
    frozen = {p.name: False for p in plans if p.name.startswith("block")}
    composition = Composition(plans, example_tensors(plans), frozen, "orepa")
    assert composition.branch_names("block.0.conv.weight") == ("kxk",)
    assert not any(".block." in name for name, p in composition.named_parameters() if p.requires_grad)
    assert not any(name.startswith("branches.block") for name, _ in composition.named_parameters())
    reasons = composition.skipped["block.0.conv.weight"]
    assert set(reasons) == {"1x1", "1x1-kxk", "1x1-avg", "dwsep", "prior", "lowrank"}
    assert all("frozen" in reason for reason in reasons.values())


def test_skipped_and_branch_names() -> None:
    composition, _ = example("orepa")
    assert composition.branch_names("stem.weight") == ("kxk", "1x1", "1x1-kxk", "1x1-avg", "dwsep", "prior")
    assert composition.branch_names("block.1.depthwise.weight") == ("kxk", "1x1", "1x1-kxk", "1x1-avg", "prior")
    assert composition.branch_names("head.weight") == ("kxk", "lowrank")
    assert composition.branch_names("one.weight") == ("kxk", "lowrank")
    assert composition.branch_names("stem.bias") == composition.branch_names("embedding.weight") == ()
    assert "depthwise" in composition.skipped["block.1.depthwise.weight"]["dwsep"]
    assert set(composition.skipped) == {p.name for p in composition.plans if p.kernel is not None}
    with pytest.raises(ArgumentError, match="no parameter 'nope'"):
        composition.branch_names("nope")


@pytest.mark.parametrize("branches", [None, [], "kxk"])
def test_without_branches(branches: list[str] | str | None) -> None:
    composition, _ = example(branches)
    assert not list(composition.branches.parameters())
    assert not composition.skipped
    teacher, student = composition()
    for p in composition.plans:
        weight = composition.weights.get_parameter(p.name)
        assert torch.equal(teacher[p.name], p.scale(weight))
        assert torch.equal(student[p.name], p.student(weight))


def test_the_given_tensors_are_copied() -> None:
    composition, tensors = example()
    before = copy.deepcopy(tensors)
    merged = composition.merged()
    for p in composition.parameters():
        nn.init.ones_(p)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    p = {p.name: p for p in composition.plans}
    assert all(torch.equal(merged[name], p[name].widen(before[name])) for name in tensors)
    assert not any(t.requires_grad for t in merged.values())


def test_integer_tensors_are_not_trained() -> None:
    table = ParamPlan("table", (3,), (torch.tensor([0, 1, 2, 0]),), (torch.arange(3),), (None,))
    composition = Composition([table], {"table": torch.tensor([5, 6, 7])}, {})
    assert composition.teacher()["table"].tolist() == [5, 6, 7, 5]
    assert not composition.weights.get_parameter("table").requires_grad


def test_names_that_methods_could_have() -> None:
    names = ["grow.weight", "layer.weights.plan", "refresh.0.merged", "branches.v", "items.keys"]
    composition = Composition([ParamPlan.identity(n, (2, 3), KernelLayout()) for n in names],
                              {n: torch.zeros(2, 3) for n in names}, {})  # fmt: skip
    assert {key for key in composition.state_dict() if key.startswith("weights.")} == {f"weights.{n}" for n in names}
    assert list(composition.teacher()) == names


def test_a_tensor_of_another_shape_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"w has shape \(2,\), its plan was made for \(3,\)"):
        Composition([ParamPlan.identity("w", (3,))], {"w": torch.zeros(2)}, {})


def test_alpha_stays_exact_through_other_dtypes() -> None:
    """Alpha is rounded from its float64 value for each dtype, so half and back loses nothing of it."""
    composition, _ = example()
    teacher = copy.deepcopy(composition)
    teacher.half()
    assert {t.dtype for t in teacher.teacher().values()} == {torch.float16}
    teacher.double()
    teacher.load_state_dict(composition.state_dict())
    expected = composition.teacher()
    assert all(torch.equal(t, expected[name]) for name, t in teacher.teacher().items())
    teacher.half()
    teacher.load_state_dict(composition.state_dict(), assign=True)
    assert all(torch.equal(t, expected[name]) for name, t in teacher.teacher().items())


def test_meta_device_and_back() -> None:
    composition, _ = example()
    moved = copy.deepcopy(composition).to("meta")
    assert all(t.device.type == "meta" for side in moved() for t in side.values())
    moved = moved.to_empty(device="cpu")
    moved.load_state_dict(composition.state_dict())
    expected = composition.teacher()
    assert all(torch.equal(t, expected[name]) for name, t in moved.teacher().items())


def test_a_copy_is_independent() -> None:
    composition, _ = example()
    randomise(composition)
    other = copy.deepcopy(composition)
    expected = {name: t.clone() for name, t in composition.teacher().items()}
    for p in composition.parameters():
        nn.init.zeros_(p)
    assert all(torch.equal(t, expected[name]) for name, t in other.teacher().items())
    assert not composition.teacher()["head.weight"].any()


def test_autocast_does_not_round_the_composition() -> None:
    composition, _ = example()
    composition = composition.float()
    randomise(composition)
    expected = composition()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = composition()
    for side, other in zip(expected, found, strict=True):
        assert all(torch.equal(side[name], other[name]) for name in side)


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    composition, _ = example()
    randomise(composition)
    compiled = torch.compile(composition, fullgraph=True, backend="aot_eager")
    for expected, found in zip(composition(), compiled(), strict=True):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-13, atol=1e-13)


def test_compose_of_nothing() -> None:
    assert compose([]) == ([], [])
    assert Composition([], {}, {})() == ({}, {})


def test_channels_last_weights() -> None:
    torch.manual_seed(0)
    plans = [p for p in example_plans() if len(p.shape) < 5]  # torch refuses the format for five dimensions
    composition = Composition(plans, example_tensors(plans), {}, ALL)
    randomise(composition)
    expected = composition()
    composition.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  missing from torch's stubs
    for side, other in zip(expected, composition(), strict=True):
        for name, tensor in side.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-13, atol=1e-13)
