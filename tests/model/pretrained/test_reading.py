"""Reading weights: forms of files, renaming, resizing, and files that must be refused."""

import math
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
from model.pretrained.archives import open_archive
from model.pretrained.loading import load_weights, resize_image_position_embedding, resize_text_position_embedding
from model.pretrained.names import from_ours, to_ours
from model.pretrained.weights import read_weights
from model.tbps_clip import TBPSCLIP
from tests.helpers.golden_models import GOLDEN, TINY_MODEL, VIT_B16, assert_close, make_model, our_name
from tests.helpers.golden_models import load as load_golden
from tests.helpers.seeded import TINY, clip_weights, normal

SMALL = TINY | {"resolution": (64, 64), "text_width": 16}  # a narrow token table keeps the files small
SETTINGS = {"input_resolution": 64, "context_length": 24, "vocab_size": 49408}


def weights(**changes) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value) for name, value in clip_weights(**SMALL | changes).items()}


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts to the precision of OpenAI's archive: norms and embeddings stay in full precision, the rest is half."""
    return {
        name: value if ".ln_" in f".{name}" or "embedding" in name else value.half() for name, value in state.items()
    }


def build_model(**changes) -> TBPSCLIP:
    torch.manual_seed(0)
    architecture = TINY_MODEL | {"text_width": 16, "text_heads": 1} | changes
    return make_model(**architecture, simclr_widths=[32, 8, 32], identities=5)


def load(model: nn.Module, path: Path) -> list[str]:
    return load_weights(model, read_weights(path))


class Holder(nn.Module):
    """A node of a module tree that only contains parameters."""

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
    """A module that runs, and has a mask outside its state dict like OpenAI's text encoder."""

    def __init__(self):
        super().__init__()
        self.attn_mask = torch.full((32, 32), float("-inf")).triu(1)

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.text_projection.float() + self.attn_mask


def save_torchscript(state: dict[str, Tensor], path: Path, traced: bool = False) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that TorchScript is deprecated
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
    embedding = torch.from_numpy(golden[f"image.{case}.in"])
    side = math.isqrt(len(embedding) - 1)
    resized = resize_image_position_embedding(embedding, grid, source=(side, side))
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
    embedding = torch.cat([torch.tensor([9.0]), columns])[:, None]
    resized = resize_image_position_embedding(embedding, (8, 2), source=(4, 4))
    assert resized[0, 0] == 9
    assert resized[1:, 0].tolist() == [0.5, 2.5] * 8  # the means of two columns


def test_source_that_is_not_square_is_kept_or_refused():
    embedding = torch.randn(1 + 8, 3)
    assert torch.equal(resize_image_position_embedding(embedding, (4, 2), source=None), embedding)
    with pytest.raises(UserError, match=r"\(9, 3\).*8 patches.*4 × 4.*input_resolution"):
        resize_image_position_embedding(embedding, (4, 4), source=None)
    with pytest.raises(UserError, match="0 patches"):
        resize_image_position_embedding(embedding[:1], (4, 4), source=None)


@pytest.mark.parametrize(("source", "length"), [(2, 5), (5, 2)])
def test_text_without_a_middle_is_refused(source, length):
    with pytest.raises(UserError, match=f"text_length={source}"):
        resize_text_position_embedding(torch.randn(source, 3), length)


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchscript_archive_of_another_number_format_is_read(tmp_path, dtype):
    state = {name: value.to(dtype) for name, value in weights().items()}
    assert_equal_states(read_weights(save_torchscript(state, tmp_path / "weights.pt")).state, state)


@pytest.mark.parametrize("traced", [False, True])
def test_torchscript_archive_is_read_bit_for_bit(tmp_path, traced):
    state = halved(weights(text_width=48))
    path = save_torchscript(state, tmp_path / "ViT-B-16.pt", traced)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal_states(read_weights(path).state, state)


def test_torchscript_tensors_may_be_views_of_a_shared_storage(tmp_path):
    whole = torch.randn(6, 5)
    state = {"text_projection": whole.T, "visual.proj": whole[2:5]}
    form, found = open_archive(save_torchscript(state, tmp_path / "weights.pt"))
    assert form == "TorchScript archive"
    assert_equal_states({name: found[name] for name in state}, state)


