"""Reading all forms of weights: the real libraries write them, and our features must equal theirs."""

import json
import pickle
from pathlib import Path

import open_clip
import pytest
import torch
from easydict import EasyDict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from misc.builders.architecture import config_of_weights, resolve_architecture
from misc.builders.model import build_encoders, build_saved_model, weight_notes
from misc.config.loading import load_config
from misc.config.rules import ENCODER_KEYS
from misc.errors import UserError
from model.preprocessing import CLIP_PREPROCESSING, TBPS_PREPROCESSING, Preprocessing
from model.pretrained.loading import load_weights
from model.pretrained.names import from_hugging_face, ours_from_published, to_hugging_face
from model.pretrained.settings import Settings
from model.pretrained.sizes import read_sizes, usual_heads
from model.pretrained.weights import Weights, read_weights
from tests.helpers.golden_models import GOLDEN, TINY_MODEL, VIT_B16, make_model
from tests.helpers.seeded import clip_shapes, clip_weights, normal

SIZES = {"embed": 32, "resolution": (64, 64), "patch": 16, "vision_width": 64, "vision_layers": 2}
SIZES |= {"text_width": 48, "text_layers": 2, "context": 24}
HEADS = {"vision_heads": 2, "text_heads": 3}
ACTIVATIONS = ("quick_gelu", "gelu")


SMALL = {key: TINY_MODEL[key] for key in ENCODER_KEYS}


def architecture(found: Weights) -> dict:
    """Returns the architecture of the model that is built from the weights."""
    saved = config_of_weights(load_config(), found)
    return {key: saved.model[key] for key in ENCODER_KEYS}


def weights() -> dict[str, Tensor]:
    return {name: torch.as_tensor(value) for name, value in clip_weights(**SIZES).items()}


def inputs() -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(normal("forms", 3, 3, 64, 64))
    token_ids = torch.tensor([[49406, 320, 2308, 49407, 0, 0], [49406, 736, 7356, 593, 1449, 49407]])
    return images, token_ids


@torch.no_grad()
def features(found: Weights, *overrides: str) -> tuple[Tensor, Tensor]:
    """Computes the features of our model with the weights."""
    model, _, _ = build_saved_model(load_config(overrides=overrides), found)
    images, token_ids = inputs()
    return model.eval().encode_image(images), model.encode_text(token_ids)


def hugging_face_model(activation: str) -> CLIPModel:
    """Builds a model with random weights. Its heads do not have 64 channels, so only its configuration shows them."""
    torch.manual_seed(0)
    both = {"num_hidden_layers": 2, "hidden_act": activation, "projection_dim": 32}
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    text = {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 3, "max_position_embeddings": 24}
    config = CLIPConfig(vision_config=vision | both, text_config=text | both, projection_dim=32)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # so that no bias is zero and no two norms are equal
    return model


@torch.no_grad()
def hugging_face_features(model: CLIPModel) -> tuple[Tensor, Tensor]:
    images, token_ids = inputs()
    text_output = model.get_text_features(input_ids=token_ids, attention_mask=(token_ids > 0).long())
    return model.get_image_features(pixel_values=images).pooler_output, text_output.pooler_output


def open_clip_model(activation: str) -> open_clip.CLIP:
    torch.manual_seed(0)
    return open_clip.CLIP(**open_clip_config(activation)).eval()


def open_clip_config(activation: str) -> dict:
    return {
        "embed_dim": 32,
        "quick_gelu": activation == "quick_gelu",
        "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 2},
    }


@torch.no_grad()
def open_clip_features(model: open_clip.CLIP) -> tuple[Tensor, Tensor]:
    images, token_ids = inputs()
    padded = nn.functional.pad(token_ids, (0, 24 - token_ids.shape[1]))
    return model.encode_image(images), model.encode_text(padded)


