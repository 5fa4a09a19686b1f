"""From a split of a dataset to batches on this rank: sampler, samples, collate, loaders.

A sample's augmentation depends on (seed, epoch, index) alone, so neither the number of workers and ranks nor a restart
changes it.
"""

import dataclasses
import multiprocessing
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from misc.data.annotations import Split
from misc.data.image_operations import build_operations
from misc.data.views import EvaluationView, PoolView, SimCLRView, mix_captions, mix_images, to_tensor
from misc.errors import UserError
from misc.system.randomness import derive_seed, seeded, single_threaded
from model.tbps_clip import Views
from text_utils.augmentation import augment_caption
from text_utils.masking import IGNORED_LABEL, mask_tokens
from text_utils.tokenizer import Tokenizer


class Draw(NamedTuple):
    """What the sampler asks of the training set: a sample of an epoch, and with which other sample MixGen mixes it."""

    epoch: int
    index: int
    partner: int | None = None


@dataclass
class Sample:
    """One augmented (image, caption) pair: `images` by view, each (3, H, W), and token ids of `captions` by view."""

    images: dict[str, Tensor]
    captions: dict[str, list[int]]
    masked_ids: list[int] | None
    masked_labels: list[int] | None
    identity: int
    path: str


@dataclass
class Batch:
    """B samples of this rank: what is encoded, who is seen (B,) int64, and the image files for messages."""

    views: Views
    identities: Tensor
    paths: list[str]

    def __len__(self) -> int:
        return len(self.identities)

    def rows(self, start: int, stop: int) -> "Batch":
        """Some of the samples, sharing the memory of these."""
        shortened = _map_tensors(self, lambda tensor: tensor[start:stop])
        return dataclasses.replace(shortened, paths=self.paths[start:stop])

    def to(self, device: torch.device) -> "Batch":
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return _map_tensors(self, Tensor.pin_memory)


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(item, function) for item in value)
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return type(value)(**{name: _map_tensors(item, function) for name, item in fields.items()})
    return value


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training sample, and which views the enabled losses need.

    Attributes:
        resolution: (height, width) in pixels.
        text_length: longest caption in tokens.
        second_view, second_caption: the views of MVS-I and MVS-T.
        simclr_views, simclr_captions: those of SS-I and SS-T.
        masked_captions: those of MLM.
        image_operations: names of operations on the training view with their strengths (`misc.image_operations`).
        image_pool: how many of them are drawn for a view; None for all, one after another.
        back_translation_probability: how often a caption is replaced by its back-translation.
        text_operation: a name in `TEXT_OPERATIONS`, or None.
        text_strength: its alpha.
        synonyms: of a word, for the operations in `NEEDS_SYNONYMS`; goes to the workers, so it must be picklable.
        mixgen: `ori`, `cat` or None.
    """

    resolution: tuple[int, int]
    text_length: int
    second_view: bool
    second_caption: bool
    simclr_views: bool
    simclr_captions: bool
    masked_captions: bool
    image_operations: Mapping[str, Any]
    image_pool: int | None
    back_translation_probability: float
    text_operation: str | None
    text_strength: float
    synonyms: Callable[[str], list[str]] | None = None
    mixgen: str | None = None


class TrainingSet(Dataset):
    """(image, caption) pairs of a split, indexed by `Draw`."""

    def __init__(self, split: Split, image_dir: Path, tokenizer: Tokenizer, augmentation: Augmentation, seed: int):
        self.split = split
        self.image_dir = image_dir
        self.tokenizer = tokenizer
        self.augmentation = augmentation
        self.seed = seed
        operations = build_operations(augmentation.image_operations, augmentation.resolution)
        self.pool_view = PoolView(augmentation.resolution, operations, augmentation.image_pool)
        self.simclr_view = SimCLRView(augmentation.resolution)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, draw: Draw) -> "Sample | UserError":
        """The sample, or the UserError that names an image that cannot be decoded (`batches` raises it)."""
        try:
            with single_threaded():
                return self._sample(draw)
        except UserError as error:
            return error

    def _sample(self, draw: Draw) -> Sample:
        decoded = self._decode(draw.index)
        images = self._pool_views(draw.epoch, draw.index, decoded)
        captions = self._captions(draw.epoch, draw.index)
        if draw.partner is not None:
            partners = self._pool_views(draw.epoch, draw.partner, self._decode(draw.partner))
            images = {name: mix_images(view, partners[name], self.augmentation.mixgen) for name, view in images.items()}
            others = self._captions(draw.epoch, draw.partner)
            captions = {name: mix_captions(caption, others[name]) for name, caption in captions.items()}
        if self.augmentation.simclr_views:
            images |= self._simclr_views(draw.epoch, draw.index, decoded)
        if self.augmentation.simclr_captions:
            for name in ("first_simclr", "second_simclr"):
                captions[name] = self._caption(draw.epoch, draw.index, name)
        ids = {
            name: self.tokenizer.encode(caption, self.augmentation.text_length) for name, caption in captions.items()
        }
        masked_ids = masked_labels = None
        if self.augmentation.masked_captions:
            masked_ids, masked_labels = mask_tokens(ids["caption"], Random(derive_seed(self.seed, *draw[:2], "mask")))
        image = self.split.caption_images[draw.index]
        return Sample(
            images=images,
            captions=ids,
            masked_ids=masked_ids,
            masked_labels=masked_labels,
            identity=self.split.image_identities[image],
            path=self.split.image_paths[image],
        )

    def _decode(self, index: int) -> Image.Image:
        return read_image(self.image_dir / self.split.image_paths[self.split.caption_images[index]])

    def _pool_views(self, epoch: int, index: int, decoded: Image.Image) -> dict[str, Tensor]:
        """One view, or two where a loss needs them; they share the resized image."""
        resized = self.pool_view.resize(decoded)
        names = ("image", "second_image") if self.augmentation.second_view else ("image",)
        return self._views(names, epoch, index, resized, self.pool_view)

    def _simclr_views(self, epoch: int, index: int, decoded: Image.Image) -> dict[str, Tensor]:
        return self._views(("first_simclr", "second_simclr"), epoch, index, to_tensor(decoded), self.simclr_view)

    def _views(
        self, names: tuple[str, ...], epoch: int, index: int, image: Tensor, view: PoolView | SimCLRView
    ) -> dict[str, Tensor]:
        views = {}
        for name in names:
            with seeded(self.seed, epoch, index, name):
                views[name] = view(image)
        return views

    def _captions(self, epoch: int, index: int) -> dict[str, str]:
        """One augmented caption, or two where a loss needs them."""
        names = ("caption", "second_caption") if self.augmentation.second_caption else ("caption",)
        return {name: self._caption(epoch, index, name) for name in names}

    def _caption(self, epoch: int, index: int, name: str) -> str:
        return augment_caption(
            self.split.captions[index],
            self.split.back_translations[index],
            back_translation_probability=self.augmentation.back_translation_probability,
            operation=self.augmentation.text_operation,
            alpha=self.augmentation.text_strength,
            synonyms=self.augmentation.synonyms,
            random=Random(derive_seed(self.seed, epoch, index, name)),
        )


class EvaluationImages(Dataset):
    """The gallery: some images of a split, by number, as (3, H, W) normalised tensors."""

    def __init__(self, split: Split, image_dir: Path, resolution: tuple[int, int], numbers: range):
        self.paths = [image_dir / split.image_paths[number] for number in numbers]
        self.view = EvaluationView(resolution)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> "Tensor | UserError":
        try:
            return self.view(read_image(self.paths[number]))
        except UserError as error:
            return error


def read_image(path: Path, *, upright: bool = False) -> Image.Image:
    """Decodes an image file to RGB. Raises UserError with its name where that cannot be done.

    Args:
        upright: turns it as its EXIF data say, which people's own pictures need. Datasets are read as they are.
    """
    try:
        with Image.open(path) as image:
            return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"image {path} cannot be decoded ({error}): replace it or its entry") from error


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


def collate(samples: "list[Sample | UserError]") -> "Batch | UserError":
    """Stacks samples; captions are padded to the longest of the batch, not to `text_length`."""
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    names = samples[0].images.keys()
    images = {name: torch.stack([sample.images[name] for sample in samples]) for name in names}
    masked = samples[0].masked_ids is not None
    rows = [sample.captions[name] for name in samples[0].captions for sample in samples]
    captions = dict(zip(samples[0].captions, pad_tokens(rows).split(len(samples)), strict=True))
    views = Views(
        image=images["image"],
        token_ids=captions["caption"],
        second_image=images.get("second_image"),
        simclr_images=(images["first_simclr"], images["second_simclr"]) if "first_simclr" in images else None,
        second_token_ids=captions.get("second_caption"),
        simclr_token_ids=(captions["first_simclr"], captions["second_simclr"]) if "first_simclr" in captions else None,
        masked_token_ids=pad_tokens([sample.masked_ids for sample in samples]) if masked else None,
        masked_labels=pad_tokens([sample.masked_labels for sample in samples], IGNORED_LABEL) if masked else None,
    )
    identities = torch.tensor([sample.identity for sample in samples])
    return Batch(views, identities, [sample.path for sample in samples])


def pad_tokens(rows: list[list[int]], padding: int = 0) -> Tensor:
    """B lists → (B, L) int64, L the longest of them."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)


