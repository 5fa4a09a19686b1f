"""The order of the training samples in an epoch, and their distribution over ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from torch.utils.data import Sampler

from misc.system.randomness import derive_seed


@dataclass(frozen=True)
class Draw:
    """A request of the sampler to the training set: epoch, sample, and the partner that MixGen mixes it with."""

    epoch: int
    index: int
    partner: int | None = None


class GlobalBatchSampler(Sampler[list[Draw]]):
    """Samples this rank's rows of the global batches of an epoch. The last incomplete global batch is dropped.

    Set `epoch` and `first_step` before iterating: it starts at batch `first_step` of `epoch`. Its length is always the
    number of batches of a complete epoch.

    The order depends only on (seed, epoch). The rows of all ranks, concatenated, are the global batch. So a step always
    has the same G samples, independent of the number of ranks.

    Args:
        samples: size of the training set.
        batch_size: B, per rank.
        seed: seed of the run.
        rank, world_size: number of this rank, and number of all ranks.
        mixgen_probability: probability that MixGen is applied to a global batch.
        mixgen_ratio: share of the batch that is mixed: the first samples, each with one of those that follow.
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
