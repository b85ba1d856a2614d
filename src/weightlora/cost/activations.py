"""What one forward pass keeps for backward, as data that answers for any set of live adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from weightlora.graft.adapters import Adapter


@dataclass(frozen=True, kw_only=True)
class Storage:
    """One piece of memory that may be kept.

    ``size``: bytes (0 for parameters, which are there anyway). ``ranked``: whether size is proportional to the rank of
    its adapter. ``module``: the innermost module that saved it first. ``uses``: ``(owner, reach, unit)``: it is kept
    when, for one of these, adapter `owner` lives (-1: the base itself) and `reach`, a bit set of adapters, holds a live
    one; `unit` is the checkpointed block in which this happens (-1: outside).
    """

    size: int
    ranked: bool
    module: str
    uses: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class ActivationTrace:
    """What autograd keeps between forward and backward of one micro-batch, for any set of live adapters.

    ``adapters``: all n, in module order. ``storages``: in order of saving. ``units``: the blocks that gradient
    checkpointing wraps: module names. ``unit_inputs``: indices into `storages` of each unit's inputs. Bit n of a reach
    stands for what always trains (a head), bit n + 1 for gradients that are drawn down to the embeddings.

    A storage counts once, parameters do not count. Every method takes the live adapters by index.
    """

    adapters: tuple[Adapter, ...]
    storages: tuple[Storage, ...]
    units: tuple[str, ...]
    unit_inputs: tuple[tuple[int, ...], ...]
    # What is kept does not depend on the batch or on ranks, and traces of all batch sizes share what was found.
    _found: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def every(self) -> range:
        """The indices of all adapters."""
        return range(len(self.adapters))

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """(n,) the checkpointable block of each adapter, 0 = the first; -1 outside them. A decoder's follow on."""
        return tuple(
            next((u for u, path in enumerate(self.units) if a.name.startswith(f"{path}.")), -1) for a in self.adapters
        )

    def at(self, batch: int, traced: int) -> ActivationTrace:
        """The trace of another batch size: what is a multiple of the traced one grows with it, the rest stays.

        Args:
            batch: the size asked for.
            traced: the size of the traced batch; a prime that divides no width of the model nor the length.
        """

        def sized(storage: Storage) -> Storage:
            return storage if storage.size % traced else replace(storage, size=storage.size // traced * batch)

        return self if batch == traced else replace(self, storages=tuple(sized(s) for s in self.storages))

    def mask(self, live: Iterable[int], inputs: bool = False) -> int:
        """The bit set of live adapters, of what always trains, and of embeddings whose outputs require a gradient."""
        n = len(self.adapters)
        return sum(1 << i for i in set(live)) | (1 << n) | (int(inputs) << (n + 1))

    def kept(self, live: Iterable[int], **options: Any) -> int:
        """Bytes kept for backward by the base and the live adapters; options as of :meth:`sizes`."""
        return sum(self.sizes(live, **options).values())

    def by_module(self, live: Iterable[int], **options: Any) -> dict[str, int]:
        """:meth:`kept`, by the module that saved it."""
        found: dict[str, int] = {}
        for index, size in self.sizes(live, **options).items():
            module = self.storages[index].module
            found[module] = found.get(module, 0) + size
        return found

    def sizes(
        self,
        live: Iterable[int],
        *,
        ranks: Mapping[int, int] | None = None,
        checkpointing: bool = False,
        every_n_layers: int = 1,
        inputs: bool = False,
    ) -> dict[int, int]:
        """Bytes of each kept storage, by its index.

        Args:
            live: indices of live adapters.
            ranks: of adapters whose rank is not the traced one.
            checkpointing: blocks keep their inputs alone, and compute the rest anew in backward.
            every_n_layers: only every so many-th block is checkpointed.
            inputs: embeddings' outputs require a gradient, as ``enable_input_require_grads`` makes them.
        """
        mask, every = self.mask(live, inputs), every_n_layers if checkpointing else 0
        if (mask, every) not in self._found:
            self._found[mask, every] = self._kept(mask, self._wrapped(every) if every else frozenset())
        return {index: self._size(self.storages[index], ranks) for index in self._found[mask, every]}

    def _kept(self, mask: int, wrapped: frozenset[int]) -> tuple[int, ...]:
        """Indices of the kept storages."""
        found = {
            index
            for index, storage in enumerate(self.storages)
            if any(unit not in wrapped and _happens(owner, reach, mask) for owner, reach, unit in storage.uses)
        }
        for unit in self._live_units(mask) & wrapped:
            found |= set(self.unit_inputs[unit])
        return tuple(sorted(found))

    def recomputed(
        self, live: Iterable[int], *, ranks: Mapping[int, int] | None = None, every_n_layers: int = 1
    ) -> int:
        """Bytes that the largest checkpointed block keeps while backward goes through it, beyond its inputs."""
        mask, wrapped = self.mask(live), self._wrapped(every_n_layers)
        kept = self.sizes(self._indices(mask), checkpointing=True, every_n_layers=every_n_layers)
        totals = dict.fromkeys(sorted(self._live_units(mask) & wrapped), 0)
        for index, storage in enumerate(self.storages):
            units = {unit for owner, reach, unit in storage.uses if unit in totals and _happens(owner, reach, mask)}
            for unit in units if index not in kept else ():
                totals[unit] += self._size(storage, ranks)
        return max(totals.values(), default=0)

    def largest(self, live: Iterable[int]) -> int:
        """Bytes of the largest single piece that is kept anywhere, recomputed or not."""
        return max(self.sizes(live).values(), default=0)

    def pieces(self, index: int) -> dict[int, int]:
        """Bytes of each storage that one adapter keeps for itself, by the storage's index."""
        return {
            number: storage.size
            for number, storage in enumerate(self.storages)
            if storage.size and any(owner == index for owner, _, _ in storage.uses)
        }

    def deepest(self, k: int) -> tuple[int, ...]:
        """The k adapters that are called last: the cheapest set."""

        def called(index: int) -> int:
            own = self._own[index]
            # Of experts, whose h nobody keeps, what they first keep.
            return min((s for s in own if self.storages[s].ranked), default=min(own, default=0))

        return tuple(sorted(sorted(self.every, key=called)[len(self.every) - k :]))

    def dearest(self, k: int, block: int = 0) -> tuple[int, ...]:
        """A set of k adapters of which the lowest lies in a block, as dear as such sets get."""
        own, blocks = self._own, self.blocks
        allowed = [i for i in self.every if blocks[i] >= block]
        first = max((i for i in allowed if blocks[i] == block), key=lambda i: self.kept([i]))
        # Inputs first: an adapter that shares one costs little more than its h.
        by_size = sorted((i for i in allowed if i != first), key=lambda i: -sum(own[i].values()))
        held, fresh, late = set(own[first]), list[int](), list[int]()
        for i in by_size:
            (late if max(own[i], key=own[i].__getitem__) in held else fresh).append(i)
            held |= set(own[i])
        return tuple(sorted([first, *fresh, *late][:k]))

    @cached_property
    def _own(self) -> list[dict[int, int]]:
        return [self.pieces(i) for i in self.every]

    def base_sizes(self, live: Iterable[int]) -> dict[int, int]:
        """Bytes of each storage that the base keeps so that gradients reach the live adapters, by its index."""
        mask = self.mask(live)
        return {
            number: storage.size
            for number, storage in enumerate(self.storages)
            if any(owner < 0 and reach & mask for owner, reach, _ in storage.uses)
        }

    def base_keeps(self, number: int, adapters: Iterable[int]) -> bool:
        """Whether the base keeps a storage whichever one of some adapters lives."""
        reach = 0
        for owner, mask, _ in self.storages[number].uses:
            reach |= mask if owner < 0 else 0
        return all(reach >> index & 1 for index in adapters)

    def _wrapped(self, every_n_layers: int) -> frozenset[int]:
        return frozenset(range(0, len(self.units), every_n_layers))

    def _live_units(self, mask: int) -> frozenset[int]:
        """Units in which anything at all is saved, parameters included: only those hold on to their inputs."""
        return frozenset(
            unit
            for storage in self.storages
            for owner, reach, unit in storage.uses
            if unit >= 0 and _happens(owner, reach, mask)
        )

    def _indices(self, mask: int) -> list[int]:
        return [i for i in self.every if mask >> i & 1]

    def _size(self, storage: Storage, ranks: Mapping[int, int] | None) -> int:
        if not (storage.ranked and ranks):
            return storage.size
        owner = next(owner for owner, _, _ in storage.uses if owner >= 0)
        rank = self.adapters[owner].rank
        return storage.size // rank * ranks.get(owner, rank)


def _happens(owner: int, reach: int, mask: int) -> bool:
    return bool(reach & mask) and (owner < 0 or bool(mask >> owner & 1))
