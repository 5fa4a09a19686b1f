"""State dicts in the wrappings of training programs, and checkpoints of IRRA's family."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from misc.builders.architecture import config_of_weights
from misc.builders.model import build_saved_model, weight_notes
from misc.config.loading import load_config
from misc.errors import UserError
from model.pretrained.names import to_hugging_face
from model.pretrained.weights import Weights, read_weights, tall_grid
from tests.helpers.golden_models import TINY_MODEL, make_model, our_name
from tests.helpers.seeded import TINY, clip_weights, normal

SQUARE = TINY | {"resolution": (64, 64), "text_width": 16}  # a narrow token table keeps the files small
State = dict[str, Tensor]


def weights(**changes) -> State:
    return {name: torch.as_tensor(value) for name, value in clip_weights(**SQUARE | changes).items()}


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def without(state: State, *names: str) -> State:
    return {name: value for name, value in state.items() if name not in names}


def compiled_blocks(state: State) -> State:
    return {name.replace("resblocks.0.", "resblocks.0._orig_mod."): value for name, value in state.items()}


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_weights(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def assert_same_tensors(found: Weights, expected: State) -> None:
    assert found.state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found.state[name], value.float()), name


# ---- wrappings ------------------------------------------------------------------------------------------------------

OPTIMIZER = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
WRAPPINGS: dict[str, tuple[Callable[[State], object], list[str]]] = {
    "a training loop": (
        lambda state: {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": OPTIMIZER, "loss": 0.5},
        ["model_state_dict"],
    ),
    "arguments and numbers of numpy": (
        lambda state: {
            "state_dict": state,
            "best_r1": np.float64(0.71),
            "epoch": np.int64(3),
            "improved": np.bool_(True),
            "args": argparse.Namespace(lr=1e-5, resolution=(384, 128)),
        },
        ["state_dict"],
    ),
    "another key": (lambda state: {"net": state, "best": torch.tensor(0.7), "meter": {"r1": torch.ones(1)}}, ["net"]),
    "two keys": (lambda state: {"state": {"clip": state}, "optimizer": OPTIMIZER}, ["state.clip"]),
    "compiled": (lambda state: under("_orig_mod.", state), ["'_orig_mod.'"]),
    "compiled outside": (lambda state: under("_orig_mod.module.", state), ["'_orig_mod.'", "'module.'"]),
    "compiled inside": (lambda state: under("module._orig_mod.", state), ["'_orig_mod.'", "'module.'"]),
    "compiled blocks": (compiled_blocks, ["'_orig_mod.'"]),
    "Lightning": (
        lambda state: {
            "state_dict": under("model.", state),
            "epoch": 4,
            "pytorch-lightning_version": "2.5.0",
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.7)}},
            "hyper_parameters": {"lr": 1e-5},
            "optimizer_states": [OPTIMIZER],
        },
        ["state_dict", "'model.'"],
    ),
    "Lightning, another name": (
        lambda state: {"state_dict": under("clip_model._orig_mod.", state)},
        ["'_orig_mod.'", "'clip_model.'"],
    ),
    "any prefix": (lambda state: under("trainer.net.backbone.", state), ["'trainer.net.backbone.'"]),
    "its temperature outside": (
        lambda state: under("model.", without(state, "logit_scale")) | {"logit_scale": state["logit_scale"]},
        ["'model.'"],
    ),
}
NAMES: dict[str, Callable[[State], State]] = {
    "OpenAI": dict,
    "Hugging Face": to_hugging_face,
    "ours": lambda state: {our_name(name): value for name, value in state.items()},
    "published": lambda state: {
        our_name(name).replace("image_encoder.", "visual.").replace("text_encoder.", "encode_text."): value
        for name, value in state.items()
    },
}


@pytest.mark.parametrize("case", WRAPPINGS)
def test_weights_are_found_in_every_wrapping(tmp_path, case):
    wrap, words = WRAPPINGS[case]
    found = read_weights(save(wrap(weights()), tmp_path / "weights.ckpt"))
    assert_same_tensors(found, weights())
    notes = "; ".join(weight_notes(config_of_weights(load_config(overrides=("model.activation=gelu",)), found), found))
    assert all(word in notes for word in words) and "warning" not in notes, notes


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("case", ["a training loop", "Lightning, another name", "compiled inside"])
def test_the_names_may_be_those_of_any_tool(tmp_path, names, case):
    wrap, _ = WRAPPINGS[case]
    found = read_weights(save(wrap(NAMES[names](weights())), tmp_path / "weights.ckpt"))
    assert_same_tensors(found, weights())


def test_a_wrapped_checkpoint_of_ours_keeps_its_configuration(tmp_path):
    state = under("_orig_mod.", make_model(**TINY_MODEL).state_dict())
    config = {"experiment": {"input_resolution": [64, 32]}, "model": {"vision_heads": 2, "text_heads": 3}}
    found = read_weights(save({"model": state, "config": config}, tmp_path / "x.pth"))
    assert (found.form, found.grid, found.settings.text_heads) == ("checkpoint of TBPS-CLIP", (4, 2), 3)


def test_the_file_in_a_folder_may_be_wrapped(tmp_path):
    wrapped = {"state_dict": under("model.", to_hugging_face(weights()))}
    save(wrapped, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(
        '{"model_type": "clip", "vision_config": {"num_attention_heads": 1, "image_size": 64},'
        ' "text_config": {"num_attention_heads": 1}}'
    )
    assert_same_tensors(read_weights(tmp_path), weights())


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_were_saved_on_a_gpu_are_read(tmp_path, monkeypatch, zipped):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save({"model": weights()}, tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(tmp_path / "weights.pth")  # shows that these tensors ask for a GPU
    assert_same_tensors(read_weights(tmp_path / "weights.pth"), weights())


def test_what_is_beside_the_clip_is_left_out_and_named(tmp_path):
    others = {"projector.weight": torch.ones(3), "norm.num_batches_tracked": torch.tensor(7)}
    found = read_weights(save(under("model.", weights()) | others, tmp_path / "weights.ckpt"))
    assert_same_tensors(found, weights())
    (note,) = (note for note in found.notes if note.startswith("warning"))
    assert "projector, norm beside the CLIP" in note


def test_of_several_state_dicts_the_usual_one_is_read(tmp_path):
    other = {name: value + 1 for name, value in weights().items()}
    found = read_weights(save({"ema": other, "model": weights()}, tmp_path / "x.pt"))
    assert_same_tensors(found, weights())
    assert "warning: only model of the file is read, not ema" in found.notes


REFUSED = {
    "several state dicts": (lambda state: {"student": state, "teacher": state}, ["student, teacher", "save one"]),
    "two models": (
        lambda state: under("model.", state) | under("ema.", state),
        ["begin in 2 ways", "(model.", "ema."],
    ),
    "encoders apart": (
        lambda state: {
            ("image." if name.startswith("visual.") else "text.") + name: value for name, value in state.items()
        },
        ["begin in 2 ways", "image.visual.conv1.weight", "text.token_embedding.weight"],
    ),
    "with and without a wrapper": (
        lambda state: state | {"module.ln_final.bias": state["ln_final.bias"]},
        ["both ln_final.bias and module.ln_final.bias"],
    ),
    "one tensor missing": (
        lambda state: {"net": under("model.", without(state, "ln_final.bias"))},
        ["ln_final.bias is missing"],
    ),
    "one tensor too many": (lambda state: under("model.", state | {"extra": torch.ones(1)}), ["extra is unknown"]),
    "text encoder only": (
        lambda state: under("model.", {n: v for n, v in state.items() if not n.startswith("visual.")}),
        ["visual.conv1.weight", "missing"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrappings_that_are_not_one_clip_are_refused(tmp_path, case):
    wrap, words = REFUSED[case]
    message = refusal(save(wrap(weights()), tmp_path / "weights.pt"))
    assert all(word in message for word in words), message
    if case in ("two models", "encoders apart", "with and without a wrapper"):
        assert "missing" not in message


def test_dicts_that_contain_themselves_are_refused(tmp_path):
    content: dict = {"epoch": 3}
    content["itself"] = content
    assert "'epoch' (int)" in refusal(save(content, tmp_path / "weights.pt"))


# ---- IRRA's family --------------------------------------------------------------------------------------------------

HEADS = {
    "classifier.weight": (5, 32),
    "classifier.bias": (5,),
    "cross_attn.in_proj_weight": (96, 32),
    "cross_modal_transformer.resblocks.0.ln_1.weight": (32,),
    "ln_pre_t.weight": (32,),
    "ln_pre_i.weight": (32,),
    "ln_post.weight": (32,),
    "mlm_head.fc.weight": (7, 32),
}
RDE = {"visul_emb_layer.fc.weight": (9, 32), "texual_emb_layer.linear.weight": (9, 32)}
PERSON = SQUARE | {"resolution": (384, 128)}


def half(state: State) -> State:
    """Converts as CLIP's training code does: matrices are half, norms and embeddings stay in full precision."""
    return {n: v if ".ln_" in f".{n}" or "embedding" in n else v.half() for n, v in state.items()}


