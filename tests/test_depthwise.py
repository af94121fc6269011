"""The depthwise conv with batch norm: its kernels under triton's interpreter, and the operator on plain tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from gpd_fx.distill.loop.sync_batch_norm import SyncedBatchNorm
from gpd_fx.kernels.depthwise import launch as depthwise_launch
from gpd_fx.kernels.depthwise import op as depthwise
from gpd_fx.kernels.depthwise.op import backward_op, depthwise_norm, depthwise_norm_op
from tests.tiles import interpreted, traffic

# triton 3.6 makes numbers of arrays in a way that numpy warns about
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
LAUNCHES = [
    *("take_statistics", "merge_statistics", "normalise"),
    *("differentiate_norm", "add_up", "differentiate_conv", "add_up"),
]


@dataclass(frozen=True)
class Case:
    """A conv with its norm, of random tensors."""

    shape: tuple[int, int, int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    last: bool = False
    bias: bool = True
    affine: bool = True
    offset: float = 0.0

    def tensors(self, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
        """x, weight, bias, gamma, beta."""
        channels = self.shape[1]
        x = torch.randn(self.shape, dtype=dtype) + self.offset
        x = x.contiguous(memory_format=torch.channels_last) if self.last else x
        found = [x, torch.randn((channels, 1, *self.kernel), dtype=dtype)]
        found += [torch.rand(channels, dtype=dtype) + 0.5, *(torch.randn(channels, dtype=dtype) for _ in range(2))]
        there = (True, True, self.bias, self.affine, self.affine)
        order = (found[0], found[1], found[3], found[2], found[4])
        return [t.requires_grad_() if is_there else None for t, is_there in zip(order, there, strict=True)]

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return self.stride, self.padding, self.dilation


CASES = {
    "odd sizes": Case((3, 5, 9, 7)),
    "channels last": Case((2, 19, 8, 9), kernel=(3, 2), padding=(1, 0), last=True),
    "batch 1, stride 2, dilation 2": Case((1, 3, 11, 10), (5, 5), (2, 2), (4, 3), (2, 1), bias=False, affine=False),
    "large images": Case((2, 2, 18, 19), stride=(1, 1), padding=(0, 2), bias=False),
    "stride 2, channels last": Case((3, 6, 7, 6), stride=(2, 3), last=True, affine=False),
    "7x7": Case((1, 2, 6, 8), (7, 7), padding=(3, 3)),
    "a large mean": Case((2, 3, 8, 8), padding=(0, 0), bias=False, offset=300.0),
}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator takes the kernels, and they run under the interpreter."""
    interpreted()
    monkeypatch.setattr(depthwise, "usable", depthwise.fitting)


def exact(given: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().double().requires_grad_() for t in given]


def run(case: Case, given: list[Tensor | None], fused: bool, training: bool = True) -> list[Tensor]:
    """The output, running statistics afterwards, and every gradient; by the operator or by torch's own ops."""
    x, weight, bias, gamma, beta = given
    assert x is not None
    assert weight is not None
    generator = torch.Generator().manual_seed(5)
    mean = torch.randn(case.shape[1], generator=generator)
    var = torch.rand(case.shape[1], generator=generator) + 0.5
    mean, var = (t.double() if x.dtype == torch.float64 else t for t in (mean, var))
    if fused:
        z = depthwise_norm(x, weight, bias, gamma, beta, mean, var, *case.geometry, training, 0.1, 1e-5)
    else:
        y = functional.conv2d(x, weight, bias, *case.geometry, groups=case.shape[1])
        z = functional.batch_norm(y, mean, var, gamma, beta, training, 0.1, 1e-5)
    upstream = (torch.randn(z.shape, generator=generator) + 0.1).to(z.dtype)
    wanted = [t for t in given if t is not None]
    return [z.detach(), mean, var, *torch.autograd.grad(z, wanted, upstream)]


