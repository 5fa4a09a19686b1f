"""Sampler, training samples and data loaders: a sample depends only on seed, epoch and index."""

import dataclasses
import itertools
import multiprocessing
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from misc.config.loading import load_config
from misc.data import samples as samples_module
from misc.data.annotations import read_annotations
from misc.data.batches import Batch, batches, collate, gallery_loader, training_loader
from misc.data.images import read_dataset_image, read_image
from misc.data.sampler import Draw, GlobalBatchSampler
from misc.data.samples import Augmentation, EvaluationImages, Sample, TrainingSet
from misc.data.split import Split
from misc.data.views import EvaluationView
from misc.errors import UserError
from model.tbps_clip import Views
from tests.helpers.tiny_dataset import spoil
from text_utils.masking import IGNORED_LABEL
from text_utils.tokenizer import END, MASK, START, Tokenizer

RESOLUTION = (32, 16)
ALL_VIEWS = Augmentation(
    resolution=RESOLUTION,
    text_length=24,
    second_view=True,
    second_caption=True,
    simclr_views=True,
    simclr_captions=True,
    masked_captions=True,
    image_operations=load_config().experiment.image_operations,
    image_pool=2,
    back_translation_probability=0.1,
    text_operation="random_deletion",
    text_strength=0.3,
)
ONE_VIEW = dataclasses.replace(
    ALL_VIEWS,
    second_view=False,
    second_caption=False,
    simclr_views=False,
    simclr_captions=False,
    masked_captions=False,
)
PLAIN = dataclasses.replace(ONE_VIEW, back_translation_probability=0.0, text_strength=0.0)
TOKENIZER = Tokenizer()


@pytest.fixture
def split(tiny_dataset) -> Split:
    return read_annotations(*tiny_dataset)["train"]


@pytest.fixture
def training_set(split, tiny_dataset):
    """A function that builds a training set from an augmentation and a seed."""

    def build(augmentation: Augmentation = ALL_VIEWS, seed: int = 0, split: Split = split) -> TrainingSet:
        return TrainingSet(split, tiny_dataset.image_dir, TOKENIZER, augmentation, seed)

    return build


def same(value, other) -> bool:
    """Whether two samples or batches, or parts of them, are identical bit by bit."""
    if isinstance(value, torch.Tensor):
        return torch.equal(value, other)
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(same(value[key], other[key]) for key in value)
    if isinstance(value, tuple):
        return len(value) == len(other) and all(map(same, value, other))
    if dataclasses.is_dataclass(value):
        return type(value) is type(other) and same(vars(value), vars(other))
    return value == other


# The sampler


def drawn(samples: int, batch_size: int, *, epoch: int = 0, **arguments) -> list[list[Draw]]:
    sampler = GlobalBatchSampler(samples, batch_size, **({"seed": 0} | arguments))
    sampler.epoch = epoch
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


