"""A batch encoded in chunks has the gradients of the whole batch, but only needs the memory of a chunk."""

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from misc.builders.training import build_objectives, build_trainer
from misc.data.batches import Batch
from misc.run.progress import EpochRecord, Progress
from misc.system.precision import Precision
from misc.training.gradient_cache import backward_in_chunks
from model.objectives import Objectives, soft_label_ratio_at
from model.tbps_clip import TBPSCLIP, Features
from tests.helpers.golden_models import TINY_MODEL, assert_close, load, make_model, tiny_model
from tests.misc.training.test_step import (
    ALONE,
    PROJECTOR_WIDTHS,
    heads_model,
    mask,
    reference_batch,
    rows_of,
    step_config,
    train_one_step,
)

HEADS = {"experiment.mlm": "true", "experiment.id": "true"}
CHUNK_SIZES = [1, 2, 3, 5, 7]
"""For 8 rows: single rows, divisors of 8 and other sizes."""


@pytest.fixture(scope="module")
def golden() -> dict:
    return load("step_w1.npz")


def masked_batch(golden: dict) -> Batch:
    """Returns the reference batch with masked captions for MLM; five of its rows have no token to predict."""
    batch = reference_batch(ALONE, golden)
    mask(batch, rows_of(ALONE, golden).start)
    return batch


def step(golden: dict, model: TBPSCLIP, **overrides) -> dict[str, dict[str, Tensor]]:
    return train_one_step(ALONE, model, masked_batch(golden), step_config(golden, **HEADS | overrides))


