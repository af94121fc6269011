"""Where the boxes of a layered drawing lie: top to bottom by depth, the longest path straight down on the left.

Boxes are placed in layers by the longest path to them. An edge that spans several layers runs through narrow lanes
beside the boxes, one lane for all such edges of one box. Within a layer, boxes and lanes are ordered so that few edges
cross (each by the mean place of its neighbours), then moved as near to their neighbours as their order allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Point = tuple[float, float]

_GAP = 30.0  # between boxes of a layer
_LANE = 12.0  # between lanes, and beside boxes
_RISE = 20.0  # between layers
_SWEEPS = 12


@dataclass(frozen=True)
class Layout:
    """Centres of boxes; for each edge the lane points that it passes, two in each layer between; the whole size."""

    centres: tuple[Point, ...]
    lanes: dict[tuple[int, int], tuple[Point, ...]]
    width: float
    height: float


@dataclass(eq=False)
class _Item:
    """A box, or a lane through one layer."""

    width: float
    layer: int
    box: int | None
    x: float = 0.0
    spine: bool = False

    def __post_init__(self) -> None:
        self.above: list[_Item] = []
        self.below: list[_Item] = []


def arrange(sizes: Sequence[tuple[float, float]], edges: Sequence[tuple[int, int]]) -> Layout:
    """Lay out boxes of the given widths and heights; each edge goes from a box to one with a higher index."""
    if not sizes:
        return Layout((), {}, 0.0, 0.0)
    above: list[list[int]] = [[] for _ in sizes]
    below: list[list[int]] = [[] for _ in sizes]
    for a, b in edges:
        above[b].append(a)
        below[a].append(b)
    spine = _spine(above)
    levels = _levels(above, below, spine)
    items = [_Item(width, levels[k], k, spine=k in spine) for k, (width, _) in enumerate(sizes)]
    layers: list[list[_Item]] = [[] for _ in range(max(levels) + 1)]
    for k in sorted(range(len(items)), key=lambda k: (k not in spine, k)):
        layers[levels[k]].append(items[k])
    ways = _lanes(items, layers, edges)
    _order(layers)
    _place(layers)
    _straighten(layers, ways)
    tops, top = [0.0], 0.0
    for layer in layers:
        top += max([sizes[item.box][1] for item in layer if item.box is not None], default=0.0) + _RISE
        tops.append(top)
    left = min(item.x - item.width / 2 for layer in layers for item in layer)
    right = max(item.x + item.width / 2 for layer in layers for item in layer)

    def middle(item: _Item) -> Point:
        return item.x - left, (tops[item.layer] + tops[item.layer + 1] - _RISE) / 2

    lanes = {
        edge: tuple(
            (lane.x - left, y) for lane in way for y in (tops[lane.layer], tops[lane.layer + 1] - _RISE)
        )
        for edge, way in ways.items()
    }  # fmt: skip
    return Layout(tuple(map(middle, items)), lanes, right - left, top - _RISE)


def _spine(above: Sequence[Sequence[int]]) -> set[int]:
    """The longest path."""
    length = [0] * len(above)
    for k, parents in enumerate(above):
        length[k] = max((length[parent] + 1 for parent in parents), default=0)
    at: int | None = max(range(len(above)), key=lambda k: length[k])
    found: set[int] = set()
    while at is not None:
        found.add(at)
        at = max(above[at], key=lambda parent: (length[parent], parent), default=None)
    return found


def _levels(above: Sequence[Sequence[int]], below: Sequence[Sequence[int]], spine: set[int]) -> list[int]:
    """The layer of each box: below what it takes, and next to what takes it where it does not hang from the spine."""
    level = [0] * len(above)
    hangs = [k in spine for k in range(len(above))]
    for k, parents in enumerate(above):
        level[k] = max((level[parent] + 1 for parent in parents), default=0)
        hangs[k] = hangs[k] or any(hangs[parent] for parent in parents)
    for k in reversed(range(len(above))):
        if not hangs[k] and below[k]:
            level[k] = min(level[child] for child in below[k]) - 1
    return level


def _lanes(
    items: Sequence[_Item], layers: Sequence[list[_Item]], edges: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], list[_Item]]:
    """Add lanes for edges that span layers; gives the lanes of each edge."""
    made: dict[tuple[int, int], _Item] = {}
    ways: dict[tuple[int, int], list[_Item]] = {}
    joined: set[tuple[int, int]] = set()
    for a, b in edges:
        last, way = items[a], []
        for level in range(items[a].layer + 1, items[b].layer):
            lane = made.get((a, level))
            if lane is None:
                lane = made[a, level] = _Item(_LANE, level, None)
                layers[level].append(lane)
                _join(last, lane, joined)
            way.append(lane)
            last = lane
        _join(last, items[b], joined)
        ways[a, b] = way
    return ways


def _join(upper: _Item, lower: _Item, joined: set[tuple[int, int]]) -> None:
    if (id(upper), id(lower)) not in joined:
        joined.add((id(upper), id(lower)))
        upper.below.append(lower)
        lower.above.append(upper)


def _order(layers: Sequence[list[_Item]]) -> None:
    """Sort each layer by the mean place of neighbours, the spine first; keeps the order with the fewest crossings."""
    best, fewest = [list(layer) for layer in layers], _crossings(layers)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            place = {id(item): at for row in layers for at, item in enumerate(row)}
            mean: dict[int, float] = {}
            for item in layer:
                near = [place[id(other)] for other in (item.above if down else item.below)]
                mean[id(item)] = sum(near) / len(near) if near else place[id(item)]
            layer.sort(key=lambda item: (not item.spine, mean[id(item)]))
        count = _crossings(layers)
        if count < fewest:
            best, fewest = [list(layer) for layer in layers], count
    for layer, order in zip(layers, best, strict=True):
        layer[:] = order


def _crossings(layers: Sequence[Sequence[_Item]]) -> int:
    total = 0
    for upper, lower in pairwise(layers):
        place = {id(item): at for at, item in enumerate(lower)}
        ends = [sorted(place[id(other)] for other in item.below if id(other) in place) for item in upper]
        seen: list[int] = []
        for row in ends:
            total += sum(old > new for new in row for old in seen)
            seen += row
    return total


def _place(layers: Sequence[Sequence[_Item]]) -> None:
    """Give every item its x: in order, apart, and as near to its neighbours as that allows; the spine stands at 0."""
    for layer in layers:
        at = 0.0
        for before, item in zip([None, *layer], layer, strict=False):
            at = 0.0 if before is None else at + _apart(before, item)
            item.x = at
    for sweep in range(2 * _SWEEPS):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            wanted: list[float] = []
            for item in layer:
                near = [*item.above, *item.below]
                weights = [_pull(item, other) for other in near]
                pulled = sum(w * other.x for w, other in zip(weights, near, strict=True))
                wanted.append(0.0 if item.spine else pulled / sum(weights) if near else item.x)
            _settle(layer, wanted)


def _pull(item: _Item, other: _Item) -> float:
    """How much an edge wants to be straight: lanes more than what enters them."""
    return 1.0 + 7.0 * ((item.box is None) + (other.box is None) == 2)


def _apart(left: _Item, right: _Item) -> float:
    gap = _GAP if left.box is not None and right.box is not None else _LANE
    return (left.width + right.width) / 2 + gap


def _settle(layer: Sequence[_Item], wanted: Sequence[float]) -> None:
    """The places nearest to those wanted that keep order and distances: isotonic regression by pooling neighbours."""
    offset, total = [0.0], 0.0
    for left, right in pairwise(layer):
        total += _apart(left, right)
        offset.append(total)
    pools: list[list[float]] = []  # sum, count
    for want, shift in zip(wanted, offset, strict=True):
        pools.append([want - shift, 1.0])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            last = pools.pop()
            pools[-1][0] += last[0]
            pools[-1][1] += last[1]
    places = [value / count for value, count in pools for _ in range(int(count))]
    bound = 0.0 if layer and layer[0].spine else -float("inf")
    for item, place, shift in zip(layer, places, offset, strict=True):
        item.x = shift if item.spine else max(place, bound) + shift


def _straighten(layers: Sequence[Sequence[_Item]], ways: Mapping[tuple[int, int], Sequence[_Item]]) -> None:
    """Give all lanes of one box one x where there is room for it, and else as many in a row as there is."""
    beside: dict[_Item, tuple[_Item | None, _Item | None]] = {}
    for layer in layers:
        for left, item, right in zip([None, *layer], layer, [*layer[1:], None], strict=False):
            beside[item] = left, right
    chains: dict[int, list[_Item]] = {}
    for (a, _), way in ways.items():
        chains[a] = max(chains.get(a, []), list(way), key=len)
    for chain in sorted(chains.values(), key=len, reverse=True):
        rows: list[tuple[list[_Item], float, float]] = []
        for lane in chain:
            left, right = beside[lane]
            low = left.x + _apart(left, lane) if left else -float("inf")
            high = right.x - _apart(lane, right) if right else float("inf")
            if rows and max(low, rows[-1][1]) <= min(high, rows[-1][2]):
                rows[-1] = [*rows[-1][0], lane], max(low, rows[-1][1]), min(high, rows[-1][2])
            else:
                rows.append(([lane], low, high))
        for lanes, low, high in rows:
            x = sorted(lane.x for lane in lanes)[len(lanes) // 2]
            for lane in lanes:
                lane.x = min(max(x, low), high)