@pytest.mark.parametrize("mixing", [{}, {"mixgen_probability": 0.5, "mixgen_ratio": 0.25}])
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_rows_of_all_ranks_are_the_batch_of_one(world_size, mixing):
    alone = drawn(50, 8, epoch=3, **mixing)
    ranks = [
        drawn(50, 8 // world_size, epoch=3, rank=rank, world_size=world_size, **mixing) for rank in range(world_size)
    ]
    assert len(alone) == 6
    together = [list(itertools.chain.from_iterable(rows)) for rows in zip(*ranks, strict=True)]
    assert together == alone


@pytest.mark.parametrize(("samples", "batch_size"), [(50, 8), (48, 8), (7, 8), (8, 8), (5, 1)])
def test_an_epoch_has_each_sample_once_and_drops_the_last_incomplete_batch(samples, batch_size):
    found = drawn(samples, batch_size, epoch=2)
    assert [len(batch) for batch in found] == [batch_size] * (samples // batch_size)
    draws = list(itertools.chain.from_iterable(found))
    assert len({draw.index for draw in draws}) == len(draws)
    assert all(draw.epoch == 2 and 0 <= draw.index < samples and draw.partner is None for draw in draws)


def test_the_order_depends_on_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[int]:
        return [draw.index for batch in drawn(64, 8, seed=seed, epoch=epoch) for draw in batch]

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(first != second for first, second in itertools.combinations(orders, 2))
    assert all(sorted(found) == list(range(64)) for found in orders)
    assert order(1, 2) == order(1, 2)
    assert order(0, 0) != list(range(64))


def test_the_order_does_not_depend_on_global_state():
    first = drawn(64, 8)
    torch.manual_seed(5)
    random.seed(5)
    assert drawn(64, 8) == first


def test_mixgen_mixes_the_first_samples_of_a_batch_with_those_that_follow():
    plain = drawn(80, 8)
    mixed = drawn(80, 8, mixgen_probability=1.0, mixgen_ratio=0.3)  # int(0.3 * 8) = 2
    for batch, mixed_batch in zip(plain, mixed, strict=True):
        indices = [draw.index for draw in batch]
        assert [draw.index for draw in mixed_batch] == indices
        assert [draw.partner for draw in mixed_batch] == [indices[2], indices[3], *[None] * 6]


def test_how_many_batches_mixgen_mixes():
    found = drawn(8000, 8, mixgen_probability=0.1, mixgen_ratio=0.25)
    mixed = sum(any(draw.partner is not None for draw in batch) for batch in found)
    assert abs(mixed - 100) < 5 * (1000 * 0.1 * 0.9) ** 0.5  # of 1000; five standard deviations


# Training samples


def test_a_sample_depends_only_on_its_draw(training_set):
    draw = Draw(epoch=3, index=5)
    expected = training_set()[draw]

    torch.manual_seed(99)
    random.seed(99)
    other = training_set()
    for index in (7, 5, 1):
        _ = other[Draw(2, index)]
    torch.rand(3)
    assert same(other[draw], expected)


def test_a_sample_does_not_change_the_global_generators(training_set):
    torch.manual_seed(1)
    random.seed(1)
    states = torch.get_rng_state(), random.getstate()
    _ = training_set()[Draw(0, 0)]
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


VIEW_NAMES = ("image", "second_image", "first_simclr", "second_simclr")


def test_epoch_index_and_seed_change_the_augmentation(training_set, split):
    assert split.caption_images[4] == split.caption_images[5]  # the same image with two captions
    draws = {
        "the same": (0, Draw(1, 4)),
        "epoch": (0, Draw(2, 4)),
        "index": (0, Draw(1, 5)),
        "seed": (1, Draw(1, 4)),
        "epoch and index exchanged": (0, Draw(4, 1)),
    }
    samples = {name: training_set(seed=seed)[draw] for name, (seed, draw) in draws.items()}
    # Only SimCLR views are compared: their crop differs each time, while both operations of a pool view may do nothing.
    for first, second in itertools.combinations(samples.values(), 2):
        for name in ("first_simclr", "second_simclr"):
            assert not torch.equal(first.images[name], second.images[name])


@pytest.mark.parametrize("changed", ["epoch", "index", "seed"])
def test_pool_views_and_captions_change_with_the_draw(training_set, split, changed):
    # The same image and caption at every index, so that only the augmentation differs.
    same_pair = dataclasses.replace(split, captions=[split.captions[0]] * len(split), caption_images=[0] * len(split))

    def sample(number: int) -> Sample:
        seed, epoch, index = (number if changed == name else 0 for name in ("seed", "epoch", "index"))
        return training_set(seed=seed, split=same_pair)[Draw(epoch, index)]

    samples = [sample(number) for number in range(10)]
    for name in ("image", "second_image"):
        assert len({sample.images[name].numpy().tobytes() for sample in samples}) >= 5
    assert len({tuple(sample.captions["caption"]) for sample in samples}) >= 5
    assert len({tuple(sample.masked_labels) for sample in samples}) >= 5


def test_the_views_of_a_sample_differ(training_set):
    equal = Counter()
    for index in range(20):
        images = training_set()[Draw(0, index)].images
        assert set(images) == set(VIEW_NAMES)
        equal["pool"] += torch.equal(images["image"], images["second_image"])
        equal["simclr"] += torch.equal(images["first_simclr"], images["second_simclr"])
    assert equal["pool"] < 10 and equal["simclr"] == 0


def test_an_additional_view_changes_no_other_part_of_a_sample(training_set):
    for index in range(6):
        draw = Draw(1, index)
        everything, one = training_set(ALL_VIEWS)[draw], training_set(ONE_VIEW)[draw]
        assert torch.equal(everything.images["image"], one.images["image"])
        assert everything.captions["caption"] == one.captions["caption"]
        second = training_set(dataclasses.replace(ONE_VIEW, second_view=True))[draw].images
        assert torch.equal(second["second_image"], everything.images["second_image"])


@pytest.mark.parametrize(
    ("switches", "names"),
    [
        ({}, {"image"}),
        ({"second_view": True}, {"image", "second_image"}),
        ({"simclr_views": True}, {"image", "first_simclr", "second_simclr"}),
        ({"second_view": True, "simclr_views": True}, set(VIEW_NAMES)),
    ],
)
def test_only_the_needed_views_are_made_and_the_file_is_decoded_once(training_set, monkeypatch, switches, names):
    calls = Counter()

    def counted(name: str, function):
        def call(*arguments):
            calls[name] += 1
            return function(*arguments)

        return call

    data = training_set(dataclasses.replace(ONE_VIEW, **switches))
    monkeypatch.setattr(samples_module, "read_dataset_image", counted("decoded", read_dataset_image))
    monkeypatch.setattr(data, "pool_view", CountedView(data.pool_view, calls))
    monkeypatch.setattr(data, "simclr_view", counted("simclr", data.simclr_view))
    sample = data[Draw(0, 0)]
    assert set(sample.images) == names
    assert all(view.shape == (3, *RESOLUTION) for view in sample.images.values())
    assert calls["decoded"] == 1 and calls["resized"] == 1
    assert calls["pool"] == len(names & {"image", "second_image"})
    assert calls["simclr"] == len(names & {"first_simclr", "second_simclr"})
    assert sample.masked_ids is None and sample.masked_labels is None


class CountedView:
    """A PoolView that counts its calls."""

    def __init__(self, view, calls: Counter):
        self.view, self.calls = view, calls

    def resize(self, image):
        self.calls["resized"] += 1
        return self.view.resize(image)

    def __call__(self, resized):
        self.calls["pool"] += 1
        return self.view(resized)


def test_simclr_views_that_the_device_finishes_are_those_of_the_loader(training_set):
    """And nothing else differs, also in a chunk of a batch."""
    draws = [Draw(1, index) for index in range(12)]
    expected = collate([training_set()[draw] for draw in draws])
    waiting = collate([training_set(dataclasses.replace(ALL_VIEWS, simclr_on_device=True))[draw] for draw in draws])
    assert all(view.dtype == torch.uint8 for view in waiting.views.simclr_images)
    for start, stop in ((0, 12), (5, 9)):
        found, rows = waiting.rows(start, stop).to(torch.device("cpu")), expected.rows(start, stop)
        assert found.adjustments is None and same(found.to(torch.device("cpu")), found)
        for view, other in zip(found.views.simclr_images, rows.views.simclr_images, strict=True):
            assert view.shape == other.shape and (view - other).abs().max() < 1e-5
        assert same(dataclasses.replace(found.views, simclr_images=rows.views.simclr_images), rows.views)
        assert torch.equal(found.identities, rows.identities) and found.paths == rows.paths


def test_a_sample_carries_its_pair(training_set, split):
    sample = training_set(PLAIN)[Draw(0, 7)]
    image = split.caption_images[7]
    assert sample.captions["caption"] == TOKENIZER.encode(split.captions[7], 24)
    assert sample.identity == split.image_identities[image] and sample.path == split.image_paths[image]


def test_masked_captions_hide_tokens_of_the_caption(training_set):
    picked = 0
    for index in range(20):
        sample = training_set()[Draw(0, index)]
        originals = zip(sample.captions["caption"], sample.masked_ids, sample.masked_labels, strict=True)
        for token, seen, label in originals:
            assert label in (IGNORED_LABEL, token)
            assert seen == token or label == token
            picked += label != IGNORED_LABEL
    assert picked > 0
    assert any(MASK in training_set()[Draw(0, index)].masked_ids for index in range(20))


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("shirt", 1),
        ("", 0),
        ("\x00\x07 \x1b", 0),
        ("\u200b", None),
        ("\ud800", None),
        ("a " * 500, 22),
        ("<|endoftext|>", None),
    ],
)
def test_any_caption_makes_a_sample(training_set, split, caption, tokens):
    data = training_set(split=dataclasses.replace(split, captions=[caption] * len(split)))
    for index in range(5):
        sample = data[Draw(0, index)]
        assert sample.captions["caption"][0] == START and sample.captions["caption"][-1] == END
        assert not {START, END} & set(sample.captions["caption"][1:-1])
        assert tokens is None or len(sample.captions["caption"]) == tokens + 2
        assert len(sample.masked_ids) == len(sample.captions["caption"])


