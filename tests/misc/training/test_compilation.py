"""Compiled training: the same losses and gradients, the same names, few shapes; in chunks, in bf16 and on two ranks."""

import dataclasses
import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from misc.builders.training import build_objectives, build_trainer
from misc.errors import UserError
from misc.system.distributed import Ranks
from misc.system.precision import Precision
from misc.training.compilation import CAPTION_MULTIPLE, compile_model, pad_captions
from misc.training.trainer import Trainer
from model.tbps_clip import TBPSCLIP, Views
from tests.helpers.golden_models import TINY_MODEL, assert_close, load, make_model, tiny_model
from tests.helpers.ranks import run_on_ranks
from tests.misc.training.test_gradient_cache import text_features_seen
from tests.misc.training.test_step import ALONE, PROJECTOR_WIDTHS, distance, mask, reference_batch, step_config
from text_utils.masking import IGNORED_LABEL
from text_utils.tokenizer import END, START

COMPILED = {"misc.compile": "true"}


@pytest.fixture
def graphs() -> Iterator[Any]:
    """Traces to graphs that torch runs operation by operation, which needs no C++ compiler, and counts them."""
    from torch._dynamo.testing import CompileCounterWithBackend  # takes seconds

    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    with patch.object(torch, "compile", partial(torch.compile, backend=counter)):
        yield counter
    torch._dynamo.reset()


def small_model(dropout: float = 0.0, **sizes) -> TBPSCLIP:
    """Returns a model with every head, in training mode."""
    torch.manual_seed(0)
    heads = {"simclr_widths": PROJECTOR_WIDTHS, "masked_language_depth": 1, "identities": 4}
    return make_model(**TINY_MODEL | sizes, **heads, dropout=dropout).train()


def trainer_of(ranks: Ranks, model: TBPSCLIP, precision: str = "fp32", **overrides) -> Trainer:
    config = step_config(load("step_w1.npz"), **{"experiment.mlm": "true", "experiment.id": "true"} | overrides)
    return build_trainer(
        config, model, build_objectives(config, ranks), 3, Precision.choose(precision, ranks.device), ranks
    )


def take_step(ranks: Ranks, precision: str = "fp32", **overrides) -> dict:
    """Returns the losses and the gradients of a step of the small model."""
    model, golden = small_model(), load("step_w1.npz")
    batch = reference_batch(ranks, golden)
    mask(batch, ranks.rank * len(batch))
    losses = trainer_of(ranks, model, precision, **overrides).step(batch, 1, 1)
    return {"losses": losses, "gradients": {name: parameter.grad for name, parameter in model.named_parameters()}}


def assert_same_step(found: dict, expected: dict, tolerance: float) -> None:
    assert found["losses"].keys() == expected["losses"].keys() >= {"nitc", "ss", "mlm", "id"}
    for name, loss in expected["losses"].items():
        assert_close(found["losses"][name], loss, tolerance, name)
    assert distance(found["gradients"], expected["gradients"]) <= tolerance


def test_a_compiled_step_has_the_same_losses_and_gradients(graphs):
    expected = take_step(ALONE)
    assert graphs.frame_count == 0
    assert_same_step(take_step(ALONE, **COMPILED), expected, 1e-5)
    whole = graphs.frame_count
    assert whole > 2
    assert_same_step(take_step(ALONE, **COMPILED, **{"data.chunk_size": 3}), expected, 1e-5)
    assert graphs.frame_count > whole