def assert_same_gradients(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            assert_close(found[name], gradient, tolerance, name)


@pytest.fixture(scope="module")
def whole(golden) -> dict[str, dict[str, Tensor]]:
    return step(golden, heads_model())


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_chunks_have_the_losses_and_gradients_of_the_whole_batch(golden, whole, chunk_size):
    """With the full recipe, MLM and ID; dropout is off."""
    chunked = step(golden, heads_model(), **{"data.chunk_size": chunk_size})
    assert set(chunked["losses"]) == {"nitc", "ritc", "citc", "ss", "mlm", "id"}
    for name, loss in whole["losses"].items():
        assert_close(chunked["losses"][name], loss, 1e-6, name)
    assert_same_gradients(chunked["gradients"], whole["gradients"], 1e-5)


@pytest.mark.parametrize("objective", ["ss", "citc", "mlm", "id", "mvs_image"])
def test_chunks_work_for_each_objective_in_addition_to_n_itc(golden, objective):
    off = {f"experiment.{name}": str(name == objective).lower() for name in ("ss", "citc", "mlm", "id", "mvs_image")}
    whole = step(golden, heads_model(), **off)
    chunked = step(golden, heads_model(), **off | {"data.chunk_size": 3})
    used = {name for name, gradient in whole["gradients"].items() if gradient is not None}
    assert any(name.startswith("simclr") for name in used) == (objective == "ss")
    assert_same_gradients(chunked["gradients"], whole["gradients"], 1e-5)


def test_chunks_work_for_the_second_views_of_captions(golden):
    """MVS-T and SS-T, in addition to MVS-I and SS-I."""

    def captioned(**overrides) -> dict:
        batch = masked_batch(golden)
        ids = batch.views.token_ids
        batch.views.second_token_ids, batch.views.simclr_token_ids = ids.roll(1, 0), (ids.roll(2, 0), ids.roll(3, 0))
        config = step_config(golden, **{"experiment.mvs_text": "true", "experiment.ss_text": "true"} | overrides)
        return train_one_step(ALONE, heads_model(text_simclr_widths=PROJECTOR_WIDTHS), batch, config)

    whole, chunked = captioned(), captioned(**{"data.chunk_size": 3})
    assert "ss_text" in whole["losses"] and whole["gradients"]["text_simclr_projector.0.weight"].abs().max() > 0
    for name, loss in whole["losses"].items():
        assert_close(chunked["losses"][name], loss, 1e-6, name)
    assert_same_gradients(chunked["gradients"], whole["gradients"], 1e-5)


@pytest.mark.parametrize("adaptation", [{"context_length": 2}, {"adapter_ratio": 0.4}], ids=["coop", "clip_adapter"])
def test_chunks_work_for_a_frozen_clip(golden, adaptation):
    def adapted(**overrides) -> dict:
        batch = reference_batch(ALONE, golden)
        batch.views.simclr_images = None
        config = step_config(golden, **{"experiment.ss": "false"} | overrides)
        return train_one_step(ALONE, adapted_model(adaptation), batch, config)

    whole, chunked = adapted(), adapted(**{"data.chunk_size": 3})
    trained = {name for name, gradient in whole["gradients"].items() if gradient is not None}
    assert trained and all(name.startswith(("prompt.", "image_adapter.")) for name in trained)
    assert_same_gradients(chunked["gradients"], whole["gradients"], 1e-5)


def adapted_model(adaptation: dict) -> TBPSCLIP:
    torch.manual_seed(0)
    model = make_model(**TINY_MODEL, **adaptation).eval()
    model.load_state_dict(tiny_model().state_dict(), strict=False)
    return model


def test_a_chunk_as_large_as_the_batch_is_the_whole_batch(golden, whole):
    chunked = step(golden, heads_model(), **{"data.chunk_size": 8})
    for name, gradient in whole["gradients"].items():
        assert gradient is None or torch.equal(chunked["gradients"][name], gradient), name


def test_chunks_in_bf16_have_the_gradients_of_the_whole_batch_in_bf16(golden, whole):
    """Features of a chunk may be rounded to another bf16 number, so the gradients agree up to bf16's precision."""

    def in_bf16(**overrides) -> dict[str, Tensor]:
        config = step_config(golden, **HEADS | overrides)
        precision = Precision("bf16", "cpu")
        return train_one_step(ALONE, heads_model(), masked_batch(golden), config, precision)["gradients"]

    together, chunked = in_bf16(), in_bf16(**{"data.chunk_size": 3})
    for name, gradient in together.items():
        if gradient is None or name.endswith("in_proj_bias"):
            continue
        rounding = (whole["gradients"][name] - gradient).norm()
        assert (chunked[name] - gradient).norm() <= rounding + 1e-3 * gradient.norm(), name


# ---- dropout --------------------------------------------------------------------------------------------------------


def dropping_model() -> TBPSCLIP:
    """Returns a model in training mode, with much dropout."""
    model = tiny_model(simclr_widths=PROJECTOR_WIDTHS, dropout=0.5)
    return model.train()


def trainer_of(golden: dict, model: TBPSCLIP, **overrides):
    config = step_config(golden, **overrides)
    objectives = build_objectives(config, ALONE)
    precision = Precision.choose("fp32", ALONE.device)
    return build_trainer(config, model, objectives, steps=3, precision=precision, ranks=ALONE)


def text_features_seen(model: TBPSCLIP) -> list[Tensor]:
    """Returns a list that collects the output of each call of the text encoder."""
    seen = []
    model.text_encoder.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    return seen


def test_both_passes_over_a_chunk_have_the_same_dropout(golden):
    model = dropping_model()
    seen = text_features_seen(model)
    trainer_of(golden, model, **{"data.chunk_size": 3}).step(reference_batch(ALONE, golden), 1, 1)
    first_pass, second_pass = seen[:6:2], seen[6:]  # between the captions of the first pass: those of soft labels
    assert [len(features) for features in first_pass] == [3, 3, 2]
    for first, second in zip(first_pass, second_pass, strict=True):
        assert torch.equal(first, second)
    model.eval()
    undropped = model.encode_text(reference_batch(ALONE, golden).views.token_ids)
    assert not torch.allclose(torch.cat(first_pass), undropped, rtol=0.01), "nothing was dropped"


def test_chunks_and_iterations_have_different_dropout(golden):
    """Every row has the same caption, so features only differ by dropout."""
    model = dropping_model()
    seen = text_features_seen(model)
    batch = reference_batch(ALONE, golden)
    batch.views.token_ids = batch.views.token_ids[:1].expand(8, -1)
    trainer = trainer_of(golden, model, **{"data.chunk_size": 4, "schedule.lr": 1e-30, "schedule.lr_end": 0})
    trainer.step(batch, 1, 3)
    trainer.step(batch, 2, 3)
    passes = [*seen[:4], *seen[6:10]]  # two chunks of each step, each also for its soft labels
    for number, one in enumerate(passes):
        assert not any(torch.equal(one, other) for other in passes[:number])


def test_with_dropout_the_gradients_belong_to_the_features_of_the_losses(golden):
    """Compared with a single backward pass through all chunks, which are encoded once with the same dropout."""
    batch = reference_batch(ALONE, golden)
    chunked = dropping_model()
    trainer = trainer_of(golden, chunked, **{"data.chunk_size": 3})
    trainer.step(batch, 1, 1)

    model = dropping_model()
    other = trainer_of(golden, model)
    parts = [other._encode(batch.rows(start, start + 3).views, 1, chunk, True) for chunk, start in enumerate((0, 3, 6))]
    features = Features(
        image=torch.cat([part.image for part in parts]),
        text=torch.cat([part.text for part in parts]),
        scale=parts[0].scale,
        second_image=torch.cat([part.second_image for part in parts]),
        simclr=tuple(torch.cat([part.simclr[view] for part in parts]) for view in (0, 1)),
        soft_label_texts=(torch.cat([part.soft_label_texts[0] for part in parts]),),
    )
    ratio = soft_label_ratio_at(1, 1, other.final_soft_label_ratio)
    sum(other.objectives(features, batch.identities, ratio).values()).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same_gradients({name: p.grad for name, p in chunked.named_parameters()}, expected, 1e-5)


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize(
    ("iteration", "overrides", "again"),
    [
        (1, {}, True),
        (0, {}, False),  # their weight grows from 0
        (1, {"model.softlabel_ratio": 0}, False),
        (1, {"experiment.nitc_ratio": 0}, False),
    ],
    ids=["recipe", "first step", "without soft labels", "without n-itc"],
)
def test_captions_are_encoded_again_for_the_soft_labels_that_count(golden, iteration, overrides, again, chunk_size):
    model = dropping_model()
    seen = text_features_seen(model)
    trainer = trainer_of(golden, model, **overrides | ({"data.chunk_size": chunk_size} if chunk_size else {}))
    trainer.step(reference_batch(ALONE, golden), iteration, 3)
    passes = 1 if chunk_size is None else 4  # two chunks, each twice
    assert len(seen) == passes + again * (1 if chunk_size is None else 2)
    if again:
        assert not torch.allclose(seen[0], seen[1])


def test_without_dropout_captions_are_encoded_once(golden):
    model = tiny_model(simclr_widths=PROJECTOR_WIDTHS).train()
    seen = text_features_seen(model)
    trainer_of(golden, model).step(reference_batch(ALONE, golden), 1, 3)
    assert len(seen) == 1


# ---- memory ---------------------------------------------------------------------------------------------------------


class KeptBytes:
    """Counts the bytes that autograd keeps for the backward pass, without the parameters."""

    def __init__(self, model: TBPSCLIP):
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.now = self.peak = 0

    def __enter__(self) -> "KeptBytes":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.hooks.__exit__(*exception)

    def _keep(self, tensor: Tensor) -> "Kept":
        kept = Kept(tensor)
        if tensor.untyped_storage().data_ptr() not in self.parameters:
            self.now += tensor.nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(kept, self._release, tensor.nbytes)
        return kept

    def _release(self, size: int) -> None:
        self.now -= size


class Kept:
    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def peak_of_a_step(golden: dict, rows: int, chunk_size: int | None, **architecture) -> int:
    """Returns the most bytes that autograd keeps in a step of `rows` samples: full recipe, MLM, ID."""
    model = heads_model(**architecture)
    batch = masked_batch(golden)
    repeated = torch.arange(rows) % 8
    batch = Batch(
        views=type(batch.views)(
            **{
                name: tuple(view[repeated] for view in value) if isinstance(value, tuple) else value[repeated]
                for name, value in vars(batch.views).items()
                if value is not None
            }
        ),
        identities=torch.arange(rows) % 4,
        paths=["none.jpg"] * rows,
    )
    trainer = trainer_of(golden, model, **HEADS | ({"data.chunk_size": chunk_size} if chunk_size else {}))
    with KeptBytes(model) as kept:
        trainer.step(batch, 1, 1)
    assert kept.now < 100  # only the temperature
    return kept.peak


@pytest.mark.slow
def test_memory_grows_with_the_chunk_and_not_with_the_batch(golden):
    whole = {rows: peak_of_a_step(golden, rows, None) for rows in (16, 32, 64)}
    assert whole[32] > 1.9 * whole[16] and whole[64] > 1.9 * whole[32]
    chunked = {rows: peak_of_a_step(golden, rows, 8) for rows in (16, 32, 64)}
    assert chunked[64] < 1.1 * chunked[16]
    assert peak_of_a_step(golden, 64, 4) < 0.7 * chunked[64]  # half, plus the logits of the tokens of rows 0 to 3
    assert chunked[64] < 0.2 * whole[64]


def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(golden, whole):
    checkpointed = step(golden, heads_model(grad_checkpointing=True))
    assert_same_gradients(checkpointed["gradients"], whole["gradients"], 1e-6)
    # Two layers per encoder; the inputs of the blocks, the images and the logits of the heads are still kept.
    assert peak_of_a_step(golden, 32, None, grad_checkpointing=True) < 0.5 * peak_of_a_step(golden, 32, None)


def test_gradient_checkpointing_repeats_the_dropout(golden):
    def gradients(**architecture) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = make_model(**TINY_MODEL, simclr_widths=PROJECTOR_WIDTHS, dropout=0.5, **architecture).train()
        trainer_of(golden, model, **{"data.chunk_size": 3}).step(reference_batch(ALONE, golden), 1, 1)
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    assert_same_gradients(gradients(grad_checkpointing=True), gradients(), 1e-6)


# ---- waiting --------------------------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Records the operations whose result Python needs, so that a GPU would have to finish first."""

    READING = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "item", "_unique2"}

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype == torch.bool for index in arguments[1]
        )
        if masked or name in self.READING:
            self.found.append(name)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_step_of_the_recipe_never_waits_for_the_device(golden, chunk_size):
    """With AdamW's fused kernel; the losses stay on the device until the log line."""
    trainer = trainer_of(golden, dropping_model(), **({"data.chunk_size": chunk_size} if chunk_size else {}))
    batch = reference_batch(ALONE, golden)
    trainer.step(batch, 0, 3)  # AdamW creates its state
    with Reads() as reads:
        losses = trainer.step(batch, 1, 3)
    assert reads.found == []
    with Reads() as reads:
        losses["nitc"].item()
    assert reads.found == ["_local_scalar_dense"]


