"""Speed and memory on a GPU: steps beside the published way, levers, chunks, encoding, loading."""

import contextlib
import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import baseline
from benchmarks.chunks import random_batch
from benchmarks.gpu.context import Context, Row
from benchmarks.suite import RECIPES, Setup, build_steps, write_images
from misc.builders.data import build_loader
from misc.builders.training import build_trainer
from misc.data.batches import Batch, batches
from misc.run.log import RunLog
from misc.run.progress import Progress
from misc.system.precision import FORMATS
from misc.system.prefetch import prefetched
from model.objectives import Objectives, total
from model.transformer import QuickGELU
from text_utils.tokenizer import Tokenizer


def machine(context: Context) -> Iterator[Row]:
    """Describes the machine, and measures its two limits: matrix products, and copies within its memory."""
    size, copied = context.choose((8192, 2**30), (256, 2**20))
    form = FORMATS[context.precision.name]
    first, second = (torch.randn(size, size, device=context.device, dtype=form) for _ in range(2))
    seconds = seconds_of(context, lambda: first @ second, 10)
    context.matrix_rate = 2 * size**3 / seconds
    source = torch.empty(copied, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    rate = 2 * copied / seconds_of(context, lambda: target.copy_(source), 10)
    yield {
        "name": torch.cuda.get_device_name(context.device) if context.on_gpu else "CPU",
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "gpus": torch.cuda.device_count(),
        "matrix_teraflops": context.matrix_rate / 1e12,
        "copy_gigabytes_per_second": rate / 1e9,
    }


def seconds_of(context: Context, work: Callable[[], object], count: int) -> float:
    """Returns the mean time of `count` calls, after three to warm up (one on a CPU)."""
    for _ in range(context.choose(3, 1)):
        work()
    context.synchronise()
    started = time.perf_counter()
    count = context.choose(count, 1)
    for _ in range(count):
        work()
    context.synchronise()
    return (time.perf_counter() - started) / count


@contextlib.contextmanager
def memory_errors_as_rows(rows: list[Row], name: str) -> Iterator[None]:
    """Notes an exhausted GPU memory as a row, and frees the memory afterwards."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        rows.append({"name": name, "error": "out of memory"})
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- steps beside the published way ----------------------------------------------------------------------------------


def steps(context: Context) -> Iterator[Row]:
    """Times forward and backward passes of the published way and of this code in turn, without dropout.

    `share` is the number of operations of a way in a second, divided by the measured rate of matrix products.
    """
    operations = {recipe: _operations(context, recipe) for recipe in RECIPES}
    for batch, recipe in itertools.product(context.choose((80, 320), (2,)), RECIPES):
        rows: list[Row] = []
        with memory_errors_as_rows(rows, f"{recipe}, batch {batch}"):
            rows += _steps_in_turn(context, recipe, batch, operations[recipe])
        yield from rows


def _steps_in_turn(context: Context, recipe: str, batch: int, operations: dict[str, float]) -> list[Row]:
    setup = Setup(context.device, context.precision, batch, 1, context.overrides)
    rows: list[Row] = []
    published, ours, model, published_model = build_steps(setup, recipe, batch)
    ways = {"published": published, "ours": ours}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, float] = {}
    for turn in range(context.choose(4, 1)):
        for name, step in list(ways.items()):
            with memory_errors_as_rows(rows, f"{recipe}, batch {batch}, {name}"):
                before = _start_measuring_memory(context)
                seconds[name].append(seconds_of(context, step, 3))
                memory[name] = _peak_since(context, before)
            if turn == 0 and not seconds[name]:
                del ways[name]
            (model if name == "ours" else published_model).zero_grad(set_to_none=True)
    for name in ways:
        taken = min(seconds[name])
        rows.append(
            {
                "name": f"{recipe}, batch {batch}, {name}",
                "samples_per_second": batch / taken,
                "gigabytes": memory[name],
                "share": operations[name] * batch / taken / context.matrix_rate,
            }
        )
    if len(ways) == 2:
        ratio = min(seconds["published"]) / min(seconds["ours"])
        rows.append({"name": f"{recipe}, batch {batch}, ours / published", "ratio": ratio})
    return rows


def _operations(context: Context, recipe: str) -> dict[str, float]:
    """Counts the floating-point operations of a sample, forward and backward."""
    setup = Setup(torch.device("cpu"), dataclasses.replace(context.precision, name="fp32", device_type="cpu"), 2, 1)
    setup = dataclasses.replace(setup, overrides=context.overrides)
    counts = []
    for step in build_steps(setup, recipe, 2)[:2]:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            step()
        counts.append(counter.get_total_flops() / 2)
    return {"published": counts[0], "ours": counts[1]}


def _start_measuring_memory(context: Context) -> int:
    if not context.on_gpu:
        return 0
    torch.cuda.reset_peak_memory_stats(context.device)
    return torch.cuda.memory_allocated(context.device)


def _peak_since(context: Context, before: int) -> float:
    """Returns by how much the peak has risen, in 10⁹ bytes; 0 on a CPU."""
    return (torch.cuda.max_memory_allocated(context.device) - before) / 1e9 if context.on_gpu else 0.0


# ---- levers ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Levers:
    """What makes a training step faster; all are off by default.

    Attributes:
        quick_gelu: QuickGELU that keeps one tensor, instead of the published formula.
        compile: `misc.compile`.
        prefetch: copies a batch while the previous one is computed.
        tf32: rounds the inputs of float32 matrix products to TF32.
        no_wait: does not read the losses after each step.
    """

    quick_gelu: bool = False
    compile: bool = False
    prefetch: bool = False
    tf32: bool = False
    no_wait: bool = False


LEVERS = tuple(field.name for field in dataclasses.fields(Levers))
DEFAULT = Levers(quick_gelu=True, prefetch=True, no_wait=True)
"""What a training uses without `misc.compile`."""


def levers(context: Context) -> Iterator[Row]:
    """Times whole training steps, the optimizer and the copy of the batch included, with each lever alone."""
    batch = context.choose(80, 2)
    variants = {"none": Levers(), "default": DEFAULT, "all": Levers(*[True] * len(LEVERS))}
    variants |= {name: Levers(**{name: True}) for name in LEVERS}
    if not context.on_gpu:
        variants = {name: dataclasses.replace(variants[name], compile=False) for name in ("none", "all")}
    first: dict[str, float] = {}
    for recipe in RECIPES:
        for name, chosen in variants.items():
            for row in training_steps(context, f"{recipe}, batch {batch}, {name}", recipe, batch, None, chosen):
                if "samples_per_second" in row:
                    row["gain"] = row["samples_per_second"] / first.setdefault(recipe, row["samples_per_second"])
                yield row
        if recipe == "full":
            yield from training_steps(context, f"full, batch {batch}, none again", recipe, batch, None, Levers())


def chunk_sizes(context: Context) -> Iterator[Row]:
    """Times whole training steps of one batch, encoded in chunks."""
    batch = context.choose(320, 8)
    for compiled in (False, True) if context.on_gpu else (False,):
        for chunk in context.choose((320, 160, 80, 40, 20), (8, 4)):
            title = f"full, batch {batch}, chunks of {chunk}" + (", compiled" if compiled else "")
            chosen = dataclasses.replace(DEFAULT, compile=compiled)
            yield from training_steps(context, title, "full", batch, chunk, chosen)


def training_steps(
    context: Context, name: str, recipe: str, batch: int, chunk: int | None, chosen: Levers
) -> list[Row]:
    """Times steps of the trainer, with dropout; the batch comes from pinned memory."""
    rows: list[Row] = []
    with memory_errors_as_rows(rows, name), _applied(chosen):
        warm_up, timed = context.choose((4, 10), (1, 1))
        overrides = (
            *context.overrides,
            "experiment.dropout=0.05",
            f"data.chunk_size={'null' if chunk is None else chunk}",
            f"misc.compile={str(chosen.compile).lower()}",
        )
        setup = Setup(context.device, context.precision, batch, 1, overrides)
        with context.device:  # drawing the weights on the CPU takes seconds
            config, objectives, model = setup.recipe(recipe)
        trainer = build_trainer(config, model, objectives, warm_up + timed, context.precision, context.ranks)
        own = _pinned_batch(objectives, tuple(config.experiment.input_resolution), batch, context.on_gpu)
        stream = itertools.repeat(own, warm_up + timed)
        moved = prefetched(stream, context.device, trainer.move) if chosen.prefetch else stream
        started = compiling = time.perf_counter()
        before = 0
        for number, each in enumerate(moved):
            if number == warm_up:
                context.synchronise()
                before, started = _start_measuring_memory(context), time.perf_counter()
            losses = trainer.step(each, number, warm_up + timed)
            if not chosen.no_wait:
                total(losses).item()
        context.synchronise()
        rows.append(
            {
                "name": name,
                "samples_per_second": batch * timed / (time.perf_counter() - started),
                "gigabytes": _peak_since(context, before),
                "warm_up_seconds": started - compiling,
            }
        )
    return rows


@functools.lru_cache(maxsize=1)
def _pinned_batch(objectives: Objectives, resolution: tuple[int, int], rows: int, pinned: bool) -> Batch:
    batch = random_batch(objectives, resolution, rows, torch.Generator().manual_seed(0))
    return batch.pin_memory() if pinned else batch


@contextlib.contextmanager
def _applied(chosen: Levers) -> Iterator[None]:
    published = patch.object(QuickGELU, "forward", baseline.QuickGELU.forward)
    precision = torch.get_float32_matmul_precision()
    torch._dynamo.reset()
    torch.set_float32_matmul_precision("high" if chosen.tf32 else "highest")
    try:
        with contextlib.nullcontext() if chosen.quick_gelu else published:
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


# ---- evaluation and loading -----------------------------------------------------------------------------------------


def encoding(context: Context) -> Iterator[Row]:
    """Times the encoding of images and captions for evaluation, in turn with the published way."""
    rows = context.choose(256, 2)
    setup = Setup(context.device, context.precision, rows, 1, context.overrides)
    config, objectives, model = setup.recipe("simplified")
    batch = random_batch(objectives, tuple(config.experiment.input_resolution), rows, torch.Generator().manual_seed(0))
    views = batch.to(context.device).views
    models = {"published": baseline.Baseline(model).to(context.device).eval(), "ours": model.eval()}
    for kind, inputs in (("image", views.image), ("text", views.token_ids)):
        rates = {}
        for name, encoder in models.items():

            def encode(encoder: torch.nn.Module = encoder, kind: str = kind, inputs: torch.Tensor = inputs) -> None:
                with torch.no_grad(), setup.precision.autocast():
                    getattr(encoder, f"encode_{kind}")(inputs)

            rates[name] = rows / min(seconds_of(context, encode, 10) for _ in range(context.choose(3, 1)))
            yield {"name": f"encoding {kind}s, {name}", "samples_per_second": rates[name]}
        yield {"name": f"encoding {kind}s, ours / published", "ratio": rates["ours"] / rates["published"]}


def loading(context: Context) -> Iterator[Row]:
    """Times the loader with all cores, then an epoch at ViT-B/16, with the share of its time spent waiting for data."""
    cores = os.cpu_count() or 1
    batch = context.choose(80, 4)
    files, times = context.choose((512, 10), (8, 2))
    folder = context.folder / "images"
    folder.mkdir(exist_ok=True)
    split = write_images(folder, files)
    rows = range(times * files)
    split = dataclasses.replace(
        split,
        captions=[split.captions[row % files] for row in rows],
        back_translations=[None] * len(rows),
        caption_images=[row % files for row in rows],
    )
    for recipe in RECIPES:
        overrides = (
            *context.overrides,
            f"image_dir={folder}",
            f"data.num_workers={context.choose(cores, 0)}",
            "experiment.back_trans=false",
            "experiment.dropout=0.05",
        )
        setup = Setup(context.device, context.precision, batch, 1, overrides)
        config, objectives, model = setup.recipe(recipe)
        loader = build_loader(config, split, objectives, Tokenizer(), context.ranks)
        steps = len(loader)
        iterator = iter(batches(loader))
        next(iterator)  # starts the workers
        started, count = time.perf_counter(), sum(1 for _ in iterator)
        rate = batch * count / (time.perf_counter() - started)
        yield {"name": f"loading, {recipe}, {cores} cores", "samples_per_second": rate}
        trainer = build_trainer(config, model, objectives, steps, context.precision, context.ranks)
        progress = Progress()
        with RunLog(None, is_main=False) as log:
            trainer.epoch(
                loader,
                progress,
                log,
                print_period=10**9,
                save_period=0,
                save=lambda: None,
                stop=lambda: False,
                after_step=lambda: None,
            )
        speed = progress.record.speed()
        yield {
            "name": f"epoch, {recipe}, batch {batch}",
            "samples_per_second": speed["samples_per_second"],
            "data_wait": speed["data_wait"],
        }
