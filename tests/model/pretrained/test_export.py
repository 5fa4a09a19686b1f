"""Exports: the real libraries compute the same features, and reading an export returns the same tensors."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
from easydict import EasyDict
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPProcessor

from misc.builders.architecture import config_of_weights
from misc.builders.model import build_export, build_saved_model
from misc.config.loading import load_config
from misc.data.views import EvaluationView
from misc.errors import UserError
from misc.files import atomic_folder
from model.preprocessing import CLIP_PREPROCESSING, IRRA_PREPROCESSING, TBPS_PREPROCESSING
from model.pretrained import export as exporting
from model.pretrained.names import from_ours, to_ours
from model.pretrained.weights import read_weights
from model.tbps_clip import TBPSCLIP
from tests.helpers.golden_models import GOLDEN, TINY_MODEL, VIT_B16, seeded_model
from tests.helpers.runs import METRICS, QUICK, ROOT, Run, of_dataset, only_error
from tests.helpers.seeded import TINY, clip_weights, normal
from text_utils.tokenizer import Tokenizer

CAPTIONS = [row["text"] for row in json.loads((GOLDEN / "captions.json").read_text(encoding="utf-8"))[:100]]
"""Captions that people wrote; the later ones in the file are special cases."""
SQUARE = TINY_MODEL | {"resolution": (64, 64), "text_length": 77}
TALL = TINY_MODEL | {"resolution": (64, 32), "text_length": 77}
ACTIVATIONS = {"square": "gelu", "tall": "quick_gelu"}
SHAPES = {"square": SQUARE, "tall": TALL}
FORMS = ("openclip", "huggingface", "onnx")
TOKENIZER = Tokenizer()
TOKEN_ROWS = [TOKENIZER.encode(caption, 77) for caption in CAPTIONS]
TOLERANCE = 1e-4


class Source(NamedTuple):
    """A checkpoint, and its model."""

    path: Path
    model: TBPSCLIP


class Traced(NamedTuple):
    """An export to ONNX, its source, and what `torch.onnx.export` returned for the image and the text encoder."""

    source: Source
    folder: Path
    programs: list[torch.onnx.ONNXProgram]


@cache
def trained_model(shape: str, activation: str) -> TBPSCLIP:
    """Returns a model with training heads. No test changes it."""
    torch.manual_seed(0)
    architecture = SHAPES[shape]
    sizes = {"resolution": architecture["resolution"], "context": architecture["text_length"]}
    own = {"activation": activation, "simclr_widths": [32, 8, 32]}
    return seeded_model(architecture | own, clip_weights(**TINY | sizes))


def checkpoint(folder: Path, shape: str, activation: str) -> Source:
    """Writes a checkpoint like that of a run."""
    architecture, model = SHAPES[shape], trained_model(shape, activation)
    config = {
        "experiment": {
            "input_resolution": list(architecture["resolution"]),
            "text_length": architecture["text_length"],
        },
        "model": {key: architecture[key] for key in architecture if key not in ("resolution", "text_length")}
        | {"activation": activation},
    }
    path = folder / "checkpoint_best.pth"
    torch.save({"model": model.state_dict(), "config": config, "epoch": 3, "metrics": {}}, path)
    return Source(path, model)


@pytest.fixture(params=["quick_gelu", "gelu"])
def source(request, tmp_path) -> Source:
    return checkpoint(tmp_path, "square", request.param)


@pytest.fixture
def tall(tmp_path) -> Source:
    return checkpoint(tmp_path, "tall", "quick_gelu")


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> Callable[[str], Traced]:
    """A function that exports a square or tall model to ONNX, each once: tracing its encoders takes seconds."""
    if not exporting.supports_onnx():
        pytest.skip("needs torch 2.6")

    @cache
    def trace(shape: str) -> Traced:
        folder = tmp_path_factory.mktemp(shape)
        source = checkpoint(folder, shape, ACTIVATIONS[shape])
        programs, torch_export = [], torch.onnx.export

        def recorded(*arguments, **options) -> torch.onnx.ONNXProgram:
            programs.append(torch_export(*arguments, **options))
            return programs[-1]

        with patch.object(torch.onnx, "export", recorded):
            export("onnx", source.path, folder / "out")
        return Traced(source, folder / "out", programs)

    return trace


def reuse(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the next export to ONNX, which must be of the same model, write the programs of an earlier one."""
    programs = iter(traced.programs)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: next(programs))