# ---- mixed precision ------------------------------------------------------------------------------------------------


def test_the_scaler_scales_every_gradient_of_a_chunk(golden):
    """fp16 needs it: all gradients are those of the scaled loss, including those of MLM and ID."""

    def gradients(factor: float) -> dict[str, Tensor]:
        model = heads_model()
        trainer = trainer_of(golden, model, **HEADS)
        backward_in_chunks(
            masked_batch(golden),
            3,
            device=ALONE.device,
            encode=lambda views, number, soft_labels: trainer._encode(views, 0, number, soft_labels),
            objectives=trainer.objectives,
            soft_label_ratio=0.3,
            scale_loss=lambda loss: factor * loss,
            without_reduction=trainer._without_reduction,
        )
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    once, scaled = gradients(1.0), gradients(1024.0)
    expected = {name: None if gradient is None else 1024 * gradient for name, gradient in once.items()}
    assert_same_gradients(scaled, expected, 1e-6)


def scaling_trainer(golden: dict, model: TBPSCLIP, **overrides):
    """Returns a trainer with the gradient scaler of fp16, in float32: the scaler works in the same way."""
    trainer = trainer_of(golden, model, **overrides)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return trainer


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_scaled_step_equals_an_unscaled_step(golden, whole, chunk_size):
    model = heads_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = scaling_trainer(golden, model, **HEADS | ({"data.chunk_size": chunk_size} if chunk_size else {}))
    trainer.step(masked_batch(golden), 1, 1)
    for name, parameter in model.named_parameters():
        if not name.endswith("in_proj_bias"):  # the gradient of its key part is only rounding
            # Adam makes a full step even of a gradient close to zero, including its rounding.
            assert_close(parameter.detach() - before[name], whole["changes"][name], 1e-2, name)


