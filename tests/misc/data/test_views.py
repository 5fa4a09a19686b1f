"""Image views against Pillow, values worked by hand, reference values and the probabilities of the paper."""

import itertools
import math
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import pil_to_tensor

from misc.config.loading import load_config
from misc.data.image_operations import IMAGE_OPERATIONS, build_operations, wrong_operations
from misc.data.transforms import draw_parameters
from misc.data.views import (
    EvaluationView,
    PoolView,
    SimCLRView,
    draw_crop,
    mix_captions,
    mix_images,
    normalise,
    to_tensor,
)
from misc.system.randomness import derive_seed, seeded
from tests.helpers.golden_models import assert_close, load
from tests.helpers.seeded import normal

TALL = (64, 32)
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
DEVIATION = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
BLACK = -MEAN / DEVIATION


def assert_rate(count: int, trials: int, probability: float) -> None:
    """Checks a binomial count to five standard deviations: chance fails one run in a million; seeds are fixed."""
    bound = 5 * math.sqrt(trials * probability * (1 - probability))
    assert abs(count - trials * probability) <= bound, f"{count} of {trials} is not a rate of {probability}"


def noise_image(height: int, width: int) -> Image.Image:
    pixels = np.random.RandomState(0).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def normalised_pixels(pixels: np.ndarray) -> torch.Tensor:
    """Converts (H, W, 3) bytes to the normalised tensor (3, H, W)."""
    return (torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 - MEAN) / DEVIATION


def paper_pool(resolution: tuple[int, int]) -> PoolView:
    """Returns the training view of the full recipe."""
    experiment = load_config().experiment
    return PoolView(resolution, build_operations(experiment.image_operations, resolution), experiment.image_pool)


def operation(view: PoolView, kind: type) -> torch.nn.Module:
    (found,) = [op for op in view.operations if isinstance(op, kind)]
    return found


# Resizing and normalising


def test_a_constant_image_is_normalised_with_the_numbers_of_imagenet():
    view = EvaluationView(TALL)(Image.new("RGB", (10, 10), (255, 0, 51)))  # 1, 0 and 0.2
    assert view.shape == (3, 64, 32) and view.dtype == torch.float32
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225])
    assert_close(view, expected[:, None, None].expand(3, 64, 32), 1e-6)


def test_the_evaluation_view_is_pillow_s_bicubic_resize():
    image = noise_image(150, 70)  # larger than the view, so it must be antialiased
    expected = normalised_pixels(np.asarray(image.resize((32, 64), Image.Resampling.BICUBIC)))
    assert_close(EvaluationView(TALL)(image), expected, 1e-6)


def test_the_pool_view_is_resized_bilinearly():
    image = noise_image(150, 70)
    expected = pil_to_tensor(image.resize((32, 64), Image.Resampling.BILINEAR))
    resized = paper_pool(TALL).resize(pil_to_tensor(image))
    levels = resized * 255
    assert_close(levels, levels.round(), 1e-5)
    # Pillow rounds to bytes after each direction, and which one comes first depends on its version.
    assert (levels - expected).abs().max() < 1.001 and (levels - expected).mean().abs() < 0.02
    assert resized.dtype == torch.float32 and resized.min() >= 0 and resized.max() <= 1


def test_images_are_normalised_channel_by_channel():
    pixels = np.asarray(noise_image(64, 32))
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
    for images, expected in (
        (image, normalised_pixels(pixels)),
        (image.expand(2, -1, -1, -1), normalised_pixels(pixels)),
    ):
        assert_close(normalise(images), expected.expand_as(images), 1e-6)


def test_resolution_is_height_and_width():
    halves = np.zeros((10, 20, 3), dtype=np.uint8)
    halves[:, 10:] = 255
    for tensor in (
        EvaluationView((60, 20))(Image.fromarray(halves)),
        paper_pool((60, 20)).resize(pil_to_tensor(Image.fromarray(halves))),
    ):
        assert tensor.shape == (3, 60, 20)
        assert tensor.std(dim=1).max() < 1e-6  # the same from top to bottom
        assert (tensor[:, :, 16:] > tensor[:, :, :4]).all()


# The operations of the study by name


STRENGTHS = {
    "color_jitter_bcs": 0.4,
    "random_rotation": 30,
    "random_resized_crop": 0.3,
    "random_grayscale": 1,
    "random_horizontal_flip": 1,
    "random_erasing": [0.02, 0.1],
    "gaussian_blur": 7,
    "color_jitter_hue": 0.4,
    "random_vertical_flip": 1,
    "auto_augment": "imagenet",
    "rand_augment": [2, 9],
    "trivial_augment": 31,
}