def open_clip_folder(folder: Path, activation: str) -> open_clip.CLIP:
    model = open_clip_model(activation)
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize_mode": "squash"}
    folder.mkdir()
    config = {"model_cfg": open_clip_config(activation), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


def assert_equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def assert_differ(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() > 1e-3


def refusal(source: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_weights(source)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and str(source) in message, message
    return message


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_folder_of_hugging_face_records_all_settings(tmp_path, activation):
    model = hugging_face_model(activation)
    model.save_pretrained(tmp_path)
    found = read_weights(tmp_path)
    assert found.form == "folder of Hugging Face"
    assert architecture(found) == SMALL | {"activation": activation}
    assert (found.grid, found.text_length, found.preprocessing) == ((4, 4), 24, CLIP_PREPROCESSING)
    assert_equal(features(found), hugging_face_features(model))


def test_the_two_activations_are_not_the_same():
    """Shows that the tests above can fail."""
    quick, gelu = hugging_face_model("quick_gelu"), hugging_face_model("gelu")
    assert_differ(hugging_face_features(quick), hugging_face_features(gelu))


def test_a_folder_that_transformers_saved_again(tmp_path):
    """transformers writes the settings of images to another file than our export."""
    model = hugging_face_model("gelu")
    model.save_pretrained(tmp_path)
    own = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.1, 0.3], "do_center_crop": False, "resample": 2}
    own |= {"size": {"height": 64, "width": 64}, "do_resize": True}
    tokenizer = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    CLIPProcessor(CLIPImageProcessor(**own), tokenizer).save_pretrained(tmp_path)
    assert (tmp_path / "processor_config.json").is_file() and not (tmp_path / "preprocessor_config.json").exists()
    expected = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.1, 0.3), squash=True, interpolation="bilinear")
    assert read_weights(tmp_path).preprocessing == expected


