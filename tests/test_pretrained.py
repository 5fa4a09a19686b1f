"""Weights in: forms of files, renaming, resizing, and everything that must be refused."""

import os
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from misc.errors import UserError
from model.pretrained import (
    load_clip,
    read_clip,
    resize_image_position_embedding,
    resize_text_position_embedding,
    to_openai_names,
)
from model.tbps_clip import TBPSCLIP
from tests.golden_models import GOLDEN, TINY_MODEL, VIT_B16, assert_close, our_name
from tests.golden_models import load as load_golden
from tests.seeded import TINY, clip_weights, normal

SMALL = TINY | {"vocab": 60}  # a small token table keeps the files small
GRID, LENGTH = (4, 2), 24  # of TINY
SETTINGS = {"input_resolution": 64, "context_length": 24, "vocab_size": 49408}


def weights(**changes) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value) for name, value in clip_weights(**SMALL | changes).items()}


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As OpenAI's archive: norms and embeddings stay in full precision, all else is half."""
    return {
        name: value if ".ln_" in f".{name}" or "embedding" in name else value.half() for name, value in state.items()
    }


def build_model(**changes) -> TBPSCLIP:
    torch.manual_seed(0)
    architecture = TINY_MODEL | {"vocab_size": SMALL["vocab"]} | changes
    return TBPSCLIP(**architecture, simclr_widths=[32, 8, 32], identities=5)


def load(model: nn.Module, path: Path) -> list[str]:
    return load_clip(model, path, grid=GRID, text_length=LENGTH)


class Holder(nn.Module):
    """A node of a module tree that only holds parameters."""

    def hold(self, state: dict[str, Tensor]) -> nn.Module:
        for name, value in state.items():
            *folders, leaf = name.split(".")
            node = self
            for folder in folders:
                if folder not in node._modules:
                    node.add_module(folder, Holder())
                node = node._modules[folder]
            node.register_parameter(leaf, nn.Parameter(value))
        for name, value in SETTINGS.items():
            self.register_buffer(name, torch.tensor(value))
        return self


class TracedHolder(Holder):
    """Runs, and has a mask outside its state dict as OpenAI's text encoder does."""

    def __init__(self):
        super().__init__()
        self.attn_mask = torch.full((32, 32), float("-inf")).triu(1)

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.text_projection.float() + self.attn_mask


def save_torchscript(state: dict[str, Tensor], path: Path, traced: bool = False) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of TorchScript
        if traced:
            archive = torch.jit.trace(TracedHolder().hold(state), torch.zeros(32, 48))
        else:
            archive = torch.jit.script(Holder().hold(state))
        torch.jit.save(archive, str(path))
    return path


def save(state: object, path: Path, **options) -> Path:
    torch.save(state, path, **options)
    return path


