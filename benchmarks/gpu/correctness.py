"""Correctness on a GPU: reference values, number formats, chunks, waiting."""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.chunks import IDENTITIES, random_batch
from benchmarks.gpu.context import Context, Row, check, difference, distance
from benchmarks.suite import Setup
from misc.builders.training import build_objectives, build_trainer
from misc.data.batches import Batch
from misc.retrieval.metrics import rank_similarities, summarise
from misc.system.precision import FORMATS, Precision
from misc.training.trainer import Trainer
from model import losses
from model.objectives import Objectives, total
from model.tbps_clip import TBPSCLIP, needed

EXACT = 1e-4
"""The bound for float32: ten times the one on the CPU, because a GPU adds up in another order."""


# ---- reference values -----------------------------------------------------------------------------------------------


def reference_values(context: Context) -> Iterator[Row]:
    """Compares with the values of the published code in `tests/golden/` that a device computes."""
    yield from _encoders(context)
    yield from _losses(context)
    yield from _heads(context)
    yield from _metrics(context)


@torch.no_grad()
def _encoders(context: Context) -> Iterator[Row]:
    from tests.helpers.golden_models import VIT_B16, load, seeded_model, tiny_model
    from tests.helpers.seeded import clip_weights, normal

    device = context.device
    golden, model = load("towers_tiny.npz"), tiny_model().to(device)
    images, ids = torch.from_numpy(normal("g.tower.image", 5, 3, 64, 32)).to(device), golden["tokens"].to(device)
    yield check("small image encoder", difference(model.encode_image(images), golden["image_features"]), EXACT)
    found = model.image_encoder(images, all_tokens=True)
    yield check("small image encoder, all tokens", difference(found, golden["image_dense"]), EXACT)
    yield check("small text encoder", difference(model.encode_text(ids), golden["text_features"]), EXACT)
    found = model.text_encoder(ids, all_tokens=True)
    yield check("small text encoder, all tokens", difference(found, golden["text_dense"]), EXACT)
    if not context.on_gpu:
        return
    golden, model = load("towers_vitb16.npz"), seeded_model(VIT_B16, clip_weights()).to(device)
    images = torch.from_numpy(normal("g.vitb16.image", 2, 3, 224, 224)).to(device)
    yield check("ViT-B/16, images", difference(model.encode_image(images), golden["image_features_224"]), EXACT)
    found = model.encode_text(golden["tokens"].to(device))
    yield check("ViT-B/16, captions", difference(found, golden["text_features_77"]), EXACT)


def _losses(context: Context) -> Iterator[Row]:
    from tests.helpers.golden_models import load
    from tests.model.test_losses import NAMES, gradients_as_stored, reference_features

    golden = {
        name: value.to(context.device) if isinstance(value, Tensor) else value
        for name, value in load("losses_w1.npz").items()
    }
    for name in (*NAMES, "total"):
        leaves, features = reference_features(golden)
        weighted = Objectives(gather=lambda rows: rows)(features, golden["ids"], float(golden["alpha"]))
        loss = total(weighted) if name == "total" else weighted[name]
        loss.backward()
        stored = NAMES.get(name, name)
        yield check(f"loss {name}", abs(float(loss.detach()) / float(golden[f"{stored}.value"]) - 1), EXACT)
        gradients = gradients_as_stored(leaves)
        scale = gradients.pop("logit_scale")
        found = max(difference(value, golden[f"{stored}.grad.{key}"]) for key, value in gradients.items())
        yield check(f"gradients of {name}", found, EXACT)
        if name != "citc":  # it does not use the temperature; in R-ITC large terms cancel (docs/exactness.md)
            found = difference(scale, golden[f"{stored}.grad.logit_scale"])
            yield check(f"gradient of the temperature, {name}", found, 100 * EXACT if name == "ritc" else EXACT)


@torch.no_grad()
def _heads(context: Context) -> Iterator[Row]:
    from tests.helpers.golden_models import load
    from tests.helpers.seeded import normal
    from tests.model.test_heads import seeded_head

    device, golden = context.device, load("mlm_id.npz")
    text, image = (torch.from_numpy(normal(f"g.mlm.{name}", 2, rows, 64)).to(device) for name, rows in SEQUENCES)
    everything = torch.ones(2, 9, dtype=torch.bool, device=device)
    logits = seeded_head().to(device)(text, image, valid=everything, picked=everything).unflatten(0, (2, 9))
    yield check("logits of MLM", difference(logits[..., ::997], golden["mlm_logits_slice"]), EXACT)
    labels = golden["labels"].to(device)
    picked = labels != -100
    found = losses.masked_language(logits[picked], labels[picked], picked.sum())
    yield check("loss MLM", difference(found, golden["mlm_loss"]), EXACT)


SEQUENCES = (("text", 9), ("image", 5))