def export(form: str, source: Path, folder: Path, *overrides: str) -> str:
    """Exports like `main.py --export`, and returns the line for the log."""
    weights = read_weights(source)
    model, config, _ = build_saved_model(load_config(overrides=overrides), weights)
    return exporting.export(form, folder, build_export(config, model.eval(), weights, TOKENIZER))


def images(*size: int, count: int = 5) -> Tensor:
    return torch.from_numpy(normal("export.images", count, 3, *size))


def picture() -> Image.Image:
    """Returns an image that is so smooth that two ways of resizing agree."""
    coarse = Image.fromarray((255 * np.random.RandomState(0).rand(9, 5, 3)).astype(np.uint8))
    return coarse.resize((90, 210), Image.Resampling.BICUBIC)


def token_rows(length: int = 77) -> Tensor:
    return torch.tensor([row + [0] * (length - len(row)) for row in TOKEN_ROWS])


@torch.no_grad()
def text_features(model: TBPSCLIP) -> Tensor:
    return model.encode_text(token_rows())


@torch.no_grad()
def assert_image_features(model: TBPSCLIP, pixels: Tensor, found: Tensor | np.ndarray) -> None:
    assert_near(torch.as_tensor(found), model.encode_image(pixels))


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


# ---- the real libraries ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_open_clip_computes_the_same(source, tmp_path):
    folder = tmp_path / "out"
    export("openclip", source.path, folder)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    assert_image_features(source.model, images(64, 64), model.eval().encode_image(images(64, 64)))
    assert_near(model.encode_text(tokenize(CAPTIONS)), text_features(source.model))
    assert model.logit_scale == source.model.logit_scale
    torch.testing.assert_close(preprocess(picture()), EvaluationView((64, 64))(picture()), rtol=0, atol=0.02)


@torch.no_grad()
def test_open_clip_computes_the_same_for_tall_images(tall, tmp_path):
    folder = tmp_path / "out"
    export("openclip", tall.path, folder)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert_image_features(tall.model, images(64, 32), model.eval().encode_image(images(64, 32)))
    torch.testing.assert_close(preprocess(picture()), EvaluationView((64, 32))(picture()), rtol=0, atol=0.02)


@torch.no_grad()
def test_transformers_computes_the_same(source, tmp_path):
    folder = tmp_path / "out"
    export("huggingface", source.path, folder)
    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=CAPTIONS, images=picture(), return_tensors="pt", padding=True, truncation=True)
    assert_image_features(
        source.model, images(64, 64), model.get_image_features(pixel_values=images(64, 64)).pooler_output
    )
    text_output = model.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert_near(text_output.pooler_output, text_features(source.model))
    assert model.logit_scale == source.model.logit_scale
    assert model.config.logit_scale_init_value == pytest.approx(source.model.logit_scale.item())
    expected = EvaluationView((64, 64))(picture())
    torch.testing.assert_close(inputs["pixel_values"][0], expected, rtol=0, atol=0.02)
    assert list(processor.image_processor.image_mean) == [0.485, 0.456, 0.406]  # ImageNet's, used in training
    assert list(processor.image_processor.image_std) == [0.229, 0.224, 0.225]


