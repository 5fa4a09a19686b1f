"""Whole runs on a GPU: resume, several ranks, evaluation, search, export, the demo."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.chunks import random_batch
from benchmarks.gpu.context import TINY, Context, Row, check, difference, distance
from benchmarks.gpu.correctness import EXACT, SMALL
from benchmarks.suite import Setup
from misc.builders.data import build_evaluator, read_dataset
from misc.builders.model import build_export, build_saved_model, read_any_weights
from misc.builders.training import build_objectives, build_trainer
from misc.config.loading import DEFAULT_CONFIG, load_config
from misc.data.views import EvaluationView
from misc.pedestrians.dataset import draw_dataset
from misc.run.checkpoint import read_checkpoint
from misc.run.folder import BEST_CHECKPOINT, LAST_CHECKPOINT
from misc.search.encoder import load_encoder
from misc.search.engine import Exact
from misc.system import distributed
from misc.system.distributed import Ranks, join_ranks, mean_over_ranks
from misc.system.precision import Precision
from misc.training.trainer import Trainer
from model.pretrained.export import export
from text_utils.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


def run_main(*words: str) -> int:
    """Runs `main.py` in this process, and returns its exit status. Its output is kept for an error.

    Raises RuntimeError with the end of the output if the status is neither 0 nor that of SIGTERM.
    """
    output = io.StringIO()
    with (
        patch.object(sys, "argv", ["main.py", *words]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
    if status not in (0, 128 + signal.SIGTERM):
        raise RuntimeError(f"main.py ended with status {status}:\n{output.getvalue()[-2000:]}")
    return status


def _tiny_run(context: Context) -> tuple[str, ...]:
    """Returns the arguments of a run on a tiny dataset, which is written at the first call."""
    from tests.helpers.tiny_dataset import write_tiny_dataset

    folder = context.folder / "tiny"
    if not folder.is_dir():
        write_tiny_dataset(folder)
    return (
        *TINY,
        f"device={context.device.type}",
        f"anno_dir={folder}",
        f"image_dir={folder / 'imgs'}",
        "misc.precision=fp32",
        "model.checkpoint=null",
        "experiment.dropout=0.3",
        "schedule.epoch=1",
        "schedule.lr=1e-3",
        "data.dataset=null",
        "data.batch_size=4",
        "data.num_workers=0",
        "log.sheet=0",
    )


def resume(context: Context) -> Iterator[Row]:
    """Stops a run in its epoch, resumes it, and compares its weights with those of a run that was never stopped.

    A GPU adds up gradients in an order that varies, so the weights may differ by rounding. A lost optimizer state or
    another order of the samples would change them by a percent or more.
    """
    weights = []
    for name, stopped in (("whole", False), ("stopped", True)):
        words = (*_tiny_run(context), f"model.saved_path={context.folder / name}")
        with _signal_at_step(3) if stopped else contextlib.nullcontext():
            status = run_main(*words)
        if stopped:
            progress = read_checkpoint(context.folder / name / LAST_CHECKPOINT)["progress"]
            yield {"name": "stopped in its epoch", "passed": status == 143 and progress["step"] == 3}
            run_main(*words, "--resume")
        weights.append(read_checkpoint(context.folder / name / LAST_CHECKPOINT)["model"])
    whole, resumed = weights
    identical = all(torch.equal(resumed[name], value) for name, value in whole.items())
    yield {**check("resumed weights", distance(resumed, whole), 1e-3), "bit_identical": identical}


@contextlib.contextmanager
def _signal_at_step(number: int) -> Iterator[None]:
    """Sends SIGTERM to this process in a training step, counted from 1."""
    step, count = Trainer.step, 0

    def counted(*arguments: Any) -> dict[str, Tensor]:
        nonlocal count
        count += 1
        if count == number:
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    with patch.object(Trainer, "step", counted):
        yield


# ---- ranks ----------------------------------------------------------------------------------------------------------


def one_rank(context: Context) -> Iterator[Row]:
    """Compares one rank under torchrun, whose collectives and DistributedDataParallel really run, with none."""
    yield from _compare_ranks(context, 1)


def several_ranks(context: Context) -> Iterator[Row]:
    """Compares all GPUs with one: losses and gradients in float32, and the time of a step. Without a GPU, two ranks."""
    count = torch.cuda.device_count() if context.on_gpu else 2
    if count < 2:
        yield {"name": "several GPUs", "skipped": "this machine has one"}
        return
    yield from _compare_ranks(context, count)


def _compare_ranks(context: Context, count: int) -> Iterator[Row]:
    rows = 4 * count
    expected = rank_result(context.ranks, rows, alone=True)
    found = launch(context, count, rows)
    yield {"name": "backend", "backend": found["backend"], "passed": found["backend"] == context.choose("nccl", "gloo")}
    for name in ("whole", "chunks"):
        worst = max(difference(found[name][0][loss], value) for loss, value in expected["whole"][0].items())
        yield check(f"{count} rank(s), {name}: losses", worst, EXACT)
        yield check(f"{count} rank(s), {name}: gradient", distance(found[name][1], expected["whole"][1]), EXACT)
    one = rank_result(context.ranks, rows, alone=True, timed=True)["seconds"]
    seconds = found["seconds"]
    yield {"name": f"step on {count} rank(s)", "seconds": seconds, "seconds_alone": one, "efficiency": one / seconds}


def launch(context: Context, count: int, rows: int) -> dict[str, Any]:
    """Runs `write_rank_result` under torchrun, and returns what rank 0 has written."""
    file = context.folder / f"ranks_{count}.pt"
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "--module")
    arguments = ("benchmarks.gpu", "--rank-result", str(file), str(rows), context.device.type)
    seconds = max(10.0, context.seconds_left())
    ended = subprocess.run(
        [sys.executable, *torchrun, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
    )
    if ended.returncode:
        raise RuntimeError(f"torchrun ended with status {ended.returncode}:\n{ended.stderr[-2000:]}")
    return torch.load(file, weights_only=True)


def write_rank_result(file: Path, rows: int, device: str) -> None:
    """Writes the result of rank 0 to a file. Runs on every rank that torchrun has started."""
    with join_ranks(device, "nccl", "env://") as ranks:
        result = rank_result(ranks, rows, alone=False)
        result["seconds"] = rank_result(ranks, rows, alone=False, timed=True)["seconds"]
        if ranks.is_main:
            torch.save(result, file)


def rank_result(ranks: Ranks, rows: int, *, alone: bool, timed: bool = False) -> dict[str, Any]:
    """Trains steps with this rank's rows of one global batch.

    Args:
        rows: of the global batch.
        alone: without collectives. Otherwise they all run, with one rank too.
        timed: measures the time of a step at ViT-B/16 in bf16, 80 samples a rank. On a CPU, with small encoders.

    Returns: `whole` and `chunks`, each a pair: losses (means over ranks), and gradients; or `seconds` of a step.
    """
    forced = contextlib.nullcontext() if alone else patch.object(distributed, "_several_ranks", lambda: True)
    on_gpu = ranks.device.type == "cuda"
    with forced:
        if timed:
            sizes = () if on_gpu else SMALL
            trainer, batch = _rank_trainer(ranks, (80 if on_gpu else 4) * ranks.world_size, "bf16", alone, sizes)
            return {"seconds": _seconds_of_steps(trainer, batch, 10 if on_gpu else 1)}
        result: dict[str, Any] = {"backend": None if alone else torch.distributed.get_backend()}
        for name, chunk in (("whole", "null"), ("chunks", "3")):
            trainer, batch = _rank_trainer(ranks, rows, "fp32", alone, (*SMALL, f"data.chunk_size={chunk}"))
            losses = {name: mean_over_ranks(loss).cpu() for name, loss in trainer.step(batch, 1, 12).items()}
            gradients = {
                name: None if parameter.grad is None else parameter.grad.cpu()
                for name, parameter in trainer.bare_model.named_parameters()
            }
            result[name] = (losses, gradients)
    return result


def _rank_trainer(ranks: Ranks, rows: int, precision: str, alone: bool, overrides: tuple[str, ...]) -> tuple:
    setup = Setup(ranks.device, Precision(precision, ranks.device.type), rows, 1, overrides)
    config, needed, model = setup.recipe("full")
    trainer = build_trainer(config, model, build_objectives(config, ranks), 12, setup.precision, ranks)
    if not alone and ranks.world_size == 1:
        device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
        trainer.model = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    size = tuple(config.experiment.input_resolution)
    own = rows // ranks.world_size
    batch = random_batch(needed, size, rows, torch.Generator().manual_seed(0))
    return trainer, batch.rows(ranks.rank * own, (ranks.rank + 1) * own)


def _seconds_of_steps(trainer: Trainer, batch: Any, count: int) -> float:
    batch = batch.to(trainer.ranks.device)
    for number in range(count + 2):
        if number == 2:
            losses["nitc"].item()  # noqa: F821  # of the steps before: waits for the GPU
            started = time.perf_counter()
        losses = trainer.step(batch, number % 12, 12)
    losses["nitc"].item()
    return (time.perf_counter() - started) / count


# ---- evaluation, search, export -------------------------------------------------------------------------------------


def _checkpoint(context: Context) -> Path:
    """Returns the checkpoint of a tiny run, which `resume` may have made."""
    folder = context.folder / "whole"
    if not (folder / BEST_CHECKPOINT).is_file():
        run_main(*_tiny_run(context), f"model.saved_path={folder}", "--overwrite")
    return folder / BEST_CHECKPOINT


def evaluation(context: Context) -> Iterator[Row]:
    """Compares evaluation and search on the GPU with those on the CPU, in float32."""
    config = load_config(overrides=_tiny_run(context))
    splits, _ = read_dataset(config, Tokenizer(), context.ranks)
    checkpoint, devices = str(_checkpoint(context)), (torch.device("cpu"), context.device)
    retrievals = []
    for device in devices:
        ranks = Ranks(0, 1, device)
        model, saved, _ = build_saved_model(config, read_any_weights(checkpoint, ranks))
        evaluator = build_evaluator(saved, splits, Tokenizer(), Precision("fp32", device.type), ranks)
        retrievals.append(evaluator(model.to(device)))
    expected, found = retrievals
    yield check("features of images", difference(found.gallery.cpu(), expected.gallery), EXACT)
    yield check("features of captions", difference(found.queries.cpu(), expected.queries), EXACT)
    worst = max(abs(found.metrics[name] - value) for name, value in expected.metrics.items())
    yield check("metrics, percent", worst, 1e-3)
    results = []
    for device in devices:
        encoder = load_encoder(checkpoint, (), device)
        encoder = dataclasses.replace(encoder, precision=Precision("fp32", device.type))
        images = sorted(Path(config.image_dir).rglob("*.jpg"))
        pixels = torch.stack([_pixels(encoder.view, image) for image in images])
        engine = Exact(encoder.encode_pictures(pixels))
        results.append(engine.search(encoder.encode_descriptions(splits["test"].captions), 3))
    scores = [torch.cat([own for own, _ in each]) for each in results]
    yield check("scores of the search", difference(scores[1], scores[0]), EXACT)


def _pixels(view: EvaluationView, image: Path) -> Tensor:
    from misc.data.images import read_image

    return view(read_image(image))


def exports(context: Context) -> Iterator[Row]:
    """Exports a model that lies on the GPU, and reads it again."""
    weights = read_any_weights(str(_checkpoint(context)), context.ranks)
    model, config, _ = build_saved_model(load_config(), weights)
    content = build_export(config, model.eval().to(context.device), weights, Tokenizer())
    for form in ("openclip", "huggingface"):
        export(form, context.folder / form, content)
        read = read_any_weights(str(context.folder / form), context.ranks)
        same = read.state.keys() == weights.state.keys()
        same = same and all(torch.equal(read.state[name], value) for name, value in weights.state.items())
        yield {"name": form, "passed": same}
    if not context.on_gpu:
        return
    if any(importlib.util.find_spec(module) is None for module in ("onnx", "onnxscript")):
        yield {"name": "onnx", "skipped": "onnx and onnxscript are not installed"}
        return
    export("onnx", context.folder / "onnx", content)
    yield {"name": "onnx", "passed": any((context.folder / "onnx").iterdir())}


# ---- demo -----------------------------------------------------------------------------------------------------------


def demo(context: Context) -> Iterator[Row]:
    """Draws the demo's people, and trains the demo on the GPU. On two CPU cores its R@1 is 53 to 56."""
    people, run = context.folder / "pedestrians", context.folder / "demo"
    cores = os.cpu_count() or 1
    started = time.perf_counter()
    sizes = {} if context.on_gpu else {"train_identities": 20, "val_identities": 2, "test_identities": 4}
    with contextlib.redirect_stderr(io.StringIO()):
        draw_dataset(people, **sizes, workers=context.choose(cores, 1))
    drawn = time.perf_counter()
    small = () if context.on_gpu else (*TINY, "schedule.epoch=1")
    config = DEFAULT_CONFIG.with_name("demo.config.yaml")
    run_main(
        *("--config", str(config), "--simplified", "--overwrite", f"device={context.device.type}"),
        *(f"anno_dir={people}", f"image_dir={people / 'imgs'}", f"model.saved_path={run}"),
        f"data.back_translation_file={people / 'back_translation.json'}",
        "misc.precision=auto",
        f"data.num_workers={context.choose(cores, 0)}",
        "log.initial_evaluation=false",
        *small,
    )
    seconds = time.perf_counter() - drawn
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    best = max(record["r1"] for record in records)
    waited = sum(record["data_wait"] * record["seconds"] for record in records)
    yield {
        "name": "demo",
        "r1": best,
        "seconds": seconds,
        "drawing_seconds": drawn - started,
        "data_wait": waited / sum(record["seconds"] for record in records),
        "passed": best >= context.choose(50, 0),
    }