def test_the_text_operation_gets_its_strength_and_synonyms(training_set, split):
    captions = dataclasses.replace(split, captions=["red shirt and red shoes"] * len(split))
    synonyms = {"red": ["crimson"], "shirt": ["jersey"], "shoes": ["boots"]}
    words = {"text_operation": "synonym_replacement", "synonyms": lambda word: synonyms.get(word, [])}
    for strength, expected in [(0.4, 2), (1.0, 3)]:
        data = training_set(dataclasses.replace(PLAIN, text_strength=strength, **words), split=captions)
        seen = TOKENIZER.decode(data[Draw(0, 0)].captions["caption"][1:-1]).split()
        assert len(set(seen) & {"crimson", "jersey", "boots"}) == expected


@pytest.mark.parametrize("kind", ["ori", "cat"])
def test_mixgen_mixes_the_pool_views_and_captions_of_two_samples(training_set, kind):
    augmentation = dataclasses.replace(ALL_VIEWS, text_strength=0.0, mixgen=kind)
    data = training_set(augmentation)
    own, partner, mixed = data[Draw(1, 3)], data[Draw(1, 30)], data[Draw(1, 3, partner=30)]
    for name in ("image", "second_image"):
        if kind == "ori":
            assert torch.allclose(mixed.images[name], (own.images[name] + partner.images[name]) / 2, atol=1e-6)
        else:
            half = RESOLUTION[1] // 2
            left = torch.nn.functional.interpolate(
                own.images[name][None], (RESOLUTION[0], half), mode="bilinear", antialias=True
            )
            assert torch.allclose(mixed.images[name][:, :, :half], left[0], atol=1e-5)
    for name in ("first_simclr", "second_simclr"):
        assert torch.equal(mixed.images[name], own.images[name])
    assert mixed.captions["caption"] == [*own.captions["caption"][:-1], *partner.captions["caption"][1:-1]][:23] + [END]
    assert (mixed.identity, mixed.path) == (own.identity, own.path)


