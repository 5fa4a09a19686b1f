"""Measures the speed of this code next to the published way of doing the same work (`make bench`).

python -m benchmarks [--only NAME ...] [--batch N] [--precision P] [--device D] [--rounds N] [--json FILE] [key=value]

Both ways run in turn in one process. The output contains medians and ratios. Before a step is timed, its losses and
gradients are compared with those of the baseline.
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from easydict import EasyDict
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import baseline
from benchmarks.chunks import IDENTITIES, random_batch
from benchmarks.comparison import HEADER, Comparison, counted, in_turn
from benchmarks.options import check_output_file, check_positive
from misc.builders.architecture import resolve_architecture
from misc.builders.model import build_model
from misc.builders.training import build_objectives
from misc.config.loading import load_config
from misc.data.batches import collate
from misc.data.sampler import Draw
from misc.data.samples import Augmentation, TrainingSet
from misc.data.split import Split
from misc.errors import UserError
from misc.retrieval import metrics
from misc.run.profiling import peak_memory_gigabytes
from misc.system.distributed import Ranks, choose_device
from misc.system.precision import Precision
from misc.terminal import prepare_streams, report, show
from misc.training.optimizer import build_optimizer, parameter_groups
from model.objectives import Objectives
from model.tbps_clip import TBPSCLIP
from text_utils.tokenizer import Tokenizer

RECIPES = {"full": False, "simplified": True}
RETRIEVALS = ((6_156, 3_074), (20_000, 20_000))
"""Numbers of queries and gallery images: the test split of CUHK-PEDES, and a large data set."""
ALPHA = 0.3
"""The weight of the soft labels."""
WORDS = (
    "man woman wearing red blue grey dark green white black shirt trousers shoes backpack carrying holding bag with "
    "short long hair sleeved striped walking"
)


@dataclasses.dataclass(frozen=True)
class Setup:
    """The settings of a measurement.

    Attributes:
        batch: samples in a step.
        rounds: timed runs of each of the two ways.
        overrides: `key=value` for the configuration.
    """

    device: torch.device
    precision: Precision
    batch: int
    rounds: int
    overrides: tuple[str, ...] = ()

    def configuration(self, recipe: str) -> EasyDict:
        """Returns the configuration of a recipe; without dropout, both ways compute the same."""
        overrides = (f"data.batch_size={self.batch}", "model.checkpoint=null", "experiment.dropout=0", *self.overrides)
        return resolve_architecture(load_config(simplified=RECIPES[recipe], overrides=overrides), None)

    def with_dropout(self) -> "Setup":
        """Returns the settings with the recipe's dropout, with which our step encodes the captions twice, too."""
        return dataclasses.replace(self, overrides=("experiment.dropout=0.05", *self.overrides))

    def recipe(self, name: str) -> tuple[EasyDict, Objectives, TBPSCLIP]:
        """Returns the configuration of a recipe, its losses, and its model with random weights."""
        config = self.configuration(name)
        objectives = build_objectives(config, Ranks(0, 1, self.device))
        model, _ = build_model(config, objectives, IDENTITIES, weights=None)
        return config, objectives, model.to(self.device).train()


