"""The order in which an epoch visits the training samples, and which of them each rank takes."""

from collections.abc import Iterator
from random import Random
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from misc.system.randomness import derive_seed


class Draw(NamedTuple):
    """What the sampler asks of the training set: a sample of an epoch, and with which other sample MixGen mixes it."""

    epoch: int
    index: int
    partner: int | None = None


class GlobalBatchSampler(Sampler[list[Draw]]):
    """This rank's rows of the global batches of an epoch; the last incomplete global batch is dropped.

    It goes through the `epoch` that is set, from batch `first_step` on. Its length is that of a whole epoch.

    The order depends on (seed, epoch) alone, and the ranks' rows one after another are the global batch: the same G
    samples meet in a step, however many ranks share them.

    Args:
        samples: size of the training set.
        batch_size: B, per rank.
        seed: of the run.
        rank, world_size: where this process stands.
        mixgen_probability, mixgen_ratio: with this probability for a global batch, the first `mixgen_ratio` of its
            samples are mixed with as many that follow them (MixGen).
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        mixgen_probability: float = 0.0,
        mixgen_ratio: float = 0.0,
    ):
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.mixgen_probability, self.mixgen_ratio = mixgen_probability, mixgen_ratio
        self.epoch = 0
        self.first_step = 0

    def __len__(self) -> int:
        return self.samples // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch, "order"))
        order = torch.randperm(self.samples, generator=generator).tolist()
        size = self.batch_size * self.world_size
        for step in range(self.first_step, len(self)):
            draws = self._mixed(order[step * size : (step + 1) * size], step)
            yield draws[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]

    def _mixed(self, indices: list[int], step: int) -> list[Draw]:
        random = Random(derive_seed(self.seed, self.epoch, step, "mixgen"))
        mixed = int(self.mixgen_ratio * len(indices)) if random.random() < self.mixgen_probability else 0
        return [
            Draw(self.epoch, index, indices[row + mixed] if row < mixed else None) for row, index in enumerate(indices)
        ]