def _metrics(context: Context) -> Iterator[Row]:
    from tests.helpers.golden_models import load

    golden = load("metrics.npz")
    for case in range(4):
        inputs = (golden[f"{case}.{key}"].to(context.device) for key in ("similarity", "query_ids", "gallery_ids"))
        found = summarise(rank_similarities(*inputs))
        worst = max(abs(found[key] - float(golden[f"{case}.{key}"])) for key in ("r1", "r5", "r10", "mAP"))
        yield check(f"retrieval metrics {case}, percent", worst, EXACT)


def reference_step(context: Context) -> Iterator[Row]:
    """Compares a whole training step with the reference: losses, gradients, and the change of every parameter."""
    from tests.helpers.golden_models import load, our_name, tiny_model
    from tests.misc.training.test_step import PROJECTOR_WIDTHS, reference_batch, step_config, train_one_step

    golden, ranks = load("step_w1.npz"), context.ranks
    model = tiny_model(simclr_widths=PROJECTOR_WIDTHS)
    step = train_one_step(ranks, model, reference_batch(ranks, golden), step_config(golden))
    worst = dict.fromkeys(("loss", "gradient norm", "gradient", "change", "change of attention biases"), 0.0)

    def note(kind: str, found: Tensor, expected: Tensor) -> None:
        worst[kind] = max(worst[kind], difference(found, expected))

    for key, expected in golden.items():
        kind, _, name = key.partition(".")
        if kind == "loss":
            note("loss", step["losses"][name.removesuffix("_loss")], expected)
        elif kind == "grad":
            note("gradient", step["gradients"][our_name(name)], expected)
        elif kind == "grad_norm" and expected != -1:
            note("gradient norm", step["gradients"][our_name(name)].norm(), expected)
        elif kind == "step_norm" and golden[f"grad_norm.{name}"] != -1:
            biases = name.endswith("in_proj_bias")
            note("change of attention biases" if biases else "change", step["changes"][our_name(name)].norm(), expected)
    # AdamW's first step is nearly the sign of the gradient. That of the key biases, a third of the attention biases, is
    # only rounding, so they change its length by up to √(3/2) - 1.
    bounds = {"change": 10 * EXACT, "change of attention biases": 0.23}
    yield from (check(f"step, {kind}", found, bounds.get(kind, EXACT)) for kind, found in worst.items())


# ---- number formats -------------------------------------------------------------------------------------------------


def number_formats(context: Context) -> Iterator[Row]:
    """Compares losses and gradients of the full recipe in bf16 and fp16 with those in float32.

    The bound: a value passes about 30 roundings in a block, forward and backward, and each has a relative error of at
    most half the format's ε. Independent errors add up like a random walk, to √(30 · layers) · ε / 2. The bound is
    three times that. An error of the code, such as a forgotten scale or a wrong mask, is about 1. Losses are means over
    many rounded numbers, so their bound is a tenth.
    """
    setup = Setup(context.device, Precision("fp32", context.device.type), context.choose(16, 4), 1, context.overrides)
    config, objectives, model = setup.recipe("full")
    size = tuple(config.experiment.input_resolution)
    batch = random_batch(objectives, size, setup.batch, torch.Generator().manual_seed(0)).to(context.device)
    exact = _gradients(model, objectives, batch, setup.precision)
    for name in ("bf16", "fp16"):
        roundings = 30 * config.model.vision_layers
        bound = 3 * math.sqrt(roundings) * torch.finfo(FORMATS[name]).eps / 2
        found = _gradients(model, objectives, batch, Precision(name, context.device.type))
        yield {**check(f"{name}, gradient", distance(found[1], exact[1]), bound), "scale": found[2]}
        worst = max(abs(float(found[0][loss] / value) - 1) for loss, value in exact[0].items())
        yield check(f"{name}, losses", worst, bound / 10)


def _gradients(
    model: TBPSCLIP, objectives: Objectives, batch: Batch, precision: Precision
) -> tuple[dict[str, Tensor], dict[str, Tensor | None], float]:
    """Returns losses, unscaled gradients, and the scale; a scale that overflows is halved, as the scaler does it."""
    scale = torch.amp.GradScaler(precision.device_type).get_scale() if precision.name == "fp16" else 1.0
    while True:
        model.zero_grad(set_to_none=True)
        with precision.autocast():
            features = model(batch.views)
        weighted = objectives(features, batch.identities, 0.3)
        (scale * total(weighted)).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        if scale <= 1 or all(value is None or bool(value.isfinite().all()) for value in gradients.values()):
            break
        scale /= 2
    unscaled = {name: None if value is None else value / scale for name, value in gradients.items()}
    return {name: loss.detach() for name, loss in weighted.items()}, unscaled, scale


# ---- chunks ---------------------------------------------------------------------------------------------------------


def chunks(context: Context) -> Iterator[Row]:
    """Compares a step in chunks with the whole batch, without dropout; then with dropout, eager and compiled."""
    rows, chunk = context.choose((24, 10), (6, 4))
    without = ("experiment.dropout=0", f"data.chunk_size={chunk}")
    expected = _step(context, rows, "fp32", ("experiment.dropout=0",))
    found = _step(context, rows, "fp32", without)
    yield check("chunks without dropout, gradient", distance(found, expected), EXACT)
    for name in ("fp32", "bf16"):
        for compiled in (False, True) if context.on_gpu else (False,):
            yield from _chunks_with_dropout(context, rows, chunk, name, compiled)