def assert_equal_states(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32 and found[name].device.type == "cpu", name
        assert torch.equal(found[name], value.float()), name


def assert_one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# ---- position embeddings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(5))
def test_image_position_embedding_is_resized_as_published(case):
    golden = np.load(GOLDEN / "positional_embeddings.npz")
    grid = tuple(golden[f"image.{case}.grid"].tolist())
    resized = resize_image_position_embedding(torch.from_numpy(golden[f"image.{case}.in"]), grid)
    assert_close(resized, torch.from_numpy(golden[f"image.{case}.out"]))


@pytest.mark.parametrize("case", range(4))
def test_text_position_embedding_is_resized_as_published(case):
    golden = np.load(GOLDEN / "positional_embeddings.npz")
    length = int(golden[f"text.{case}.length"])
    source = torch.from_numpy(golden[f"text.{case}.in"])
    resized = resize_text_position_embedding(source, length)
    assert_close(resized, torch.from_numpy(golden[f"text.{case}.out"]))
    assert torch.equal(resized[[0, -1]], source[[0, -1]])


def test_square_source_is_resized_even_when_the_number_of_patches_agrees():
    columns = torch.arange(4.0).repeat(4)  # 4 x 4 patches, each with the number of its column
    resized = resize_image_position_embedding(torch.cat([torch.tensor([9.0]), columns])[:, None], (8, 2))
    assert resized[0, 0] == 9
    assert resized[1:, 0].tolist() == [0.5, 2.5] * 8  # the means of two columns


def test_source_that_is_not_square_is_kept_or_refused():
    embedding = torch.randn(1 + 8, 3)
    assert torch.equal(resize_image_position_embedding(embedding, (4, 2)), embedding)
    with pytest.raises(UserError, match=r"\(9, 3\).*8 patches.*4 x 4.*input_resolution"):
        resize_image_position_embedding(embedding, (4, 4))
    with pytest.raises(UserError, match="0 patches"):
        resize_image_position_embedding(embedding[:1], (4, 4))


@pytest.mark.parametrize(("source", "length"), [(2, 5), (5, 2)])
def test_text_without_a_middle_is_refused(source, length):
    with pytest.raises(UserError, match=f"text_length={source}"):
        resize_text_position_embedding(torch.randn(source, 3), length)


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("traced", [False, True])
def test_torchscript_archive_is_read_bit_for_bit(tmp_path, traced):
    state = halved(weights(vocab=49408))
    path = save_torchscript(state, tmp_path / "ViT-B-16.pt", traced)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal_states(read_clip(path)[1], state)


def test_torchscript_tensors_may_be_views_of_a_shared_storage(tmp_path):
    whole = torch.randn(6, 5)
    state = {"text_projection": whole.T, "visual.proj": whole[2:5]}
    assert_equal_states(read_clip(save_torchscript(state, tmp_path / "weights.pt"))[1], state)


def test_code_in_a_torchscript_archive_is_not_even_parsed(tmp_path):
    state = halved(weights())
    with zipfile.ZipFile(save_torchscript(state, tmp_path / "good.pt")) as good:
        records = {name: good.read(name) for name in good.namelist()}
    with zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for name, content in records.items():
            bad.writestr(name, b"this is no code" if name.endswith(".py") else content)
    assert_equal_states(read_clip(tmp_path / "bad.pt")[1], state)


@pytest.mark.parametrize(
    ("wrap", "options"),
    [
        (dict, {}),
        (halved, {}),
        (dict, {"_use_new_zipfile_serialization": False}),
        (lambda state: {name: nn.Parameter(value) for name, value in state.items()}, {}),
        (lambda state: {"state_dict": state, "epoch": 3}, {}),
        (lambda state: {f"module.{name}": value for name, value in state.items()}, {}),
        (lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}}, {}),
        (lambda state: state | {name: torch.tensor(value) for name, value in SETTINGS.items()}, {}),
    ],
    ids=["bare", "half", "before 1.6", "parameters", "state_dict", "module", "state_dict and module", "settings"],
)
def test_state_dict_is_read_in_every_wrapping(tmp_path, wrap, options):
    state = weights()
    _, found = read_clip(str(save(wrap(state), tmp_path / "weights.bin", **options)))
    assert_equal_states(found, halved(state) if wrap is halved else state)
    assert not any(value.requires_grad for value in found.values())