def build_steps(
    setup: Setup, recipe: str, rows: int
) -> tuple[Callable[[], dict], Callable[[], dict], TBPSCLIP, baseline.Baseline]:
    """Returns two training steps without the optimizer, the published one and ours; then our model and the baseline's.

    A step returns its losses.
    """
    config, objectives, model = setup.recipe(recipe)
    published_model = baseline.Baseline(model).to(setup.device).train()
    resolution = tuple(config.experiment.input_resolution)
    all_views = dataclasses.replace(objectives, mvs_image=True, ss=True)  # the baseline moves all views
    published_batch = random_batch(all_views, resolution, rows, torch.Generator().manual_seed(0))
    views = published_batch.views
    used_views = dataclasses.replace(
        views,
        second_image=views.second_image if objectives.needs_second_view else None,
        simclr_images=views.simclr_images if objectives.needs_simclr_views else None,
    )
    our_batch = dataclasses.replace(published_batch, views=used_views)

    def published() -> dict[str, torch.Tensor]:
        published_model.zero_grad(set_to_none=True)
        moved = published_batch.to(setup.device)
        with setup.precision.autocast():
            weighted = baseline.step_losses(published_model, moved.views, moved.identities, ALPHA, objectives)
        sum(weighted.values()).backward()
        for loss in weighted.values():
            loss.item()  # the published code prints it in each iteration
        return weighted

    def ours() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        moved = our_batch.to(setup.device)
        with setup.precision.autocast():
            features = model(moved.views, soft_labels=True)
        weighted = objectives(features, moved.identities, ALPHA)
        sum(weighted.values()).backward()
        return weighted

    return published, ours, model, published_model


def check_steps(setup: Setup, recipe: str) -> str:
    """Compares losses and gradients of both ways in float32, and returns a line about their difference.

    Raises AssertionError if the baseline computes something else.
    """
    exact = dataclasses.replace(setup, precision=Precision("fp32", setup.device.type))
    published, ours, model, published_model = build_steps(exact, recipe, 4)
    expected, found = published(), ours()
    assert expected.keys() == found.keys()
    loss = max(abs(found[name].item() / expected[name].item() - 1) for name in expected)
    found_gradients = baseline.from_ours(
        {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    )
    parameters = dict(published_model.named_parameters())
    names = sorted(found_gradients)
    found_vector = torch.cat([found_gradients[name].flatten() for name in names])
    expected_vector = torch.cat([parameters[name].grad.flatten() for name in names])
    gradient = ((expected_vector - found_vector).norm() / expected_vector.norm()).item()
    assert loss < 1e-4 and gradient < 1e-3, f"{recipe}: losses differ by {loss:.1e}, gradients by {gradient:.1e}"
    return f"{recipe}: losses agree within {loss:.1e}, the gradient within {gradient:.1e} of its length"


def bench_step(setup: Setup) -> Iterator[Comparison]:
    """Times a training step, after a check that both ways compute the same."""
    for recipe in RECIPES:
        show(check_steps(setup, recipe))
        published, ours, *_ = build_steps(setup.with_dropout(), recipe, setup.batch)
        yield in_turn(f"training step, {recipe}, batch {setup.batch}", published, ours, setup.rounds)


def bench_flops(setup: Setup) -> Iterator[Comparison]:
    """Counts the FLOPs of the forward and backward pass, with attention as matrix products, which can be counted."""
    exact = dataclasses.replace(setup.with_dropout(), precision=Precision("fp32", setup.device.type))
    for recipe in RECIPES:
        totals = []
        for step in build_steps(exact, recipe, 2)[:2]:
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                step()
            totals.append(counter.get_total_flops() / 2e9)
        yield counted(f"FLOPs of a step and sample, {recipe}", *totals, "GFLOP")


def bench_optimizer(setup: Setup) -> Iterator[Comparison]:
    """Times a step of the optimizer."""
    config, _, model = setup.recipe("full")
    schedule = config.schedule
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3) if parameter.requires_grad else None
    groups = parameter_groups(model, weight_decay=schedule.weight_decay, head_ratio=schedule.ratio_factor)
    settings = {"betas": tuple(schedule.betas), "eps": schedule.eps}
    published = baseline.optimizer(model, weight_decay=schedule.weight_decay, **settings)
    ours = build_optimizer(groups, **settings)
    yield in_turn("optimizer step, full", published.step, ours.step, 5 * setup.rounds)