def test_a_step_that_the_scaler_skips_is_counted_without_an_error(golden):
    model = tiny_model(simclr_widths=PROJECTOR_WIDTHS)
    trainer = scaling_trainer(golden, model)
    batch = reference_batch(ALONE, golden)
    trainer.step(batch, 1, 3)
    assert trainer.skipped_steps(1) == 0
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    overflow = model.image_encoder.proj.register_hook(lambda gradient: gradient * torch.inf)
    losses = trainer.step(batch, 2, 3)
    overflow.remove()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert trainer.skipped_steps(2) == 1 and trainer.scaler.get_scale() == 512
    trainer.step(batch, 2, 3)
    assert not torch.equal(model.image_encoder.proj, before["image_encoder.proj"])
    assert trainer.skipped_steps(3) == 1
    finished = Progress(epoch=0, step=3, record=EpochRecord({"nitc": 3.0}, 3, 24, 1.0))
    assert trainer.summary(finished)["skipped_steps"] == 1
    assert "skipped_steps" not in trainer_of(golden, model).summary(finished)


def test_objectives_of_all_rows_are_the_sum_of_those_of_their_parts(golden):
    """MLM and ID, as the second pass adds them."""
    model = heads_model()
    batch = masked_batch(golden)
    objectives = Objectives(gather=lambda rows: rows, mlm=True, id=True)
    features = model(batch.views)
    labels = batch.views.masked_labels
    picked = objectives.picked_tokens(labels)
    assert picked == 7  # of MASKED_POSITIONS
    whole = objectives.classify(features, batch.identities, labels, rows=8, picked=picked)
    parts = []
    for start, stop in ((0, 3), (3, 8)):
        part = batch.rows(start, stop)
        parts.append(
            objectives.classify(model(part.views), part.identities, part.views.masked_labels, rows=8, picked=picked)
        )
    for name in ("mlm", "id"):
        assert_close(parts[0][name] + parts[1][name], whole[name], 1e-6, name)