def test_an_old_folder_whose_second_sections_override(tmp_path):
    model = hugging_face_model("gelu")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for tower in ("vision", "text"):
        config[f"{tower}_config_dict"] = config[f"{tower}_config"]
        config[f"{tower}_config"] = {"hidden_act": "quick_gelu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_equal(hugging_face_features(CLIPModel.from_pretrained(tmp_path).eval()), hugging_face_features(model))
    assert_equal(features(read_weights(tmp_path)), hugging_face_features(model))


@pytest.mark.parametrize("weight_map", [None, [1], {"a": 3}, {"a": None}, {"a": ["x"]}, {"a": "../x"}, {"a": "none"}])
def test_a_broken_index_is_refused(tmp_path, weight_map):
    hugging_face_model("gelu").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "model.safetensors.index.json" in refusal(tmp_path)


def test_endless_json_is_refused(tmp_path):
    hugging_face_model("gelu").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert "config.json cannot be read" in refusal(tmp_path)


def test_the_configuration_that_has_weights_is_used(tmp_path):
    """Repositories on the hub contain the files of both tools, but a download may have only one."""
    model = hugging_face_model("gelu")
    model.save_pretrained(tmp_path)
    config = {"model_cfg": open_clip_config("gelu"), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert read_weights(tmp_path).form == "folder of Hugging Face"
    save_file(open_clip_model("gelu").state_dict(), tmp_path / "open_clip_model.safetensors")
    assert read_weights(tmp_path).form == "folder of open_clip"


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_state_dict_in_hugging_face_names(tmp_path, suffix):
    model = hugging_face_model("gelu")
    path = tmp_path / f"model.{suffix}"
    state = model.state_dict() | {"text_model.embeddings.position_ids": torch.arange(24)[None]}  # as in older files
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    found = read_weights(path)
    assert "names of Hugging Face" in found.form and found.settings.activation is None
    given = ("model.activation=gelu", "model.vision_heads=2", "model.text_heads=3")  # a file does not record them
    assert_equal(features(found, *given), hugging_face_features(model))


def test_a_folder_of_hugging_face_in_several_files(tmp_path):
    model = hugging_face_model("quick_gelu")
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    parts = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 1 and (tmp_path / "model.safetensors.index.json").is_file()
    assert_equal(features(read_weights(tmp_path)), hugging_face_features(model))
    (tmp_path / parts[0]).unlink()
    assert parts[0] in refusal(tmp_path)


def test_the_preprocessing_of_a_folder_is_read(tmp_path):
    hugging_face_model("gelu").save_pretrained(tmp_path)
    own = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.1, 0.3], "do_center_crop": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own | {"size": {"height": 64, "width": 64}}))
    assert read_weights(tmp_path).preprocessing == Preprocessing((0.5, 0.4, 0.3), (0.2, 0.1, 0.3), squash=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "siglip"}, ["siglip", "CLIPModel"]),
        ({"vision_config": {"hidden_act": "gelu"}}, ["hidden_act", "'gelu' and 'quick_gelu'"]),
        ({"vision_config": {"num_hidden_layers": 9}}, ["vision_layers 9", "vision_layers 2", "two models"]),
        ({"text_config": {"hidden_size": 96}}, ["text_width 96", "text_width 48"]),
        ({"projection_dim": 512}, ["embed_dim 512", "embed_dim 32"]),
        ({"text_config": {"hidden_act": "re\nlu"}}, ["hidden_act"]),
        ({"text_config": {"hidden_act": "relu"}}, ["hidden_act", "relu"]),
        ({"vision_config": {"layer_norm_eps": 1e-6}}, ["layer_norm_eps", "1e-06"]),
        ({"vision_config": {"image_size": 96}}, ["16 patches", "96 × 96", "6 × 6"]),
        ({"vision_config": {"num_attention_heads": "two"}}, ["'two' attention heads"]),
        ({"text_config": {"num_attention_heads": 0}}, ["0 attention heads"]),
        ({"text_config": {"num_attention_heads": 5}}, ["5 attention heads", "do not divide the width 48"]),
        ({"vision_config": {"image_size": -64}}, ["-64 pixels"]),
    ],
)
def test_a_folder_of_another_model_is_refused(tmp_path, change, words):
    hugging_face_model("quick_gelu").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refusal(tmp_path)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), ["a folder, but not one of", "model.safetensors"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json cannot be read"]),
        (lambda folder: (folder / "config.json").write_text("[]"), ["config.json contains a list"]),
        (lambda folder: (folder / "config.json").unlink(), ["a folder, but not one of"]),
        (lambda folder: cut_off(folder / "model.safetensors"), ["damaged"]),
    ],
    ids=["no weights", "cut off", "no keys", "no configuration", "weights cut off"],
)
def test_an_incomplete_folder_is_refused(tmp_path, spoil, words):
    hugging_face_model("quick_gelu").save_pretrained(tmp_path)
    spoil(tmp_path)
    message = refusal(tmp_path)
    assert all(word in message for word in words), message


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda state: state.pop("text_model.encoder.layers.1.self_attn.k_proj.bias"),
            ["1.self_attn.k_proj.bias is m"],
        ),
        (lambda state: state.pop("visual_projection.weight"), ["visual.proj missing"]),
        (lambda state: state.update({"vision_model.head.weight": torch.ones(2)}), ["vision_model.head.weight is unk"]),
        (lambda state: state.update({"visual_projection.weight": torch.ones(16, 64)}), ["end in different widths"]),
        (
            lambda state: state.update({"text_model.encoder.layers.1.self_attn.k_proj.weight": torch.ones(47, 48)}),
            ["text_model.encoder.layers.1.self_attn", "different shapes"],
        ),
    ],
    ids=["no key", "no projection", "unknown", "other width", "other shape"],
)
def test_an_incomplete_state_dict_of_hugging_face_is_refused(tmp_path, spoil, words):
    state = to_hugging_face(weights())
    spoil(state)
    torch.save(state, tmp_path / "model.bin")
    message = refusal(tmp_path / "model.bin")
    assert all(word in message for word in words), message