def test_every_operation_changes_an_image_and_keeps_its_shape_and_range():
    assert STRENGTHS.keys() == IMAGE_OPERATIONS.keys()
    image = to_tensor(noise_image(64, 32))
    for name, strength in STRENGTHS.items():
        (operation,) = build_operations({name: strength}, TALL)
        with seeded("operations"):
            views = [operation(image) for _ in range(20)]
        assert all(view.shape == image.shape and view.dtype == torch.float32 for view in views), name
        assert all(view.min() >= 0 and view.max() <= 1 for view in views), name
        assert any(not torch.equal(view, image) for view in views), name


def built(name: str, strength, resolution: tuple[int, int] = (224, 224)) -> torch.nn.Module:
    (operation,) = build_operations({name: strength}, resolution)
    return operation


def test_operations_have_the_parameters_that_the_paper_names():
    image = to_tensor(noise_image(8, 4))
    assert torch.equal(built("random_vertical_flip", 1)(image), image.flip(1))
    assert torch.equal(built("random_horizontal_flip", 1)(image), image.flip(2))
    blur = built("gaussian_blur", 11)
    assert tuple(blur.kernel_size) == (11, 11) and tuple(blur.sigma) == (0.1, 2.0)
    hue = built("color_jitter_hue", 0.2)
    assert tuple(hue.hue) == (-0.2, 0.2) and hue.brightness is hue.contrast is hue.saturation is None
    random = built("rand_augment", [2, 9])
    assert (random.num_ops, random.magnitude) == (2, 9)
    assert built("trivial_augment", 31).num_magnitude_bins == 31
    assert tuple(built("random_resized_crop", 0.3).scale) == (0.3, 1.0)
    erasing = built("random_erasing", [0.2, 0.3])
    assert erasing.p == 0.5 and tuple(erasing.scale) == (0.2, 0.3)


@pytest.mark.parametrize(
    ("strengths", "word"),
    [
        ({"random_rotaton": 15}, "random_rotaton"),
        ({"gaussian_blur": 4}, "odd"),
        ({"random_erasing": [0.3, 0.2]}, "smallest"),
        ({"random_grayscale": 1.5}, "probability"),
        ({"rand_augment": 2}, "magnitude"),
        ({"auto_augment": "mine"}, "imagenet"),
        ([], "mapping"),
    ],
)
def test_a_wrong_operation_or_strength_is_named(strengths, word):
    (problem,) = wrong_operations(strengths)
    assert word in problem


def test_without_a_number_to_draw_all_operations_are_applied_in_order():
    image = torch.full((3, 1, 1), 2.0)
    view = PoolView((1, 1), [lambda image: image + 1, lambda image: image * 3], None)
    assert round((view(image) * DEVIATION + MEAN)[0].item(), 4) == 9
    untouched = PoolView((1, 1), [], 2)
    assert round((untouched(image) * DEVIATION + MEAN)[0].item(), 4) == 2


def test_the_faster_operations_are_torchvision_s():
    image = torch.from_numpy(normal("operations", 3, 60, 40)).sigmoid()
    crop = v2.RandomResizedCrop([60, 40], scale=(0.3, 1.0), ratio=(3 / 4 * 40 / 60, 4 / 3 * 40 / 60))
    for ours, theirs in (
        (built("color_jitter_bcs", 0.9), v2.ColorJitter(brightness=0.9, contrast=0.9, saturation=0.9)),
        (built("color_jitter_hue", 0.5), v2.ColorJitter(hue=0.5)),
        (built("random_rotation", 180), v2.RandomRotation(180)),
        (built("random_resized_crop", 0.3, (60, 40)), crop),
    ):
        before = image.clone()
        for seed in range(20):
            with seeded(seed):
                found = ours(image)
            with seeded(seed):
                expected = theirs(image)
            # Where a pixel comes from the border of two, rounding decides.
            assert ((found - expected).abs().amax(dim=0) > 1e-3).sum() <= 2 and found.shape == expected.shape
        assert torch.equal(image, before)


# The augmentation pool


def recorded_draws(times: int) -> list[list[int]]:
    """Returns, for each view, the numbers of the operations that it applied."""
    view = paper_pool(TALL)
    applied: list[int] = []

    def recorder(number: int):
        def record(image):
            applied.append(number)
            return image

        return record

    view.operations = [recorder(number) for number in range(len(view.operations))]
    draws = []
    image = torch.zeros(3, 2, 2)
    with seeded("draws"):
        for _ in range(times):
            applied.clear()
            view(image)
            draws.append(list(applied))
    return draws