# Batches


def test_captions_are_padded_to_the_longest_of_the_batch(training_set, split):
    captions = ["one two three four five", "one", "one two"]
    numbers = range(len(split))
    augmentation = dataclasses.replace(PLAIN, masked_captions=True)
    data = training_set(
        augmentation, split=dataclasses.replace(split, captions=[captions[number % 3] for number in numbers])
    )
    batch = collate([data[Draw(0, index)] for index in range(3)])
    lengths = [7, 3, 4]  # with start and end
    views = batch.views
    assert views.token_ids.shape == views.masked_token_ids.shape == views.masked_labels.shape == (3, 7)
    assert views.token_ids.dtype == views.masked_labels.dtype == torch.int64
    for row, length in enumerate(lengths):
        assert views.token_ids[row, :length].tolist() == TOKENIZER.encode(captions[row])
        assert not views.token_ids[row, length:].any() and not views.masked_token_ids[row, length:].any()
        assert (views.masked_labels[row, length:] == IGNORED_LABEL).all()


def test_a_batch_has_the_views_of_its_samples(training_set, split):
    samples = [training_set()[Draw(0, index)] for index in (2, 9)]
    batch = collate(samples)
    found = {
        "image": batch.views.image,
        "second_image": batch.views.second_image,
        "first_simclr": batch.views.simclr_images[0],
        "second_simclr": batch.views.simclr_images[1],
    }
    for name, images in found.items():
        assert torch.equal(images, torch.stack([sample.images[name] for sample in samples]))
    assert batch.identities.tolist() == [split.caption_identities[index] for index in (2, 9)]
    assert batch.identities.dtype == torch.int64
    assert batch.paths == [sample.path for sample in samples]

    views = collate([training_set(ONE_VIEW)[Draw(0, 1)]]).views
    assert views.second_image is views.simclr_images is views.masked_token_ids is views.masked_labels is None