def test_names_of_hugging_face_and_back_are_the_same_tensors():
    state = weights()
    theirs = to_hugging_face(state)
    assert theirs.keys() == hugging_face_model("gelu").state_dict().keys()
    back = from_hugging_face(theirs)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


# ---- open_clip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_folder_of_open_clip_records_all_settings(tmp_path, activation):
    model = open_clip_folder(tmp_path / "model", activation)
    found = read_weights(tmp_path / "model")
    assert found.form == "folder of open_clip"
    assert architecture(found) == SMALL | {"activation": activation}
    assert found.preprocessing == Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), squash=True)
    assert_equal(features(found), open_clip_features(model))


@pytest.mark.parametrize("wrap", [dict, lambda state: {"epoch": 3, "name": "run", "state_dict": state}])
def test_a_training_checkpoint_of_open_clip(tmp_path, wrap):
    """open_clip writes it when it trains with DistributedDataParallel."""
    state = open_clip_model("gelu").state_dict()
    torch.save(wrap({f"module.{name}": value for name, value in state.items()}), tmp_path / "epoch_3.pt")
    found = read_weights(tmp_path / "epoch_3.pt")
    assert found.state.keys() == state.keys()
    assert all(torch.equal(found.state[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("section", "change"),
    [
        (None, {"custom_text": True}),
        ("vision_cfg", {"timm_model_name": "vit_base_patch16_siglip_224"}),
        ("vision_cfg", {"pool_type": "avg"}),
        ("vision_cfg", {"mlp_ratio": 4.36}),
        ("text_cfg", {"no_causal_mask": True}),
        ("text_cfg", {"hf_model_name": "roberta-base"}),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}),
    ],
)
def test_a_folder_of_open_clip_with_another_kind_of_model_is_refused(tmp_path, section, change):
    open_clip_folder(tmp_path / "model", "gelu")
    config = json.loads((tmp_path / "model/open_clip_config.json").read_text())
    (config["model_cfg"] if section is None else config["model_cfg"][section]).update(change)
    (tmp_path / "model/open_clip_config.json").write_text(json.dumps(config))
    message = refusal(tmp_path / "model")
    assert "another kind of model than CLIP" in message and next(iter(change)) in message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, ["no vision_cfg"]),
        ({"model_cfg": 3}, ["no vision_cfg"]),
        ({"model_cfg": open_clip_config("gelu"), "preprocess_cfg": {"mean": [0.5, 0.5]}}, ["[0.5, 0.5]"]),
        ({"model_cfg": open_clip_config("gelu"), "preprocess_cfg": {"mean": 0.5}}, ["[0.5]"]),
        ({"model_cfg": open_clip_config("gelu"), "preprocess_cfg": {"mean": [0, float("nan"), 1]}}, ["nan"]),
        ({"model_cfg": open_clip_config("gelu"), "preprocess_cfg": {"std": ["a", 1, 2]}}, ["'a'"]),
        ({"model_cfg": open_clip_config("gelu"), "preprocess_cfg": {"std": [1, 0, 2]}}, ["[1, 0, 2]", "above 0"]),
        ({"model_cfg": open_clip_config("gelu"), "preprocess_cfg": {"interpolation": "random"}}, ["'random'"]),
        ({"model_cfg": open_clip_config("gelu"), "preprocess_cfg": {"resize_mode": "longest"}}, ["'longest'"]),
        ({"model_cfg": open_clip_config("gelu") | {"vision_cfg": {"width": 64, "head_width": 0}}}, ["64 / 0"]),
        ({"model_cfg": open_clip_config("gelu") | {"embed_dim": 64}}, ["embed_dim 64", "embed_dim 32"]),
    ],
)
def test_a_folder_of_open_clip_with_broken_settings_is_refused(tmp_path, config, words):
    open_clip_folder(tmp_path / "model", "gelu")
    (tmp_path / "model/open_clip_config.json").write_text(json.dumps(config))
    message = refusal(tmp_path / "model")
    assert all(word in message for word in words), message


