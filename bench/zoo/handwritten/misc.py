"""Transforms, complex numbers, orders, regions under other settings, buffers, randomness that is switched off."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo.entry import Entry, normal


class Fourier(nn.Module):
    """A global filter: products with a learnt complex table in the frequencies of space."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 2, stride=2)
        self.table = nn.Parameter(torch.zeros(8, 5, 4, 2))
        self.mix = nn.Conv2d(8, 10, 1)
        self.leave = nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        y = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.table)
        x = self.mix(x + torch.fft.irfft2(y, s=x.shape[2:], norm="ortho"))
        y = torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real
        line = torch.fft.irfft(torch.fft.rfft(x.flatten(2)), n=35).view_as(x)
        whole = torch.fft.ifft2(torch.fft.fft2(x).conj()).real + torch.fft.ifft(torch.fft.fftn(y, dim=(2, 3))).imag
        return self.leave(F.hardswish(x + 0.1 * y + line + whole))


class Complex(nn.Module):
    """Complex layers from real weights, and the modulus of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.real, self.imag = nn.Linear(6, 10), nn.Linear(6, 10)
        self.turn = nn.Parameter(torch.zeros(10))
        self.leave = nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.complex(self.real(x), self.imag(x)) * torch.polar(torch.ones_like(self.turn), self.turn)
        parts = torch.view_as_real(z.conj().resolve_conj()).flatten(1)
        return self.leave(torch.cat([parts * 0.5, (z.abs() + z.angle() + torch.real(z) * torch.imag(z.conj()))], 1))


class Sorted(nn.Module):
    """Pooling by rank: the largest few places, the median, everything in order, and soft positions of a maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv1d(3, 8, 3)
        self.mix = nn.Linear(8, 8)
        self.late = nn.Linear(8, 9)
        self.leave = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.enter(x).transpose(1, 2)).transpose(1, 2)
        best = x.topk(3, -1)[0].mean(-1) + x.median(-1)[0] + x.kthvalue(2, -1)[0]
        ordered = torch.sort(x, -1)[0] * torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)
        where = torch.argsort(x, -1).to(x) + torch.sort(x, dim=-1, stable=True)[1]
        late = x.argmax(-1).to(x.dtype) - x.argmin(-1) + x.max(-1)[1]
        y = best + ordered.sum(-1) / 9 + (where * x).mean(-1) + 0.1 * late
        return self.leave(F.logsigmoid(self.late(y)))


class Settings(nn.Module):
    """A part without gradients, a part with autocast off, and a norm in single precision, as language models have."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 9)
        self.fixed = nn.Linear(9, 9)
        self.exact = nn.Linear(9, 9)
        self.leave = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        with torch.no_grad():
            target = F.relu(self.fixed(x))
        with torch.autocast("cpu", enabled=False):
            x = F.layer_norm(self.exact(x), (9,))
            x = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return self.leave(x + target)


class Buffers(nn.Module):
    """Buffers that carry channels: positions, a running mean of its own, fixed filters, masks."""

    places: Tensor
    blur: Tensor
    centre: Tensor
    keep: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.register_buffer("places", torch.zeros(1, 8, 5, 6))
        self.register_buffer("blur", torch.zeros(8, 1, 3, 3))
        self.register_buffer("centre", torch.zeros(8))
        self.register_buffer("keep", torch.arange(8) % 3 > 0)
        self.fill = nn.Parameter(torch.zeros(()))
        self.leave = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x) + self.places
        if self.training:
            self.centre.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        x = F.conv2d(x - self.centre.view(1, -1, 1, 1), self.blur, padding=1, groups=8)
        x = torch.where(self.keep[:, None, None], x, 0.0)
        return self.leave(x.masked_fill(~self.keep[:, None, None], self.fill))


class Created(nn.Module):
    """Constants made on the way: of a size, like a tensor, of its type, spread over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 8)
        self.gain = nn.Parameter(torch.zeros(8))
        self.other = nn.Linear(14, 7)
        self.leave = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        y = torch.where(x > 0, torch.ones_like(x), torch.full_like(x, 0.5)) * x
        y = y + torch.ones(8, dtype=x.dtype) * self.gain + torch.full((1, 8), 0.5, dtype=x.dtype)
        y = y + torch.where(x > 1, 1.0, x) + torch.where(x > 1, x, 2.0) + torch.where(x > 2, 1.0, 0.0)
        y = y - torch.empty_like(x).fill_(0.5) + torch.empty(8, dtype=x.dtype).zero_().to(x) + x.new_full((8,), 0.1)
        y = y + x.new_empty(8).copy_(self.gain) * x.new_ones(8) + torch.fill(x, 0.5)
        y = y + torch.fill(x, self.gain.detach().sum() / 8) + x.contiguous().type_as(self.gain).detach()
        y = torch.cat([y, x.new_zeros(x.shape[0], 2), torch.zeros(1, 4, dtype=x.dtype).expand(x.shape[0], 4)], 1)
        return self.leave(self.other(F.pad(y[:, 1:], (0, 1))).to(device=x.device, dtype=x.dtype))