def test_code_in_a_torchscript_archive_is_not_even_parsed(tmp_path):
    state = halved(weights())
    with zipfile.ZipFile(save_torchscript(state, tmp_path / "good.pt")) as good:
        records = {name: good.read(name) for name in good.namelist()}
    with zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for name, content in records.items():
            bad.writestr(name, b"this is no code" if name.endswith(".py") else content)
    assert_equal_states(read_weights(tmp_path / "bad.pt").state, state)


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
    found = read_weights(str(save(wrap(state), tmp_path / "weights.bin", **options))).state
    assert_equal_states(found, halved(state) if wrap is halved else state)
    assert not any(value.requires_grad for value in found.values())


def test_the_weights_do_not_depend_on_the_file_after_reading(tmp_path):
    path = save(weights(), tmp_path / "weights.pt")
    found = read_weights(path).state
    path.write_bytes(b"\0" * path.stat().st_size)
    assert_equal_states(found, weights())


class Sabotage:
    """An object that creates a folder when it is unpickled without checks."""

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
    assert victim.exists()  # it does harm if it runs
    victim.rmdir()
    write(path, victim)
    with pytest.raises(UserError) as error:
        read_weights(path)
    assert_one_line(error, str(path), ".mkdir", "never run", "torch.save(model.state_dict(), path)")
    assert not victim.exists()


def test_missing_file_and_folder_are_refused(tmp_path):
    for path, reason in (
        (tmp_path / "none.pt", "No such file"),
        (tmp_path, "a folder, but not one of Hugging Face or open"),
    ):
        with pytest.raises(UserError) as error:
            read_weights(path)
        assert_one_line(error, str(path), reason)


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
        read_weights(path)
    assert_one_line(error, str(path), reason)


def test_other_zip_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "weights.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match="no checkpoint .*; expected OpenAI's archive"):
        read_weights(tmp_path / "weights.pt")


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
        read_weights(path)
    assert_one_line(error, str(path), "expected OpenAI's archive")


def test_damage_in_the_middle_of_an_archive_is_refused(tmp_path):
    path = save_torchscript({"text_projection": torch.ones(48, 320)}, tmp_path / "weights.pt")
    content = path.read_bytes()
    ones = torch.ones(100).numpy().tobytes()
    assert ones in content
    path.write_bytes(content.replace(ones, bytes(len(ones)), 1))
    with pytest.raises(UserError, match="damaged"):
        read_weights(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([torch.ones(2)], "list"),
        (torch.ones(2), "Tensor"),
        ({}, "dict"),
        ({0: torch.ones(2)}, "names to tensors"),
        ({"logit_scale": 2.5, "proj": "text"}, "'logit_scale' (float), 'proj' (str)"),
        ({"model": {"logit_scale": torch.ones(()), "step": 3}, "optimizer": {}}, "'step' (int)"),
        ({"logit_scale": torch.tensor(3)}, "'logit_scale' (torch.int64)"),
    ],
)
def test_content_that_is_no_state_dict_is_refused(tmp_path, content, reason):
    path = save(content, tmp_path / "weights.pt")
    with pytest.raises(UserError) as error:
        read_weights(path)
    assert_one_line(error, str(path), reason, "torch.save(model.state_dict(), path)")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_value_that_is_not_finite_is_refused(tmp_path, value):
    state = weights()
    state["visual.ln_post.bias"][7] = value
    path = save(state, tmp_path / "weights.pt")
    with pytest.raises(UserError) as error:
        read_weights(path)
    assert_one_line(error, str(path), "NaN or infinity in visual.ln_post.bias")


# ---- renaming -------------------------------------------------------------------------------------------------------


def test_names_of_the_model_become_openai_s_and_back():
    state = weights()
    ours = {our_name(name): value for name, value in state.items()}
    assert from_ours(ours | {"simclr_projector.0.weight": torch.ones(1)}) == state  # the same tensors
    assert to_ours(state) == ours
    assert from_ours(build_model().state_dict()).keys() == state.keys()


# ---- loading --------------------------------------------------------------------------------------------------------


def test_archive_is_loaded_only_into_encoders_and_temperature(tmp_path):
    state = halved(weights())
    path = save_torchscript(state, tmp_path / "ViT-B-16.pt")
    model = build_model(resolution=(64, 64))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    assert load(model, path) == []

    assert all(value is parameters[name] for name, value in model.named_parameters())  # in place
    after = model.state_dict()
    heads = [name for name in before if "simclr" in name or "identity" in name]
    assert len(heads) >= 5 and all(torch.equal(after[name], before[name]) for name in heads)
    assert_equal_states(from_ours(after), state)