def test_transformers_reads_the_tokenizer(tmp_path):
    """It returns our ids, also for the word whose token is our mask token."""
    export("huggingface", checkpoint(tmp_path, "square", "gelu").path, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    long = "a man in a red coat " * 30
    for caption in [*CAPTIONS, "Jekyll and Hyde", "", long]:
        assert theirs(caption, truncation=True)["input_ids"] == TOKENIZER.encode(caption, 77), caption
    assert len(theirs) == 49408
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (49406, 49407, 49407)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_onnxruntime_computes_the_same(traced, shape):
    trained, folder, _ = traced(shape)
    image_session, text_session = (session(folder / f"{name}_encoder.onnx") for name in ("image", "text"))
    size = SHAPES[shape]["resolution"]
    for count in (1, 2, 5):
        found = image_session.run(["features"], {"images": images(*size, count=count).numpy()})[0]
        assert_image_features(trained.model, images(*size, count=count), found)

    expected, longest = text_features(trained.model), int((token_rows() > 0).sum(dim=1).max())
    for token_ids in (token_rows(), token_rows(longest)):
        assert_near(torch.as_tensor(text_session.run(["features"], {"token_ids": token_ids.numpy()})[0]), expected)
    caption = np.array([TOKEN_ROWS[0]])
    single = text_session.run(["features"], {"token_ids": caption})[0]  # without padding, a batch of one
    assert_near(torch.as_tensor(single), expected[:1])

    metadata = text_session.get_modelmeta().custom_metadata_map
    assert float(metadata["logit_scale"]) == trained.model.logit_scale.item()
    processor = CLIPImageProcessor.from_pretrained(folder)
    pixels = torch.as_tensor(np.asarray(processor(picture())["pixel_values"][0]))
    torch.testing.assert_close(pixels, EvaluationView(size)(picture()), rtol=0, atol=0.02)


def session(path: Path) -> onnxruntime.InferenceSession:
    """Opens an ONNX model for one thread: several would only wait for each other."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options)


@pytest.mark.slow
def test_onnx_models_above_two_gigabytes_store_their_weights_in_a_second_file(traced, tall, tmp_path, monkeypatch):
    reuse(traced("tall"), monkeypatch)
    monkeypatch.setattr(exporting, "MAX_SINGLE_FILE_BYTES", 0)
    export("onnx", tall.path, tmp_path / "out")
    assert (tmp_path / "out/text_encoder.onnx").stat().st_size < 1_000_000 < 49408 * 48 * 4
    found = session(tmp_path / "out/image_encoder.onnx").run(None, {"images": images(64, 32).numpy()})[0]
    assert_image_features(tall.model, images(64, 32), found)


@pytest.mark.slow
@torch.no_grad()
def test_towers_as_wide_as_vit_b16_are_the_same_in_all_three(tmp_path):
    """Uses three of the twelve layers: the others would only take four times as long."""
    layers = {"vision_layers": 3, "text_layers": 3}
    model = seeded_model(VIT_B16 | layers, clip_weights(**layers))
    path = tmp_path / "weights.pt"
    torch.save({"model": model.state_dict(), "config": {}}, path)
    for form in FORMS if exporting.supports_onnx() else FORMS[:2]:
        export(form, path, tmp_path / form)
    pixels, token_ids = images(224, 224, count=2), token_rows()[:16]
    image_features, text_features = model.encode_image(pixels), model.encode_text(token_ids)

    openclip = open_clip.create_model(f"local-dir:{tmp_path / 'openclip'}").eval()
    assert_near(openclip.encode_image(pixels), image_features)
    assert_near(openclip.encode_text(token_ids), text_features)
    transformers = CLIPModel.from_pretrained(tmp_path / "huggingface")
    assert_near(transformers.get_image_features(pixels).pooler_output, image_features)
    found = transformers.get_text_features(token_ids, attention_mask=(token_ids > 0).long()).pooler_output
    assert_near(found, text_features)
    for name, inputs, values, expected in (
        ("image", "images", pixels, image_features),
        ("text", "token_ids", token_ids, text_features),
    ):
        if not exporting.supports_onnx():
            continue
        found = session(tmp_path / f"onnx/{name}_encoder.onnx").run(None, {inputs: values.numpy()})[0]
        assert_near(torch.as_tensor(found), expected)


# ---- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["openclip", "huggingface"])
def test_reading_an_export_returns_the_same_tensors_and_settings(source, tmp_path, form):
    export(form, source.path, tmp_path / "out")
    first, second = read_weights(source.path), read_weights(tmp_path / "out")
    assert second.form == {"openclip": "folder of open_clip", "huggingface": "folder of Hugging Face"}[form]
    assert_same_weights(second, first)
    assert (second.settings, second.grid, second.sizes) == (first.settings, first.grid, first.sizes)
    assert second.preprocessing == TBPS_PREPROCESSING and not second.heads

    export(form, tmp_path / "out", tmp_path / "again")
    for file in sorted((tmp_path / "out").iterdir()):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def assert_same_weights(found, expected) -> None:
    assert found.state.keys() == expected.state.keys()
    for name, value in expected.state.items():
        assert torch.equal(found.state[name], value), name


def test_from_tool_to_tool(source, tmp_path):
    """Ours → Hugging Face → open_clip → Hugging Face."""
    export("huggingface", source.path, tmp_path / "1")
    export("openclip", tmp_path / "1", tmp_path / "2")
    export("huggingface", tmp_path / "2", tmp_path / "3")
    assert_same_weights(read_weights(tmp_path / "3"), read_weights(source.path))
    for file in sorted((tmp_path / "1").iterdir()):
        assert (tmp_path / "3" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_single_file_of_an_export_needs_the_activation_to_be_given(source, tmp_path):
    for form, name in (("openclip", "open_clip_model.safetensors"), ("huggingface", "model.safetensors")):
        export(form, source.path, tmp_path / form)
        found = read_weights(tmp_path / form / name)
        assert_same_weights(found, read_weights(source.path))
        with pytest.raises(UserError, match="model.activation=quick_gelu"):
            config_of_weights(load_config(), found)


def test_transformers_saves_an_export_without_changes(source, tmp_path):
    export("huggingface", source.path, tmp_path / "out")
    CLIPModel.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    CLIPProcessor.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    first, second = read_weights(source.path), read_weights(tmp_path / "again")
    assert_same_weights(second, first)
    assert (second.settings, second.preprocessing) == (first.settings, TBPS_PREPROCESSING)


def test_a_published_checkpoint_is_exported(tmp_path):
    trained = checkpoint(tmp_path, "square", "quick_gelu")
    state = {
        name.replace("image_encoder.", "visual.").replace("text_encoder.", "encode_text."): value
        for name, value in trained.model.state_dict().items()
        if name.startswith(("image_encoder.", "text_encoder.", "logit_scale"))
    }
    config = EasyDict(experiment={"input_resolution": 64, "text_length": 77})
    torch.save({"model": state, "optimizer": {}, "config": config}, tmp_path / "published.pth")
    export("huggingface", tmp_path / "published.pth", tmp_path / "out")
    assert_same_weights(read_weights(tmp_path / "out"), read_weights(trained.path))


def test_clip_that_was_not_trained_here_keeps_clip_s_preprocessing(tmp_path):
    state = {name: torch.as_tensor(value) for name, value in clip_weights(**TINY | {"resolution": (64, 64)}).items()}
    torch.save(state, tmp_path / "weights.pt")
    export("huggingface", tmp_path / "weights.pt", tmp_path / "out", "model.activation=gelu")
    assert read_weights(tmp_path / "out").preprocessing == CLIP_PREPROCESSING
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "out")
    assert processor(picture())["pixel_values"][0].shape == (3, 64, 64)
    assert list(processor.image_mean) == pytest.approx([0.48145466, 0.4578275, 0.40821073])


def irra_file(folder: Path, shape: str, size: tuple[int, int]) -> Source:
    """Writes a checkpoint in IRRA's form, which contains no temperature."""
    model = trained_model(shape, "quick_gelu")
    state = from_ours(model.state_dict())
    positions = torch.from_numpy(normal("irra.positions", 1 + size[0] * size[1] // 16**2, TINY["vision_width"]))
    state = {name: value for name, value in state.items() if name != "logit_scale"}
    state["visual.positional_embedding"] = positions
    torch.save({"model": {f"base_model.{name}": value for name, value in state.items()}}, folder / "best.pth")
    model = seeded_model(
        SHAPES[shape] | {"resolution": size}, clip_weights(**TINY | {"resolution": size, "context": 77})
    )
    model.load_state_dict(to_ours(state | {"logit_scale": torch.tensor(math.log(50))}))
    return Source(folder / "best.pth", model.eval())


IRRA_SIZE = {"openclip": (96, 32), "huggingface": (64, 64), "onnx": (96, 32)}
"""CLIPModel supports only square images. The others are three times as high as wide, as IRRA's are."""


IRRA_HEADS = ("model.vision_heads=2", "model.text_heads=3")
"""The encoders are narrower than CLIP's heads, so the number of heads must be given."""


@pytest.mark.parametrize("form", ["openclip", "huggingface"])
@torch.no_grad()
def test_irra_s_weights_are_exported_with_their_preprocessing(tmp_path, form):
    size = IRRA_SIZE[form]
    irra, folder = irra_file(tmp_path, "square", size), tmp_path / "out"
    export(form, irra.path, folder, *IRRA_HEADS)
    again = read_weights(folder)
    assert_same_weights(again, read_weights(irra.path))
    assert again.preprocessing == IRRA_PREPROCESSING and again.settings.activation == "quick_gelu"
    model, _, _ = build_saved_model(load_config(), again)
    assert_image_features(irra.model, images(*size), model.eval().encode_image(images(*size)))
    assert_near(model.encode_text(token_rows()), text_features(irra.model))


@pytest.mark.slow
def test_irra_s_weights_are_exported_to_onnx_with_their_preprocessing(tmp_path, traced, monkeypatch):
    """The encoders that are traced have the weights; the programs are those of an earlier export, to save time."""
    irra, folder, programs = (
        irra_file(tmp_path, "square", IRRA_SIZE["onnx"]),
        tmp_path / "out",
        list(traced("tall").programs),
    )
    encoders = []
    monkeypatch.setattr(torch.onnx, "export", lambda encoder, *_, **__: encoders.append(encoder) or programs.pop(0))
    export("onnx", irra.path, folder, *IRRA_HEADS)
    for found, expected in zip(encoders, (irra.model.image_encoder, irra.model.text_encoder), strict=True):
        assert found.state_dict().keys() == expected.state_dict().keys()
        assert all(torch.equal(found.state_dict()[name], value) for name, value in expected.state_dict().items())
    metadata = session(folder / "text_encoder.onnx").get_modelmeta().custom_metadata_map
    assert float(metadata["logit_scale"]) == pytest.approx(math.log(50)) and metadata["activation"] == "quick_gelu"
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 96, "width": 32} and not processor["do_center_crop"]
    assert processor["resample"] == Image.Resampling.BILINEAR
    assert processor["image_mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_exported_run_is_evaluated_to_the_same_numbers(run, unstopped, data, tmp_path):
    best = unstopped.folder / "checkpoint_best.pth"
    outcome = run("--export", "openclip", tmp_path / "out", f"model.checkpoint={best}")
    assert outcome.status == 0 and outcome.err == "", outcome
    line = outcome.out.splitlines()[-1]
    assert line.startswith(f"exported for openclip to {tmp_path / 'out'}: open_clip_config.json, open_clip_model.saf")
    assert "checkpoint of TBPS-CLIP, epoch" in outcome.out

    tables = []
    for weights in (best, tmp_path / "out"):
        outcome = run("--evaluate", weights, *QUICK, *of_dataset(data))
        assert outcome.status == 0, outcome
        tables.append([line for line in outcome.out.splitlines() if line.startswith(" ")][-1])
    assert tables[0] == tables[1] and len(tables[0].split()) == len(METRICS)


@pytest.mark.slow
def test_a_run_starts_from_an_export(run, data, source, tmp_path):
    export("huggingface", source.path, tmp_path / "out")
    settings = (f"model.checkpoint={tmp_path / 'out'}", "experiment.input_resolution=[64, 32]", "schedule.epoch=1")
    folder = tmp_path / "run"
    outcome = run(*QUICK, *of_dataset(data), *settings, "log.sheet=0", f"model.saved_path={folder}")
    assert outcome.status == 0, outcome
    log = Run(folder, outcome).log
    assert f"weights of {tmp_path / 'out'} (folder of Hugging Face)" in log
    assert "image position embeddings resized from 4 × 4 to 4 × 2 patches" in log
    found = read_weights(folder / "checkpoint_best.pth")
    expected = read_weights(source.path)
    assert (found.sizes, found.grid) == (expected.sizes, (4, 2))
    assert found.settings.activation == expected.settings.activation


MISTAKES = {
    "unknown form": (
        lambda source, folder: ("--export", "tflite", folder / "out"),
        ["tflite", "openclip, huggingface"],
    ),
    "folder that exists": (
        lambda source, folder: ("--export", "openclip", folder, f"model.checkpoint={source.path}"),
        ["already exists"],
    ),
    "file that exists": (
        lambda source, folder: ("--export", "openclip", source.path, f"model.checkpoint={source.path}"),
        ["checkpoint_best.pth already exists"],
    ),
    "no weights": (lambda source, folder: ("--export", "openclip", folder / "out", "model.checkpoint=null"), ["null"]),
    "no such weights": (
        lambda source, folder: ("--export", "openclip", folder / "out", f"model.checkpoint={folder / 'none.pt'}"),
        ["none.pt", "No such file"],
    ),
    "tall images": (
        lambda source, folder: ("--export", "huggingface", folder / "out", f"model.checkpoint={source.path}"),
        ["64 × 32", "openclip or onnx"],
    ),
    "no folder": (
        lambda source, folder: ("--export", "openclip", f"model.checkpoint={source.path}"),
        ["model.checkpoint=", "is a setting", "--export FORM OUT"],
    ),
    "a name that is too long": (
        lambda source, folder: ("--export", "openclip", folder / ("x" * 300), f"model.checkpoint={source.path}"),
        ["cannot be accessed (File name too long)"],
    ),
    "weights with a name that is too long": (
        lambda source, folder: ("--export", "openclip", folder / "out", f"model.checkpoint={folder / ('x' * 300)}.pt"),
        ["cannot be read (File name too long)"],
    ),
    "a pipe": (
        lambda source, folder: ("--export", "openclip", folder / "out", "model.checkpoint=/dev/null"),
        ["not a file"],
    ),
    "a file in its way": (
        lambda source, folder: ("--export", "openclip", source.path / "out", f"model.checkpoint={source.path}"),
        ["is not a folder", "choose another folder"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(run, tall, tmp_path, mistake):
    arguments, words = MISTAKES[mistake]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    message = only_error(run(*arguments(tall, tmp_path)))
    assert all(word in message for word in words), message
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_option_without_its_folder_is_refused(run):
    with pytest.raises(SystemExit) as ended:
        run("--export", "openclip")
    assert ended.value.code == 2


def test_packages_that_are_missing_are_named(run, tall, tmp_path, monkeypatch):
    from importlib import util

    find_spec = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    message = only_error(run("--export", "onnx", tmp_path / "out", f"model.checkpoint={tall.path}"))
    assert "pip install onnx onnxscript" in message and not (tmp_path / "out").exists()


def test_a_torch_that_cannot_export_to_onnx_is_refused(run, tall, tmp_path, monkeypatch):
    if exporting.supports_onnx():
        monkeypatch.delattr(torch.onnx.ONNXProgram, "optimize")
    message = only_error(run("--export", "onnx", tmp_path / "out", f"model.checkpoint={tall.path}"))
    assert "torch 2.6 or newer" in message and torch.__version__ in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["openclip", "huggingface", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_disk_that_gets_full_leaves_nothing(run, tmp_path, full_disk, form, traced, monkeypatch):
    if form == "onnx":
        reuse(traced("square"), monkeypatch)
    trained = checkpoint(tmp_path, "square", "gelu")
    full_disk(1_000_000)
    message = only_error(run("--export", form, tmp_path / "out", f"model.checkpoint={trained.path}"))
    assert "cannot be written" in message and "free some space" in message
    assert [path.name for path in tmp_path.iterdir()] == [trained.path.name]


def test_a_failure_leaves_nothing(tall, tmp_path, monkeypatch):
    def failing(folder, content):
        (folder / "config.json").write_text("{}")
        raise ArithmeticError("our own mistake")

    monkeypatch.setitem(exporting.FORMS, "openclip", failing)
    with pytest.raises(ArithmeticError):
        export("openclip", tall.path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [tall.path.name]


def test_the_remains_of_a_killed_export_do_not_matter(tall, tmp_path):
    code = "from pathlib import Path; from misc.files import atomic_folder\n"
    code += f"with atomic_folder(Path({str(tmp_path / 'out')!r}))"
    code += " as folder:\n (folder / 'half').write_text('x'); print('there', flush=True); import time; time.sleep(60)"
    writing = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert writing.stdout.readline() == "there\n"
    os.kill(writing.pid, signal.SIGKILL)
    writing.wait()
    assert not (tmp_path / "out").exists()
    export("openclip", tall.path, tmp_path / "out")
    assert not (tmp_path / "out/half").exists()
    (left,) = (path for path in tmp_path.iterdir() if path not in (tall.path, tmp_path / "out"))
    assert left.name.startswith("out.") and left.name.endswith(".part")


def test_a_folder_of_the_user_with_such_a_name_is_kept(tall, tmp_path):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part/precious").touch()
    export("openclip", tall.path, tmp_path / "out")
    assert (tmp_path / "out.part/precious").exists()


def test_one_of_two_exports_to_the_same_folder_fails(tmp_path):
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "out") as second:
        (second / "second").touch()
        with atomic_folder(tmp_path / "out") as first:
            (first / "first").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "first"]


def test_new_parents_are_removed_after_a_failure(tmp_path):
    with pytest.raises(ArithmeticError), atomic_folder(tmp_path / "a/b/out") as folder:
        (folder / "file").touch()
        raise ArithmeticError
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "a/b/out") as folder:
        (folder / "file").touch()
    assert (tmp_path / "a/b/out/file").exists()


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out/old").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]