def test_a_view_draws_two_operations_of_the_pool_with_replacement():
    times = 3000
    draws = recorded_draws(times)
    assert {len(draw) for draw in draws} == {2}
    pairs = Counter(map(tuple, draws))
    for pair in itertools.product(range(6), repeat=2):
        assert_rate(pairs[pair], times, 1 / 36)
    for number in range(6):
        assert_rate(sum(draw.count(number) for draw in draws), 2 * times, 1 / 6)


def test_operations_are_applied_in_the_order_drawn():
    view = paper_pool(TALL)
    view.operations = [lambda image: image + 1, lambda image: image * 3]
    image = torch.full((3, 1, 1), 2.0)
    with seeded("order"):
        results = {round((view(image) * DEVIATION + MEAN)[0].item(), 3) for _ in range(100)}
    assert results == {4, 18, 9, 7}  # (2 + 1 + 1), 2 * 3 * 3, (2 + 1) * 3, 2 * 3 + 1


def test_the_pool_has_the_six_operations_with_the_parameters_of_the_paper():
    view = paper_pool((224, 224))
    assert len(view.operations) == 6
    jitter = operation(view, v2.ColorJitter)
    for strength in (jitter.brightness, jitter.contrast, jitter.saturation):
        assert tuple(strength) == pytest.approx((0.9, 1.1))
    assert jitter.hue is None or tuple(jitter.hue) == (0, 0)
    rotation = operation(view, v2.RandomRotation)
    assert tuple(rotation.degrees) == (-15, 15)
    assert rotation.interpolation in ("nearest", InterpolationMode.NEAREST)
    crop = operation(view, v2.RandomResizedCrop)
    assert (*crop.scale, *crop.ratio) == pytest.approx((0.9, 1.0, 3 / 4, 4 / 3)) and tuple(crop.size) == (224, 224)
    erasing = operation(view, v2.RandomErasing)
    assert (*erasing.scale, *erasing.ratio) == pytest.approx((0.10, 0.20, 0.3, 3.3))


def test_crops_of_a_tall_input_keep_nine_tenths_of_it():
    """The paper's aspect ratios are meant for a square input. With them, crops of a tall one are always its middle."""
    crop = operation(paper_pool(TALL), v2.RandomResizedCrop)
    with seeded("crop"):
        boxes = [draw_parameters(crop, [torch.zeros(3, *TALL)]) for _ in range(200)]
    areas = [box["height"] * box["width"] / (TALL[0] * TALL[1]) for box in boxes]
    assert min(areas) > 0.87 and len({tuple(box.values()) for box in boxes}) > 50  # sides are rounded to whole pixels


@pytest.mark.parametrize(
    ("kind", "probability"), [(v2.RandomGrayscale, 0.1), (v2.RandomHorizontalFlip, 0.5), (v2.RandomErasing, 0.5)]
)
def test_how_often_an_operation_of_the_pool_does_something(kind, probability):
    chosen = operation(paper_pool(TALL), kind)
    image = to_tensor(noise_image(16, 12))
    with seeded(kind.__name__):
        changed = sum(not torch.equal(chosen(image), image) for _ in range(1000))
    assert_rate(changed, 1000, probability)


@pytest.mark.parametrize("kind", [v2.RandomRotation, v2.RandomErasing])
def test_pixels_filled_by_rotation_or_erasing_are_black_before_normalising(kind):
    view = paper_pool((40, 40))
    view.operations = [operation(view, kind)]
    white = torch.ones(3, 40, 40)
    blackened = 0
    with seeded("fill"):
        for _ in range(20):
            seen = view(white)
            black = (seen - BLACK).abs().amax(dim=0) < 1e-6
            still_white = (seen - (1 - MEAN) / DEVIATION).abs().amax(dim=0) < 1e-6
            assert (black | still_white).all()
            blackened += black.any().item()
    assert blackened > 10


def test_the_pool_s_crop_takes_most_of_a_square_image():
    resolution = (48, 48)
    areas = crop_areas(operation(paper_pool(resolution), v2.RandomResizedCrop), resolution)
    assert min(areas) == pytest.approx(0.9, abs=0.02) and max(areas) == pytest.approx(1.0, abs=0.02)


