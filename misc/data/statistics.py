"""What a log says about the splits of a dataset, and their published sizes."""

import itertools
import sys

from misc.data.split import SPLITS, Counts, Split
from misc.errors import UserError, first_of
from text_utils.cleaning import clean_caption
from text_utils.tokenizer import Tokenizer

PUBLISHED_COUNTS = {
    "CUHK-PEDES": {
        "train": Counts(11_003, 34_054, 68_126),
        "val": Counts(1_000, 3_078, 6_158),
        "test": Counts(1_000, 3_074, 6_156),
    },
    "ICFG-PEDES": {
        "train": Counts(3_102, 34_674, 34_674),
        "test": Counts(1_000, 19_848, 19_848),
    },
    "RSTPReid": {
        "train": Counts(3_701, 18_505, 37_010),
        "val": Counts(200, 1_000, 2_000),
        "test": Counts(200, 1_000, 2_000),
    },
    "UFine6926": {
        "train": Counts(None, 18_577, 37_154),
        "test": Counts(None, 7_629, 15_258),
    },
    "UFine3C": {
        "test": Counts(2_250, 7_446, 37_939),
    },
}
PUBLISHED_IDENTITIES = {"UFine6926": 6_926}
"""The number of identities of all splits together, where it is only published so."""


def statistics_table(
    splits: dict[str, Split], dataset: str | None, compared: tuple[str, ...] = SPLITS
) -> tuple[str, list[str]]:
    """Returns a table of identities, images and captions per split, and a list of warnings.

    Args:
        dataset: a key of `PUBLISHED_COUNTS`, or None for your own data. There is one warning for each number that
            differs from the published one.
        compared: names of the splits to compare.

    Raises UserError if `dataset` is another name.
    """
    if dataset is not None and dataset not in PUBLISHED_COUNTS:
        raise UserError(f"unknown dataset {dataset!r}: expected one of {', '.join(PUBLISHED_COUNTS)}, or null")
    lines = [f"{'split':<6}" + "".join(f"{field:>12}" for field in Counts._fields)]
    lines += [f"{name:<6}" + "".join(f"{count:>12,}" for count in split.counts) for name, split in splits.items()]
    return "\n".join(lines), _differences(splits, dataset, compared) if dataset else []


def _differences(splits: dict[str, Split], dataset: str, compared: tuple[str, ...]) -> list[str]:
    """Returns one line for each number that differs from the published one. A missing split counts as zero."""
    ours = {name: split.counts for name, split in splits.items()}
    empty = Counts(0, 0, 0)
    numbers = [
        (name, field, found, published)
        for name in compared
        for field, found, published in zip(
            Counts._fields, ours.get(name, empty), PUBLISHED_COUNTS[dataset].get(name, empty), strict=True
        )
    ]
    if dataset in PUBLISHED_IDENTITIES and set(compared) == set(SPLITS):  # no person is in two splits
        together = sum(counts.identities or 0 for counts in ours.values())
        numbers.append(("all splits", "identities", together, PUBLISHED_IDENTITIES[dataset]))
    return [
        f"{dataset} {name}: {found:,} {field} here, {published:,} published"
        for name, field, found, published in numbers
        if published is not None and found != published
    ]


def image_notes(splits: dict[str, Split]) -> list[str]:
    """Returns lines for the log: images that have several entries, and warnings of images in two splits."""
    notes = []
    for name, split in splits.items():
        if split.caption_entries is not None:
            entries, images = len(set(split.caption_entries)), len(split.image_paths)
            notes.append(f"{name}: {entries:,} entries describe {images:,} images, so entries of an image are merged")
    for (name, split), (other_name, other) in itertools.combinations(splits.items(), 2):
        paths = set(split.image_paths)
        if shared := [path for path in other.image_paths if path in paths]:
            notes.append(
                f"warning: images in both {name} and {other_name}: {first_of(shared)}: remove them from one of the two"
            )
    return notes


def cut_captions_note(splits: dict[str, Split], tokenizer: Tokenizer, text_length: int, *, cleaned: bool = True) -> str:
    """Returns a line for the log: how many captions exceed `text_length` tokens, and how many tokens they lose.

    Args:
        cleaned: whether the model takes cleaned captions. False: those as annotated.

    This takes about a second of processor time for 80,000 captions.
    """
    parts = []
    for name, split in splits.items():
        lost = []
        captions = split.captions if cleaned else split.annotated_captions
        for caption, annotated in zip(captions, split.annotated_captions, strict=True):
            if tokenizer.count(caption) > text_length:  # then a cleaned one may have lost words already
                whole = clean_caption(annotated, sys.maxsize) if cleaned else annotated
                lost.append(tokenizer.count(whole) - text_length)
        many = f" (by {sum(lost) / len(lost):.1f} tokens on average, at most {max(lost)})" if lost else ""
        parts.append(f"{len(lost):,} of {len(split):,} in {name}{many}")
    return f"captions{'' if cleaned else ' as annotated,'} cut at {text_length} tokens: {', '.join(parts)}"


def data_title(dataset: str | None, split: str, anno_dir: str) -> str:
    """Returns the dataset, the split and the folder of an evaluation, to name its results by."""
    return f"{dataset} {split} in {anno_dir}" if dataset else f"{split} in {anno_dir}"
