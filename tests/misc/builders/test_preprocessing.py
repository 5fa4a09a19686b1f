"""Each kind of weights prepares images and captions in its own way, in evaluation, export and search."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from misc.builders.architecture import config_of_weights
from misc.builders.data import build_evaluator
from misc.builders.model import build_saved_model
from misc.builders.preprocessing import preprocessing_of
from misc.config.loading import load_config
from misc.data.annotations import read_annotations
from misc.errors import UserError
from misc.search.encoder import load_encoder
from misc.system.distributed import Ranks
from misc.system.precision import Precision
from model.preprocessing import CLIP_PREPROCESSING, IRRA_PREPROCESSING, TBPS_PREPROCESSING, Preprocessing
from model.pretrained.names import from_ours
from model.pretrained.weights import read_weights
from tests.helpers.golden_models import make_model
from tests.helpers.runs import ARCHITECTURE, QUICK, of_dataset, only_error
from text_utils.tokenizer import Tokenizer

SIZES = {"resolution": (32, 32), "patch_size": 16, "vision_width": 32, "vision_layers": 1, "vision_heads": 1}
SIZES |= {"text_width": 32, "text_layers": 1, "text_heads": 1, "embed_dim": 32, "activation": "quick_gelu"}
CLIP_MEAN, CLIP_DEVIATION = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
IMAGENET_MEAN, IMAGENET_DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
QUICK_GELU = "model.activation=quick_gelu"


def write_weights(folder: Path, kind: str) -> Path:
    """Writes the same weights in the form of a kind: `ours`, `clip` or `irra`."""
    torch.manual_seed(0)
    model = make_model(**SIZES | {"text_length": 77})
    openai = {name: value for name, value in from_ours(model.state_dict()).items() if name != "logit_scale"}
    content = {
        "ours": {"model": model.state_dict(), "config": {"experiment": {"input_resolution": [32, 32]}}},
        "clip": openai | {"logit_scale": torch.tensor(3.9)},
        "irra": {"model": {f"base_model.{name}": value for name, value in openai.items()}},
    }[kind]
    torch.save(content, folder / f"{kind}.pth")
    return folder / f"{kind}.pth"


@pytest.fixture
def weights(tmp_path) -> Callable[[str], Path]:
    return lambda kind: write_weights(tmp_path, kind)


def used(path: Path, *overrides: str) -> Preprocessing:
    config, found = load_config(overrides=(QUICK_GELU, *overrides)), read_weights(path)
    return preprocessing_of(config_of_weights(config, found), found.preprocessing)


# ---- who decides ----------------------------------------------------------------------------------------------------

USUAL = {"ours": TBPS_PREPROCESSING, "clip": CLIP_PREPROCESSING, "irra": IRRA_PREPROCESSING}


@pytest.mark.parametrize("kind", USUAL)
def test_each_kind_of_weights_has_its_own_preprocessing(weights, kind):
    assert used(weights(kind)) == USUAL[kind]
    notes = build_saved_model(load_config(overrides=(QUICK_GELU,)), read_weights(weights(kind)))[2]
    note = next(note for note in notes if note.startswith("images: "))
    assert {"ours": "TBPS-CLIP", "clip": "CLIP, because the weights record none", "irra": "IRRA"}[kind] in note
    assert ("bilinear" in note) == (kind == "irra") and ("as annotated" in note) == (kind != "ours")


@pytest.mark.parametrize(
    ("override", "attribute", "value"),
    [
        ("preprocessing.interpolation=bilinear", "interpolation", "bilinear"),
        ("preprocessing.mean=[0.5, 0.4, 3e-1]", "mean", (0.5, 0.4, 0.3)),
        ("preprocessing.deviation=[0.2, 1, 0.3]", "deviation", (0.2, 1, 0.3)),
        ("preprocessing.clean_captions=true", "clean_captions", True),
    ],
)
def test_a_key_overrides_each_value(weights, override, attribute, value):
    found = used(weights("clip"), override)
    others = [name for name in ("interpolation", "mean", "deviation", "clean_captions") if name != attribute]
    assert getattr(found, attribute) == value != getattr(CLIP_PREPROCESSING, attribute)
    assert all(getattr(found, name) == getattr(CLIP_PREPROCESSING, name) for name in others)
    _, _, notes = build_saved_model(load_config(overrides=(QUICK_GELU, override)), read_weights(weights("clip")))
    assert any(f"given as {override.partition('=')[0]}; otherwise" in note for note in notes)


def test_a_key_chooses_another_kind(weights):
    assert used(weights("clip"), "preprocessing.kind=tbps_clip") == TBPS_PREPROCESSING
    found = used(weights("ours"), "preprocessing.kind=irra", "preprocessing.interpolation=bicubic")
    assert (found.interpolation, found.mean, found.clean_captions) == ("bicubic", IRRA_PREPROCESSING.mean, False)


@pytest.mark.parametrize(
    "override",
    ["kind=openai", "mean=[0.5, 0.5]", "mean=[0.5, 0.5, 2]", "deviation=[0, 1, 1]", "interpolation=nearest"],
)
def test_an_invalid_value_is_refused(override):
    with pytest.raises(UserError, match=rf"preprocessing\.{override.partition('=')[0]}: .* should be .*auto"):
        load_config(overrides=(f"preprocessing.{override}",))


def test_a_given_resolution_resizes_the_position_embeddings(weights):
    path = weights("irra")
    model, config, notes = build_saved_model(
        load_config(overrides=("preprocessing.resolution=48",)), read_weights(path)
    )
    assert config.experiment.input_resolution == [48, 48] and model.image_encoder.grid == (3, 3)
    assert "image position embeddings resized from 2 × 2 to 3 × 3 patches" in notes
    with pytest.raises(UserError, match=r"preprocessing.resolution: \[40, 40\] should be multiples of 16"):
        build_saved_model(load_config(overrides=("preprocessing.resolution=40",)), read_weights(path))


def test_a_resolution_may_be_given_together_with_that_of_the_weights(tmp_path):
    """Nothing shows that the two patches are one above the other."""
    model = make_model(**SIZES | {"resolution": (32, 16), "text_length": 77})
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    given = (QUICK_GELU, "experiment.input_resolution=[32, 16]", "preprocessing.resolution=[64, 16]")
    built, config, notes = build_saved_model(load_config(overrides=given), read_weights(tmp_path / "bare.pt"))
    assert config.experiment.input_resolution == [64, 16] and built.image_encoder.grid == (4, 1)
    assert "image position embeddings resized from 2 × 1 to 4 × 1 patches" in notes


# ---- evaluation -----------------------------------------------------------------------------------------------------


def prepared(path: Path, resample: Image.Resampling, mean: list[float], deviation: list[float]) -> Tensor:
    """Prepares an image without torchvision and without cropping."""
    pixels = np.asarray(Image.open(path).convert("RGB").resize((32, 32), resample)) / 255
    return torch.from_numpy((pixels - mean) / deviation).permute(2, 0, 1).float()


BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
EVALUATIONS = {
    "ours": ("ours", (), (BICUBIC, IMAGENET_MEAN, IMAGENET_DEVIATION), True),
    "clip": ("clip", (), (BICUBIC, CLIP_MEAN, CLIP_DEVIATION), False),
    "irra": ("irra", (), (BILINEAR, CLIP_MEAN, CLIP_DEVIATION), False),
    "clip as in training": (
        "clip",
        ("preprocessing.kind=tbps_clip",),
        (BICUBIC, IMAGENET_MEAN, IMAGENET_DEVIATION),
        True,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("case", EVALUATIONS)
def test_an_evaluation_prepares_images_and_captions_as_the_weights_need(weights, data, case):
    kind, overrides, preparation, cleaned = EVALUATIONS[case]
    config = load_config(overrides=(*QUICK, *of_dataset(data), QUICK_GELU, *overrides))
    model, saved, _ = build_saved_model(config, read_weights(weights(kind)))
    splits = read_annotations(data.anno_dir, data.image_dir)
    split, ranks, tokenizer = splits["test"], Ranks(0, 1, torch.device("cpu")), Tokenizer()
    retrieval = build_evaluator(saved, splits, tokenizer, Precision("fp32", "cpu"), ranks)(model)
    model.eval()
    images = torch.stack([prepared(data.image_dir / path, *preparation) for path in split.image_paths])
    torch.testing.assert_close(retrieval.gallery, F.normalize(model.encode_image(images), dim=1))
    entries = json.loads((data.anno_dir / "reid_raw.json").read_text())
    captions = [caption for entry in entries if entry["split"] == "test" for caption in entry["captions"]]
    assert any("." in caption for caption in captions)
    if cleaned:
        captions = [caption.replace(".", "") for caption in captions]
    for feature, caption in zip(retrieval.queries, captions, strict=True):
        expected = F.normalize(model.encode_text(torch.tensor([tokenizer.encode(caption)])), dim=1)
        torch.testing.assert_close(feature, expected[0])


# ---- the commands ---------------------------------------------------------------------------------------------------


def scores(folder: Path) -> list:
    return [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["irra", None])
def test_the_checkpoint_of_a_run_is_evaluated_as_in_its_training(run, data, tmp_path, weights, start):
    """Whatever weights a run starts from: its own preprocessing is the recipe's."""
    folder = tmp_path / "run"
    source = () if start is None else (f"model.checkpoint={weights(start)}", QUICK_GELU)
    architecture = ARCHITECTURE if start is None else ("experiment.input_resolution=[32, 32]",)
    common = (*QUICK, *of_dataset(data))
    trained = run(*architecture, *common, *source, f"model.saved_path={folder}", "schedule.epoch=1", "log.sheet=1")
    assert trained.status == 0, trained.err
    last = folder / "checkpoint_last.pth"
    evaluated = run("--evaluate", last, *common, "--sheet", "1", "--out", tmp_path / "own")
    assert "as usual for TBPS-CLIP" in evaluated.out
    assert scores(tmp_path / "own") == scores(folder)
    run("--evaluate", last, *common, "--sheet", "1", "--out", tmp_path / "other", "preprocessing.kind=irra")
    assert scores(tmp_path / "other") != scores(folder)