def crop_areas(crop: torch.nn.Module, resolution: tuple[int, int]) -> list[float]:
    """Returns the shares of an image that random crops show, measured on an image whose colours are coordinates."""
    height, width = 96, 96
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    image = torch.stack([rows, columns, torch.zeros(height, width)])
    areas = []
    with seeded("crops"):
        for _ in range(300):
            cropped = crop(image)
            assert cropped.shape == (3, *resolution)
            extent = cropped.amax(dim=(1, 2)) - cropped.amin(dim=(1, 2))
            # The centres of the outermost pixels are half a pixel of the result inside the crop.
            areas.append((extent[0] * resolution[0] / (resolution[0] - 1) * extent[1]).item())
    return areas


# The SimCLR view


@pytest.mark.parametrize("size", [(5, 9), (64, 32), (300, 200)])
def test_a_simclr_view_has_the_shape_of_the_model_s_input(size):
    view = SimCLRView(TALL)(pil_to_tensor(noise_image(*size)), Random(0))
    assert view.shape == (3, *TALL) and view.dtype == torch.float32
    assert ((view >= BLACK - 1e-5) & (view <= (1 - MEAN) / DEVIATION + 1e-5)).all()


@pytest.mark.slow
def test_how_often_a_simclr_view_changes_colours():
    view, random = SimCLRView((8, 8)), Random("colours")
    plain = torch.tensor([128, 77, 51], dtype=torch.uint8)[:, None, None].expand(
        3, 12, 12
    )  # crop, blur, flip: no change
    times, grey, unchanged = 1500, 0, 0
    for _ in range(times):
        seen = view(plain, random) * DEVIATION + MEAN
        grey += torch.allclose(seen[0], seen[1], atol=1e-4) and torch.allclose(seen[1], seen[2], atol=1e-4)
        unchanged += torch.allclose(seen, plain[:, :8, :8] / 255, atol=1e-4)
    assert_rate(grey, times, 0.2)
    assert_rate(unchanged, times, (1 - 0.8) * (1 - 0.2))


@pytest.mark.slow
def test_how_often_a_simclr_view_is_flipped():
    view, random = SimCLRView((8, 8)), Random("flips")
    ramp = (
        torch.linspace(50, 200, 24).to(torch.uint8).expand(3, 24, 24)
    )  # brighter to the right with every crop and colour
    flipped = sum(
        (seen[0, :, 0].mean() > seen[0, :, -1].mean()).item() for seen in (view(ramp, random) for _ in range(1500))
    )
    assert_rate(flipped, 1500, 0.5)


def test_how_often_and_how_much_a_simclr_view_is_adjusted():
    view, random, times = SimCLRView((8, 8)), Random("adjustments"), 3000
    draws = [[adjustment for adjustment in view.draw(random) if adjustment is not None] for _ in range(times)]
    values: dict[str, list[float]] = {}
    for name, value in itertools.chain.from_iterable(draws):
        values.setdefault(name, []).append(value)
    jitter = ("brightness", "contrast", "saturation", "hue")
    for name, probability in {**dict.fromkeys(jitter, 0.8), "grayscale": 0.2, "blur": 0.5, "flip": 0.5}.items():
        assert_rate(len(values[name]), times, probability)
    ranges = {**dict.fromkeys(jitter[:3], (0.6, 1.4)), "hue": (-0.1, 0.1), "blur": (0.1, 2.0)}
    for name, (low, high) in ranges.items():
        assert low <= min(values[name]) and max(values[name]) <= high
        for quarter in range(4):  # uniform
            start, stop = low + (high - low) * quarter / 4, low + (high - low) * (quarter + 1) / 4
            assert_rate(sum(start <= value < stop for value in values[name]), len(values[name]), 1 / 4)
    names = [tuple(name for name, _ in draw) for draw in draws]
    jittered = [draw for draw in names if len(draw) >= 4]
    orders = Counter(draw[:4] for draw in jittered)
    for order in itertools.permutations(jitter):
        assert_rate(orders[order], len(jittered), 1 / 24)
    rest = ("grayscale", "blur", "flip")
    assert all(draw[-3:] == rest for draw in names if set(rest) <= set(draw))


def test_the_simclr_crop_takes_a_fifth_to_all_of_the_image():
    view, random = SimCLRView((48, 48)), Random("crops")
    areas = crop_areas(lambda image: view.crop((image * 255).round().to(torch.uint8), random) / 255, (48, 48))
    assert 0.18 <= min(areas) < 0.25 and 0.95 < max(areas) <= 1.05
    assert_rate(sum(area < 0.6 for area in areas), len(areas), 0.5)  # uniform