# ---- architecture ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14"])
def test_the_architecture_is_read_from_the_tensors(name):
    """Expects open_clip's sizes. Only the shapes matter, so there are no tensors."""
    theirs = open_clip.get_model_config(name)
    vision, text = theirs["vision_cfg"], theirs["text_cfg"]
    shapes = clip_shapes(
        embed=theirs["embed_dim"],
        resolution=(vision["image_size"], vision["image_size"]),
        patch=vision["patch_size"],
        vision_width=vision["width"],
        vision_layers=vision["layers"],
        text_width=text["width"],
        text_layers=text["layers"],
    )
    sizes = read_sizes(shapes)
    assert sizes._asdict() == {
        "patch_size": vision["patch_size"],
        "vision_width": vision["width"],
        "vision_layers": vision["layers"],
        "text_width": text["width"],
        "text_layers": text["layers"],
        "embed_dim": theirs["embed_dim"],
        "vocab_size": 49408,
    }
    assert usual_heads(sizes.vision_width) == vision["width"] // vision.get("head_width", 64)
    assert usual_heads(sizes.text_width) == text["heads"]


# ---- weights and configuration --------------------------------------------------------------------------------------


def resolved(path: Path, *overrides: str):
    fixed = ("experiment.input_resolution=64",)
    return resolve_architecture(load_config(overrides=(*fixed, *overrides)), read_weights(path))


@pytest.fixture
def state_dict(tmp_path) -> Path:
    path = tmp_path / "weights.pt"
    torch.save(weights(), path)
    return path


def test_an_activation_that_is_not_recorded_must_be_given(state_dict):
    with pytest.raises(UserError) as error:
        resolved(state_dict)
    message = str(error.value)
    assert all(word in message for word in (str(state_dict), "model.activation=quick_gelu", "model.activation=gelu"))
    for activation in ACTIVATIONS:
        config = resolved(state_dict, f"model.activation={activation}")
        assert config.model.activation == activation
        notes = weight_notes(config, read_weights(state_dict))
        assert f"activation: {activation} (given as model.activation)" in notes


def test_a_recorded_activation_is_logged_and_not_overridden(tmp_path):
    open_clip_folder(tmp_path / "model", "gelu")
    config = resolved(tmp_path / "model")
    notes = weight_notes(config, read_weights(tmp_path / "model"))
    assert "activation: gelu (known from the weights)" in notes
    with pytest.raises(
        UserError, match=r"model.activation: quick_gelu does not fit .*activation gelu: set model.*=auto"
    ):
        resolved(tmp_path / "model", "model.activation=quick_gelu")


def test_the_architecture_of_the_weights_replaces_auto(state_dict):
    config = resolved(state_dict, "model.activation=gelu", "model.vision_heads=2")
    expected = SMALL | {"activation": "gelu", "text_heads": 1}  # 64 channels, because nothing else is known
    assert {key: config.model[key] for key in SMALL} == expected
    assert config.experiment.simclr_mlp == [32, 128, 32]


def test_all_contradictions_are_reported_together(state_dict):
    with pytest.raises(UserError) as error:
        resolved(state_dict, "model.activation=gelu", "model.patch_size=32", "experiment.simclr_mlp=[256, 128, 256]")
    message = str(error.value)
    assert "[256, 128, 256]" in message and f"model.patch_size: 32 does not fit {state_dict}" in message


