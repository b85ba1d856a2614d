"""Where each adapter of a record belongs: its tower, layer, short name and cell. Shared by pictures and tables."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from weightlora.runs.record import AdapterScore

OTHER = "other"
"""The tower of adapters outside every stack of layers, in a model that has several stacks."""
GAP = 0.35
MOST_BLOCKS = 1000
"""The space between towers, and below what lies outside the layers; in columns or rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """One adapter's place: ``tower`` ("" unless the model has several), ``block``, and ``kind`` for people to read."""

    tower: str
    block: int | None
    kind: str
    adapter: AdapterScore

    @property
    def short(self) -> str:
        """The adapter in few letters, such as ``3.query`` or ``decoder.3.q_proj``."""
        parts = (self.tower, "" if self.block is None else str(self.block), self.kind)
        return ".".join(part for part in parts if part)


def layout(adapters: Sequence[AdapterScore]) -> tuple[Place, ...]:
    """The place of every adapter, in the order given; no two share (tower, block, kind).

    An encoder-decoder model has two layers 0, so what stands before the layer's index in the names tells the towers
    apart. A kind that occurs twice in one layer (a decoder's two ``q_proj``) is replaced by the rest of the name,
    and every kind is then cut to the shortest ending that is unique in its tower.

    >>> names = ("base.encoder.layers.0.self_attn.q_proj", "base.decoder.layers.0.self_attn.q_proj")
    >>> scores = [AdapterScore(name=n, block=0, kind="q_proj", omega=1.0, score=None, kept=True) for n in names]
    >>> [place.short for place in layout(scores)]
    ['encoder.0.q_proj', 'decoder.0.q_proj']
    """
    split = [_split(adapter) for adapter in adapters]
    towers = _tower_names([head for head, _ in split if head is not None])
    tower = [_tower_of(head, towers) for head, _ in split]
    kinds = [adapter.kind for adapter in adapters]
    blocks = [adapter.block for adapter in adapters]
    if _collide(tower, blocks, kinds):
        kinds = [tail for _, tail in split]
    if _collide(tower, blocks, kinds):
        kinds = [adapter.name for adapter in adapters]  # names are unique in a model
    short = _shorten(tower, kinds)
    return tuple(
        Place(tower=where, block=adapter.block, kind=short[where, kind], adapter=adapter)
        for where, kind, adapter in zip(tower, kinds, adapters, strict=True)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """The columns (tower, kind) at their horizontal positions, and the rows (blocks) at their vertical ones."""

    columns: dict[tuple[str, str], float]
    rows: dict[int | None, float]

    @classmethod
    def of(cls, places: tuple[Place, ...]) -> Grid:
        towers = list(dict.fromkeys(place.tower for place in places))
        pairs = dict.fromkeys((place.tower, place.kind) for place in places)
        ordered = sorted(pairs, key=lambda pair: towers.index(pair[0]))  # stable: module order inside a tower
        columns = {pair: index + GAP * towers.index(pair[0]) for index, pair in enumerate(ordered)}
        blocks = {place.block for place in places if place.block is not None}
        last = max(blocks, default=-1)
        # Blocks without an adapter have their row, too; not so where one is said to be the billionth.
        shown = range(last + 1) if min(blocks, default=0) >= 0 and last < MOST_BLOCKS else sorted(blocks)
        rows: dict[int | None, float] = {block: float(row) for row, block in enumerate(shown)}
        if any(place.block is None for place in places):
            rows[None] = len(rows) + GAP * bool(rows)
        return cls(columns=columns, rows=rows)

    @property
    def towers(self) -> dict[str, list[float]]:
        """The positions of each tower's columns."""
        found: dict[str, list[float]] = {}
        for (tower, _), x in self.columns.items():
            found.setdefault(tower, []).append(x)
        return found


def _split(adapter: AdapterScore) -> tuple[tuple[str, ...] | None, str]:
    """The name's segments before the layer's index (None outside the layers), and the rest after it."""
    segments = adapter.name.split(".")
    if adapter.block is None or str(adapter.block) not in segments:
        return None, adapter.kind
    at = segments.index(str(adapter.block))
    return tuple(segments[:at]), ".".join(segments[at + 1 :]) or adapter.kind


def _tower_names(heads: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """A short name for each distinct head: its first segment that differs, or all that differ; "" if alone."""
    distinct = list(dict.fromkeys(heads))
    if len(distinct) < 2:
        return {head: "" for head in distinct}
    common = 0
    while len({head[common : common + 1] for head in distinct}) == 1:
        common += 1
    first = {head: head[common] if len(head) > common else head[-1] if head else "base" for head in distinct}
    if len(set(first.values())) == len(distinct):
        return first
    return {head: ".".join(head[common:]) or "base" for head in distinct}


def _tower_of(head: tuple[str, ...] | None, towers: dict[tuple[str, ...], str]) -> str:
    if head is not None:
        return towers[head]
    return OTHER if len(towers) > 1 else ""


def _collide(towers: Sequence[str], blocks: Sequence[int | None], kinds: Sequence[str]) -> bool:
    return max(Counter(zip(towers, blocks, kinds, strict=True)).values(), default=0) > 1


def _shorten(towers: Sequence[str], kinds: Sequence[str]) -> dict[tuple[str, str], str]:
    """For each (tower, kind) the shortest dotted ending that no other kind of that tower has."""
    pairs = list(dict.fromkeys(zip(towers, kinds, strict=True)))
    short = {}
    for tower, kind in pairs:
        rivals = [other.split(".") for where, other in pairs if where == tower and other != kind]
        segments = kind.split(".")
        length = 1
        while length < len(segments) and any(rival[-length:] == segments[-length:] for rival in rivals):
            length += 1
        short[tower, kind] = ".".join(segments[-length:])
    return short
