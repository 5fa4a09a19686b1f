"""How fast this code is, beside the published way of doing the same work: `make bench`.

python -m benchmarks [--only NAME ...] [--batch N] [--precision P] [--device D] [--rounds N] [--json FILE] [key=value]

Both ways run in turn in one process; medians and ratios are printed. Before a step is timed, its losses and gradients
are compared with the baseline's.
"""

import argparse
import dataclasses
import json
import multiprocessing
import platform
import tempfile
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
from misc.build.architecture import resolve_architecture
from misc.build.model import build_model
from misc.build.training import build_objectives
from misc.config.loading import load_config
from misc.data.annotations import Split
from misc.data.batches import collate
from misc.data.sampler import Draw
from misc.data.samples import Augmentation, TrainingSet
from misc.retrieval import metrics
from misc.run.profiling import peak_memory_gigabytes
from misc.system.distributed import Ranks
from misc.system.precision import Precision
from misc.training.optimizer import build_optimizer, parameter_groups
from model.objectives import Objectives
from model.tbps_clip import TBPSCLIP
from text_utils.tokenizer import Tokenizer

RECIPES = {"full": False, "simplified": True}
RETRIEVALS = ((6_156, 3_074), (20_000, 20_000))
"""Queries and gallery images: CUHK-PEDES, and the size of a large one."""
ALPHA = 0.3
"""Weight of the soft labels."""
WORDS = (
    "man woman wearing red blue grey dark green white black shirt trousers shoes backpack carrying holding bag with "
    "short long hair sleeved striped walking"
)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is measured with."""

    device: torch.device
    precision: Precision
    batch: int
    rounds: int
    overrides: tuple[str, ...] = ()

    def configuration(self, recipe: str) -> EasyDict:
        """A recipe, without dropout so that both ways compute the same."""
        own = (f"data.batch_size={self.batch}", "model.checkpoint=null", "experiment.dropout=0", *self.overrides)
        return resolve_architecture(load_config(simplified=RECIPES[recipe], overrides=own), None)

    def recipe(self, name: str) -> tuple[EasyDict, Objectives, TBPSCLIP]:
        """Its configuration, its losses, and its model with random weights."""
        merged = self.configuration(name)
        objectives = build_objectives(merged, Ranks(0, 1, self.device))
        model, _ = build_model(merged, objectives, IDENTITIES, weights=None)
        return merged, objectives, model.to(self.device).train()


def steps(
    setup: Setup, recipe: str, rows: int
) -> tuple[Callable[[], dict], Callable[[], dict], TBPSCLIP, baseline.Baseline]:
    """A training step without the optimizer, the published way and ours, and their models. A step gives its losses."""
    merged, objectives, model = setup.recipe(recipe)
    other = baseline.Baseline(model).to(setup.device).train()
    everything = dataclasses.replace(objectives, mvs_image=True, ss=True)  # the baseline moves all views
    batch = random_batch(everything, tuple(merged.experiment.input_resolution), rows, torch.Generator().manual_seed(0))
    views = batch.views
    used = dataclasses.replace(
        views,
        second_image=views.second_image if objectives.needs_second_view else None,
        simclr_images=views.simclr_images if objectives.needs_simclr_views else None,
    )
    own = dataclasses.replace(batch, views=used)

    def published() -> dict[str, torch.Tensor]:
        other.zero_grad(set_to_none=True)
        moved = batch.to(setup.device)
        with setup.precision.autocast():
            weighted = baseline.step_losses(other, moved.views, moved.identities, ALPHA, objectives)
        sum(weighted.values()).backward()
        for loss in weighted.values():
            loss.item()  # printed in each iteration
        return weighted

    def ours() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        moved = own.to(setup.device)
        with setup.precision.autocast():
            features = model(moved.views)
        weighted = objectives(features, moved.identities, ALPHA)
        sum(weighted.values()).backward()
        return weighted

    return published, ours, model, other


def check_steps(setup: Setup, recipe: str) -> str:
    """Compares losses and gradients in float32. Raises AssertionError where the baseline computes something else."""
    exact = dataclasses.replace(setup, precision=Precision("fp32", setup.device.type))
    published, ours, model, other = steps(exact, recipe, 4)
    expected, found = published(), ours()
    assert expected.keys() == found.keys()
    loss = max(abs(found[name].item() / expected[name].item() - 1) for name in expected)
    own = baseline.from_ours(
        {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    )
    theirs = {name: parameter.grad for name, parameter in other.named_parameters() if name in own}
    pairs = [torch.cat([grads[name].flatten() for name in sorted(own)]) for grads in (theirs, own)]
    gradient = ((pairs[0] - pairs[1]).norm() / pairs[0].norm()).item()
    assert loss < 1e-4 and gradient < 1e-3, f"{recipe}: losses differ by {loss:.1e}, gradients by {gradient:.1e}"
    return f"{recipe}: losses agree within {loss:.1e}, the gradient within {gradient:.1e} of its length"


def bench_step(setup: Setup) -> Iterator[Comparison]:
    for recipe in RECIPES:
        print(check_steps(setup, recipe), flush=True)
        published, ours, *_ = steps(setup, recipe, setup.batch)
        yield in_turn(f"training step, {recipe}, batch {setup.batch}", published, ours, setup.rounds)


def bench_flops(setup: Setup) -> Iterator[Comparison]:
    """Of forward and backward pass, counted; attention by matrix products, which is how it can be counted."""
    exact = dataclasses.replace(setup, precision=Precision("fp32", setup.device.type))
    for recipe in RECIPES:
        totals = []
        for step in steps(exact, recipe, 2)[:2]:
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                step()
            totals.append(counter.get_total_flops() / 2e9)
        yield counted(f"FLOPs of a step and sample, {recipe}", *totals, "GFLOP")


def bench_optimizer(setup: Setup) -> Iterator[Comparison]:
    merged, _, model = setup.recipe("full")
    schedule = merged.schedule
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3) if parameter.requires_grad else None
    groups = parameter_groups(model, weight_decay=schedule.weight_decay, head_ratio=schedule.ratio_factor)
    settings = {"betas": tuple(schedule.betas), "eps": schedule.eps}
    published = baseline.optimizer(model, weight_decay=schedule.weight_decay, **settings)
    ours = build_optimizer(groups, **settings)
    yield in_turn("optimizer step, full", published.step, ours.step, 5 * setup.rounds)


def bench_loader(setup: Setup) -> Iterator[Comparison]:
    """Of one core: images of 150 × 400 pixels to a batch."""
    with tempfile.TemporaryDirectory() as folder:
        split = write_images(Path(folder), 48)
        torch.set_num_threads(1)
        for recipe in RECIPES:
            merged = setup.configuration(recipe)
            experiment = merged.experiment
            everything = baseline.PublishedAugmentation(tuple(merged.experiment.input_resolution))
            dataset = TrainingSet(
                split,
                Path(folder),
                Tokenizer(),
                Augmentation(
                    resolution=tuple(merged.experiment.input_resolution),
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
                ),
                seed=1,
            )

            def published(everything=everything) -> None:
                views = [everything(Path(folder) / path) for path in split.image_paths]
                for view in zip(*views, strict=True):
                    torch.stack(view)

            def ours(dataset=dataset) -> None:
                collate([dataset[Draw(0, index)] for index in range(len(split))])

            yield in_turn(f"loading 48 samples on one core, {recipe}", published, ours, setup.rounds)


def write_images(folder: Path, count: int) -> Split:
    """JPEGs with the detail of photographs, and captions."""
    random = np.random.RandomState(0)
    for number in range(count):
        coarse = Image.fromarray(random.randint(0, 256, (25, 10, 3), dtype=np.uint8)).resize((150, 400), Image.BICUBIC)
        noisy = np.asarray(coarse, dtype=np.int16) + random.randint(-12, 13, (400, 150, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
    captions = captions_of(count)
    return Split([f"{n}.jpg" for n in range(count)], list(range(count)), captions, [None] * count, list(range(count)))


def captions_of(count: int) -> list[str]:
    """As long and as varied as those of CUHK-PEDES, about 25 words."""
    random = np.random.RandomState(0)
    words = WORDS.split()
    return [" ".join(random.choice(words, 25)) for _ in range(count)]


def bench_evaluation(setup: Setup) -> Iterator[Comparison]:
    """Encoding of images and captions, then the ranking alone."""
    merged, _, model = setup.recipe("simplified")
    other = baseline.Baseline(model).to(setup.device)
    rows = 4 * setup.batch
    images = torch.randn(rows, 3, *merged.experiment.input_resolution).to(setup.device)
    tokenizer = Tokenizer()
    ids = [torch.tensor(tokenizer.encode(caption)) for caption in captions_of(rows)]
    token_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(setup.device)

    def encoding(encode: Callable, inputs: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad(), setup.precision.autocast():
                encode(inputs)

        return run

    for name, inputs in (("image", images), ("text", token_ids)):
        pair = (encoding(getattr(m.eval(), f"encode_{name}"), inputs) for m in (other, model))
        yield in_turn(f"encoding {rows} {name}s for evaluation", *pair, setup.rounds)
    for queries, gallery in RETRIEVALS:
        data = retrieval(queries, gallery)
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


def retrieval(queries: int, gallery: int) -> tuple[torch.Tensor, ...]:
    """Features of random directions, four images of each person."""
    generator = torch.Generator().manual_seed(0)
    encoded = [F.normalize(torch.randn(count, 512, generator=generator), dim=1) for count in (queries, gallery)]
    identities = [torch.randint(gallery // 4, (count,), generator=generator) for count in (queries, gallery)]
    return *encoded, *identities


def bench_tokenizer(setup: Setup) -> Iterator[Comparison]:
    """Against open_clip's, which is OpenAI's code; new words and such as were seen before."""
    from open_clip.tokenizer import SimpleTokenizer

    captions = captions_of(2_000)
    yield in_turn(
        "tokenizing 2,000 captions",
        lambda: SimpleTokenizer()(captions),
        lambda: encode_all(Tokenizer(), captions),
        setup.rounds,
    )
    theirs, ours = SimpleTokenizer(), Tokenizer()
    yield in_turn(
        "tokenizing them once more", lambda: theirs(captions), lambda: encode_all(ours, captions), setup.rounds
    )


def encode_all(tokenizer: Tokenizer, captions: list[str]) -> None:
    for caption in captions:
        tokenizer.encode(caption)


def bench_changes(setup: Setup) -> Iterator[Comparison]:
    """Each change alone: a part of the work before and after it, forward and backward, in the full recipe."""
    merged, objectives, model = setup.recipe("full")
    other = baseline.Baseline(model).to(setup.device).train()
    everything = random_batch(
        objectives, tuple(merged.experiment.input_resolution), setup.batch, torch.Generator().manual_seed(0)
    )
    views = everything.to(setup.device).views
    images = [views.image, views.second_image, *views.simclr_images]
    padded = F.pad(views.token_ids, (0, baseline.TEXT_LENGTH - views.token_ids.shape[1]))
    encoder, blocks = model.image_encoder, model.image_encoder.transformer
    tokens = torch.randn(setup.batch, encoder.positional_embedding.shape[0], blocks.width, device=setup.device)
    first = torch.zeros(setup.batch, dtype=torch.int64, device=setup.device)

    def back(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
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
            lambda: other.visual.transformer.resblocks[0](tokens.transpose(0, 1), None),
            lambda: blocks.resblocks[0](tokens),
        ),
        "the last block at one token, image encoder": (
            lambda: blocks(tokens)[:, 0],
            lambda: blocks.pooled(tokens, first),
        ),
        "soft labels from the features, one view": (soft_labels_recomputed, lambda: encoder(views.image)),
        "four views in one pass": (
            lambda: torch.cat([encoder(view) for view in images]),
            lambda: encoder(torch.cat(images)),
        ),
        "captions as long as they are": (
            lambda: model.text_encoder(padded),
            lambda: model.text_encoder(views.token_ids),
        ),
        "compilation, image encoder": (lambda: encoder(views.image), lambda: compiled(views.image)),
    }
    for name, pair in pairs.items():
        yield in_turn(name, *map(back, pair), setup.rounds)
    captions, tokenizer = captions_of(2_000), Tokenizer()
    known = {caption: tokenizer.encode(caption) for caption in captions}
    yield in_turn(
        "cached tokens, 2,000 captions",
        lambda: encode_all(tokenizer, captions),
        lambda: [known[caption] for caption in captions],
        setup.rounds,
    )


def bench_memory(setup: Setup) -> Iterator[Comparison]:
    """Peak of a process of its own, beyond what it had before the work."""
    works = [(f"memory of a step, {recipe}, batch {setup.batch}", step_memory, (setup, recipe)) for recipe in RECIPES]
    works += [(f"memory of ranking {q:,} × {n:,}", ranking_memory, (q, n)) for q, n in RETRIEVALS]
    for name, work, arguments in works:
        peaks = []
        for which in (0, 1):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                peaks.append(pool.submit(work, which, *arguments).result())
        yield counted(name, *peaks, "GB")


def step_memory(which: int, setup: Setup, recipe: str) -> float:
    step = steps(setup, recipe, setup.batch)[which]
    before = peak_memory_gigabytes(setup.device)
    step()
    return max(peak_memory_gigabytes(setup.device) - before, 1e-3)


def ranking_memory(which: int, queries: int, gallery: int) -> float:
    data = retrieval(queries, gallery)
    before = peak_memory_gigabytes(torch.device("cpu"))
    (baseline.rank_metrics, metrics.rank_queries)[which](*data)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="NAME")
    parser.add_argument("--batch", type=int, help="default: 80 on a GPU, 4 on a CPU")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was measured there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    arguments = parser.parse_intermixed_args()
    device = torch.device(arguments.device)
    batch = arguments.batch or (80 if device.type == "cuda" else 4)
    setup = Setup(
        device, Precision.choose(arguments.precision, device), batch, arguments.rounds, tuple(arguments.overrides)
    )
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor()} CPU",
        "threads": torch.get_num_threads(),
        "precision": setup.precision.name,
        "torch": torch.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(HEADER)
    rows = []
    for name in arguments.only:
        for row in BENCHMARKS[name](setup):
            print(row.line(), flush=True)
            rows.append({"benchmark": name, **dataclasses.asdict(row)})
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
