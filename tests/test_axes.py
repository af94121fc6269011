"""Laws of axis expressions, against plain index arithmetic on lists of coordinates; then examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpd_fx.axes.expressions import (
    Atom,
    Cat,
    Expr,
    Reason,
    atoms,
    concat,
    frozen,
    is_frozen,
    joint,
    parts,
    product,
    reasons,
    show,
    size,
)
from gpd_fx.axes.solver import AxisMismatchError, AxisSolver
from gpd_fx.axes.widening import Copies, Widening
from gpd_fx.rules.shape import reshape_axes

LARGEST = 120
Draw: TypeAlias = Callable[[st.SearchStrategy[Any]], Any]


# A model of what expressions mean


def coordinates(expr: Expr, along: Callable[[Atom], list[int]]) -> list[tuple[object, ...]]:
    """The elements of an axis, each as the path to it; `along` lists the elements of an atom."""
    found: list[tuple[object, ...]] = [()]
    for factor in expr:
        if isinstance(factor, int):
            inner = [(k,) for k in range(factor)]
        elif isinstance(factor, Atom):
            inner = [(k,) for k in along(factor)]
        else:
            inner = [(k, path) for k, part in enumerate(factor.parts) for path in coordinates(part, along)]
        found = [(*head, *tail) for head in found for tail in inner]
    return found


def model_gather(solver: AxisSolver, expr: Expr, copies: dict[Atom, Copies]) -> list[int]:
    """For each element of the wide axis, the place in the axis of what it is a copy of."""
    resolved = solver.resolve(expr)
    place = {path: k for k, path in enumerate(coordinates(resolved, lambda atom: list(range(atom.size))))}
    wide = coordinates(resolved, lambda a: copies[a].gather.tolist() if a in copies else list(range(a.size)))
    return [place[path] for path in wide]


# Random expressions and copies


@st.composite
def expressions(draw: st.DrawFn, pool: list[Atom], depth: int = 2) -> Expr:
    """An expression over a pool of atoms, of at most LARGEST elements."""
    factors: list[Expr] = []
    for _ in range(draw(st.integers(0 if depth < 2 else 1, 3))):
        kind = draw(st.sampled_from(["int", "atom", "atom", "cat"] if depth else ["int", "atom", "atom"]))
        if kind == "int":
            factors.append(frozen(draw(st.integers(1, 4))))
        elif kind == "atom":
            factors.append((draw(st.sampled_from(pool)),))
        else:
            joined = st.lists(expressions(pool, depth - 1), min_size=2, max_size=3)
            factors.append(concat(draw(joined)))
    expr = product(factors)
    return expr if size(expr) <= LARGEST else frozen(draw(st.integers(1, 6)))


def new_pool(draw: Draw) -> list[Atom]:
    sizes = draw(st.lists(st.sampled_from([2, 3, 4, 6, 8, 12]), min_size=1, max_size=4))
    return [Atom(extent, f"a{k}") for k, extent in enumerate(sizes)]


def draw_copies(draw: Draw, extent: int) -> Copies:
    """Originals first, then any of them again; shares in multiples of 1/64 that sum to one."""
    gather = [*range(extent), *draw(st.lists(st.integers(0, extent - 1), max_size=2 * extent))]
    left = dict.fromkeys(range(extent), 64)
    alpha: list[int] = []
    for channel in gather[extent:]:
        alpha.append(draw(st.integers(0, left[channel])))
        left[channel] -= alpha[-1]
    return Copies(torch.tensor(gather), torch.tensor([*left.values(), *alpha], dtype=torch.float64) / 64)


def free_atoms(solver: AxisSolver, exprs: list[Expr]) -> list[Atom]:
    return list(dict.fromkeys(atom for expr in exprs for atom in atoms(solver.resolve(expr))))


def draw_widening(draw: Draw, solver: AxisSolver, exprs: list[Expr]) -> Widening:
    widened = [atom for atom in free_atoms(solver, exprs) if draw(st.booleans())]
    return Widening(solver, {atom: draw_copies(draw, atom.size) for atom in widened})


# Laws of widening


@settings(max_examples=150)
@given(st.data())
def test_widening_is_index_arithmetic(data: st.DataObject) -> None:
    solver, pool = AxisSolver(), new_pool(data.draw)
    expr = data.draw(expressions(pool))
    widening = draw_widening(data.draw, solver, [expr])
    gather, keep, alpha = widening.gather(expr), widening.keep(expr), widening.alpha(expr)
    assert gather.tolist() == model_gather(solver, expr, widening.copies)
    assert torch.equal(gather[keep], torch.arange(size(expr)))
    assert len(gather) == len(alpha) == widening.size(expr)
    assert torch.equal(torch.zeros(size(expr), dtype=torch.float64).index_add_(0, gather, alpha), torch.ones_like(keep))
    assert widening.widens(expr) == (len(gather) > size(expr)) or not any(
        len(copies.gather) > atom.size for atom, copies in widening.copies.items()
    )


@settings(max_examples=150)
@given(st.data())
def test_multiplicity_is_the_number_of_copies_of_each(data: st.DataObject) -> None:
    solver, pool = AxisSolver(), new_pool(data.draw)
    expr = data.draw(expressions(pool))
    copies: dict[Atom, Copies] = {}
    for atom in free_atoms(solver, [expr]):
        extra = data.draw(st.sampled_from([0, 1, atom.size - 1, atom.size, 2 * atom.size]))
        gather = torch.arange(atom.size + extra) % atom.size
        copies[atom] = Copies(gather, torch.ones(len(gather), dtype=torch.float64))
    widening = Widening(solver, copies)
    counts = set(Counter(widening.gather(expr).tolist()).values())
    assert widening.multiplicity(expr) == (counts.pop() if len(counts) == 1 else None)


@settings(max_examples=100)
@given(st.data())
def test_parts_hold_all_elements_in_products_without_concatenations(data: st.DataObject) -> None:
    expr = data.draw(expressions(new_pool(data.draw)))
    found = parts(expr)
    assert sum(map(size, found)) == size(expr)
    assert not any(isinstance(factor, Cat) for part in found for factor in part)
    assert set(atoms(expr)) == {atom for part in found for atom in atoms(part)}


# Laws of the solver: whatever it has said stays true, for any copies of whatever is still free


def divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


@settings(max_examples=300)
@given(st.data())
def test_what_the_solver_says_stays_true(data: st.DataObject) -> None:
    solver, pool = AxisSolver(), new_pool(data.draw)
    exprs: list[Expr] = [data.draw(expressions(pool)) for _ in range(data.draw(st.integers(1, 4)))]
    same: list[tuple[Expr, Expr]] = []
    asleep: list[Expr] = []
    for _ in range(data.draw(st.integers(1, 6))):
        expr = data.draw(st.sampled_from(exprs))
        kind = data.draw(st.sampled_from(["unify", "split", "cut", "cut", "freeze"]))
        if kind == "unify":
            other = data.draw(st.sampled_from([e for e in exprs if size(e) == size(expr)]))
            result = solver.unify(expr, other)
            same += [(expr, other), (expr, result)]
        elif kind == "split":
            outer = data.draw(st.sampled_from(divisors(size(expr))))
            left, right = solver.split(expr, outer)
            assert (size(left), size(right)) == (outer, size(expr) // outer)
            same.append((expr, product((left, right))))
            exprs += [left, right]
        elif kind == "cut":
            at = data.draw(st.integers(0, size(expr)))
            left, right = solver.cut(expr, at)
            assert (size(left), size(right)) == (at, size(expr) - at)
            same.append((expr, concat((left, right))))
            exprs += [side for side in (left, right) if size(side)]
        else:
            assert is_frozen(solver.freeze(expr))
            asleep.append(expr)
    widening = draw_widening(data.draw, solver, exprs)
    for left, right in same:
        assert size(solver.resolve(left)) == size(left) == size(right)
        assert torch.equal(widening.gather(left), widening.gather(right))
        assert torch.equal(widening.alpha(left), widening.alpha(right))
        assert widening.gather(left).tolist() == model_gather(solver, right, widening.copies)
    for expr in asleep:
        assert is_frozen(solver.resolve(expr))
    for expr in exprs:
        assert solver.resolve(solver.resolve(expr)) == solver.resolve(expr)


@settings(max_examples=150)
@given(st.data())
def test_the_solver_learns_a_fact_only_once(data: st.DataObject) -> None:
    solver, pool = AxisSolver(), new_pool(data.draw)
    expr, other = data.draw(expressions(pool)), data.draw(expressions(pool))
    at, outer = data.draw(st.integers(0, size(expr))), data.draw(st.sampled_from(divisors(size(expr))))

    def learn() -> None:
        solver.cut(expr, at)
        solver.split(expr, outer)
        if size(expr) == size(other):
            solver.unify(expr, other)

    versions: list[int] = []
    for _ in range(12):
        learn()
        versions.append(solver.version)
    assert versions[-1] == versions[-2]


@settings(max_examples=200)
@given(st.data())
def test_reshape_is_torch_reshape(data: st.DataObject) -> None:
    solver, pool = AxisSolver(), new_pool(data.draw)
    axes: list[Expr] = []
    for _ in range(data.draw(st.integers(1, 3))):
        expr = data.draw(expressions(pool, depth=1))
        axes.append(expr if prod(map(size, axes)) * size(expr) <= 4 * LARGEST else ())
    shape: list[int] = []
    rest = prod(map(size, axes))
    while rest > 1 and len(shape) < 4:
        shape.append(data.draw(st.sampled_from(divisors(rest))))
        rest //= shape[-1]
    shape.append(rest)
    seen = reshape_axes(solver, axes, shape)
    assert list(map(size, seen)) == shape
    widening = draw_widening(data.draw, solver, [*axes, *seen])
    values = torch.arange(prod(shape)).reshape([size(axis) for axis in axes])
    assert torch.equal(
        widen(widening, values, axes).reshape([widening.size(axis) for axis in seen]),
        widen(widening, values.reshape(shape), seen),
    )


def widen(widening: Widening, values: Tensor, axes: list[Expr]) -> Tensor:
    for dim, axis in enumerate(axes):
        values = values.index_select(dim, widening.gather(axis))
    return values


# Examples: how much stays free


@pytest.fixture
def solver() -> AxisSolver:
    return AxisSolver()


def axis(solver: AxisSolver, extent: int, label: str = "a") -> Expr:
    return solver.fresh(extent, label)


def text(solver: AxisSolver, *exprs: Expr) -> str:
    return ", ".join(show(solver.resolve(expr)) for expr in exprs)


def test_an_axis_of_one_element_is_the_empty_product(solver: AxisSolver) -> None:
    assert solver.fresh(1, "a") == () == frozen(1)
    assert product([(), (1,), ()]) == ()
    assert size(()) == 1
    assert show(()) == "1"


def test_products_and_concatenations_are_kept_flat(solver: AxisSolver) -> None:
    a, b = axis(solver, 2, "a"), axis(solver, 3, "b")
    assert show(product([(2,), (3,), a, b])) == "6·a:2·b:3"
    assert show(concat([(2,), (3,), concat([a, b]), (4,)])) == "[5 + a:2 + b:3 + 4]"
    assert concat([a]) == a


def test_empty_parts_vanish(solver: AxisSolver) -> None:
    a = axis(solver, 3)
    assert concat([(0,), a, (0,)]) == a
    assert concat([(0,), (0,)]) == (0,) == concat([])
    solver.unify(concat([(0,), a]), concat([a, (0,)]))
    assert not is_frozen(solver.resolve(a))


def test_atoms_that_are_the_same(solver: AxisSolver) -> None:
    a, b, c = (axis(solver, 6, name) for name in "abc")
    solver.unify(a, b)
    solver.unify(b, c)
    assert solver.resolve(a) == solver.resolve(b) == solver.resolve(c)
    assert not is_frozen(solver.resolve(a))


def test_an_atom_becomes_a_product_everywhere(solver: AxisSolver) -> None:
    a, b = axis(solver, 12), axis(solver, 12, "b")
    solver.unify(a, b)
    outer, inner = solver.split(a, 3)
    assert text(solver, outer, inner, a) == "b.0:3, b.1:4, b.0:3·b.1:4" == text(solver, outer, inner, b)


def test_an_atom_becomes_a_concatenation_everywhere(solver: AxisSolver) -> None:
    a = axis(solver, 12)
    left, right = solver.cut(a, 5)
    assert text(solver, left, right, product([(2,), a])) == "a[:5]:5, a[5:]:7, 2·[a[:5]:5 + a[5:]:7]"


def test_products_meet_factor_by_factor(solver: AxisSolver) -> None:
    a, b, c = axis(solver, 2, "a"), axis(solver, 6, "b"), axis(solver, 12, "c")
    solver.unify(product([a, b]), c)
    d, e = axis(solver, 4, "d"), axis(solver, 3, "e")
    solver.unify(c, product([d, e]))
    assert text(solver, d, e, a, b) == "d.0:2·d.1:2, e:3, d.0:2, d.1:2·e:3"


def test_factors_without_a_common_divisor_freeze(solver: AxisSolver) -> None:
    a, b = axis(solver, 2, "a"), axis(solver, 3, "b")
    solver.unify(product([a, b]), product([b, a]))
    assert text(solver, a, b) == "2, 3"


def test_concatenations_meet_at_all_their_borders(solver: AxisSolver) -> None:
    a, b, c = axis(solver, 5, "a"), axis(solver, 4, "b"), axis(solver, 9, "c")
    solver.cut(c, 3)
    solver.unify(concat([a, b]), c)
    assert text(solver, a, b) == "[c[:3]:3 + c[3:][:2]:2], c[3:][2:]:4"


def test_a_frozen_part_freezes_only_what_it_meets(solver: AxisSolver) -> None:
    a, b = axis(solver, 5, "a"), axis(solver, 9, "b")
    solver.unify(concat([a, (4,)]), b)
    assert text(solver, b) == "[a:5 + 4]"


def test_splitting_a_concatenation_into_equal_groups(solver: AxisSolver) -> None:
    a, b, c, d = (axis(solver, extent, name) for name, extent in zip("abcd", (4, 4, 6, 2), strict=True))
    assert text(solver, *solver.split(concat([a, b]), 2)) == "2, b:4"
    assert text(solver, *solver.split(concat([c, d]), 2)) == "2, [c[4:]:2 + d:2]"
    assert text(solver, c) == "[c[4:]:2 + d:2 + c[4:]:2]"


def test_splitting_a_concatenation_with_a_common_suffix(solver: AxisSolver) -> None:
    a, b = axis(solver, 6, "a"), axis(solver, 9, "b")
    assert text(solver, *solver.split(concat([a, b]), 5)) == "[a.0:2 + b.0:3], b.1:3"


def test_many_groups_of_uneven_parts_freeze(solver: AxisSolver) -> None:
    a, b = axis(solver, 5, "a"), axis(solver, 45, "b")
    assert text(solver, *solver.split(concat([a, b]), 25)) == "25, 2"
    assert text(solver, a, b) == "5, 45"


def test_cutting_a_small_frozen_factor_writes_it_out(solver: AxisSolver) -> None:
    a = axis(solver, 4)
    left, right = solver.cut(product([(3,), a]), 6)
    assert text(solver, left, right) == "[a[:2]:2 + a[2:]:2 + a[:2]:2], [a[2:]:2 + a[:2]:2 + a[2:]:2]"
    b = axis(solver, 4, "b")
    solver.cut(product([(AxisSolver.EXPAND + 1,), b]), 6)
    assert is_frozen(solver.resolve(b))


def test_cutting_between_whole_inner_factors_keeps_them(solver: AxisSolver) -> None:
    a, b = axis(solver, 4, "a"), axis(solver, 3, "b")
    left, right = solver.cut(product([a, b]), 6)
    assert text(solver, left, right) == "a[:2]:2·b:3, a[2:]:2·b:3"


def test_cutting_through_inner_factors_freezes(solver: AxisSolver) -> None:
    a, b = axis(solver, 4, "a"), axis(solver, 3, "b")
    assert text(solver, *solver.cut(product([a, b]), 7)) == "7, 5"
    assert text(solver, a, b) == "4, 3"


def test_frozen_axes_may_be_cut_and_split_anywhere(solver: AxisSolver) -> None:
    assert solver.cut((12,), 5) == ((5,), (7,))
    assert solver.split((12,), 4) == ((4,), (3,))
    assert solver.cut((12,), 0) == ((0,), (12,))
    assert solver.cut((12,), 12) == ((12,), (0,))
    assert solver.split((12,), 12) == ((12,), ())


def test_axes_of_different_sizes_are_a_fault_of_the_rule(solver: AxisSolver) -> None:
    a = axis(solver, 4)
    solver.at(Reason("aten.op", "node", ""))
    with pytest.raises(AxisMismatchError, match=r"a:4 and 2·a:4 at node \(aten.op\)"):
        solver.unify(a, product([(2,), a]))  # nor can an atom be a part of itself
    assert not is_frozen(solver.resolve(a))


def test_reasons_tell_what_froze_the_parts_of_an_atom(solver: AxisSolver) -> None:
    a = axis(solver, 8)
    (atom,) = atoms(a)
    left, right = solver.cut(a, 3)
    assert list(reasons(atom)) == []
    first, second = Reason("aten.one", "x", "one"), Reason("aten.two", "y", "two")
    solver.freeze(left, first)
    solver.at(second)
    solver.freeze(right)
    solver.freeze(a, Reason("aten.three", "z", "too late"))
    assert list(reasons(atom)) == [first, second]


def test_meeting_a_frozen_axis_is_the_reason(solver: AxisSolver) -> None:
    a = axis(solver, 8)
    (atom,) = atoms(a)
    solver.at(Reason("aten.add", "x", "?"))
    solver.unify(a, (8,))
    assert [(reason.op, reason.text) for reason in reasons(atom)] == [
        ("aten.add", "it meets an axis that stays as it is")
    ]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_what_joined_two_atoms_is_remembered(pairs: list[tuple[int, int]]) -> None:
    solver = AxisSolver()
    axes = [solver.fresh(6, f"{k}") for k in range(10)]
    sets = [{k} for k in range(10)]  # the same, by plain sets
    met: dict[frozenset[int], str] = {}
    for step, (i, j) in enumerate(pairs):
        solver.at(Reason("op", f"{step}", ""))
        solver.unify(axes[i], axes[j])
        if sets[i] is not sets[j]:
            met |= {frozenset((a, b)): f"{step}" for a in sets[i] for b in sets[j]}
            sets[i] |= sets[j]
            for k in sets[j]:
                sets[k] = sets[i]
    for i in range(10):
        for j in range(10):
            if sets[i] is sets[j] and i != j:
                (atom,) = atoms(solver.resolve(axes[i]))
                link = joint(axes[i], axes[j], atom)
                assert link is not None
                assert link.joined is not None
                assert link.joined.node == met[frozenset((i, j))]


def test_what_joined_parts_is_remembered(solver: AxisSolver) -> None:
    whole, other = solver.fresh(12, "whole"), solver.fresh(4, "other")
    solver.at(Reason("op", "cut", ""))
    head, _ = solver.cut(whole, 4)
    solver.at(Reason("op", "join", ""))
    solver.unify(head, other)
    solver.at(Reason("op", "group", ""))
    solver.split(other, 2)
    for atom in atoms(solver.resolve(other)):
        link = joint(whole, other, atom)
        assert link is not None
        assert link.joined == Reason("op", "join", "")


def test_splitting_by_a_huge_number_takes_no_time(solver: AxisSolver) -> None:
    batch = 1000003
    a, b = axis(solver, 4, "a"), axis(solver, 6, "b")
    whole = concat([product([(batch,), a]), product([(batch,), b])])
    solver.split(whole, batch)
    solver.cut(whole, batch * 4)
    assert size(solver.resolve(whole)) == batch * 10