def _chunks_with_dropout(context: Context, rows: int, chunk: int, precision: str, compiled: bool) -> Iterator[Row]:
    """Compares with one backward pass through all chunks, which are encoded once with the same dropout.

    In bf16, the two computations round the same features, so they differ by much less than bf16's own error.
    """
    title = f"chunks with dropout, {precision}" + (", compiled" if compiled else "")
    settings = ("experiment.dropout=0.5", f"misc.compile={str(compiled).lower()}")
    trainer, batch = _trainer(context, rows, precision, (*settings, f"data.chunk_size={chunk}"))
    seen: list[Tensor] = []
    trainer.bare_model.text_encoder.register_forward_hook(lambda *call: seen.append(call[2].detach().clone()))
    trainer.step(batch, 1, 2)
    chunks = len(seen) // 3  # the first pass encodes the captions of a chunk again, for its soft labels
    first_pass, second_pass = seen[: 2 * chunks : 2], seen[2 * chunks :]
    passes = max(difference(second, first) for first, second in zip(first_pass, second_pass, strict=True))
    found = {name: parameter.grad for name, parameter in trainer.bare_model.named_parameters()}
    trainer, batch = _trainer(context, rows, precision, settings)
    parts = [
        trainer._encode(batch.rows(start, start + chunk).to(context.device).views, 1, number, soft_labels=True)
        for number, start in enumerate(range(0, rows, chunk))
    ]
    features = dataclasses.replace(
        parts[0],
        image=torch.cat([part.image for part in parts]),
        text=torch.cat([part.text for part in parts]),
        second_image=torch.cat([part.second_image for part in parts if part.second_image is not None]),
        simclr=tuple(torch.cat([part.simclr[view] for part in parts if part.simclr]) for view in (0, 1)),
        soft_label_texts=(torch.cat([needed(part.soft_label_texts)[0] for part in parts]),),
    )
    weighted = trainer.objectives(features, batch.identities.to(context.device), trainer.final_soft_label_ratio / 2)
    total(weighted).backward()
    expected = {name: parameter.grad for name, parameter in trainer.bare_model.named_parameters()}
    bound = EXACT if precision == "fp32" else 4 * torch.finfo(torch.bfloat16).eps
    yield check(f"{title}: features of both passes", passes, bound)
    yield check(f"{title}: gradient", distance(found, expected), bound)


def waiting(context: Context) -> Iterator[Row]:
    """Checks that a step, whole and in chunks, never waits for the GPU: torch raises an error where it does.

    More than 3,072 tokens, since torch has another kernel for the gradient of their vectors from there on.
    """
    rows, chunk = context.choose((120, 110), (6, 4))
    for name in ("bf16", "fp16") if context.on_gpu else ("bf16",):
        for overrides in ((), (f"data.chunk_size={chunk}",)):
            trainer, batch = _trainer(context, rows, name, overrides)
            batch = batch.pin_memory() if context.on_gpu else batch
            trainer.step(batch, 0, 2)  # AdamW creates its state
            context.synchronise()
            if context.on_gpu:
                torch.cuda.set_sync_debug_mode("error")
            try:
                trainer.step(batch, 1, 2)
            finally:
                if context.on_gpu:
                    torch.cuda.set_sync_debug_mode("default")
            found = {"passed": True} if context.on_gpu else {"skipped": "only a GPU can tell"}
            yield {"name": f"no waiting, {name}" + (", in chunks" if overrides else ""), **found}


def _trainer(context: Context, rows: int, precision: str, overrides: tuple[str, ...]) -> tuple[Trainer, Batch]:
    """Returns a trainer of the full recipe with small encoders, and a batch on the CPU."""
    setup = Setup(context.device, Precision(precision, context.device.type), rows, 1, (*SMALL, *overrides))
    config, objectives, model = setup.recipe("full")
    trainer = build_trainer(config, model, build_objectives(config, context.ranks), 2, setup.precision, context.ranks)
    size = tuple(config.experiment.input_resolution)
    return trainer, random_batch(objectives, size, rows, torch.Generator().manual_seed(0))


def _step(context: Context, rows: int, precision: str, overrides: tuple[str, ...]) -> dict[str, Tensor | None]:
    """Returns the gradients of a step."""
    trainer, batch = _trainer(context, rows, precision, overrides)
    trainer.step(batch, 1, 2)
    return {name: parameter.grad for name, parameter in trainer.bare_model.named_parameters()}


SMALL = (
    "experiment.input_resolution=[64, 32]",
    "experiment.simclr_mlp=[128, 32, 128]",
    "model.embed_dim=128",
    "model.vision_width=128",
    "model.vision_layers=2",
    "model.vision_heads=2",
    "model.text_width=128",
    "model.text_layers=2",
    "model.text_heads=2",
)
"""Heads of 64 channels, as CLIP's, so that a GPU takes the same attention kernels."""
assert IDENTITIES > 1  # of random batches