@pytest.mark.slow
def test_two_checkpoints_are_compared_each_with_its_own_preprocessing(run, data, tmp_path, weights):
    common = (*QUICK, *of_dataset(data), QUICK_GELU)
    precision = {}
    for kind in ("ours", "irra"):
        outcome = run("--evaluate", weights(kind), *common, "--sheet", "1", "--out", tmp_path / kind)
        assert outcome.status == 0, outcome.err
        precision[kind] = {each["query"]: each["average_precision"] for each in scores(tmp_path / kind)}
    assert precision["ours"] != precision["irra"]
    run("--evaluate", weights("ours"), "--against", weights("irra"), *common, "--out", tmp_path / "both")
    for line in (tmp_path / "both/comparison.jsonl").read_text().splitlines():
        found = json.loads(line)
        assert found["average_precision"] == [precision[kind][found["query"]] for kind in ("irra", "ours")]


@pytest.mark.slow
def test_a_training_with_another_preprocessing_is_refused(run, data, tmp_path):
    arguments = (*ARCHITECTURE, *QUICK, *of_dataset(data), f"model.saved_path={tmp_path / 'run'}")
    message = only_error(run(*arguments, "preprocessing.interpolation=bilinear"))
    assert "preprocessing.interpolation: bilinear has no effect on a training" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_export_records_the_preprocessing_that_is_given(run, tmp_path, weights):
    given = ("preprocessing.interpolation=bilinear", "preprocessing.clean_captions=true", "preprocessing.resolution=48")
    for form in ("openclip", "huggingface"):
        checkpoint = (f"model.checkpoint={weights('clip')}", QUICK_GELU)
        outcome = run("--export", form, tmp_path / form, *checkpoint, *given)
        assert outcome.status == 0, outcome.err
        found = read_weights(tmp_path / form)
        assert (found.grid, found.preprocessing.interpolation) == ((3, 3), "bilinear")
        assert found.preprocessing.clean_captions and found.preprocessing.mean == CLIP_PREPROCESSING.mean