@pytest.mark.parametrize("augmentation", [ALL_VIEWS, ONE_VIEW])
def test_all_tensors_of_a_batch_move(training_set, monkeypatch, augmentation):
    batch = collate([training_set(augmentation)[Draw(0, index)] for index in range(2)])
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, Batch) and isinstance(moved.views, Views) and moved.paths == batch.paths
    pairs = list(zip(tensors(batch), tensors(moved), strict=True))
    assert len(pairs) == (11 if augmentation is ALL_VIEWS else 3)
    assert all(tensor.shape == found.shape and found.device.type == "meta" for tensor, found in pairs)

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)  # pinning needs a GPU
    pinned = tensors(batch.pin_memory())
    assert all(torch.equal(tensor + 1, found) for tensor, found in zip(tensors(batch), pinned, strict=True))


def tensors(batch: Batch) -> list[torch.Tensor]:
    views = [value for value in vars(batch.views).values() if value is not None and not isinstance(value, tuple)]
    pairs = (*(batch.views.simclr_images or ()), *(batch.views.simclr_token_ids or ()))
    return [*views, *pairs, batch.identities]


def test_each_caption_of_a_sample_is_augmented_independently(training_set):
    """About two of three words are deleted, so equal draws would be visible."""
    strong = dataclasses.replace(ALL_VIEWS, text_strength=0.6)
    samples = [training_set(strong)[Draw(0, index)] for index in range(12)]
    names = ("caption", "second_caption", "first_simclr", "second_simclr")
    assert all(tuple(sample.captions) == names for sample in samples)
    for one, other in itertools.combinations(names, 2):
        assert sum(sample.captions[one] != sample.captions[other] for sample in samples) >= 9
    batch = collate(samples)
    ids = (batch.views.token_ids, batch.views.second_token_ids, *batch.views.simclr_token_ids)
    for rows, name in zip(ids, names, strict=True):
        for row, sample in zip(rows, samples, strict=True):
            assert row[: len(sample.captions[name])].tolist() == sample.captions[name]
    assert len({rows.shape for rows in ids}) == 1


# Loaders


def loaded(data: TrainingSet, workers: int, batch_size: int = 6, **arguments) -> list[Batch]:
    """Returns the batches of two epochs."""
    sampler = GlobalBatchSampler(len(data), batch_size, seed=4, **arguments)
    loader = training_loader(data, sampler, workers=workers, pin_memory=False)
    found = []
    for epoch in range(2):
        sampler.epoch = epoch
        found += list(batches(loader))
    return found


@pytest.fixture(scope="module")
def mixed_set(data) -> Callable[[], TrainingSet]:
    """A function that builds a training set with MixGen."""
    augmentation = dataclasses.replace(ALL_VIEWS, mixgen="ori")
    return lambda: TrainingSet(read_annotations(*data)["train"], data.image_dir, TOKENIZER, augmentation, 0)


@pytest.fixture(scope="module")
def alone(mixed_set) -> list[Batch]:
    """The batches of one rank without workers."""
    return loaded(mixed_set(), workers=0, batch_size=12, **MIXING)