def bench_loader(setup: Setup) -> Iterator[Comparison]:
    """Measures the processor time of one thread for loading a batch, from images of 150 × 400 pixels."""
    with tempfile.TemporaryDirectory() as folder:
        split = write_images(Path(folder), 48)
        torch.set_num_threads(1)
        for recipe, on_device in (("full", False), ("full", True), ("simplified", False)):
            experiment = setup.configuration(recipe).experiment
            resolution = tuple(experiment.input_resolution)
            augmentation = baseline.PublishedAugmentation(resolution)
            dataset = TrainingSet(
                split,
                Path(folder),
                Tokenizer(),
                Augmentation(
                    resolution=resolution,
                    text_length=experiment.text_length,
                    second_view=experiment.mvs_image,
                    second_caption=False,
                    simclr_views=experiment.ss,
                    simclr_captions=False,
                    masked_captions=False,
                    image_operations=experiment.image_operations,
                    image_pool=experiment.image_pool,
                    back_translation_probability=0.0,
                    text_operation="random_deletion",
                    text_strength=experiment.eda_alpha,
                    simclr_on_device=on_device,
                ),
                seed=1,
            )

            epochs = itertools.count()

            def published(augmentation=augmentation) -> None:
                views = [augmentation(Path(folder) / path) for path in split.image_paths]
                for view in zip(*views, strict=True):
                    torch.stack(view)

            def ours(dataset=dataset, epochs=epochs) -> None:
                epoch = next(epochs)
                collate([dataset[Draw(epoch, index)] for index in range(len(split))])

            name = f"loading 48 samples, {recipe}" + (", colours on the device" if on_device else "")
            yield in_turn(name, published, ours, setup.rounds, time.process_time)


