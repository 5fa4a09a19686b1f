"""Measures memory and time of a training step by chunk size (`data.chunk_size`) and with gradient checkpointing.

python -m benchmarks.chunks [--config FILE] [--chunks N ...] [--steps N] [--json FILE] [key=value ...]

Each row is measured in its own process, since the peak memory of a process never falls. The inputs are random: time and
memory depend on the number of pixels and tokens, not on their values.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from benchmarks.options import check_output_file, check_positive
from misc.builders.architecture import resolve_architecture
from misc.builders.model import build_model
from misc.builders.training import build_objectives, build_trainer
from misc.config.loading import DEFAULT_CONFIG, load_config
from misc.data.batches import Batch
from misc.errors import UserError
from misc.run.profiling import peak_memory_gigabytes
from misc.system.distributed import join_ranks
from misc.system.precision import Precision
from misc.terminal import prepare_streams, report, show
from model.objectives import Objectives
from model.tbps_clip import Views
from text_utils.masking import IGNORED_LABEL
from text_utils.tokenizer import END, START

CAPTION_TOKENS = 30
"""The length of a typical caption, including start and end."""
IDENTITIES = 100


def main() -> int:
    """Measures what the command line asks for. Returns the exit status: 0, or 2 for a mistake of the user."""
    prepare_streams()
    arguments = parse_arguments()
    try:
        measure_chunks(arguments)
    except UserError as error:
        report(f"error: {error}")
        return 2
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.chunks", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="FILE", help="default: config/config.yaml")
    parser.add_argument(
        "--chunks",
        type=int,
        nargs="+",
        default=[320, 160, 80, 40, 20],
        metavar="N",
        help="chunk sizes; the largest is also the batch size",
    )
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="timed steps, after one to warm up")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example model.vision_layers=2")
    return parser.parse_intermixed_args()


def measure_chunks(arguments: argparse.Namespace) -> None:
    """Prints one row per chunk size, and one for gradient checkpointing without chunks.

    Raises UserError if an argument is invalid.
    """
    check_positive("--chunks", min(arguments.chunks))
    check_positive("--steps", arguments.steps)
    check_output_file("--json", arguments.json)
    common = (f"data.batch_size={max(arguments.chunks)}", "model.checkpoint=null", *arguments.overrides)
    resolve_architecture(load_config(arguments.config, overrides=common), None)  # raises before any process starts
    variants = [(chunk, False) for chunk in arguments.chunks] + [(max(arguments.chunks), True)]
    rows = []
    show(f"{'chunk':>6} {'checkpointing':>14} {'peak GB':>8} {'GB of step':>12} {'s / step':>9} {'ratio':>6}")
    for chunk, checkpointing in variants:
        varied = (f"data.chunk_size={chunk}", f"model.grad_checkpointing={str(checkpointing).lower()}")
        try:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                row = pool.submit(measure, arguments.config, (*common, *varied), arguments.steps).result()
        except BrokenProcessPool:
            show(f"{chunk:>6} {'yes' if checkpointing else 'no':>14}  the process was killed: out of memory?")
            continue
        rows.append({"chunk": chunk, "grad_checkpointing": checkpointing, **row})
        show(
            f"{chunk:>6} {'yes' if checkpointing else 'no':>14} {row['peak_gigabytes']:>8.2f} "
            f"{row['step_gigabytes']:>12.2f} {row['seconds']:>9.2f} {row['seconds'] / rows[0]['seconds']:>6.2f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def measure(file: str | Path, overrides: tuple[str, ...], steps: int) -> dict[str, float]:
    """Measures some training steps, after one to warm up.

    Returns: the peak memory of the process and the part that the steps added to it, in 10⁹ bytes; the median time of a
        step in seconds.
    """
    config = resolve_architecture(load_config(file, overrides=overrides), None)
    with join_ranks(config.device, config.distributed.backend, config.distributed.url) as ranks:
        objectives = build_objectives(config, ranks)
        model, _ = build_model(config, objectives, IDENTITIES, weights=None)
        precision = Precision.choose(config.misc.precision, ranks.device)
        trainer = build_trainer(config, model, objectives, steps + 1, precision, ranks)
        model.train()
        batch = random_batch(
            objectives,
            tuple(config.experiment.input_resolution),
            config.data.batch_size,
            torch.Generator().manual_seed(0),
        )
        before = peak_memory_gigabytes(ranks.device)
        times = []
        for step in range(steps + 1):
            started = time.perf_counter()
            losses = trainer.step(batch, step, steps + 1)
            sum(losses.values()).item()  # waits for the device
            times.append(time.perf_counter() - started)
        peak = peak_memory_gigabytes(ranks.device)
    return {
        "peak_gigabytes": peak,
        "step_gigabytes": peak - before,
        "seconds": statistics.median(times[1:]),
    }


def random_batch(objectives: Objectives, resolution: tuple[int, int], rows: int, generator: torch.Generator) -> Batch:
    """Returns a random batch on the CPU, with the views that the objectives need."""

    def images() -> torch.Tensor:
        return torch.randn(rows, 3, *resolution, generator=generator)

    token_ids = torch.randint(1, START, (rows, CAPTION_TOKENS), generator=generator)
    token_ids[:, 0], token_ids[:, -1] = START, END
    labels = token_ids.where(torch.rand(token_ids.shape, generator=generator) < 0.15, IGNORED_LABEL)
    masked = objectives.needs_masked_captions
    views = Views(
        image=images(),
        token_ids=token_ids,
        second_image=images() if objectives.needs_second_view else None,
        simclr_images=(images(), images()) if objectives.needs_simclr_views else None,
        masked_token_ids=token_ids if masked else None,
        masked_labels=labels if masked else None,
    )
    return Batch(views, torch.randint(IDENTITIES, (rows,), generator=generator), ["random"] * rows)


if __name__ == "__main__":
    sys.exit(main())