def test_a_configuration_for_other_weights_is_not_used_to_evaluate(tmp_path):
    """For example the demo's configuration and a CLIP of another size: its heads and its activation are ignored."""
    open_clip_folder(tmp_path / "model", "gelu")
    state = tmp_path / "weights.pt"
    torch.save(weights(), state)
    demo = ("model.vision_width=192", "model.vision_heads=32", "model.vision_layers=9", "model.activation=quick_gelu")
    saved = config_of_weights(load_config(overrides=demo), read_weights(state))
    assert (saved.model.vision_width, saved.model.vision_heads, saved.model.vision_layers) == (64, 1, 2)
    _, saved, notes = build_saved_model(load_config(overrides=demo), read_weights(tmp_path / "model"))
    assert (saved.model.activation, saved.model.vision_heads) == ("gelu", 2)
    assert notes[-1].startswith("warning: model.activation: quick_gelu is not used")


def test_impossible_heads_must_be_given(tmp_path):
    sizes = SIZES | {"vision_width": 200}
    torch.save({name: torch.as_tensor(value) for name, value in clip_weights(**sizes).items()}, tmp_path / "weights.pt")
    found = read_weights(tmp_path / "weights.pt")
    for use in (resolve_architecture, config_of_weights):
        with pytest.raises(UserError, match=r"width 200, and 3 do not divide it: set model.vision_heads"):
            use(load_config(overrides=("model.activation=gelu",)), found)
        given = ("model.activation=gelu", "model.vision_heads=4", "experiment.input_resolution=64")
        assert use(load_config(overrides=given), found).model.vision_heads == 4


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.patch_size=32", ["model.patch_size: 32", "patch_size 16", "model.patch_size=auto"]),
        ("model.vision_layers=12", ["model.vision_layers: 12", "vision_layers 2"]),
        ("model.embed_dim=512", ["model.embed_dim: 512", "embed_dim 32"]),
        ("experiment.simclr_mlp=[512, 128, 512]", ["experiment.simclr_mlp", "model.embed_dim: 32"]),
        (
            "experiment.input_resolution=72",
            ["experiment.input_resolution: [72, 72]", "multiples of model.patch_size: 16"],
        ),
        ("model.vision_heads=5", ["width 64", "5 do not divide it", "model.vision_heads"]),
    ],
)
def test_a_configuration_that_contradicts_the_weights_is_refused(state_dict, override, words):
    with pytest.raises(UserError) as error:
        resolved(state_dict, "model.activation=gelu", override)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: to_hugging_face(weights()), ["of OpenAI (", "of Hugging Face ("]),
        (
            lambda: {"encode_text.ln_final.weight": torch.ones(48)},
            ["of OpenAI (", "of the published code (encode_text."],
        ),
        (lambda: {"image_encoder.proj": torch.ones(64, 32)}, ["of OpenAI (", "of this project (image_encoder.proj)"]),
    ],
    ids=["Hugging Face", "published", "ours"],
)
def test_names_of_several_tools_are_not_mixed(tmp_path, other, words):
    torch.save(weights() | other(), tmp_path / "mixed.pt")
    message = refusal(tmp_path / "mixed.pt")
    assert all(word in message for word in ("mixed", *words)), message


# ---- checkpoints of TBPS-CLIP ---------------------------------------------------------------------------------------


PUBLISHED_CONFIG = {
    "device": 5,
    "anno_dir": "/data/anno",
    "experiment": {"input_resolution": [64, 32], "text_length": 24, "simclr_mlp": [32, 16, 32], "ss": True},
    "schedule": {"lr": 1.0e-4, "betas": [0.9, 0.98]},
    "model": {"ckpt_type": "original_clip", "embed_dim": 32, "vocab_size": 49408},
    "distributed": {"url": "env://"},
}
PUBLISHED = TINY_MODEL | {"vision_width": 128, "vision_heads": 2, "text_width": 64, "text_heads": 1}


def published_name(ours: str) -> str:
    for prefix, theirs in (
        ("image_encoder.", "visual."),
        ("text_encoder.", "encode_text."),
        ("simclr_projector.", "simclr_mlp."),
        ("masked_language_head.", ""),
        ("identity_classifier.", "classifier."),
    ):
        if ours.startswith(prefix):
            return theirs + ours.removeprefix(prefix)
    return ours