@torch.no_grad()
def test_loaded_model_gives_the_published_features(tmp_path):
    model = build_model(text_width=48, text_heads=3).eval()
    load(model, save(weights(resolution=(64, 32), text_width=48), tmp_path / "weights.pt"))
    golden = load_golden("towers_tiny.npz")
    images = torch.from_numpy(normal("g.tower.image", 5, 3, 64, 32))
    assert_close(model.encode_image(images), golden["image_features"])
    assert_close(model.encode_text(golden["tokens"]), golden["text_features"])


@pytest.mark.slow
@torch.no_grad()
def test_vit_b16_at_another_resolution_and_length_gives_the_published_features(tmp_path):
    model = make_model(**VIT_B16 | {"resolution": (384, 128), "text_length": 64}).eval()
    path = save({name: torch.as_tensor(value) for name, value in clip_weights().items()}, tmp_path / "weights.pt")
    assert len(load(model, path)) == 2
    golden = load_golden("towers_vitb16.npz")
    images = torch.from_numpy(normal("g.vitb16.tall", 2, 3, 384, 128))
    assert_close(model.encode_image(images), golden["image_features_384x128"])
    assert_close(model.encode_text(golden["tokens_64"]), golden["text_features_64"])


def test_position_embeddings_are_resized_and_logged(tmp_path):
    state = weights(resolution=(96, 96), context=30)
    model = build_model()
    assert load(model, save(state, tmp_path / "weights.pt")) == [
        "image position embeddings resized from 6 × 6 to 4 × 2 patches",
        "text position embeddings resized from 30 to 24 tokens",
    ]
    image, text = state["visual.positional_embedding"], state["positional_embedding"]
    resized = resize_image_position_embedding(image, (4, 2), source=(6, 6))
    assert torch.equal(model.image_encoder.positional_embedding, resized)
    assert torch.equal(model.text_encoder.positional_embedding, resize_text_position_embedding(text, 24))


def test_weights_that_cannot_be_resized_are_refused_and_the_model_is_unchanged(tmp_path):
    model = build_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = save(weights(resolution=(96, 32)), tmp_path / "weights.pt")
    with pytest.raises(UserError) as error:
        load(model, path)
    assert_one_line(error, str(path), "visual.positional_embedding (13, 64)", "12 patches", "4 × 2", "input_resolution")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("changes", [{"vision_layers": 3}, {"embed_dim": 16, "simclr_widths": None}])
def test_a_model_of_another_architecture_is_our_own_mistake(tmp_path, changes):
    model = make_model(**TINY_MODEL | {"text_width": 16, "text_heads": 1, "simclr_widths": [32, 8, 32]} | changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="another architecture"):
        load(model, save(weights(), tmp_path / "weights.pt"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- heads of a checkpoint ------------------------------------------------------------------------------------------


def checkpoint_of(model: TBPSCLIP, path: Path) -> Path:
    return save({"model": model.state_dict(), "config": {"experiment": {"input_resolution": [64, 32]}}}, path)


def test_heads_that_the_model_does_not_have_are_left_out(tmp_path):
    source = build_model()
    towers = make_model(**TINY_MODEL | {"text_width": 16, "text_heads": 1})
    assert load(towers, checkpoint_of(source, tmp_path / "x.pth")) == []
    expected = source.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in towers.state_dict().items())


@pytest.mark.parametrize("identities", [None, 9], ids=["no head", "of other size"])
def test_a_head_that_does_not_fit_is_not_loaded(tmp_path, identities):
    architecture = TINY_MODEL | {"text_width": 16, "text_heads": 1, "simclr_widths": [32, 8, 32]}
    source, target = make_model(**architecture, identities=identities), build_model()
    fresh = {name: value.clone() for name, value in target.state_dict().items()}
    path = checkpoint_of(source, tmp_path / "x.pth")
    (note,) = load(target, path)
    assert "identity_classifier" in note and str(path) in note
    for name, tensor in target.state_dict().items():
        expected = fresh if name.startswith("identity_classifier.") else source.state_dict()
        assert torch.equal(tensor, expected[name]), name
    assert not torch.equal(target.state_dict()["simclr_projector.0.weight"], fresh["simclr_projector.0.weight"])


# ---- incomplete and other weights -----------------------------------------------------------------------------------


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name not in names}