def worst(found: list[Tensor], expected: list[Tensor], case: Case) -> float:
    """The largest error relative to its tensor's largest element; a bias has no gradient but rounding errors."""
    errors: list[float] = []
    for number, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert mine.shape == theirs.shape
        assert mine.isfinite().all()
        if case.bias and number == 5:
            assert mine.abs().max() == 0
            assert theirs.abs().max() < 1e-9
            continue
        errors.append(((mine - theirs).abs().max() / theirs.abs().max()).item())
    return max(errors)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_against_float64(name: str) -> None:
    case = CASES[name]
    given = case.tensors()
    with traffic(depthwise_launch) as counted:
        found = run(case, given, True)
    assert counted.launches == LAUNCHES
    expected = run(case, exact(given), False)
    if not case.offset:
        assert worst(found, expected, case) <= 1e-6
        return
    # y is off by units in the last place of its mean, however it is computed; E[y²] - E[y]² would be off by the square
    x, weight, *_ = exact(given)
    assert x is not None
    assert weight is not None
    y = functional.conv2d(x, weight, None, *case.geometry, groups=case.shape[1])
    unit = torch.finfo(torch.float32).eps * (y.abs().amax((0, 2, 3)) / y.std((0, 2, 3))).max().item()
    assert unit > 1e-5
    for mine, theirs, truth in zip(found, run(case, given, False), expected, strict=True):
        error, usual = (((t - truth).abs().max() / truth.abs().max()).item() for t in (mine, theirs))
        assert error <= 4 * usual + unit


@pytest.mark.usefixtures("kernels")
def test_half_precision() -> None:
    """Sums are in float32: what comes out is off by its own rounding, gradients also by that of x̂."""
    case = Case((2, 5, 7, 6), last=True)
    given = case.tensors(torch.float16)
    found = run(case, given, True)
    assert found[0].dtype == torch.float16
    assert worst(found, run(case, exact(given), False), case) <= 2 * torch.finfo(torch.float16).eps


@pytest.mark.usefixtures("kernels")
def test_several_tiles_a_program_and_the_same_bits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depthwise_launch, "PROGRAMS", 1)
    monkeypatch.setattr(depthwise_launch, "MOST_STEPS", 4)
    monkeypatch.setattr(depthwise_launch, "ELEMENTS", 256)
    monkeypatch.setattr(depthwise_launch, "INPUTS", 256)
    case = Case((2, 4, 9, 10), bias=False)
    grid = depthwise_launch.Call(torch.empty(case.shape), torch.empty(4, 1, 3, 3), conv_of(case)).over_outputs
    assert grid.steps > 1
    assert grid.steps * grid.programs[0] > grid.tiles.count  # the last program has less to do
    given = case.tensors()
    found = run(case, given, True)
    assert worst(found, run(case, exact(given), False), case) <= 1e-6
    for mine, again in zip(found, run(case, given, True), strict=True):
        assert torch.equal(mine, again)


def conv_of(case: Case) -> depthwise_launch.Conv:
    return depthwise_launch.Conv(case.kernel, *case.geometry)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("last", [False, True])
def test_passes_over_the_activations(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward 3 (x, x, z), backward 7 (x, dz, x̂; dx from x, dz, x̂); torch's own ops take 5 and 9."""
    monkeypatch.setattr(depthwise_launch, "PROGRAMS", 4)  # several tiles a program, as where there is more to do
    case = Case((2, 16, 16, 16), last=last, bias=False)
    x, weight, _, gamma, beta = case.tensors()
    assert x is not None
    assert weight is not None
    one = x.numel() * 4
    with traffic(depthwise_launch) as forward:
        z = depthwise_norm(x, weight, None, gamma, beta, None, None, *case.geometry, True, 0.1, 1e-5)
    assert forward.launches == LAUNCHES[:3]
    assert 3 * one <= forward.moved <= 1.1 * 3 * one
    with traffic(depthwise_launch) as backward:
        z.backward(torch.randn_like(z))
    assert backward.launches == LAUNCHES[3:]
    assert 7 * one <= backward.moved <= 1.1 * 7 * one
    assert forward.requested + backward.requested <= 1.5 * 10 * one  # with what neighbouring tiles share, mostly cached


@pytest.mark.usefixtures("kernels")
def test_eval_mode_is_a_folded_conv() -> None:
    case = Case((2, 5, 7, 6), stride=(2, 1))
    given = case.tensors()
    with traffic(depthwise_launch) as counted:
        found = run(case, given, True, training=False)
    assert counted.launches == []
    expected = run(case, exact(given), False, training=False)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).abs().max() <= 1e-6 * theirs.abs().max()