def irra_names(state: State, heads: dict[str, tuple[int, ...]] = HEADS) -> State:
    encoders = {f"base_model.{name}": value for name, value in state.items() if name != "logit_scale"}
    return encoders | {name: torch.ones(shape) for name, shape in heads.items()}


IRRA_FILES: dict[str, Callable[[State], object]] = {
    "IRRA": lambda state: {
        "model": irra_names(state),
        "optimizer": OPTIMIZER,
        "scheduler": {"last_epoch": 59, "milestones": [20, 50], "gamma": 0.1},
        "epoch": 59,
        "arguments": "CUHK-PEDES",
    },
    "in parallel": lambda state: {"model": under("module.", irra_names(state)), "epoch": 1},
    "bare": lambda state: irra_names(state, {}),
    "Lightning": lambda state: {"state_dict": under("model.", irra_names(state))},
    "RDE": lambda state: {"model": irra_names(state, HEADS | RDE)},
}


@torch.no_grad()
@pytest.mark.parametrize("case", IRRA_FILES)
def test_features_of_irra_s_form_equal_those_of_openai_s(tmp_path, case):
    state = half(weights(**PERSON)) | {"logit_scale": torch.tensor(math.log(50))}
    irra = read_weights(save(IRRA_FILES[case](state), tmp_path / "best.pth"))
    assert irra.form == "torch.save, names of IRRA" and irra.grid == (24, 8) and not irra.heads
    assert_same_tensors(irra, state)
    assert irra.state["logit_scale"].exp().item() == pytest.approx(50)

    openai = read_weights(save(state, tmp_path / "openai.pt"))
    given = ("model.activation=quick_gelu", "experiment.input_resolution=[384, 128]")  # IRRA's form implies both
    (first, config, _), (second, _, _) = (
        build_saved_model(load_config(overrides=overrides), found) for overrides, found in (((), irra), (given, openai))
    )
    assert config.experiment.input_resolution == [384, 128] and config.model.activation == "quick_gelu"
    images = torch.from_numpy(normal("irra", 2, 3, 384, 128))
    tokens = torch.tensor([[49406, 320, 2308, 49407, 0], [49406, 736, 7356, 593, 49407]])
    assert torch.equal(first.eval().encode_image(images), second.eval().encode_image(images))
    assert torch.equal(first.encode_text(tokens), second.encode_text(tokens))