REFUSED = {
    "vocabulary": (lambda: weights(vocab=60), ["vocabulary", "60", "49408", "token_embedding.weight"]),
    "towers of different width": (
        lambda: weights() | {"visual.proj": torch.ones(64, 16)},
        ["the two encoders end in different widths", "visual.proj (64, 16)", "text_projection (16, 32)"],
    ),
    "vision width": (lambda: weights() | {"visual.proj": torch.ones(65, 32)}, ["disagree on the vision_width"]),
    "patches that are not square": (
        lambda: weights() | {"visual.conv1.weight": torch.ones(64, 3, 16, 8)},
        ["disagree on the patch_size", "(64, 3, 16, 8)"],
    ),
    "missing": (lambda: without(weights(), "visual.ln_pre.weight"), ["visual.ln_pre.weight is missing"]),
    "missing position embedding": (
        lambda: without(weights(), "positional_embedding"),
        ["weights.pt: positional_embedding missing"],
    ),
    "missing temperature": (lambda: without(weights(), "logit_scale"), ["logit_scale is missing"]),
    "missing in a block": (
        lambda: without(weights(), "transformer.resblocks.0.ln_1.bias"),
        ["transformer.resblocks.0.ln_1.bias is missing"],
    ),
    "missing block": (
        lambda: {name: value for name, value in weights().items() if "visual.transformer.resblocks.0" not in name},
        ["vision_layers: block 0 is missing"],
    ),
    "unknown": (lambda: weights() | {"extra": torch.ones(1)}, ["extra is unknown"]),
    "misshapen": (
        lambda: weights() | {"visual.ln_post.bias": torch.ones(7)},
        ["visual.ln_post.bias is (7,) and should be (64,)"],
    ),
    "two tokens": (lambda: weights(context=2), ["positional_embedding is (2, 16)", "too few positions"]),
    "no patches": (
        lambda: weights() | {"visual.positional_embedding": torch.ones(1, 64)},
        ["visual.positional_embedding is (1, 64)", "too few positions"],
    ),
    "nothing": (
        lambda: weights() | {"visual.proj": torch.ones(64, 0)},
        ["visual.proj is (64, 0), so the tensor is empty"],
    ),
    "a name of two lines": (lambda: weights() | {"visual.a\nb": torch.ones(1)}, ["visual.a b is unknown"]),
    "a number of a block without end": (
        lambda: weights() | {f"transformer.resblocks.{'9' * 5000}.ln_1.bias": torch.ones(16)},
        ["is unknown"],
    ),
    "sparse": (lambda: weights() | {"visual.proj": torch.eye(64).to_sparse()}, ["'visual.proj' (not a dense tensor)"]),
    "without storage": (
        lambda: weights() | {"visual.proj": torch.ones(64, 32, device="meta")},
        ["'visual.proj' (not a dense tensor)"],
    ),
    "larger than what is stored": (
        lambda: weights() | {"visual.proj": torch.ones(1, 1).expand(10**9, 10**3)},
        ["'visual.proj' (not a dense tensor)"],
    ),
    "other dimensions": (lambda: weights() | {"text_projection": torch.ones(16)}, ["text_projection is (16,)"]),
    "many": (
        lambda: weights() | {f"visual.extra{number}": torch.zeros(1) for number in range(10)},
        ["visual.extra0 is unknown", "and 7 more"],
    ),
    "residual network": (
        lambda: {"visual.conv1.weight": torch.ones(8, 3, 3, 3), "visual.layer1.0.bn1.weight": torch.ones(8)},
        ["visual.proj", "missing", "vision transformer"],
    ),
    "one tower": (
        lambda: {name: value for name, value in weights().items() if name.startswith("visual.")},
        ["token_embedding.weight", "missing"],
    ),
    "nobody's names": (lambda: {"backbone.weight": torch.ones(2)}, ["no tensor of a CLIP, but backbone.weight"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_anything_but_one_complete_clip_is_refused(tmp_path, case):
    build_state, words = REFUSED[case]
    path = save(build_state(), tmp_path / "weights.pt")
    with pytest.raises(UserError) as error:
        read_weights(path)
    assert_one_line(error, str(path), *words)


def test_a_temperature_of_one_dimension_is_read(tmp_path):
    state = weights() | {"logit_scale": torch.tensor([2.5])}
    assert_equal_states(
        read_weights(save(state, tmp_path / "weights.pt")).state, state | {"logit_scale": torch.tensor(2.5)}
    )
