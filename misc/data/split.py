"""A split of a dataset in memory."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import NamedTuple

SPLITS = ("train", "val", "test")
Identity = int | str
"""The annotated id of a person."""


class Counts(NamedTuple):
    """Size of a split. The number of identities is None if it is not published."""

    identities: int | None
    images: int
    captions: int


@dataclass(frozen=True)
class Split:
    """One split. A training sample is one (image, caption) pair, so the length of a split is its number of captions.

    Attributes:
        image_paths: per image, relative to the image folder. Each image is listed once.
        image_identities: per image. Training identities are renumbered 0..n-1 in order of first appearance. Those of
            other splits stay as annotated, or are renumbered too if one of them is not an integer of 64 bits.
        captions: cleaned, in the order of the annotation.
        back_translations: per caption, cleaned; None if it has no back-translation.
        caption_images: per caption, the index of its image.
        annotated_captions: the captions as annotated, for people to read.
        identity_names: for identities that are renumbered, except those of the training split, the annotated one.
        caption_entries: per caption, the index of its entry in the annotation; None if each image has one entry.
    """

    image_paths: list[str]
    image_identities: list[int]
    captions: list[str]
    back_translations: list[str | None]
    caption_images: list[int]
    annotated_captions: list[str]
    identity_names: dict[int, Identity] = field(default_factory=dict)
    caption_entries: list[int] | None = None

    def __len__(self) -> int:
        return len(self.captions)

    @cached_property
    def caption_identities(self) -> list[int]:
        """Per caption, the identity of its image."""
        return [self.image_identities[image] for image in self.caption_images]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of identities, captions, back-translations and their order.

        The image paths do not change it. It is a hash of the entries as annotated, so merging them changes nothing.
        """
        identities, entries = self.image_identities, self.caption_images
        if self.caption_entries is not None:
            entries = self.caption_entries
            identities = list(dict(zip(entries, self.caption_identities, strict=True)).values())
        content = [identities, self.captions, self.back_translations, entries]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def annotated_identity(self, identity: int) -> Identity:
        """Returns the id of a person as annotated, for people to read. Not for the training split."""
        return self.identity_names.get(identity, identity)

    @cached_property
    def counts(self) -> Counts:
        """The numbers of identities, images and captions."""
        return Counts(len(set(self.image_identities)), len(self.image_paths), len(self.captions))


def few_shot(split: Split, share: float, seed: int) -> Split:
    """Draws a share of the images, at least one, with all their captions. Identities are renumbered."""
    images = len(split.image_paths)
    drawn = sorted(Random(f"few-shot {seed}").sample(range(images), max(1, round(share * images))))
    return keep_images(split, drawn, renumber=True)


def keep_images(split: Split, images: Sequence[int], *, renumber: bool) -> Split:
    """Returns a split with only these images, and all their captions.

    Args:
        images: their indices, in ascending order.
        renumber: whether identities are renumbered, as in a training split.
    """
    new_index = {image: index for index, image in enumerate(images)}
    identities = [split.image_identities[image] for image in images]
    captions = [number for number, image in enumerate(split.caption_images) if image in new_index]
    entries = split.caption_entries
    return Split(
        image_paths=[split.image_paths[image] for image in images],
        image_identities=numbered(identities) if renumber else identities,
        captions=[split.captions[number] for number in captions],
        back_translations=[split.back_translations[number] for number in captions],
        caption_images=[new_index[split.caption_images[number]] for number in captions],
        annotated_captions=[split.annotated_captions[number] for number in captions],
        identity_names=split.identity_names,
        caption_entries=None if entries is None else numbered(entries[number] for number in captions),
    )


def numbered(values: Iterable[Identity]) -> list[int]:
    """Replaces equal values by the same number, counted from 0 in order of first appearance."""
    numbers: dict[Identity, int] = {}
    return [numbers.setdefault(value, len(numbers)) for value in values]
