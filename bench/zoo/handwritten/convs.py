"""Convolutions in one, two and three dimensions, resizing, and weights that are computed from others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from bench.zoo.entry import Entry, normal


class Wave(nn.Module):
    """A network over sound: strided, dilated and grouped convs, every way of pooling and resizing in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 12, 7, stride=2, padding=3)
        self.norm = nn.BatchNorm1d(12)
        self.deep = nn.Conv1d(12, 12, 3, padding="same", dilation=2, groups=3)
        self.mix = nn.Conv1d(24, 10, 1)
        self.up = nn.ConvTranspose1d(10, 12, 4, stride=2, padding=1)
        self.unpool = nn.ConvTranspose1d(12, 12, 3, groups=4, bias=False)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.stem(x)))
        y = F.log_softmax(self.deep(x), -1)
        y = torch.cat([F.avg_pool1d(y, 2), F.max_pool1d(x, 2)], 1)
        y = F.relu(self.mix(y))
        y = self.unpool(self.up(y))
        y = F.interpolate(y, scale_factor=2.0, mode="linear") + F.interpolate(y, scale_factor=2.0)
        y = y + F.interpolate(F.adaptive_avg_pool1d(y, 7), size=y.shape[-1], mode="nearest-exact")
        return self.head(torch.cat([F.adaptive_max_pool1d(y, 1).flatten(1), y.mean(-1)], 1))


class UNet(nn.Module):
    """Down and up again, with transposed convs and skips that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 6, 3, padding=1)
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(n, 2 * n, 3, stride=2, padding=1), nn.BatchNorm2d(2 * n), nn.ReLU())
            for n in (6, 12)
        )
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * n, n, 2, stride=2) for n in (12, 6))
        self.join = nn.ModuleList(nn.Conv2d(2 * n, n, 3, padding=1) for n in (12, 6))
        self.leave = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.enter(x)]
        for down in self.down:
            levels.append(down(levels[-1]))
        y = levels.pop()
        for up, join in zip(self.up, self.join, strict=True):
            skip = levels.pop()
            grown = up(y)
            grown = F.pad(grown, (0, skip.shape[3] - grown.shape[3], 0, skip.shape[2] - grown.shape[2]))
            y = F.silu(join(torch.cat([skip, grown], 1)))
        return self.leave(y)


class Volume(nn.Module):
    """A U-Net over volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv3d(1, 6, 3, padding=1)
        self.same = nn.Conv3d(6, 6, (3, 1, 3), padding="same", groups=2)
        self.norm = nn.BatchNorm3d(6)
        self.up = nn.ConvTranspose3d(12, 6, 2, stride=2)
        self.down = nn.Conv3d(6, 12, 3, stride=2, padding=1)
        self.leave = nn.Conv3d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.same(F.relu(self.enter(x))))
        y = self.up(F.relu(self.down(x)))
        z = F.interpolate(F.max_pool3d(x, 2), scale_factor=2.0) + F.interpolate(F.avg_pool3d(x, 2), scale_factor=2.0)
        z = z + F.interpolate(F.adaptive_avg_pool3d(x, (1, 2, 1)), size=z.shape[2:], mode="trilinear")
        z = z * F.interpolate(F.adaptive_max_pool3d(x, 2), size=z.shape[2:], mode="nearest-exact").sigmoid()
        return self.leave(torch.cat([y, z], 1))


class SegNet(nn.Module):
    """Pooling remembers where its maxima were, and unpooling puts them back."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(3, 8, 3)
        self.enter = nn.Conv2d(8, 10, 3, padding=1)
        self.cube = nn.Conv3d(10, 10, 1)
        self.leave = nn.Conv2d(10, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        line, _ = F.max_pool1d_with_indices(self.line(x), [2])
        y = self.enter(line[:, :, :, None] * line[:, :, None])
        y, places = F.max_pool2d_with_indices(y, [2, 2])
        cube, _ = F.max_pool3d_with_indices(torch.stack([y, -y, y * y], 2), (3, 1, 1))
        y = y + self.cube(cube).squeeze(2)
        return self.leave(F.max_unpool2d(y, places, [2, 2]))


class Resizes(nn.Module):
    """Pictures brought to other sizes in every way, as feature pyramids do."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 10, 3, padding="same")
        self.leave = nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.enter(x))
        y = F.interpolate(F.avg_pool2d(x, 2) + F.max_pool2d(x, 2), size=(9, 7), mode="bilinear", align_corners=True)
        y = y + F.interpolate(x, size=(9, 7), mode="bicubic") + F.interpolate(x, size=(9, 7), mode="nearest-exact")
        y = y + F.interpolate(x, size=(9, 7), mode="bilinear", antialias=True)
        y = y - F.interpolate(x, size=(9, 7), mode="bicubic", antialias=True)
        y = y + F.interpolate(F.adaptive_max_pool2d(x, 3), size=(9, 7)) + F.adaptive_avg_pool2d(x, (9, 7))
        return self.leave(F.lp_pool2d(y.abs() + 0.1, 2, 2))


