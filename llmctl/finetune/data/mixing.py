"""The order in which several sources are drawn from: a function of the seed, which any step can be asked for alone."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from llmctl.data.packing import permuted

_WEIGHT_STEPS = 10**6


class Mixture:
    """An endless sequence of (source, index); `size` is the length of an epoch, the items of all sources together.

    Without `weights` an epoch visits every item once, in an order of its own. With them a share of every stretch of the
    sequence goes to each source, evenly spread, and a source begins its own next epoch when its items are through.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0):
        self.sizes, self.size, self.seed = list(sizes), sum(sizes), seed
        self._shares = None
        if weights is not None and len(sizes) > 1:
            # whole numbers, so that the place of every item in the sequence is exact
            self._shares = [max(1, round(weight / sum(weights) * _WEIGHT_STEPS)) for weight in weights]

    def at(self, number: int) -> tuple[int, int]:
        """Source and index of item `number` of the sequence."""
        if self._shares is not None:
            source, turn = self._weighted(number)
            epoch, index = divmod(turn, self.sizes[source])
            return source, permuted(index, self.sizes[source], self.seed + source, epoch)
        epoch, index = divmod(number, self.size)
        index = permuted(index, self.size, self.seed, epoch)
        for source, size in enumerate(self.sizes):
            if index < size:
                return source, index
            index -= size
        raise AssertionError("an index beyond the sum of the sizes")

    def _weighted(self, number: int) -> tuple[int, int]:
        """Which source item `number` comes from, and the how-manieth it is from there.

        Item j of a source with share s stands at (j + 1/2) / s of the whole; the sequence is all of them in order.
        """
        total = sum(self._shares)
        # at this place no more than `number` items have passed, and all but a few of them
        place = Fraction(max(0, number - len(self.sizes)), total)
        turns = [int(place * share + Fraction(1, 2)) for share in self._shares]
        for _ in range(number - sum(turns) + 1):
            nexts = [Fraction(2 * turn + 1, share) for turn, share in zip(turns, self._shares)]
            source = nexts.index(min(nexts))
            turns[source] += 1
        return source, turns[source] - 1