def published(model: nn.Module, config: object, path: Path) -> Path:
    """Writes a checkpoint like the published code, after a training step."""
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad).backward()
    optimizer.step()
    state = {published_name(name): tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": state, "optimizer": optimizer.state_dict(), "config": config}, path)
    return path


def test_a_published_checkpoint_is_read_with_its_easydict(tmp_path):
    model = make_model(**PUBLISHED, simclr_widths=[32, 16, 32], masked_language_depth=1, identities=5)
    path = published(model, EasyDict(PUBLISHED_CONFIG), tmp_path / "checkpoint_best.pth")
    with pytest.raises(pickle.UnpicklingError, match=r"easydict\.EasyDict"):
        torch.load(path, weights_only=True)  # so plain torch.load needs the class
    found = read_weights(path)
    assert found.form == "checkpoint of the published code"
    assert architecture(found) == {key: PUBLISHED[key] for key in SMALL}
    assert (found.grid, found.text_length, found.preprocessing) == ((4, 2), 24, TBPS_PREPROCESSING)
    own = {"simclr_widths": [32, 16, 32], "masked_language_depth": 1, "identities": 5}
    loaded = build_encoders(config_of_weights(load_config(), found), **own)
    assert load_weights(loaded, found) == []
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_every_name_of_the_published_code_is_known():
    """The reference has CLIP's names for the text encoder; checkpoints have `encode_text.` in front of them."""
    golden = json.loads((GOLDEN / "parameter_groups.json").read_text())
    with torch.device("meta"):
        model = make_model(**VIT_B16, simclr_widths=[512, 128, 512], masked_language_depth=4, identities=11003)
    text_names = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
    found = {
        ours_from_published(f"encode_text.{name}" if name.startswith(text_names) else name): golden["shapes"][name]
        for name in (*golden["trained"], *golden["frozen"])
    }
    assert found == {name: list(parameter.shape) for name, parameter in model.named_parameters()}


@torch.no_grad()
def test_a_published_checkpoint_is_evaluated_with_its_architecture(tmp_path):
    model = make_model(**PUBLISHED, simclr_widths=[32, 16, 32]).eval()
    with torch.enable_grad():
        found = read_weights(published(model, EasyDict(PUBLISHED_CONFIG), tmp_path / "published.pth"))
    loaded, _, notes = build_saved_model(load_config(), found)
    assert "for 64 × 32 pixels, 24 tokens" in notes and "published code" in notes[0]
    images, tokens = torch.randn(2, 3, 64, 32), torch.randint(1, 59, (2, 24))
    loaded.eval()
    assert torch.equal(loaded.encode_image(images), model.encode_image(images))
    assert torch.equal(loaded.encode_text(tokens), model.encode_text(tokens))


class Intruder:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_beside_an_easydict_is_not_run(tmp_path):
    created = tmp_path / "created by the file"
    config = EasyDict(PUBLISHED_CONFIG | {"device": Intruder(created)})
    path = published(make_model(**PUBLISHED), config, tmp_path / "published.pth")
    assert "io.open" in refusal(path)
    assert not created.exists()


def test_a_published_checkpoint_that_does_not_record_its_grid(tmp_path):
    """Its 8 patches form no square, but training can still start from them at the right resolution."""
    model = make_model(**PUBLISHED)
    found = read_weights(published(model, EasyDict(experiment={"text_length": 24}), tmp_path / "published.pth"))
    assert found.grid is None
    with pytest.raises(UserError, match=r"8 patches of 16 pixels form no square: set experiment.input_resolution="):
        config_of_weights(load_config(), found)
    given = load_config(overrides=("experiment.input_resolution=[64, 32]",))
    assert config_of_weights(given, found).experiment.input_resolution == [64, 32]
    assert load_weights(make_model(**PUBLISHED), found) == []


def test_a_grid_that_only_looks_square_is_resized_from_the_recorded_one(tmp_path):
    """128 × 32 pixels are 8 × 2 patches, as many as 4 × 4."""
    sizes = TINY_MODEL | {"resolution": (128, 32)}
    config = {"experiment": {"input_resolution": [128, 32]}, "model": {"vision_heads": 2, "text_heads": 3}}
    model = make_model(**sizes)
    torch.save({"model": model.state_dict(), "config": config}, tmp_path / "x.pth")
    found = read_weights(tmp_path / "x.pth")
    assert found.grid == (8, 2)
    other = make_model(**TINY_MODEL | {"resolution": (64, 64)})
    assert load_weights(other, found) == ["image position embeddings resized from 8 × 2 to 4 × 4 patches"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model": {"activation": "relu"}}, ["'relu'"]),
        ({"model": {"vision_heads": "auto"}}, ["'auto' attention heads"]),
        ({"experiment": {"input_resolution": [64, 0]}}, ["0 pixels"]),
        ({"experiment": {"input_resolution": [64, 64]}}, ["8 patches", "4 × 4"]),
    ],
)
def test_a_checkpoint_with_broken_settings_is_refused(tmp_path, config, words):
    torch.save({"model": make_model(**TINY_MODEL).state_dict(), "config": config}, tmp_path / "x.pth")
    message = refusal(tmp_path / "x.pth")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "config", [{}, {"model": [1], "experiment": None}, {"experiment": {"input_resolution": "big"}}]
)
def test_a_checkpoint_with_few_settings_is_read(tmp_path, config):
    torch.save({"model": make_model(**TINY_MODEL).state_dict(), "config": config}, tmp_path / "x.pth")
    found = read_weights(tmp_path / "x.pth")
    assert found.settings == Settings("quick_gelu", preprocessing=TBPS_PREPROCESSING) and found.grid is None