def test_the_boxes_of_simclr_crops_are_distributed_as_torchvision_s():
    """Of a square image, and of one that is so tall that few crops fit."""
    crop, random, times = v2.RandomResizedCrop([8, 8], scale=(0.2, 1.0)), Random("boxes"), 2000
    for size in ((90, 80), (100, 40), (100, 15), (15, 100)):
        ours = torch.tensor([draw_crop(*size, random) for _ in range(times)], dtype=torch.float64)
        with seeded("boxes"):
            boxes = [draw_parameters(crop, [torch.zeros(3, *size)]) for _ in range(times)]
        theirs = torch.tensor(
            [[box[name] for name in ("top", "left", "height", "width")] for box in boxes], dtype=torch.float64
        )
        assert (ours >= 0).all() and (ours[:, :2] + ours[:, 2:] <= torch.tensor(size)).all()
        for power in (1, 2):
            error = ((ours**power).std(dim=0) ** 2 + (theirs**power).std(dim=0) ** 2).div(times).sqrt()
            assert ((ours**power).mean(dim=0) - (theirs**power).mean(dim=0)).abs().le(5 * error + 1e-9).all(), size


def test_a_simclr_crop_is_pillow_s_within_one_level():
    image, view = noise_image(150, 70), SimCLRView(TALL)
    top, left, height, width = draw_crop(150, 70, Random(5))
    expected = image.crop((left, top, left + width, top + height)).resize((32, 64), Image.Resampling.BILINEAR)
    found = view.crop(pil_to_tensor(image), Random(5))
    assert found.dtype == torch.uint8
    assert (found.int() - pil_to_tensor(expected).int()).abs().max() <= 1


# Seeds


def test_a_seed_depends_on_every_part_of_its_key():
    keys = [(1, 0, 5, "image"), (0, 1, 5, "image"), (1, 0, 6, "image"), (1, 0, 5, "second_image"), (10, 5, "image")]
    keys += [(1, 0, 5), (1, 5, 0, "image"), (1, 0, 50, "image")]
    seeds = [derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeded_draws_depend_only_on_the_key_and_restore_the_generator():
    torch.manual_seed(3)
    before = torch.rand(2)
    after = torch.rand(2)

    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), before)
    with seeded(1, 2, "image"):
        first = torch.rand(4)
    assert torch.equal(torch.rand(2), after)
    with seeded(1, 2, "image"):
        assert torch.equal(torch.rand(4), first)
    with seeded(2, 1, "image"):
        assert not torch.equal(torch.rand(4), first)


def test_the_generator_is_restored_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded("key"):
        torch.rand(1)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), state)


# MixGen


def mixed(images: torch.Tensor, captions: list[str], kind: str, count: int) -> tuple[list[torch.Tensor], list[str]]:
    """Mixes the first `count` samples of a batch with as many that follow them."""
    rows = range(len(images))
    partner = {row: row + count for row in range(count)}
    return (
        [mix_images(images[i], images[partner[i]], kind) if i in partner else images[i] for i in rows],
        [mix_captions(captions[i], captions[partner[i]]) if i in partner else captions[i] for i in rows],
    )


def test_mixgen_by_mean_equals_the_reference():
    golden = load("mixgen.npz")
    images, captions = mixed(torch.from_numpy(normal("g.mix.0", 8, 3, 32, 16)), [f"t{i}" for i in range(8)], "ori", 2)
    assert_close(torch.stack(images), golden["ori.out"], 1e-6)
    assert captions == golden["ori.texts"].tolist()


def test_mixgen_side_by_side_equals_the_reference():
    golden = load("mixgen.npz")
    inputs = torch.from_numpy(normal("g.mix.1", 6, 3, 224, 224)).abs()
    images, captions = mixed(inputs, [f"t{i}" for i in range(6)], "cat", 2)
    assert_close(images[0][:, 100], golden["cat.row0"])
    assert_close(images[5][:, 100], golden["cat.row5"])
    assert captions == golden["cat.texts"].tolist()


def test_mixgen_side_by_side_keeps_an_odd_width():
    left, right = torch.zeros(3, 4, 7), torch.ones(3, 4, 7)
    both = mix_images(left, right, "cat")
    assert both.shape == (3, 4, 7)
    assert both[0, 0].tolist() == pytest.approx([0, 0, 0, 1, 1, 1, 1])
