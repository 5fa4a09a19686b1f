"""Checkpoints: written whole or not at all, read without running code, and loaded only where they fit."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from easydict import EasyDict
from torch import nn

from misc import build
from misc.checkpoint import _our_name, load_weights, read_checkpoint, write_checkpoint
from misc.config import load_config
from misc.errors import UserError
from model.tbps_clip import TBPSCLIP
from tests.golden_models import GOLDEN, TINY_MODEL, VIT_B16

CONFIG = {"experiment": {"input_resolution": [64, 32]}, "model": {"saved_path": "runs/x", "checkpoint": None}}
METRICS = {"r1": 12.5, "mAP": 7.25}


def content_of(model: nn.Module, epoch: int = 3) -> dict:
    return {"model": model.state_dict(), "config": CONFIG, "epoch": epoch, "metrics": METRICS}


def tiny_model(seed: int = 0, **changes) -> TBPSCLIP:
    torch.manual_seed(seed)
    return TBPSCLIP(**TINY_MODEL | {"vocab_size": 60, "simclr_widths": [32, 8, 32], "identities": 5} | changes)


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    path = tmp_path / "checkpoint_last.pth"
    write_checkpoint(path, content_of(nn.Linear(20, 30)))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and str(path) in message, message
    return message


# ---- saving and reading -------------------------------------------------------------------------------------------


def test_what_was_saved_is_read(tmp_path):
    model = tiny_model()
    write_checkpoint(tmp_path / "checkpoint.pth", content_of(model) | {"launch": "one"})
    content = read_checkpoint(tmp_path / "checkpoint.pth")
    assert same(content.pop("model"), model.state_dict())
    assert content == {"config": CONFIG, "epoch": 3, "metrics": METRICS, "launch": "one"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_disk_that_gets_full_leaves_the_old_file(checkpoint, full_disk, share):
    old = checkpoint.read_bytes()
    full_disk(int(share * len(old)))
    with pytest.raises(
        UserError, match=r"checkpoint_last\.pth cannot be written \(File too large\).*--resume.*is whole"
    ):
        write_checkpoint(checkpoint, content_of(nn.Linear(20, 30), epoch=4))
    assert checkpoint.read_bytes() == old
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_what_is_no_trouble_of_the_disk_is_not_called_so(checkpoint):
    old = checkpoint.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        write_checkpoint(checkpoint, content_of(nn.Linear(2, 3)) | {"function": lambda: None})
    assert checkpoint.read_bytes() == old
    write_checkpoint(checkpoint, content_of(nn.Linear(2, 3), epoch=5))  # what the failure left is in nobody's way
    assert read_checkpoint(checkpoint)["epoch"] == 5


def test_the_file_is_complete_before_it_takes_the_name(checkpoint, monkeypatch):
    """A power cut must not leave a name whose content was never written: the content is on the disk first."""
    order = []
    replace, fsync = Path.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("content"), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda path, target: (order.append("name"), replace(path, target))[1])
    write_checkpoint(checkpoint, content_of(nn.Linear(2, 3), epoch=4))
    assert order == ["content", "name", "content"]  # at last the folder, which holds the name


# ---- what is not read ---------------------------------------------------------------------------------------------


def test_a_missing_file_is_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.pth")
    assert str(tmp_path) in refusal(tmp_path)


def test_a_file_that_is_cut_off_at_any_byte_is_refused(checkpoint):
    whole = checkpoint.read_bytes()
    assert len(whole) > 3000
    for kept in range(len(whole)):
        checkpoint.write_bytes(whole[:kept])
        refusal(checkpoint)
    checkpoint.write_bytes(whole)
    read_checkpoint(checkpoint)


def test_a_weight_that_has_changed_on_the_disk_is_noticed(checkpoint):
    """torch itself reads such a file without a word."""
    whole = bytearray(checkpoint.read_bytes())
    weight = read_checkpoint(checkpoint)["model"]["weight"].numpy().tobytes()
    whole[whole.index(weight) + 50] ^= 0x40
    checkpoint.write_bytes(whole)
    assert "checksum" in refusal(checkpoint)


class Intruder:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_file_is_not_run(tmp_path, save):
    made = tmp_path / "made by the file"
    content = {"model": {}, "config": Intruder(made), "epoch": 1, "metrics": {}}
    save(content, tmp_path / "intruder.pth")
    message = refusal(tmp_path / "intruder.pth")
    assert "io.open" in message if save is torch.save else True
    assert not made.exists()
    torch.load(tmp_path / "intruder.pth", weights_only=False) if save is torch.save else pickle.loads(
        (tmp_path / "intruder.pth").read_bytes()
    )
    assert made.exists(), "the file was harmless, so this test has shown nothing"


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "not a checkpoint")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html></html>\n",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1\n",
        b"some text\nof two lines\n",
        bytes(range(256)) * 4,
        b"\x80\x02",
        b"\x80\x02}",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        zipped(),
    ],
    ids=["web page", "Git LFS", "text", "bytes", "pickle header", "unfinished pickle", "picture", "archive"],
)
def test_something_else_is_refused(tmp_path, content):
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(content)
    refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        torch.zeros(3),
        {"weight": torch.zeros(3)},
        {"model": [1], "config": {}},
        {"model": {"logit_scale": 1.0}, "optimizer": {}, "config": {}},
        {"model": {"logit_scale": torch.tensor(1.0)}, "optimizer": {}, "config": EasyDict(model={})},
        {"model": {1: torch.tensor(1.0)}, "config": {}},
        {"model": {"logit_scale": torch.tensor(1.0)}, "config": {"experiment": "none"}},
        {"model": [1], "config": {}, "epoch": 1, "metrics": {}},
        {"model": {}, "config": "none", "epoch": 1, "metrics": {}},
    ],
    ids=[
        "list",
        "tensor",
        "state dict",
        "no state",
        "no tensors",
        "no towers",
        "no names",
        "no section",
        "list for a model",
        "text for a configuration",
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    refusal(tmp_path / "other.pth")


# ---- checkpoints of the published code ----------------------------------------------------------------------------


PUBLISHED_CONFIG = {
    "device": 5,
    "anno_dir": "/data/anno",
    "experiment": {"input_resolution": [64, 32], "text_length": 24, "simclr_mlp": [32, 16, 32], "ss": True},
    "schedule": {"lr": 1.0e-4, "betas": [0.9, 0.98]},
    "model": {"ckpt_type": "original_clip", "embed_dim": 32, "vocab_size": 60},
    "distributed": {"url": "env://"},
}
SIZES = TINY_MODEL | {"vocab_size": 60, "vision_width": 128, "vision_heads": 2, "text_width": 64, "text_heads": 1}


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
    """A file as the published code writes it, after a training step."""
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad).backward()
    optimizer.step()
    state = {published_name(name): tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": state, "optimizer": optimizer.state_dict(), "config": config}, path)
    return path


def test_a_published_checkpoint_is_read_with_its_easydict(tmp_path):
    model = TBPSCLIP(**SIZES, simclr_widths=[32, 16, 32], masked_language_depth=1, identities=5)
    path = published(model, EasyDict(PUBLISHED_CONFIG), tmp_path / "checkpoint_best.pth")
    with pytest.raises(pickle.UnpicklingError, match=r"easydict\.EasyDict"):
        torch.load(path, weights_only=True)  # so it needs the class
    content = read_checkpoint(path)
    assert same(content["model"], model.state_dict())
    assert content["config"]["experiment"] == {"input_resolution": [64, 32], "text_length": 24}
    architecture = {key: SIZES[key] for key in SIZES if key not in ("resolution", "text_length")}
    assert content["config"]["model"] == architecture
    assert (content["epoch"], content["metrics"]) == (None, {})


def test_every_name_of_the_published_code_is_known():
    """The reference names the text encoder's parameters as CLIP does; checkpoints put `encode_text.` in front."""
    golden = json.loads((GOLDEN / "parameter_groups.json").read_text())
    with torch.device("meta"):
        model = TBPSCLIP(**VIT_B16, simclr_widths=[512, 128, 512], masked_language_depth=4, identities=11003)
    of_text = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
    found = {
        _our_name(f"encode_text.{name}" if name.startswith(of_text) else name): golden["shapes"][name]
        for name in (*golden["trained"], *golden["frozen"])
    }
    assert found == {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def test_a_published_checkpoint_is_evaluated_with_its_architecture(tmp_path):
    model = TBPSCLIP(**SIZES, simclr_widths=[32, 16, 32]).eval()
    path = published(model, EasyDict(PUBLISHED_CONFIG), tmp_path / "published.pth")
    loaded, config, note = build.build_saved_model(path, load_config())
    assert "published code" in note and "64 × 32 pixels" in note and "24 tokens" in note
    images, tokens = torch.randn(2, 3, 64, 32), torch.randint(1, 59, (2, 24))
    loaded.eval()
    assert torch.equal(loaded.encode_image(images), model.encode_image(images))
    assert torch.equal(loaded.encode_text(tokens), model.encode_text(tokens))


def test_code_beside_an_easydict_is_not_run(tmp_path):
    made = tmp_path / "made by the file"
    config = EasyDict(PUBLISHED_CONFIG | {"device": Intruder(made)})
    path = published(TBPSCLIP(**SIZES), config, tmp_path / "published.pth")
    assert "io.open" in refusal(path)
    assert not made.exists()


def test_a_published_checkpoint_without_its_sizes_is_refused(tmp_path):
    path = published(TBPSCLIP(**SIZES), EasyDict(experiment={"text_length": 24}), tmp_path / "published.pth")
    assert "input_resolution" in refusal(path)


# ---- into a model -------------------------------------------------------------------------------------------------


def load_refusal(model: nn.Module, state: dict[str, torch.Tensor]) -> str:
    """The message with which weights are refused; the model is as before."""
    before = copied(model)
    with pytest.raises(UserError) as caught:
        load_weights(model, state, Path("runs/x/checkpoint_best.pth"))
    message = str(caught.value)
    assert same(model.state_dict(), before)
    assert len(message.splitlines()) == 1 and "runs/x/checkpoint_best.pth" in message
    return message


def test_all_weights_are_loaded():
    source, target = tiny_model(1), tiny_model(2)
    assert not same(source.state_dict(), target.state_dict())
    assert load_weights(target, copied(source), Path("x.pth")) == []
    assert same(source.state_dict(), target.state_dict())


def test_a_missing_tensor_is_named():
    state = copied(tiny_model())
    del state["text_encoder.ln_final.weight"]
    assert "text_encoder.ln_final.weight is missing" in load_refusal(tiny_model(1), state)


def test_the_temperature_must_be_there():
    state = copied(tiny_model())
    del state["logit_scale"]
    assert "logit_scale is missing" in load_refusal(tiny_model(1), state)


def test_an_unknown_tensor_is_named():
    state = copied(tiny_model()) | {"image_encoder.extra": torch.zeros(1)}
    assert "image_encoder.extra is unknown" in load_refusal(tiny_model(1), state)


def test_a_misshapen_tensor_is_named_with_both_shapes():
    state = copied(tiny_model())
    state["image_encoder.ln_post.weight"] = torch.zeros(7)
    wanted = tuple(tiny_model().image_encoder.ln_post.weight.shape)
    assert f"image_encoder.ln_post.weight is (7,), the model's is {wanted}" in load_refusal(tiny_model(1), state)


def test_of_many_problems_some_are_named_and_all_are_counted():
    state = copied(tiny_model()) | {f"image_encoder.extra{number}": torch.zeros(1) for number in range(10)}
    message = load_refusal(tiny_model(1), state)
    named = message.count("is unknown")
    assert 0 < named < 10 and f"and {10 - named} more" in message


def test_heads_that_the_model_does_not_have_are_left_out():
    source = tiny_model(1)
    towers = tiny_model(2, simclr_widths=None, identities=None)
    assert load_weights(towers, copied(source), Path("x.pth")) == []
    assert same(copied(towers), {name: copied(source)[name] for name in copied(towers)})


@pytest.mark.parametrize("changes", [{"identities": None}, {"identities": 9}], ids=["no head", "of other size"])
def test_a_head_that_does_not_fit_starts_afresh(changes):
    source, target = tiny_model(1, **changes), tiny_model(2)
    fresh = copied(target)
    (note,) = load_weights(target, copied(source), Path("x.pth"))
    assert "identity_classifier" in note and "x.pth" in note
    for name, tensor in copied(target).items():
        expected = fresh if name.startswith("identity_classifier.") else copied(source)
        assert torch.equal(tensor, expected[name]), name
    assert not torch.equal(copied(target)["simclr_projector.0.weight"], fresh["simclr_projector.0.weight"])