def test_what_was_read_does_not_depend_on_the_file(tmp_path):
    path = save(weights(), tmp_path / "weights.pt")
    _, found = read_clip(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert_equal_states(found, weights())


class Sabotage:
    """Creates a folder where it is unpickled carelessly."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_sabotaged_archive(path: Path, victim: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Sabotage(victim), protocol=2))
        archive.writestr("archive/constants.pkl", b"")


@pytest.mark.parametrize(
    "write",
    [
        write_sabotaged_archive,
        lambda path, victim: torch.save({"logit_scale": Sabotage(victim)}, path),
        lambda path, victim: torch.save(Sabotage(victim), path, _use_new_zipfile_serialization=False),
    ],
    ids=["TorchScript", "state dict", "before 1.6"],
)
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, write):
    victim, path = tmp_path / "victim", tmp_path / "weights.pt"
    pickle.loads(pickle.dumps(Sabotage(victim)))
    assert victim.exists()  # it does harm when it runs
    victim.rmdir()
    write(path, victim)
    with pytest.raises(UserError) as error:
        read_clip(path)
    assert_one_line(error, str(path), ".mkdir", "only tensors", "torch.save(model.state_dict(), path)")
    assert not victim.exists()


def test_missing_file_and_folder_are_refused(tmp_path):
    for path, reason in ((tmp_path / "none.pt", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError) as error:
            read_clip(path)
        assert_one_line(error, str(path), reason, "set model.checkpoint")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html><body>Please log in</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:5806e77c\nsize 350000000\n", "git lfs pull"),
        (b"PK", "known"),
        (b'{"error": "quota exceeded"}', "known"),
        (pickle.dumps({"logit_scale": 1.0}), "known"),
    ],
    ids=["empty", "web page", "Git LFS", "two bytes", "JSON", "pickle"],
)
def test_file_that_is_no_checkpoint_is_refused(tmp_path, content, reason):
    path = tmp_path / "ViT-B-16.pt"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_clip(path)
    assert_one_line(error, str(path), reason)


def test_other_zip_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "weights.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match="no checkpoint .*; expected OpenAI's ViT-B-16.pt"):
        read_clip(tmp_path / "weights.pt")


@pytest.mark.parametrize("form", ["TorchScript", "state dict", "before 1.6"])
@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.9, 0.9999])
def test_truncated_file_is_refused(tmp_path, form, share):
    path = tmp_path / "weights.pt"
    if form == "TorchScript":
        save_torchscript({"text_projection": torch.randn(48, 320)}, path)
    else:
        save({"text_projection": torch.randn(48, 320)}, path, _use_new_zipfile_serialization=form == "state dict")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError) as error:
        read_clip(path)
    assert_one_line(error, str(path), "expected OpenAI's ViT-B-16.pt")


def test_damage_in_the_middle_of_an_archive_is_refused(tmp_path):
    path = save_torchscript({"text_projection": torch.ones(48, 320)}, tmp_path / "weights.pt")
    content = path.read_bytes()
    ones = torch.ones(100).numpy().tobytes()
    assert ones in content
    path.write_bytes(content.replace(ones, bytes(len(ones)), 1))
    with pytest.raises(UserError, match="damaged"):
        read_clip(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([torch.ones(2)], "list"),
        (torch.ones(2), "Tensor"),
        ({}, "dict"),
        ({0: torch.ones(2)}, "names to tensors"),
        ({"logit_scale": 2.5, "proj": "text"}, "logit_scale (float), proj (str)"),
        ({"model": {"logit_scale": torch.ones(())}, "optimizer": {}}, "model (dict), optimizer (dict)"),
        ({"logit_scale": torch.tensor(3)}, "logit_scale (torch.int64)"),
    ],
)
def test_content_that_is_no_state_dict_is_refused(tmp_path, content, reason):
    path = save(content, tmp_path / "weights.pt")
    with pytest.raises(UserError) as error:
        read_clip(path)
    assert_one_line(error, str(path), reason, "torch.save(model.state_dict(), path)")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_value_that_is_not_finite_is_refused(tmp_path, value):
    state = weights()
    state["visual.ln_post.bias"][7] = value
    path = save(state, tmp_path / "weights.pt")
    with pytest.raises(UserError) as error:
        read_clip(path)
    assert_one_line(error, str(path), "NaN or infinity in visual.ln_post.bias")


# ---- renaming -------------------------------------------------------------------------------------------------------


def test_names_of_the_model_become_openai_s():
    state = weights()
    ours = {our_name(name): value for name, value in state.items()}
    assert to_openai_names(ours | {"simclr_projector.0.weight": torch.ones(1)}) == state  # the same tensors
    assert to_openai_names(build_model().state_dict()).keys() == state.keys()


# ---- loading --------------------------------------------------------------------------------------------------------


def test_archive_is_loaded_into_encoders_and_temperature_alone(tmp_path):
    state = halved(weights())
    path = save_torchscript(state, tmp_path / "ViT-B-16.pt")
    model = build_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    assert load(model, path) == [f"CLIP weights from {path} (TorchScript archive)"]

    assert all(value is parameters[name] for name, value in model.named_parameters())  # in place
    after = model.state_dict()
    heads = [name for name in before if "simclr" in name or "identity" in name]
    assert len(heads) >= 5 and all(torch.equal(after[name], before[name]) for name in heads)
    assert_equal_states(to_openai_names(after), state)


@torch.no_grad()
def test_loaded_model_gives_the_published_features(tmp_path):
    model = build_model(vocab_size=49408).eval()
    load(model, save(weights(vocab=49408), tmp_path / "weights.pt"))
    golden = load_golden("towers_tiny.npz")
    images = torch.from_numpy(normal("g.tower.image", 5, 3, 64, 32))
    assert_close(model.encode_image(images), golden["image_features"])
    assert_close(model.encode_text(golden["tokens"]), golden["text_features"])


@pytest.mark.slow
@torch.no_grad()
def test_vit_b16_at_another_resolution_and_length_gives_the_published_features(tmp_path):
    model = TBPSCLIP(**VIT_B16 | {"resolution": (384, 128), "text_length": 64}).eval()
    path = save({name: torch.as_tensor(value) for name, value in clip_weights().items()}, tmp_path / "weights.pt")
    assert len(load_clip(model, path, grid=(24, 8), text_length=64)) == 3
    golden = load_golden("towers_vitb16.npz")
    images = torch.from_numpy(normal("g.vitb16.tall", 2, 3, 384, 128))
    assert_close(model.encode_image(images), golden["image_features_384x128"])
    assert_close(model.encode_text(golden["tokens_64"]), golden["text_features_64"])


def test_position_embeddings_are_resized_and_logged(tmp_path):
    state = weights(resolution=(96, 96), context=30)
    model = build_model()
    path = save(state, tmp_path / "weights.pt")
    assert load(model, path) == [
        f"CLIP weights from {path} (state dict)",
        "image position embeddings resized from 6 x 6 to 4 x 2 patches",
        "text position embeddings resized from 30 to 24 tokens",
    ]
    image, text = state["visual.positional_embedding"], state["positional_embedding"]
    assert torch.equal(model.image_encoder.positional_embedding, resize_image_position_embedding(image, GRID))
    assert torch.equal(model.text_encoder.positional_embedding, resize_text_position_embedding(text, LENGTH))


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name not in names}


ARCHITECTURE = "of the configured size"
REFUSED = {
    "ViT-B/32": (
        lambda: weights(patch=32, resolution=(64, 64)),
        ["1 tensor does not fit", "visual.conv1.weight is (64, 3, 32, 32), the model's is (64, 3, 16, 16)"],
        "; set model.patch_size=32",
    ),
    "vision width": (
        lambda: weights(vision_width=128),
        ["32 tensors do not fit", "visual.class_embedding is (128,), the model's is (64,)", " and 29 more"],
        "; set model.vision_width=128",
    ),
    "vision layers": (
        lambda: weights(vision_layers=3),
        ["12 tensors", "visual.transformer.resblocks.2.attn.in_proj_weight is unknown"],
        "; set model.vision_layers=3",
    ),
    "text layers": (
        lambda: weights(text_layers=1),
        ["12 tensors", "transformer.resblocks.1.attn.in_proj_weight is missing"],
        "; set model.text_layers=1",
    ),
    "text width": (lambda: weights(text_width=96), ["(96"], "; set model.text_width=96"),
    "embedding": (
        lambda: weights(embed=16),
        ["2 tensors", "visual.proj is (64, 16), the model's is (64, 32)", "text_projection is (48, 16)"],
        "; set model.embed_dim=16",
    ),
    "vocabulary": (
        lambda: weights(vocab=61),
        ["token_embedding.weight is (61, 48), the model's is (60, 48)"],
        "; set model.vocab_size=61",
    ),
    "several sizes": (
        lambda: weights(patch=32, resolution=(64, 64), text_layers=3),
        ["13 tensors"],
        "; set model.patch_size=32 model.text_layers=3",
    ),
    "missing": (
        lambda: without(weights(), "visual.ln_pre.weight"),
        ["1 tensor does not fit", "visual.ln_pre.weight is missing"],
        ARCHITECTURE,
    ),
    "missing position embedding": (
        lambda: without(weights(), "positional_embedding"),
        ["the model: positional_embedding is missing"],
        ARCHITECTURE,
    ),
    "missing in a block": (
        lambda: without(weights(), "transformer.resblocks.0.ln_1.bias"),
        ["transformer.resblocks.0.ln_1.bias is missing"],
        ARCHITECTURE,
    ),
    "unknown": (lambda: weights() | {"extra": torch.ones(1)}, ["extra is unknown"], ARCHITECTURE),
    "sizes that contradict": (
        lambda: weights() | {"visual.proj": torch.ones(64, 16)},
        ["visual.proj is (64, 16), the model's is (64, 32)"],
        ARCHITECTURE,
    ),
    "other dimensions": (
        lambda: weights() | {"text_projection": torch.ones(48), "logit_scale": torch.ones(1)},
        ["text_projection is (48,), the model's is (48, 32)", "logit_scale is (1,), the model's is ()"],
        ARCHITECTURE,
    ),
    "position embedding of one dimension": (
        lambda: weights() | {"visual.positional_embedding": torch.ones(64)},
        ["visual.positional_embedding is (64,), the model's is (9, 64)"],
        ARCHITECTURE,
    ),
    "grid that is not square": (
        lambda: weights(resolution=(96, 32)),
        ["visual.positional_embedding (13, 64)", "12 patches", "4 x 2"],
        "set experiment.input_resolution",
    ),
    "two tokens": (lambda: weights(context=2), ["positional_embedding (2, 48)"], "set experiment.text_length=2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_do_not_fit_are_refused_and_the_model_is_unchanged(tmp_path, case):
    build_state, parts, remedy = REFUSED[case]
    model = build_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = save(build_state(), tmp_path / "weights.pt")
    with pytest.raises(UserError) as error:
        load(model, path)
    assert_one_line(error, str(path), remedy, *parts)
    if remedy.startswith("; "):
        assert str(error.value).endswith(remedy)  # these keys and no other
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