def test_a_compiled_step_in_bf16_is_as_close_to_float32(graphs):
    exact, rounded = take_step(ALONE), take_step(ALONE, precision="bf16")
    compiled = take_step(ALONE, precision="bf16", **COMPILED)
    rounding = distance(rounded["gradients"], exact["gradients"])
    assert 0 < distance(compiled["gradients"], exact["gradients"]) < 1.5 * rounding


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_compiled_encoder_has_the_same_dropout_in_both_passes_over_a_chunk(monkeypatch):
    """With torch's own compiler. The passes without and with gradients are two graphs."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # processes would import torch first
    model = small_model(dropout=0.5)
    model.text_encoder.transformer.compile_blocks()
    seen = text_features_seen(model)
    golden = load("step_w1.npz")
    off = {"experiment.mlm": "false", "experiment.id": "false"}
    model.masked_language_head = model.identity_classifier = None
    batch = reference_batch(ALONE, golden)
    trainer_of(ALONE, model, **off, **{"data.chunk_size": 4}).step(batch, 1, 1)
    first_pass, second_pass = seen[:4:2], seen[4:]  # between the captions of the first pass: those of soft labels
    for first, second in zip(first_pass, second_pass, strict=True):
        assert_close(second, first, 1e-6)
    undropped = model.eval().encode_text(batch.views.token_ids)
    assert not torch.allclose(torch.cat(first_pass), undropped, rtol=0.01), "nothing was dropped"


def test_all_layers_and_all_lengths_within_a_multiple_share_a_graph(graphs):
    model = small_model(vision_layers=3, text_layers=3)
    trainer = trainer_of(ALONE, model, **COMPILED)
    before, counts = graphs.frame_count, []
    for tokens in (9, 10, 16, 17):
        trainer._encode(dataclasses.replace(views(tokens), masked_token_ids=None), 1)
        counts.append(graphs.frame_count - before)
    frames = counts[0] // 2  # torch 2.4 counts each graph twice
    assert frames in (1, 2)
    assert counts == [2 * frames, 2 * frames, 2 * frames, 3 * frames]  # the images, and each length of captions


def views(tokens: int) -> Views:
    ids = torch.full((2, tokens), START)
    ids[:, -1] = END
    labels = torch.full((2, tokens), IGNORED_LABEL)
    labels[:, 1] = 7
    return Views(torch.randn(2, 3, *TINY_MODEL["resolution"]), ids, masked_token_ids=ids, masked_labels=labels)


def test_names_and_evaluation_do_not_change(graphs):
    model, images = tiny_model(), torch.randn(2, 3, *TINY_MODEL["resolution"])
    names, expected = list(model.state_dict()), model.encode_image(images)
    compile_model(model, ALONE.device)
    assert list(model.state_dict()) == names
    before = graphs.frame_count
    assert torch.equal(model.encode_image(images), expected) and graphs.frame_count == before
    model.train().encode_image(images)
    assert graphs.frame_count > before


def test_a_compiled_training_continues_uncompiled_and_the_other_way_round(graphs):
    """The state of one is loaded into the other, and the next step is the same except for rounding."""
    batch = reference_batch(ALONE, load("step_w1.npz"))
    off = {"experiment.mlm": "false", "experiment.id": "false"}
    trained = {
        name: trainer_of(ALONE, projecting_model(), **off, **{"misc.compile": name}) for name in ("false", "true")
    }
    for trainer in trained.values():
        trainer.step(batch, 0, 3)
    for name, other in (("false", "true"), ("true", "false")):
        continued = trainer_of(ALONE, projecting_model(), **off, **{"misc.compile": other})
        continued.load_state(trained[name].state())
        losses = continued.step(batch, 1, 3)
        assert continued.optimizer.state_dict()["state"][0]["step"] == 2
        for loss, value in trained[name].step(batch, 1, 3).items():
            assert_close(losses[loss], value, 1e-5, loss)


def projecting_model() -> TBPSCLIP:
    torch.manual_seed(0)
    return make_model(**TINY_MODEL, simclr_widths=PROJECTOR_WIDTHS).train()


@pytest.mark.parametrize(("tokens", "padded"), [(5, 8), (8, 8), (9, 16), (17, 20), (20, 20)])
def test_captions_are_padded_to_a_multiple_and_never_beyond_the_longest(tokens, padded):
    found = pad_captions(views(tokens), CAPTION_MULTIPLE, 20)
    assert found.token_ids.shape == found.masked_token_ids.shape == found.masked_labels.shape == (2, padded)
    assert not found.token_ids[:, tokens:].any()
    assert (found.masked_labels[:, tokens:] == IGNORED_LABEL).all()
    assert torch.equal(found.token_ids[:, :tokens], views(tokens).token_ids)


def test_padding_reaches_every_view_of_a_caption():
    ids = torch.ones(2, 5, dtype=torch.int64)
    found = pad_captions(Views(torch.zeros(2), ids, second_token_ids=ids, simclr_token_ids=(ids, ids)), 8, 77)
    for padded in (found.second_token_ids, *found.simclr_token_ids):
        assert padded.shape == (2, 8)


def test_a_machine_that_cannot_compile_is_refused(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no compiler\nsecond line")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(UserError, match=r"misc\.compile: .*no compiler\).*misc\.compile=false"):
        compile_model(tiny_model(), ALONE.device)


def compiled_step_on_ranks(ranks: Ranks) -> dict[str, dict[str, Tensor]]:
    with patch.object(torch, "compile", partial(torch.compile, backend="eager")):
        return take_step(ranks, **COMPILED, **{"data.chunk_size": 3})


def test_two_ranks_train_compiled_in_chunks_as_one_uncompiled(tmp_path):
    expected = take_step(ALONE)
    first, second = run_on_ranks(2, compiled_step_on_ranks, tmp_path)
    for name, loss in expected["losses"].items():
        assert_close((first["losses"][name] + second["losses"][name]) / 2, loss, 1e-5, name)
    assert distance(first["gradients"], expected["gradients"]) <= 1e-5
