"""What every part of `make gpu` gets, and the rows that it returns."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from misc.system.distributed import Ranks
from misc.system.precision import Precision

Row = dict[str, Any]
"""A result: its `name`, and numbers; a check also has `found`, `bound` and `passed`."""

TINY = (
    "experiment.input_resolution=[32, 32]",
    "experiment.simclr_mlp=[32, 16, 32]",
    "model.embed_dim=32",
    "model.vision_width=32",
    "model.vision_layers=2",
    "model.vision_heads=2",
    "model.text_width=32",
    "model.text_layers=2",
    "model.text_heads=2",
)
"""Sizes of the encoders where there is no GPU."""


@dataclass
class Context:
    """Where and how large the parts run.

    Attributes:
        device: the first GPU, or the CPU.
        folder: for temporary files.
        deadline: when all parts should have ended, on the clock of `time.monotonic`.
        matrix_rate: measured bf16 matrix operations per second; 0 before they are measured.
    """

    device: torch.device
    folder: Path
    deadline: float
    matrix_rate: float = 0.0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def ranks(self) -> Ranks:
        return Ranks(0, 1, self.device)

    @property
    def overrides(self) -> tuple[str, ...]:
        """Sizes of the encoders: ViT-B/16 on a GPU."""
        return () if self.on_gpu else TINY

    @property
    def precision(self) -> Precision:
        """The number format of the speed measurements: bf16 on a GPU."""
        return Precision("bf16" if self.on_gpu else "fp32", self.device.type)

    def choose(self, large: Any, small: Any) -> Any:
        """Returns the size for a GPU, or the one for a CPU."""
        return large if self.on_gpu else small

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def synchronise(self) -> None:
        """Waits until the GPU has done its work."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def check(name: str, found: float, bound: float) -> Row:
    """Returns a row that passes if `found` is at most `bound`; NaN never passes."""
    return {"name": name, "found": float(found), "bound": bound, "passed": bool(found <= bound)}


def difference(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference of any element, divided by the largest expected element."""
    expected = expected.to(found)
    if found.shape != expected.shape:
        return math.inf
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def distance(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> float:
    """Returns the length of the difference of all gradients, divided by the length of the expected ones."""
    pairs = [(name, found[name], tensor) for name, tensor in expected.items() if tensor is not None]
    if any(own is None for _, own, _ in pairs):
        return math.inf
    squares = [((own.to(tensor) - tensor).square().sum(), tensor.square().sum()) for _, own, tensor in pairs]
    return math.sqrt(float(sum(square for square, _ in squares)) / float(sum(square for _, square in squares)))