def test_what_is_left_out_of_irra_s_form_is_named(tmp_path):
    notes = read_weights(save(IRRA_FILES["IRRA"](weights()), tmp_path / "irra.pth")).notes
    heads = "classifier, cross_attn, cross_modal_transformer, ln_pre_t, ln_pre_i, ln_post, mlm_head"
    assert f"training heads are left out: {heads}" in notes and not any("warning" in note for note in notes)
    notes = read_weights(save(IRRA_FILES["RDE"](weights()), tmp_path / "rde.pth")).notes
    (warning,) = (note for note in notes if note.startswith("warning"))
    assert "visul_emb_layer and texual_emb_layer are left out" in warning and "not reached" in warning
    fork = {"model": irra_names(weights(), HEADS | {"new_layer.weight": (3,)})}
    (warning,) = (n for n in read_weights(save(fork, tmp_path / "fork.pth")).notes if n.startswith("warning"))
    assert "new_layer beside the CLIP is left out" in warning


@pytest.mark.parametrize(
    ("patches", "grid"), [(192, (24, 8)), (48, (12, 4)), (243, (27, 9)), (3, (3, 1)), (196, None), (0, None)]
)
def test_images_of_irra_are_three_times_as_high_as_wide(patches, grid):
    assert tall_grid(patches) == grid


def test_irra_s_form_for_square_images_is_read(tmp_path):
    found = read_weights(save(irra_names(weights()), tmp_path / "square.pth"))
    assert config_of_weights(load_config(), found).experiment.input_resolution == [64, 64]


def test_base_model_with_a_temperature_is_another_code_s(tmp_path):
    """Nothing shows its activation, so it must be given."""
    found = read_weights(save(under("base_model.", weights()), tmp_path / "other.pth"))
    assert found.form == "torch.save, names of OpenAI" and found.settings.activation is None


def test_an_incomplete_file_of_irra_s_form_is_refused(tmp_path):
    state = irra_names(weights())
    del state["base_model.ln_final.bias"]
    assert "ln_final.bias is missing" in refusal(save({"model": state}, tmp_path / "best.pth"))