def training_loader(dataset: TrainingSet, sampler: GlobalBatchSampler, *, workers: int, pin_memory: bool) -> DataLoader:
    """Batches of this rank, in the sampler's order, on the CPU. Go through it with `batches`."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=outlive_signals,
    )


def gallery_loader(dataset: EvaluationImages, batch_size: int, *, workers: int, pin_memory: bool) -> DataLoader:
    """(B, 3, H, W) in order. Go through it with `batches`."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=_stack_images,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=outlive_signals,
    )


def outlive_signals(worker: int) -> None:
    """A loader worker ends by its training process alone, which needs it for the step that it finishes before it stops.

    Ctrl-C and torchrun signal a whole process group, and schedulers every process of a job. Against the latter this
    helps where workers are forked; one that is started otherwise has threads already, which may take the signal.
    """
    os.setpgrp()
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, daemon=True).start()


def _end_by_parent() -> None:
    training = multiprocessing.parent_process().pid  # os.getppid() may be a server that forks the workers
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != training:
        pass
    os._exit(0)


def _stack_images(images: "list[Tensor | UserError]") -> "Tensor | UserError":
    errors = [image for image in images if isinstance(image, UserError)]
    return errors[0] if errors else torch.stack(images)


def batches(loader: Iterable) -> Iterator:
    """The batches of a loader; a UserError that a sample became is raised here.

    A worker process hands an exception over as a text with its traceback; as a value it stays the one clear line.
    """
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch
