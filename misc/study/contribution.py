"""Measures how much each module of the encoders contributes: the loss without it, and how much training it needs.

A module is a layer's self-attention with its norm, its feed-forward block with its norm, or the whole layer. While one
module is changed, all others keep their trained weights.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from misc.data.images import damaged_warning
from misc.errors import UserError
from misc.files import atomic_folder, check_new_path
from misc.retrieval.evaluation import EncodeFunction, Evaluator
from misc.retrieval.metrics import QueryResults
from misc.run.log import RunLog
from misc.study.contribution_chart import draw_contribution_chart
from misc.system.distributed import gather_strided
from model.tbps_clip import TBPSCLIP
from model.text_transformer import TextTransformer
from model.vision_transformer import VisionTransformer

ALPHAS = tuple(step / 10 for step in range(11))
"""The α that C2 tries, from 0 (only the initial weights) to 1 (only the trained weights)."""
POINTS = 3
"""C2 accepts an α with which R@1 drops by less than this many percentage points."""


class ModuleKind(NamedTuple):
    """A kind of module, as prefixes of parameter names within a residual block.

    Attributes:
        parameters: prefixes of all its parameters.
        outputs: prefixes of the last linear layer of each branch. If these are zero, it adds nothing to its input.
    """

    parameters: tuple[str, ...]
    outputs: tuple[str, ...]


MODULE_KINDS = {
    "self_attention": ModuleKind(("ln_1.", "attn."), ("attn.out_proj.",)),
    "feed_forward": ModuleKind(("ln_2.", "mlp."), ("mlp.c_proj.",)),
    "layer": ModuleKind(("",), ("attn.out_proj.", "mlp.c_proj.")),
}


class Module(NamedTuple):
    """A module of an encoder: the number of its layer, from 0, and a key of `MODULE_KINDS`."""

    layer: int
    kind: str


@dataclass(frozen=True)
class ModuleContribution:
    """The contribution of one module: R@1 in percent without it, and C1 and C2 of `measure_contribution`."""

    r1_removed: float
    c1: float
    c2: float


@dataclass(frozen=True)
class Contribution:
    """The contributions of all modules, the same on every rank.

    Attributes:
        r1: R@1 of the whole model, in percent.
        seconds: duration of the measurement.
        image, text: for each layer of the encoder, the contributions by kind of module.
    """

    r1: float
    seconds: float
    image: list[dict[str, ModuleContribution]]
    text: list[dict[str, ModuleContribution]]


@torch.no_grad()
def measure_contribution(
    evaluator: Evaluator, model: TBPSCLIP, initial: dict[str, Tensor], log: RunLog
) -> Contribution:
    """Measures each module by R@1. Call it on all ranks. The model is unchanged afterwards.

    C1: remove the module, so that its output is its input. C1 is the drop of R@1, divided by the largest such drop of
    all modules of both encoders. It is negative if the model is better without the module. If no R@1 drops, every C1
    is 0.

    C2: replace the module's weights by (1 - α) · initial + α · trained. C2 is the smallest α of `ALPHAS` with which R@1
    drops by less than `POINTS` percentage points.

    Memory grows with the number of modules: it contains the features of all images, or all captions, for each module.

    Args:
        evaluator: evaluates the split to measure on.
        model: the trained model, on the device of the evaluator.
        initial: state dict from before the training, on the same device; only the residual blocks of the encoders are
            used.
        log: shows the progress.
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    images, captions, width = len(evaluator.split.image_paths), len(evaluator.split), model.embed_dim
    damaged: list[str] = []
    (own_gallery,) = evaluator.encode_images([model.encode_image], width, damaged)
    if damaged := evaluator.ranks.all_gather_list(damaged):
        log.line(damaged_warning(damaged))
    (own_queries,) = evaluator.encode_captions([model.encode_text], width)
    gallery = gather_strided(own_gallery, images)

    def image_hits(encoders: list[EncodeFunction]) -> list[int]:
        galleries = (gather_strided(own, images) for own in evaluator.encode_images(encoders, width))
        return [_hits(evaluator.rank(own_queries, changed)) for changed in galleries]

    def text_hits(encoders: list[EncodeFunction]) -> list[int]:
        return [_hits(evaluator.rank(changed, gallery)) for changed in evaluator.encode_captions(encoders, width)]

    whole = _hits(evaluator.rank(own_queries, gallery))
    log.line(f"R@1 of the whole model {100 * whole / captions:.2f}")
    world_size = evaluator.ranks.world_size
    encoders = {
        name: _Encoder(
            f"{name} encoder", encoder, encode, _within(initial, f"{name}_encoder."), -(-items // world_size), hits
        )
        for name, encoder, encode, items, hits in (
            ("image", model.image_encoder, model.encode_image, images, image_hits),
            ("text", model.text_encoder, model.encode_text, captions, text_hits),
        )
    }
    removed = {name: _without_each(encoder, log) for name, encoder in encoders.items()}
    needed = {name: _needed_of_each(encoder, whole, captions, log) for name, encoder in encoders.items()}
    model.train(was_training)

    largest = max(whole - hits for encoder in removed.values() for hits in encoder.values())
    contributions = {
        name: [
            {
                kind: ModuleContribution(
                    r1_removed=100 * removed[name][Module(layer, kind)] / captions,
                    c1=(whole - removed[name][Module(layer, kind)]) / largest if largest > 0 else 0.0,
                    c2=needed[name][Module(layer, kind)],
                )
                for kind in MODULE_KINDS
            }
            for layer in range(encoder.layers)
        ]
        for name, encoder in encoders.items()
    }
    return Contribution(100 * whole / captions, time.perf_counter() - started, **contributions)


@dataclass(frozen=True)
class _Encoder:
    """An encoder whose modules can be changed, while the features of the other encoder stay the same.

    Attributes:
        title: its name in the log.
        encoder: the trained encoder.
        encode: encodes with the encoder, and with an adapter or a learned context if the model has one.
        initial: its state dict from before the training.
        items: number of images or captions that a rank encodes.
        hits: returns for each given replacement of `encode` how many queries have the right person at rank 1.
    """

    title: str
    encoder: VisionTransformer | TextTransformer
    encode: EncodeFunction
    initial: dict[str, Tensor]
    items: int
    hits: Callable[[list[EncodeFunction]], list[int]]

    @property
    def layers(self) -> int:
        return len(self.encoder.transformer.resblocks)

    @property
    def modules(self) -> list[Module]:
        return [Module(layer, kind) for layer in range(self.layers) for kind in MODULE_KINDS]

    def without(self, module: Module) -> EncodeFunction:
        """Returns a function that encodes without the module."""
        outputs = self._parameters(module.layer, MODULE_KINDS[module.kind].outputs)

        def encode(inputs: Tensor) -> Tensor:
            with _changed(outputs, {name: torch.zeros_like(trained) for name, trained in outputs.items()}):
                return self.encode(inputs)

        return encode

    def blended(self, module: Module, alpha: float) -> EncodeFunction:
        """Returns a function that encodes with (1 - alpha) · initial + alpha · trained weights of the module."""
        parameters = self._parameters(module.layer, MODULE_KINDS[module.kind].parameters)

        def encode(inputs: Tensor) -> Tensor:  # computed each time: the values of all modules need two encoders' memory
            values = {name: (1 - alpha) * self.initial[name] + alpha * trained for name, trained in parameters.items()}
            with _changed(parameters, values):
                return self.encode(inputs)

        return encode

    def count(self, encoders: list[EncodeFunction], title: str, log: RunLog) -> list[int]:
        """Calls `hits` with a progress bar."""
        with log.progress(len(encoders) * self.items, 0, f"{self.title}, {title}") as bar:

            def with_progress(encoder: EncodeFunction) -> EncodeFunction:
                def encode(inputs: Tensor) -> Tensor:
                    bar.update(len(inputs))
                    return encoder(inputs)

                return encode

            return self.hits([with_progress(encoder) for encoder in encoders])

    def _parameters(self, layer: int, prefixes: tuple[str, ...]) -> dict[str, nn.Parameter]:
        block = f"transformer.resblocks.{layer}."
        names = tuple(block + name for name in prefixes)
        return {name: value for name, value in self.encoder.named_parameters() if name.startswith(names)}


@contextmanager
def _changed(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> Iterator[None]:
    """Replaces the values of parameters within the context, and restores exactly the same values at its end."""
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


def _without_each(encoder: _Encoder, log: RunLog) -> dict[Module, int]:
    """Returns the hits without each module."""
    modules = encoder.modules
    hits = encoder.count([encoder.without(module) for module in modules], "each module removed", log)
    log.line(f"{encoder.title}: each of {len(modules)} modules was removed once")
    return dict(zip(modules, hits, strict=True))


def _needed_of_each(encoder: _Encoder, whole: int, queries: int, log: RunLog) -> dict[Module, float]:
    """Returns C2 of each module: tries all modules with one α, then those that lose too much with the next α."""
    needed = dict.fromkeys(encoder.modules, ALPHAS[-1])  # α = 1 changes nothing, so it is always enough
    pending = encoder.modules
    for alpha in ALPHAS[:-1]:
        hits = encoder.count([encoder.blended(module, alpha) for module in pending], f"α {alpha}", log)
        # Integers, because in a difference of percentages a drop of exactly 3 points may be rounded to less.
        enough = {m for m, found in zip(pending, hits, strict=True) if 100 * (whole - found) < POINTS * queries}
        needed |= dict.fromkeys(enough, alpha)
        pending = [module for module in pending if module not in enough]
        log.line(f"{encoder.title}, α {alpha}: {len(pending)} of {len(needed)} modules lose {POINTS} points or more")
        if not pending:
            break
    return needed


def _hits(results: QueryResults) -> int:
    """Returns how many queries have the right person at rank 1."""
    return int((results.first_match == 1).sum())


def _within(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in _starting_with(state, (prefix,)).items()}


def _starting_with(state: dict[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.startswith(prefixes)}


def contribution_table(contribution: Contribution) -> str:
    """Returns both measures as a table with a line for each layer."""
    lines = ["                    C1                            C2"]
    lines.append("          attention feed-fwd    layer   attention feed-fwd    layer")
    for name in ("image", "text"):
        for number, layer in enumerate(getattr(contribution, name), start=1):
            c1 = "".join(f"{module.c1:9.2f}" for module in layer.values())
            c2 = "".join(f"{module.c2:9.1f}" for module in layer.values())
            lines.append(f"{name:5} {number:3} {c1}   {c2}")
    return "\n".join(lines)


def contribution_folder(checkpoint: Path) -> Path:
    """Returns the new folder beside a checkpoint that its contributions are written to.

    Raises UserError if the path exists or cannot be created.
    """
    folder = checkpoint.with_name(f"{checkpoint.stem}_contribution")
    return check_new_path(folder, "--contribution", "copy the checkpoint to another folder")


def write_contribution(folder: Path, contribution: Contribution, log: RunLog) -> None:
    """Writes `contribution.json` and `contribution.png` into a new folder, which then exists completely or not at all.

    Raises UserError if they cannot be written.
    """
    measured = asdict(contribution)
    encoders = {name: measured.pop(name) for name in ("image", "text")}
    content = {**measured, "alphas": ALPHAS, "points": POINTS, **encoders}
    try:
        with atomic_folder(folder) as part:
            (part / "contribution.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            with log.decoration("contribution.png"):
                draw_contribution_chart(part / "contribution.png", **encoders)
    except OSError as error:
        raise UserError(
            f"--contribution: {folder} cannot be written ({error.strerror}): copy the results from the table above"
        ) from error
