"""What each module of the towers contributes: what is lost without it, and how much of its training is needed.

A module is a layer's self-attention with its norm, its feed-forward with its norm, or the whole layer. While one is
changed, all others are as they were trained.
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

from misc.errors import UserError
from misc.files import atomic_folder, check_new_path
from misc.retrieval.evaluation import EncodeFunction, Evaluator
from misc.retrieval.metrics import QueryResults
from misc.run.log import RunLog
from misc.study.contribution_chart import draw_contribution_chart
from misc.system.distributed import gather_strided
from model.tbps_clip import TBPSCLIP

ALPHAS = tuple(step / 10 for step in range(11))
"""Shares of the trained weights that C2 tries, from the initial weights alone to the trained ones alone."""
POINTS = 3
"""Of R@1; C2 allows a loss of less."""


class ModuleKind(NamedTuple):
    """A kind of module: beginnings of names within a residual block.

    Attributes:
        parameters: all that it has.
        outputs: where its branches end. With zeros there, it adds nothing to its input.
    """

    parameters: tuple[str, ...]
    outputs: tuple[str, ...]


MODULE_KINDS = {
    "self_attention": ModuleKind(("ln_1.", "attn."), ("attn.out_proj.",)),
    "feed_forward": ModuleKind(("ln_2.", "mlp."), ("mlp.c_proj.",)),
    "layer": ModuleKind(("",), ("attn.out_proj.", "mlp.c_proj.")),
}


class Module(NamedTuple):
    """One of a tower: the number of its layer, from 0, and a key of `KINDS`."""

    layer: int
    kind: str


@dataclass(frozen=True)
class ModuleContribution:
    """Of one module: R@1 in percent without it, and the two measures that `measure_contribution` explains."""

    r1_removed: float
    c1: float
    c2: float


@dataclass(frozen=True)
class Contribution:
    """Of all modules, the same on every rank.

    Attributes:
        r1: of the whole model, in percent.
        seconds: that all this took.
        image, text: for each layer of the tower, by kind of module.
    """

    r1: float
    seconds: float
    image: list[dict[str, ModuleContribution]]
    text: list[dict[str, ModuleContribution]]


@torch.no_grad()
def measure_contribution(
    evaluator: Evaluator, model: TBPSCLIP, initial: dict[str, Tensor], log: RunLog
) -> Contribution:
    """Measures each module by R@1. Call it on all ranks; the model is left as it is.

    C1: how many points are lost when the module is removed, so that its input is its output, over the largest such loss
    of all modules of both towers. Negative where the model is better without it; 0 for all where none loses anything.

    C2: the smallest α of `ALPHAS` with which (1 - α) · initial + α · trained in place of the module's weights loses
    less than `POINTS` points.

    Memory grows with the modules of a tower: for each, the features of all images or captions are held at once.

    Args:
        evaluator: of the split to measure on.
        model: trained, on the device of the evaluator.
        initial: state dict from before the training, on the same device; other names than those of the towers' residual
            blocks have no part.
        log: for the progress.
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    images, captions, width = len(evaluator.split.image_paths), len(evaluator.split), model.embed_dim
    (own_gallery,) = evaluator.encode_images([model.encode_image], width)
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
    towers = {
        name: _Tower(
            f"{name} encoder", tower, encode, _within(initial, f"{name}_encoder."), -(-items // world_size), hits
        )
        for name, tower, encode, items, hits in (
            ("image", model.image_encoder, model.encode_image, images, image_hits),
            ("text", model.text_encoder, model.encode_text, captions, text_hits),
        )
    }
    removed = {name: _without_each(tower, log) for name, tower in towers.items()}
    needed = {name: _needed_of_each(tower, whole, captions, log) for name, tower in towers.items()}
    model.train(was_training)

    largest = max(whole - hits for tower in removed.values() for hits in tower.values())
    contributions = {
        name: [
            {
                kind: ModuleContribution(
                    r1_removed=100 * removed[name][layer, kind] / captions,
                    c1=(whole - removed[name][layer, kind]) / largest if largest > 0 else 0.0,
                    c2=needed[name][layer, kind],
                )
                for kind in MODULE_KINDS
            }
            for layer in range(tower.layers)
        ]
        for name, tower in towers.items()
    }
    return Contribution(100 * whole / captions, time.perf_counter() - started, **contributions)


@dataclass(frozen=True)
class _Tower:
    """A tower whose modules can be changed, while the features of the other stay.

    Attributes:
        title: for the log.
        tower: as trained.
        encode: with the tower, and what belongs to no layer of it.
        initial: its state dict from before.
        items: number of images or captions that a rank encodes.
        hits: for each encoder in place of the tower, how many queries find their person first.
    """

    title: str
    tower: nn.Module
    encode: EncodeFunction
    initial: dict[str, Tensor]
    items: int
    hits: Callable[[list[EncodeFunction]], list[int]]

    @property
    def layers(self) -> int:
        return len(self.tower.transformer.resblocks)

    @property
    def modules(self) -> list[Module]:
        return [Module(layer, kind) for layer in range(self.layers) for kind in MODULE_KINDS]

    def without(self, module: Module) -> EncodeFunction:
        """Encodes without the module."""
        outputs = self._parameters(module.layer, MODULE_KINDS[module.kind].outputs)

        def encode(inputs: Tensor) -> Tensor:
            with _changed(outputs, {name: torch.zeros_like(trained) for name, trained in outputs.items()}):
                return self.encode(inputs)

        return encode

    def blended(self, module: Module, alpha: float) -> EncodeFunction:
        """Encodes with the share `alpha` of the module's training."""
        parameters = self._parameters(module.layer, MODULE_KINDS[module.kind].parameters)

        def encode(inputs: Tensor) -> Tensor:  # the values are made each time: of all modules, they are two towers
            values = {name: (1 - alpha) * self.initial[name] + alpha * trained for name, trained in parameters.items()}
            with _changed(parameters, values):
                return self.encode(inputs)

        return encode

    def count(self, encoders: list[EncodeFunction], title: str, log: RunLog) -> list[int]:
        """`hits`, under a progress bar."""
        with log.progress(len(encoders) * self.items, 0, f"{self.title}, {title}") as bar:

            def shown(encoder: EncodeFunction) -> EncodeFunction:
                def encode(inputs: Tensor) -> Tensor:
                    bar.update(len(inputs))
                    return encoder(inputs)

                return encode

            return self.hits([shown(encoder) for encoder in encoders])

    def _parameters(self, layer: int, beginnings: tuple[str, ...]) -> dict[str, nn.Parameter]:
        block = f"transformer.resblocks.{layer}."
        return _starting_with(dict(self.tower.named_parameters()), tuple(block + name for name in beginnings))


@contextmanager
def _changed(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> Iterator[None]:
    """Other values in place of parameters, whose own come back in the end: they are put aside, not computed again."""
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


def _without_each(tower: _Tower, log: RunLog) -> dict[Module, int]:
    """Hits without each module."""
    modules = tower.modules
    hits = tower.count([tower.without(module) for module in modules], "each module removed", log)
    log.line(f"{tower.title}: each of {len(modules)} modules was removed once")
    return dict(zip(modules, hits, strict=True))


def _needed_of_each(tower: _Tower, whole: int, queries: int, log: RunLog) -> dict[Module, float]:
    """C2 of each module: all are tried with one α, and those that lose too much with the next."""
    needed = dict.fromkeys(tower.modules, ALPHAS[-1])  # with which nothing is changed, so nothing is lost
    pending = tower.modules
    for alpha in ALPHAS[:-1]:
        hits = tower.count([tower.blended(module, alpha) for module in pending], f"α {alpha}", log)
        # In whole numbers: as differences of percentages, a loss of exactly 3 points may come out as less.
        enough = {m for m, found in zip(pending, hits, strict=True) if 100 * (whole - found) < POINTS * queries}
        needed |= dict.fromkeys(enough, alpha)
        pending = [module for module in pending if module not in enough]
        log.line(f"{tower.title}, α {alpha}: {len(pending)} of {len(needed)} modules lose {POINTS} points or more")
        if not pending:
            break
    return needed


def _hits(results: QueryResults) -> int:
    """How many queries find their person first."""
    return int((results.first_match == 1).sum())


def _within(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in _starting_with(state, (prefix,)).items()}


def _starting_with(state: dict[str, Tensor], beginnings: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.startswith(beginnings)}


def contribution_table(contribution: Contribution) -> str:
    """Both measures of each layer, in lines."""
    lines = ["                    C1                            C2"]
    lines.append("          attention feed-fwd    layer   attention feed-fwd    layer")
    for name in ("image", "text"):
        for number, layer in enumerate(getattr(contribution, name), start=1):
            c1 = "".join(f"{module.c1:9.2f}" for module in layer.values())
            c2 = "".join(f"{module.c2:9.1f}" for module in layer.values())
            lines.append(f"{name:5} {number:3} {c1}   {c2}")
    return "\n".join(lines)


def contribution_folder(checkpoint: Path) -> Path:
    """Where the contributions to a checkpoint are written: a new folder beside it.

    Raises UserError where there is something of that name, or it cannot be made.
    """
    folder = checkpoint.with_name(f"{checkpoint.stem}_contribution")
    return check_new_path(folder, "--contribution", "copy the checkpoint to another folder")


def write_contribution(folder: Path, contribution: Contribution) -> None:
    """Writes `contribution.json` and `contribution.png` into a new folder, whole or not at all.

    Raises UserError where that cannot be done.
    """
    measured = asdict(contribution)
    towers = {name: measured.pop(name) for name in ("image", "text")}
    content = {**measured, "alphas": ALPHAS, "points": POINTS, **towers}
    try:
        with atomic_folder(folder) as unfinished:
            (unfinished / "contribution.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            draw_contribution_chart(unfinished / "contribution.png", **towers)
    except OSError as error:
        raise UserError(
            f"--contribution: {folder} cannot be written ({error.strerror}): the table above is all that is left"
        ) from error