class SuperResolution(nn.Module):
    """Space is moved to channels and back: pixel unshuffle, pixel shuffle, channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 6, 3, padding=1)
        self.fewer = nn.Conv2d(24, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.shuffle = nn.ChannelShuffle(3)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.more = nn.Conv2d(12, 8 * 4, 1, groups=2)
        self.leave = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.fewer(F.pixel_unshuffle(self.enter(x), 2)))
        y = F.relu(self.depth(self.shuffle(self.grouped(y))))
        return self.leave(F.prelu(F.pixel_shuffle(self.more(y), 2), torch.tensor([0.2] * 8, dtype=x.dtype)))


class Patches(nn.Module):
    """Convolution as a product with unfolded patches, and overlapping patches folded back."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 6, 1)
        self.mix = nn.Linear(6 * 9, 5 * 9)
        self.act = nn.PReLU(5)
        self.leave = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        patches = F.unfold(self.enter(x), 3, padding=1)
        patches = self.mix(patches.transpose(1, 2)).transpose(1, 2)
        return self.leave(self.act(F.fold(patches, (size[0], size[1]), 3, padding=1)))


class StandardisedConv(nn.Conv2d):
    """A conv whose kernels have mean zero and variance one."""

    def forward(self, input: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        spread = self.weight.std((1, 2, 3), keepdim=True, unbiased=False) + 1e-5
        return F.conv2d(input, (self.weight - mean) / spread, self.bias, self.stride, self.padding)


class ReshapedConv(nn.Conv2d):
    """The same by a batch norm over the flattened kernels."""

    def forward(self, input: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding)


class Standardised(nn.Module):
    """Weight standardisation in both ways, with group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.first = StandardisedConv(8, 12, 3, stride=2)
        self.norm = nn.GroupNorm(3, 12)
        self.second = ReshapedConv(12, 12, 3, padding=1)
        self.leave = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(self.enter(x))))
        return self.leave(x + self.second(x))


def _weight_normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 8, 3),
        parametrizations.weight_norm(nn.Conv1d(8, 10, 3)),
        nn.ELU(),
        parametrizations.weight_norm(nn.Conv1d(10, 12, 1), dim=1),
        nn.RReLU(0.2, 0.2),  # random in name only
        nn.Flatten(),
        parametrizations.weight_norm(nn.Linear(12 * 7, 9), dim=None),  # pyright: ignore[reportArgumentType]  documented
        nn.Linear(9, 4),
    )


def _spectral_normed() -> nn.Module:
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)),
        nn.LeakyReLU(0.1),
        parametrizations.spectral_norm(nn.Conv2d(8, 10, 3, groups=2)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(10 * 3 * 5, 4),
    )


class SpectralByHand(nn.Module):
    """The largest singular value by one power iteration without gradients, kept in buffers."""

    u: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 12)
        self.inner = nn.Linear(12, 10)
        self.leave = nn.Linear(10, 3)
        self.register_buffer("u", torch.randn(10))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.inner.weight
        with torch.no_grad():
            v = F.normalize(torch.mv(weight.t(), self.u), dim=0)
            u = F.normalize(torch.mv(weight, v), dim=0)
        largest = torch.dot(u, torch.mv(weight, v))
        return self.leave(F.relu(F.linear(self.enter(x), weight / largest, self.inner.bias)))


class Warp(nn.Module):
    """A spatial transformer: features say how they are to be sampled."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.place = nn.Linear(8, 6)
        self.flow = nn.Conv2d(8, 2, 3, padding=1)
        self.leave = nn.Conv2d(8, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.enter(x))
        turned = F.affine_grid(self.place(x.mean((2, 3))).view(-1, 2, 3), [*x.shape], align_corners=False)
        moved = turned + self.flow(x).permute(0, 2, 3, 1).tanh()
        return self.leave(F.grid_sample(x, moved, align_corners=False))


class Ghost(nn.Module):
    """Depthwise separable convs, with cheap features concatenated and then cut to size."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 6, 3, stride=2)
        self.cheap = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.point = nn.Conv2d(10, 8, 1)
        self.multiplied = nn.Conv2d(8, 16, 3, groups=8)
        self.leave = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.enter(x))
        x = torch.cat([x, self.cheap(x)], 1)[:, :10]
        return self.leave(F.relu6(self.multiplied(self.point(x))).amax((2, 3)))


MODELS: dict[str, Entry] = {
    "wave": Entry(Wave, normal((2, 37))),
    "unet": Entry(UNet, normal((3, 13, 11))),
    "volume": Entry(Volume, normal((1, 6, 4, 6))),
    "segnet": Entry(SegNet, normal((3, 10))),
    "resizes": Entry(Resizes, normal((3, 11, 13))),
    "super_resolution": Entry(SuperResolution, normal((3, 10, 6))),
    "patches": Entry(Patches, normal((3, 5, 7))),
    "standardised": Entry(Standardised, normal((3, 9, 7))),
    "weight_normed": Entry(_weight_normed, normal((2, 11))),
    "spectral_normed": Entry(_spectral_normed, normal((3, 7, 9))),
    "spectral_by_hand": Entry(SpectralByHand, normal((6,))),
    "warp": Entry(Warp, normal((3, 7, 9))),
    "ghost": Entry(Ghost, normal((3, 11, 9))),
}