def write_images(folder: Path, count: int) -> Split:
    """Writes JPEG files with the detail of photographs, and returns them as a split with random captions."""
    random = np.random.RandomState(0)
    for number in range(count):
        coarse = Image.fromarray(random.randint(0, 256, (25, 10, 3), dtype=np.uint8)).resize((150, 400), Image.BICUBIC)
        noisy = np.asarray(coarse, dtype=np.int16) + random.randint(-12, 13, (400, 150, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
    captions = random_captions(count)
    return Split(
        [f"{n}.jpg" for n in range(count)], list(range(count)), captions, [None] * count, list(range(count)), captions
    )


def random_captions(count: int) -> list[str]:
    """Returns captions of 25 random words, about as long and as varied as those of CUHK-PEDES."""
    random = np.random.RandomState(0)
    words = WORDS.split()
    return [" ".join(random.choice(words, 25)) for _ in range(count)]


def bench_evaluation(setup: Setup) -> Iterator[Comparison]:
    """Times the encoding of images and captions, then the ranking without encoding."""
    config, _, model = setup.recipe("simplified")
    published_model = baseline.Baseline(model).to(setup.device)
    rows = 4 * setup.batch
    images = torch.randn(rows, 3, *config.experiment.input_resolution).to(setup.device)
    tokenizer = Tokenizer()
    ids = [torch.tensor(tokenizer.encode(caption)) for caption in random_captions(rows)]
    token_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(setup.device)

    def encoding(encode: Callable, inputs: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad(), setup.precision.autocast():
                encode(inputs)

        return run

    for name, inputs in (("image", images), ("text", token_ids)):
        pair = (encoding(getattr(each.eval(), f"encode_{name}"), inputs) for each in (published_model, model))
        yield in_turn(f"encoding {rows} {name}s for evaluation", *pair, setup.rounds)
    for queries, gallery in RETRIEVALS:
        data = random_retrieval(queries, gallery)
        ours = metrics.summarise(metrics.rank_queries(*data))
        if queries * gallery < 1e8:
            expected = baseline.rank_metrics(*data)
            assert all(abs(ours[name] - value) < 1e-3 for name, value in expected.items()), (ours, expected)
        yield in_turn(
            f"ranking {queries:,} queries × {gallery:,} images",
            lambda data=data: baseline.rank_metrics(*data),
            lambda data=data: metrics.summarise(metrics.rank_queries(*data)),
            setup.rounds if queries * gallery < 1e8 else 1,
        )


def random_retrieval(queries: int, gallery: int) -> tuple[torch.Tensor, ...]:
    """Returns random features of queries and gallery, then their identities: about four images per person."""
    generator = torch.Generator().manual_seed(0)
    encoded = [F.normalize(torch.randn(count, 512, generator=generator), dim=1) for count in (queries, gallery)]
    identities = [torch.randint(gallery // 4, (count,), generator=generator) for count in (queries, gallery)]
    return *encoded, *identities


def bench_tokenizer(setup: Setup) -> Iterator[Comparison]:
    """Times the tokenizer next to open_clip's, which is OpenAI's code: first with new words, then with known ones."""
    from open_clip.tokenizer import SimpleTokenizer

    captions = random_captions(2_000)
    yield in_turn(
        "tokenizing 2,000 captions",
        lambda: SimpleTokenizer()(captions),
        lambda: encode_all(Tokenizer(), captions),
        setup.rounds,
    )
    published, ours = SimpleTokenizer(), Tokenizer()
    yield in_turn(
        "tokenizing them again", lambda: published(captions), lambda: encode_all(ours, captions), setup.rounds
    )


def encode_all(tokenizer: Tokenizer, captions: list[str]) -> None:
    for caption in captions:
        tokenizer.encode(caption)


def bench_changes(setup: Setup) -> Iterator[Comparison]:
    """Times each change by itself: its part of the work before and after, forward and backward, in the full recipe."""
    config, objectives, model = setup.recipe("full")
    published_model = baseline.Baseline(model).to(setup.device).train()
    resolution = tuple(config.experiment.input_resolution)
    batch = random_batch(objectives, resolution, setup.batch, torch.Generator().manual_seed(0))
    views = batch.to(setup.device).views
    images = [views.image, views.second_image, *views.simclr_images]
    padded = F.pad(views.token_ids, (0, baseline.TEXT_LENGTH - views.token_ids.shape[1]))
    encoder, blocks = model.image_encoder, model.image_encoder.transformer
    tokens = torch.randn(setup.batch, encoder.positional_embedding.shape[0], blocks.width, device=setup.device)
    first_token = torch.zeros(setup.batch, dtype=torch.int64, device=setup.device)

    def with_backward(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            with setup.precision.autocast():
                encoded = forward()
            encoded.float().square().mean().backward()

        return run

    def soft_labels_recomputed() -> torch.Tensor:
        with torch.no_grad():
            encoder(views.image)
        return encoder(views.image)

    compiled = torch.compile(encoder)
    pairs = {
        "attention that keeps no weights, one block": (
            lambda: published_model.visual.transformer.resblocks[0](tokens.transpose(0, 1), None),
            lambda: blocks.resblocks[0](tokens),
        ),
        "the last block at one token, image encoder": (
            lambda: blocks(tokens)[:, 0],
            lambda: blocks.pooled(tokens, first_token),
        ),
        "soft labels from the features, one view": (soft_labels_recomputed, lambda: encoder(views.image)),
        "four views in one pass": (
            lambda: torch.cat([encoder(view) for view in images]),
            lambda: encoder(torch.cat(images)),
        ),
        "captions without padding, text encoder": (
            lambda: model.text_encoder(padded),
            lambda: model.text_encoder(views.token_ids),
        ),
        "compilation, image encoder": (lambda: encoder(views.image), lambda: compiled(views.image)),
    }
    for name, pair in pairs.items():
        yield in_turn(name, *map(with_backward, pair), setup.rounds)
    captions, tokenizer = random_captions(2_000), Tokenizer()
    known = {caption: tokenizer.encode(caption) for caption in captions}
    yield in_turn(
        "cached tokens, 2,000 captions",
        lambda: encode_all(tokenizer, captions),
        lambda: [known[caption] for caption in captions],
        setup.rounds,
    )


def bench_memory(setup: Setup) -> Iterator[Comparison]:
    """Measures in a separate process how far the work raises the peak memory."""
    works = [(f"memory of a step, {recipe}, batch {setup.batch}", step_memory, (setup, recipe)) for recipe in RECIPES]
    works += [(f"memory of ranking {q:,} × {n:,}", ranking_memory, (q, n)) for q, n in RETRIEVALS]
    for name, work, arguments in works:
        peaks = []
        for way in (0, 1):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                peaks.append(pool.submit(work, way, *arguments).result())
        yield counted(name, *peaks, "GB")


def step_memory(way: int, setup: Setup, recipe: str) -> float:
    """Returns by how much a training step raises the peak memory, in 10⁹ bytes; way 0 is the published one, 1 ours."""
    step = build_steps(setup, recipe, setup.batch)[way]
    before = peak_memory_gigabytes(setup.device)
    step()
    return max(peak_memory_gigabytes(setup.device) - before, 1e-3)


def ranking_memory(way: int, queries: int, gallery: int) -> float:
    """Returns by how much the ranking raises the peak memory, in 10⁹ bytes; way 0 is the published one, 1 ours."""
    data = random_retrieval(queries, gallery)
    before = peak_memory_gigabytes(torch.device("cpu"))
    (baseline.rank_metrics, metrics.rank_queries)[way](*data)
    return max(peak_memory_gigabytes(torch.device("cpu")) - before, 1e-3)


BENCHMARKS: dict[str, Callable[[Setup], Iterator[Comparison]]] = {
    "flops": bench_flops,
    "step": bench_step,
    "optimizer": bench_optimizer,
    "evaluation": bench_evaluation,
    "tokenizer": bench_tokenizer,
    "memory": bench_memory,
    "changes": bench_changes,
    "loader": bench_loader,  # last: it sets the number of threads
}


def main() -> int:
    """Runs the benchmarks of the command line. Returns the exit status: 0, or 2 for a mistake of the user."""
    prepare_streams()
    arguments = parse_arguments()
    try:
        run_benchmarks(arguments.only, build_setup(arguments), arguments.json)
    except UserError as error:
        report(f"error: {error}")
        return 2
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS)
    )
    parser.add_argument("--batch", type=int, metavar="N", help="samples in a step (default: 80 on a GPU, 4 on a CPU)")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one) | cpu | cuda | cuda:N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed runs of each way (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements to this file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example model.vision_layers=2")
    return parser.parse_intermixed_args()


def build_setup(arguments: argparse.Namespace) -> Setup:
    """Returns the settings of the command line. Raises UserError if one of them is invalid."""
    device = choose_device(arguments.device)
    if arguments.precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16: it needs a GPU, and this device is a CPU: give --precision auto")
    batch = (80 if device.type == "cuda" else 4) if arguments.batch is None else arguments.batch
    check_positive("--batch", batch)
    check_positive("--rounds", arguments.rounds)
    check_output_file("--json", arguments.json)
    precision = Precision.choose(arguments.precision, device)
    setup = Setup(device, precision, batch, arguments.rounds, tuple(arguments.overrides))
    for recipe in RECIPES:
        setup.configuration(recipe)  # raises before anything is measured
    return setup


def run_benchmarks(names: list[str], setup: Setup, output: Path | None) -> None:
    """Prints the results of the named benchmarks, and writes them to a JSON file."""
    device = setup.device
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor()} CPU",
        "threads": torch.get_num_threads(),
        "precision": setup.precision.name,
        "torch": torch.__version__,
    }
    show(", ".join(f"{key} {value}" for key, value in machine.items()))
    show(HEADER)
    rows = []
    for name in names:
        for row in BENCHMARKS[name](setup):
            show(row.line())
            rows.append({"benchmark": name, **dataclasses.asdict(row)})
    if output:
        output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")