@pytest.mark.usefixtures("kernels")
def test_autocast_rounds_what_a_conv_would_round() -> None:
    case = Case((2, 4, 6, 5), bias=False)
    given = case.tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(case, given, True)
    assert found[0].dtype == torch.bfloat16
    assert [t.dtype for t in found[1:]] == [torch.float32] * 6
    assert worst(found, run(case, exact(given), False), case) <= 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at them itself
@pytest.mark.usefixtures("kernels")
def test_the_operator() -> None:
    case = Case((2, 3, 5, 4))
    given = case.tensors()
    torch.library.opcheck(depthwise_norm_op, (*given, *map(list, case.geometry), 1e-5))

    def both(x: Tensor, weight: Tensor) -> Tensor:
        return depthwise_norm(x, weight, None, None, None, None, None, *case.geometry, True, 0.1, 1e-5)

    x, weight, *_ = given
    assert x is not None
    assert weight is not None
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    (mine, theirs) = (torch.autograd.grad(f(x, weight).sin().sum(), (x, weight)) for f in (compiled, both))
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at them itself
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["channels last", "batch 1, stride 2, dilation 2"])
def test_the_operator_on_plain_tensors(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    given = case.tensors(dtype)
    args: tuple[Any, ...] = (*given, *map(list, case.geometry), 1e-5)
    torch.library.opcheck(depthwise_norm_op, args)
    z, statistics = depthwise_norm_op(*args)
    detached = [None if t is None else t.detach() for t in (torch.randn_like(z), given[0], given[1], given[3])]
    torch.library.opcheck(backward_op, (*detached, statistics.detach(), *args[5:]))


@pytest.mark.parametrize("name", ["odd sizes", "batch 1, stride 2, dilation 2"])
def test_gradients_of_the_operator(name: str) -> None:
    case = CASES[name]
    given = case.tensors(torch.float64)
    x, weight, bias, gamma, beta = given
    wanted = [t for t in (x, weight, gamma, beta) if t is not None]

    def output(*tensors: Tensor) -> Tensor:
        return depthwise_norm_op(x, weight, bias, gamma, beta, *case.geometry, 1e-5)[0]

    assert torch.autograd.gradcheck(output, wanted)


@pytest.mark.parametrize("training", [True, False])
def test_elsewhere_it_is_torchs_own_ops(training: bool) -> None:
    case = CASES["stride 2, channels last"]
    for dtype in (torch.float32, torch.float64):
        given = case.tensors(dtype)
        for mine, theirs in zip(run(case, given, True, training), run(case, given, False, training), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("half", [False, True])
def test_statistics_over_all_processes_are_taken_from_a_conv_of_its_own(half: bool) -> None:
    case = Case((2, 3, 5, 4))
    given = case.tensors()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with traffic(depthwise_launch) as counted, SyncedBatchNorm(), torch.autocast("cpu", enabled=half):
            found = run(case, given, True)
    finally:
        dist.destroy_process_group()
    assert counted.launches == []
    assert found[0].dtype == (torch.bfloat16 if half else torch.float32)
    for number, (mine, theirs) in enumerate(zip(found, run(case, exact(given), False), strict=True)):
        bound = (0.02 if half else 1e-5) * max(theirs.abs().max().item(), float(number == 5))
        assert (mine - theirs).abs().max() <= bound


@pytest.mark.usefixtures("kernels")
def test_what_the_kernels_do_not_take() -> None:
    x, weight = torch.empty(2, 3, 9, 9), torch.empty(3, 1, 3, 3)
    assert depthwise.fitting(x, weight)
    assert not depthwise.fitting(x.double(), weight.double())
    assert not depthwise.fitting(x, weight.half())
    assert depthwise.fitting(x, weight.half(), mixed=True)
    assert not depthwise.fitting(x, torch.empty(3, 1, 9, 9))
    assert not depthwise.fitting(x, torch.empty(6, 1, 3, 3))
    assert not depthwise.fitting(torch.empty(0, 3, 9, 9), weight)
    assert not depthwise.fitting(torch.empty(2, 1, 1, 1, device="meta").expand(2, 1, 2**15, 2**15), weight)