class Dropouts(nn.Module):
    """Every kind of dropout and stochastic depth, with a probability of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.parts = nn.Sequential(
            nn.Dropout(0.0), nn.Dropout2d(0.0), nn.AlphaDropout(0.0), nn.FeatureAlphaDropout(0.0)
        )
        self.block = nn.Conv2d(8, 8, 3, padding=1)
        self.leave = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.parts(self.enter(x))
        y = self.block(x)
        if self.training:
            y = y * torch.empty(y.shape[0], 8, 1, 1, dtype=y.dtype).bernoulli_(1.0)
            y = y * torch.bernoulli(torch.ones(y.shape[1:], dtype=y.dtype), 1.0)
        return self.leave(x + y)


class Lowered(nn.Module):
    """Ops that torch's own functions do not reach on every device, but lowered graphs contain."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv1d(3, 8, 3, padding=1)
        self.mix = nn.Conv1d(8, 9, 1)
        self.late = nn.Conv1d(11, 7, 1)
        self.leave = nn.Conv1d(7, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        aten = torch.ops.aten
        x = aten._unsafe_view.default(self.enter(x), [x.shape[0], 8, 7])
        x = x + aten._softmax.default(x, 1, False) - 0.1 * aten._log_softmax.default(x, 1, False)
        x = aten._to_copy.default(x > 0, dtype=x.dtype) * x + aten.to.other(x > 1, x).type(x.dtype)
        x = x / (aten.norm.ScalarOpt_dim(x, 2, [1], True) + aten.norm.Scalar(self.mix.weight) + 1)
        first, rest = aten.split.sizes(torch.native_dropout(self.mix(x), 0.0, self.training)[0], [4, 5], 1)
        x = torch.constant_pad_nd(torch.cat([rest, first.resolve_neg()], 1), [0, 0, 0, 2], 0.5)
        return self.leave(F.relu(self.late(x)))


class AcrossChannels(nn.Module):
    """Efficient channel attention: a convolution along the channels, which must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3)
        self.body = nn.Conv2d(8, 10, 3)
        self.across = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.point = nn.Conv1d(1, 1, 1)
        self.leave = nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(F.relu(self.enter(x)))
        gate = self.across(self.point(x.mean((2, 3)).unsqueeze(1)))
        return self.leave(x * gate.sigmoid().transpose(1, 2).unsqueeze(-1))


class Mixer(nn.Module):
    """An MLP along the places, whose hidden width is free, and one along the channels, with a GLU."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 2, stride=2)
        self.first = nn.LayerNorm(8)
        self.tokens = nn.Sequential(nn.Linear(12, 14), nn.GELU(), nn.Linear(14, 12))
        self.second = nn.LayerNorm(8)
        self.channels = nn.Sequential(nn.Linear(8, 18), nn.GLU(), nn.Linear(9, 8))
        self.leave = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.first(x).transpose(1, 2)).transpose(1, 2)
        return self.leave((x + self.channels(self.second(x))).mean(1))


MODELS: dict[str, Entry] = {
    "fourier": Entry(Fourier, normal((3, 10, 14))),
    "complex": Entry(Complex, normal((6,))),
    "sorted": Entry(Sorted, normal((3, 11))),
    "settings": Entry(Settings, normal((5,))),
    "buffers": Entry(Buffers, normal((3, 5, 6))),
    "created": Entry(Created, normal((5,))),
    "dropouts": Entry(Dropouts, normal((3, 5, 6))),
    "lowered": Entry(Lowered, normal((3, 7))),
    "across_channels": Entry(AcrossChannels, normal((3, 7, 8))),
    "mixer": Entry(Mixer, normal((3, 6, 8))),
}