MIXING = {"mixgen_probability": 0.5, "mixgen_ratio": 0.34}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize("workers", [0, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 3))])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_and_workers_change_no_sample(mixed_set, alone, world_size, workers):
    """Compares every view, token and label of two epochs bit by bit."""
    assert len(alone) == 8
    assert not any(same(batch, other) for batch, other in itertools.combinations(alone, 2))
    ranks = [
        loaded(mixed_set(), workers, batch_size=12 // world_size, rank=rank, world_size=world_size, **MIXING)
        for rank in range(world_size)
    ]
    for whole, *parts in zip(alone, *ranks, strict=True):
        rows = [row for part in parts for row in rows_of(part)]
        assert all(same(row, other) for row, other in zip(rows, rows_of(whole), strict=True))


def rows_of(batch: Batch) -> list[Batch]:
    """Returns the samples one by one, without padding, which depends on the longest caption of the batch."""
    rows = [batch.rows(number, number + 1) for number in range(len(batch))]
    for row in rows:
        views = row.views
        length = length_of(views.token_ids)
        views.token_ids, views.masked_token_ids, views.masked_labels = (
            tokens[:, :length] for tokens in (views.token_ids, views.masked_token_ids, views.masked_labels)
        )
        views.second_token_ids = views.second_token_ids[:, : length_of(views.second_token_ids)]
        views.simclr_token_ids = tuple(ids[:, : length_of(ids)] for ids in views.simclr_token_ids)
    return rows


def length_of(token_ids: torch.Tensor) -> int:
    return int((token_ids == END).nonzero()[0, 1]) + 1


def test_a_loader_continues_in_the_middle_of_an_epoch(training_set):
    whole = loaded(training_set(), workers=0)
    sampler = GlobalBatchSampler(48, 6, seed=4)
    loader = training_loader(training_set(), sampler, workers=1, pin_memory=False)
    sampler.epoch, sampler.first_step = 1, 5
    assert len(loader) == 8
    rest = list(batches(loader))
    assert len(rest) == 3 and all(same(batch, other) for batch, other in zip(rest, whole[13:], strict=True))


def test_the_number_of_threads_changes_no_sample(split, tiny_dataset):
    """Loader workers have one thread, other processes more. At full size, this could change how sums round."""
    full_size = dataclasses.replace(ALL_VIEWS, resolution=(224, 224))
    data = TrainingSet(split, tiny_dataset.image_dir, TOKENIZER, full_size, 0)
    threads = torch.get_num_threads()
    samples = {}
    for count in (1, 2):
        torch.set_num_threads(count)
        samples[count] = [data[Draw(0, index)] for index in range(12)]
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert all(same(one, two) for one, two in zip(samples[1], samples[2], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_gallery_is_in_order_and_complete(split, tiny_dataset, workers):
    numbers = range(1, len(split.image_paths), 2)
    images = EvaluationImages(split, tiny_dataset.image_dir, RESOLUTION, numbers)
    found = torch.cat([batch.pixels for batch in batches(gallery_loader(images, 5, workers=workers, pin_memory=False))])
    view = EvaluationView(RESOLUTION)
    expected = [view(read_image(tiny_dataset.image_dir / split.image_paths[number])) for number in numbers]
    assert torch.equal(found, torch.stack(expected))


# Images that cannot be decoded


@pytest.fixture(params=["no image", "undecodable", "empty"])
def spoiled(request, split, tiny_dataset) -> str:
    """Spoils an image of the training set, and returns its path."""
    spoil(tiny_dataset.image_dir / split.image_paths[3], request.param)
    return split.image_paths[3]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_names_an_image_that_cannot_be_decoded(training_set, spoiled, workers):
    refused(spoiled, lambda: loaded(training_set(), workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_names_an_image_that_cannot_be_decoded(split, tiny_dataset, spoiled, workers):
    images = EvaluationImages(split, tiny_dataset.image_dir, RESOLUTION, range(len(split.image_paths)))
    refused(spoiled, lambda: list(batches(gallery_loader(images, 5, workers=workers, pin_memory=False))))


def refused(path: str, load: Callable[[], object]) -> None:
    """Checks that loading ends with one line that names the image, and that its workers end at once.

    Were the loader part of a cycle, its collection would close the queues of the workers first, and torch would then
    wait five seconds for each worker.
    """
    message = ""
    try:
        load()
    except UserError as error:
        message = str(error)
    assert path in message and "\n" not in message
    assert multiprocessing.active_children() == []


def test_a_mixgen_partner_that_cannot_be_decoded_is_named(training_set, split, spoiled):
    partner = split.caption_images.index(3)
    result = training_set(dataclasses.replace(ALL_VIEWS, mixgen="ori"))[Draw(0, 0, partner=partner)]
    assert isinstance(result, UserError) and spoiled in str(result)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_used_and_named(training_set, split, tiny_dataset, workers):
    path = split.image_paths[3]
    spoil(tiny_dataset.image_dir / path, "cut off")
    found = [batch.damaged for batch in loaded(training_set(), workers)]
    assert set(sum(found, [])) == {path} and [] in found
    images = EvaluationImages(split, tiny_dataset.image_dir, RESOLUTION, range(len(split.image_paths)))
    loader = gallery_loader(images, 2, workers=workers, pin_memory=False)
    assert [batch.damaged for batch in batches(loader)][:3] == [[], [path], []]


def test_a_damaged_mixgen_partner_is_named(training_set, split, tiny_dataset):
    spoil(tiny_dataset.image_dir / split.image_paths[3], "cut off")
    partner = split.caption_images.index(3)
    mixed = training_set(dataclasses.replace(ALL_VIEWS, mixgen="ori"))[Draw(0, 0, partner=partner)]
    assert mixed.damaged == [split.image_paths[3]]
