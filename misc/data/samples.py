"""Training samples and gallery images: from a split to augmented views and token ids.

The augmentation of a sample depends only on (seed, epoch, index). So the number of workers, the number of ranks and
restarts do not change it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from misc.data.adjustments import Adjustments
from misc.data.image_operations import build_operations
from misc.data.images import read_dataset_image
from misc.data.sampler import Draw
from misc.data.split import Split
from misc.data.transforms import functional as F
from misc.data.views import EvaluationView, PoolView, SimCLRView, mix_captions, mix_images
from misc.errors import UserError
from misc.system.randomness import derive_seed, seeded, single_threaded
from model.preprocessing import TBPS_PREPROCESSING, Preprocessing
from text_utils.augmentation import augment_caption
from text_utils.masking import mask_tokens
from text_utils.tokenizer import Tokenizer


@dataclass
class Sample:
    """One augmented (image, caption) pair: `images` (3, H, W) by view, and the token ids of `captions` by view.

    With `Augmentation.simclr_on_device`, the SimCLR views are uint8 crops, and `adjustments` lists what each lacks.
    `damaged` are the files of its images that could only be decoded in part.
    """

    images: dict[str, Tensor]
    adjustments: list[Adjustments]
    captions: dict[str, list[int]]
    masked_ids: list[int] | None
    masked_labels: list[int] | None
    identity: int
    path: str
    damaged: list[str]


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of training samples, and the views that the enabled losses need.

    Attributes:
        resolution: (height, width) in pixels.
        text_length: maximum length of a caption in tokens.
        second_view, second_caption: whether to make the views of MVS-I and MVS-T.
        simclr_views, simclr_captions: whether to make the views of SS-I and SS-T.
        masked_captions: whether to mask captions for MLM.
        image_operations: strengths of the operations on the training view, by name (`misc.data.image_operations`).
        image_pool: number of operations drawn for a view; None applies all of them in order.
        back_translation_probability: probability that a caption is replaced by its back-translation.
        text_operation: a name in `TEXT_OPERATIONS`, or None.
        text_strength: the alpha of the text operation.
        synonyms: returns the synonyms of a word, for the operations in `NEEDS_SYNONYMS`. It must be picklable, because
            it is sent to the workers.
        mixgen: `ori`, `cat` or None.
        simclr_on_device: whether SimCLR views are only cropped here; `Batch.to` finishes them.
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
    simclr_on_device: bool = False


class TrainingSet(Dataset):
    """The (image, caption) pairs of a split, indexed by `Draw`."""

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

    def __getitem__(self, draw: Draw) -> Sample | UserError:
        """Returns the sample, or a UserError if an image cannot be decoded (`batches` raises it)."""
        try:
            with single_threaded():
                return self._sample(draw)
        except UserError as error:
            return error

    def _sample(self, draw: Draw) -> Sample:
        damaged: list[str] = []
        pixels = self._pixels(draw.index, damaged)
        images = self._pool_views(draw.epoch, draw.index, pixels)
        captions = self._captions(draw.epoch, draw.index)
        if draw.partner is not None:
            partners = self._pool_views(draw.epoch, draw.partner, self._pixels(draw.partner, damaged))
            kind = self.augmentation.mixgen
            assert kind is not None  # without MixGen, no sample has a partner
            images = {name: mix_images(view, partners[name], kind) for name, view in images.items()}
            others = self._captions(draw.epoch, draw.partner)
            captions = {name: mix_captions(caption, others[name]) for name, caption in captions.items()}
        adjustments: list[Adjustments] = []
        if self.augmentation.simclr_views:
            for name in ("first_simclr", "second_simclr"):
                random = Random(derive_seed(self.seed, draw.epoch, draw.index, name, "image"))
                if self.augmentation.simclr_on_device:
                    images[name] = self.simclr_view.crop(pixels, random)
                    adjustments.append(self.simclr_view.draw(random))
                else:
                    images[name] = self.simclr_view(pixels, random)
        if self.augmentation.simclr_captions:
            for name in ("first_simclr", "second_simclr"):
                captions[name] = self._caption(draw.epoch, draw.index, name)
        ids = {
            name: self.tokenizer.encode(caption, self.augmentation.text_length) for name, caption in captions.items()
        }
        masked_ids = masked_labels = None
        if self.augmentation.masked_captions:
            masked_ids, masked_labels = mask_tokens(
                ids["caption"], Random(derive_seed(self.seed, draw.epoch, draw.index, "mask"))
            )
        image = self.split.caption_images[draw.index]
        return Sample(
            images=images,
            adjustments=adjustments,
            captions=ids,
            masked_ids=masked_ids,
            masked_labels=masked_labels,
            identity=self.split.image_identities[image],
            path=self.split.image_paths[image],
            damaged=damaged,
        )

    def _pixels(self, index: int, damaged: list[str]) -> Tensor:
        """Decodes the image of a sample to (3, H', W') uint8. Adds its path to `damaged` if the file is."""
        path = self.split.image_paths[self.split.caption_images[index]]
        image, is_damaged = read_dataset_image(self.image_dir / path)
        damaged += [path] if is_damaged else []
        return F.pil_to_tensor(image)

    def _pool_views(self, epoch: int, index: int, pixels: Tensor) -> dict[str, Tensor]:
        """Makes one view, or two if a loss needs them. They share the resized image."""
        resized = self.pool_view.resize(pixels)
        names = ("image", "second_image") if self.augmentation.second_view else ("image",)
        views = {}
        for name in names:
            with seeded(self.seed, epoch, index, name):
                views[name] = self.pool_view(resized)
        return views

    def _captions(self, epoch: int, index: int) -> dict[str, str]:
        """Makes one augmented caption, or two if a loss needs them."""
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


class GalleryImage(NamedTuple):
    """An image (3, H, W), normalised, and its path in a list if its file could only be decoded in part."""

    pixels: Tensor
    damaged: list[str]


class EvaluationImages(Dataset):
    """Gallery images: the images of a split with these numbers."""

    def __init__(
        self,
        split: Split,
        image_dir: Path,
        resolution: tuple[int, int],
        numbers: range,
        preprocessing: Preprocessing = TBPS_PREPROCESSING,
    ):
        self.image_dir = image_dir
        self.paths = [split.image_paths[number] for number in numbers]
        self.view = EvaluationView(resolution, preprocessing)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> GalleryImage | UserError:
        path = self.paths[number]
        try:
            image, is_damaged = read_dataset_image(self.image_dir / path)
        except UserError as error:
            return error
        return GalleryImage(self.view(image), [path] if is_damaged else [])