# ---- search ---------------------------------------------------------------------------------------------------------


def encoder(path: Path, *overrides: str):
    return load_encoder(str(path), [QUICK_GELU, *overrides], torch.device("cpu"))


def test_a_search_prepares_pictures_and_descriptions_as_the_weights_need(weights, data):
    image = next((data.image_dir / "tiny").iterdir())
    for kind, preparation in (
        ("ours", (BICUBIC, IMAGENET_MEAN, IMAGENET_DEVIATION)),
        ("irra", (BILINEAR, CLIP_MEAN, CLIP_DEVIATION)),
    ):
        own = encoder(weights(kind))
        torch.testing.assert_close(own.view(Image.open(image)), prepared(image, *preparation))
        plain, marked = own.encode_descriptions(["a woman in red", "A woman in red."])
        assert torch.equal(plain, marked) == (kind == "ours")
        assert any(note.startswith("images: ") for note in own.notes)


def test_only_what_changes_features_of_pictures_changes_an_index(weights):
    path = weights("clip")
    former = encoder(path).fingerprint
    assert encoder(path, "preprocessing.clean_captions=true").fingerprint == former
    for override in ("interpolation=bilinear", "mean=[0.5, 0.5, 0.5]", "deviation=[1, 1, 1]", "resolution=48"):
        assert encoder(path, f"preprocessing.{override}").fingerprint != former
