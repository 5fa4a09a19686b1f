"""Collate functions and data loaders: from samples to batches."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from misc.data.adjustments import Adjustments
from misc.data.sampler import GlobalBatchSampler
from misc.data.samples import EvaluationImages, GalleryImage, Sample, TrainingSet
from misc.data.views import finish_simclr_views
from misc.data.workers import build_loader, received, stack
from misc.errors import UserError
from model.tbps_clip import Views, needed
from text_utils.masking import IGNORED_LABEL

Item = TypeVar("Item")


@dataclass
class Batch:
    """B samples of this rank.

    Attributes:
        views: the views to encode.
        identities: (B,) int64.
        paths: the image files, for messages.
        damaged: the files that could only be decoded in part.
        adjustments: if the SimCLR views are still crops (B, 3, H, W) uint8, the adjustments of the first and the second
            view of each sample; None if they are finished. `to` finishes them.
    """

    views: Views
    identities: Tensor
    paths: list[str]
    damaged: list[str] = field(default_factory=list)
    adjustments: list[list[Adjustments]] | None = None

    def __len__(self) -> int:
        return len(self.identities)

    def rows(self, start: int, stop: int) -> "Batch":
        """Returns samples `start` to `stop`, which share the memory of this batch."""
        selected = _map_tensors(self, lambda tensor: tensor[start:stop])
        adjustments = None if self.adjustments is None else self.adjustments[start:stop]
        return dataclasses.replace(selected, paths=self.paths[start:stop], adjustments=adjustments)

    def to(self, device: torch.device) -> "Batch":
        """Moves the batch, and finishes its SimCLR views there."""
        moved = _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))
        if moved.adjustments is None:
            return moved
        crops = torch.cat(needed(moved.views.simclr_images))
        first, second = zip(*moved.adjustments, strict=True)
        views = dataclasses.replace(moved.views, simclr_images=finish_simclr_views(crops, first + second).chunk(2))
        return dataclasses.replace(moved, views=views, adjustments=None)

    def pin_memory(self) -> "Batch":
        return _map_tensors(self, Tensor.pin_memory)


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(item, function) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: _map_tensors(item, function) for name, item in fields.items()})
    return value


def collate(samples: list[Sample | UserError]) -> Batch | UserError:
    """Stacks samples. Captions are padded to the longest one of the batch, not to `text_length`.

    If an image could not be decoded, its UserError is returned instead (`batches` raises it).
    """
    decoded = _all_or_error(samples)
    return decoded if isinstance(decoded, UserError) else _stack_samples(decoded)


def _all_or_error(items: list[Item | UserError]) -> list[Item] | UserError:
    """Returns the items, or the first error among them."""
    good: list[Item] = []
    for item in items:
        if isinstance(item, UserError):
            return item
        good.append(item)
    return good


def _stack_samples(samples: list[Sample]) -> Batch:
    names = samples[0].images.keys()
    images = {name: stack([sample.images[name] for sample in samples]) for name in names}
    rows = [sample.captions[name] for name in samples[0].captions for sample in samples]
    masked = samples[0].masked_ids is not None  # then all samples are
    masked_ids = [needed(sample.masked_ids) for sample in samples if masked]
    masked_labels = [needed(sample.masked_labels) for sample in samples if masked]
    captions = dict(zip(samples[0].captions, pad_tokens(rows).split(len(samples)), strict=True))
    views = Views(
        image=images["image"],
        token_ids=captions["caption"],
        second_image=images.get("second_image"),
        simclr_images=(images["first_simclr"], images["second_simclr"]) if "first_simclr" in images else None,
        second_token_ids=captions.get("second_caption"),
        simclr_token_ids=(captions["first_simclr"], captions["second_simclr"]) if "first_simclr" in captions else None,
        masked_token_ids=pad_tokens(masked_ids) if masked else None,
        masked_labels=pad_tokens(masked_labels, IGNORED_LABEL) if masked else None,
    )
    identities = torch.tensor([sample.identity for sample in samples])
    adjustments = [sample.adjustments for sample in samples] if samples[0].adjustments else None
    damaged = [path for sample in samples for path in sample.damaged]
    return Batch(views, identities, [sample.path for sample in samples], damaged, adjustments)


def pad_tokens(rows: list[list[int]], padding: int = 0) -> Tensor:
    """Pads B lists to (B, L) int64, where L is the length of the longest list."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)


def training_loader(dataset: TrainingSet, sampler: GlobalBatchSampler, *, workers: int, pin_memory: bool) -> DataLoader:
    """Returns a loader of this rank's batches, in the sampler's order, on the CPU. Iterate over it with `batches`."""
    return build_loader(
        dataset,
        collate,
        workers=workers,
        batch_sampler=sampler,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
    )


def gallery_loader(dataset: EvaluationImages, batch_size: int, *, workers: int, pin_memory: bool) -> DataLoader:
    """Returns a loader of `GalleryImage`s in order, with pixels (B, 3, H, W). Iterate over it with `batches`."""
    return build_loader(dataset, _stack_images, workers=workers, batch_size=batch_size, pin_memory=pin_memory)


def _stack_images(images: list[GalleryImage | UserError]) -> GalleryImage | UserError:
    decoded = _all_or_error(images)
    if isinstance(decoded, UserError):
        return decoded
    return GalleryImage(
        stack([image.pixels for image in decoded]), [path for image in decoded for path in image.damaged]
    )


def batches(loader: DataLoader, stop: Callable[[], bool] = lambda: False) -> Iterator:
    """Yields the batches of a loader.

    A worker process would pass an exception on as a text with a traceback. So samples return a UserError as a value,
    and this function raises it in the main process, as one clear line.

    Args:
        stop: called about once per second while there is no batch; True ends the iteration.

    Raises UserError if an image cannot be decoded.
    """
    for batch in received(loader, stop):
        if isinstance(batch, UserError):
            try:
                raise batch
            finally:
                del batch  # else the error would refer to itself, and keep the workers until a garbage collection
        yield batch
