"""Checkpoints: written completely or not at all, and read without running code."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from misc.errors import UserError
from misc.run.checkpoint import read_checkpoint, write_checkpoint
from model.tbps_clip import TBPSCLIP
from tests.helpers.golden_models import TINY_MODEL, make_model

CONFIG = {"experiment": {"input_resolution": [64, 32]}, "model": {"saved_path": "runs/x", "checkpoint": None}}
METRICS = {"r1": 12.5, "mAP": 7.25}


def content_of(model: nn.Module, epoch: int = 3) -> dict:
    return {"model": model.state_dict(), "config": CONFIG, "epoch": epoch, "metrics": METRICS}


def tiny_model(seed: int = 0, **changes) -> TBPSCLIP:
    torch.manual_seed(seed)
    return make_model(**TINY_MODEL | {"vocab_size": 60, "simclr_widths": [32, 8, 32], "identities": 5} | changes)


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
def test_a_full_disk_leaves_the_old_file(checkpoint, full_disk, share):
    old = checkpoint.read_bytes()
    full_disk(int(share * len(old)))
    with pytest.raises(
        UserError, match=r"checkpoint_last\.pth cannot be written \(File too large\).*--resume.*is still there"
    ):
        write_checkpoint(checkpoint, content_of(nn.Linear(20, 30), epoch=4))
    assert checkpoint.read_bytes() == old
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_an_error_that_is_not_of_the_disk_is_not_reported_as_one(checkpoint):
    old = checkpoint.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        write_checkpoint(checkpoint, content_of(nn.Linear(2, 3)) | {"function": lambda: None})
    assert checkpoint.read_bytes() == old
    write_checkpoint(checkpoint, content_of(nn.Linear(2, 3), epoch=5))  # the failure left nothing that prevents this
    assert read_checkpoint(checkpoint)["epoch"] == 5


def test_the_file_is_complete_before_it_takes_the_name(checkpoint, monkeypatch):
    """The content must be on the disk first. Otherwise a power failure could leave a name without its content."""
    order = []
    replace, fsync = Path.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("content"), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda path, target: (order.append("name"), replace(path, target))[1])
    write_checkpoint(checkpoint, content_of(nn.Linear(2, 3), epoch=4))
    assert order == ["content", "name", "content"]  # at last the folder, which contains the name


# ---- files that are refused ---------------------------------------------------------------------------------------


def test_a_missing_file_is_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.pth")
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
    """torch itself reads such a file without an error."""
    whole = bytearray(checkpoint.read_bytes())
    weight = read_checkpoint(checkpoint)["model"]["weight"].numpy().tobytes()
    whole[whole.index(weight) + 50] ^= 0x40
    checkpoint.write_bytes(whole)
    assert "checksum" in refusal(checkpoint)


class Intruder:
    """A pickle that creates a file when it is loaded."""

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
        "no names",
        "no section",
        "list for a model",
        "text for a configuration",
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    refusal(tmp_path / "other.pth")