def test_the_names_of_a_bare_state_dict_of_ours_imply_its_preprocessing(tmp_path):
    """They do not imply its activation, nor that its 16 patches are 8 × 2 and not 4 × 4."""
    model = make_model(**TINY_MODEL | {"resolution": (128, 32)})
    torch.save(model.state_dict(), tmp_path / "x.pt")
    found = read_weights(tmp_path / "x.pt")
    assert found.settings == Settings(preprocessing=TBPS_PREPROCESSING) and found.grid is None
    given = load_config(overrides=("experiment.input_resolution=[128, 32]", "model.activation=gelu"))
    assert config_of_weights(given, found).experiment.input_resolution == [128, 32]
    assert load_weights(make_model(**TINY_MODEL | {"resolution": (128, 32)}), found) == []


@pytest.mark.parametrize(
    "other",
    [{"progress": 0.5}, {"progress": None, "epoch": 7}, {"epoch": "last", "optimizer": {}}],
)
def test_a_checkpoint_of_others_that_looks_like_ours(tmp_path, other):
    torch.save({"model": weights(), "config": {}} | other, tmp_path / "x.pt")
    found = read_weights(tmp_path / "x.pt")
    assert found.form == "torch.save, names of OpenAI" and found.settings == Settings()


def test_for_a_folder_of_a_run_the_file_to_give_is_named(tmp_path):
    (tmp_path / "checkpoint_best.pth").touch()
    assert str(tmp_path / "checkpoint_best.pth") in refusal(tmp_path)


def test_a_checkpoint_with_a_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    model = make_model(**TINY_MODEL)
    torch.save({"model": model.state_dict(), "config": {}}, path)
    content = bytearray(path.read_bytes())
    weight = model.image_encoder.proj.detach().numpy().tobytes()
    content[content.index(weight) + 50] ^= 0x40
    path.write_bytes(content)
    assert "checksum" in refusal(path)
