"""Paths that a system cannot have, or does not let a user access: one clear line from every command."""

import errno
import io
import os
import pathlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.runs import ARCHITECTURE, QUICK, of_dataset, only_error

pytestmark = pytest.mark.slow


def too_long(folder: Path) -> Path:
    return folder / ("name" * 75)


def in_a_circle(folder: Path) -> Path:
    (folder / "one").symlink_to(folder / "two")
    (folder / "two").symlink_to(folder / "one")
    return folder / "one" / "file"


def without_permission(folder: Path) -> Path:
    return folder / "closed" / "below" / "file"


CALLS = ("lstat", "mkdir", "open", "scandir", "stat")
UNUSABLE = (too_long, in_a_circle, without_permission)


@pytest.fixture
def closed(tmp_path, monkeypatch) -> None:
    """Makes the folder `closed` inaccessible. Its permissions would not do that if the tests run as root."""

    def refusing(function: Callable) -> Callable:
        def call(path, *arguments, **options):
            if isinstance(path, str | Path) and str(path).startswith(f"{tmp_path / 'closed'}{os.sep}"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return function(path, *arguments, **options)

        return call

    (tmp_path / "closed" / "below").mkdir(parents=True)
    kept = getattr(pathlib, "_normal_accessor", os)  # Python 3.10 keeps the functions that `Path` calls there
    for module, names in ((os, CALLS), (io, ("open",)), *([(kept, CALLS)] if kept is not os else [])):
        for name in names:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, refusing(getattr(module, name)))
    monkeypatch.setattr("builtins.open", io.open)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and access(path, mode))


@pytest.mark.parametrize("unusable", UNUSABLE)
@pytest.mark.parametrize(
    "words",
    [
        ["--config", "PATH"],
        ["--evaluate", "PATH"],
        ["--contribution", "PATH"],
        ["--export", "onnx", "PATH", "model.checkpoint=null"],
        ["--resume", "model.saved_path=PATH"],
        ["model.saved_path=PATH"],
        ["--overwrite", "model.saved_path=PATH"],
        ["model.checkpoint=PATH", "model.saved_path=TEMPORARY"],
        ["model.ckpt_type=saved", "model.saved_path=PATH"],
        ["anno_dir=PATH", "model.saved_path=TEMPORARY"],
        ["image_dir=PATH", "model.saved_path=TEMPORARY"],
        ["data.back_translation_file=PATH", "model.saved_path=TEMPORARY"],
        ["experiment.wordnet=PATH", "experiment.text_operation=eda", "model.saved_path=TEMPORARY"],
        ["--study", "report", "model.saved_path=PATH"],
        ["--study", "losses/ss_i", "model.saved_path=PATH"],
        ["--study", "irra_on_tbps_clip/CUHK-PEDES/tbps_clip", "model.saved_path=PATH"],
    ],
    ids=" ".join,
)
def test_a_path_that_cannot_be_used_is_one_line(run, data, tmp_path, closed, unusable, words):
    path = unusable(tmp_path)
    own = [word.replace("PATH", str(path)).replace("TEMPORARY", str(tmp_path / "run")) for word in words]
    given = {word.partition("=")[0] for word in own}
    fixed = [word for word in (*ARCHITECTURE, *QUICK, *of_dataset(data)) if word.partition("=")[0] not in given]
    message = only_error(run(*own, *([] if words[:2] == ["--study", "report"] else fixed)))
    assert str(path)[:50] in message


@pytest.mark.parametrize("unusable", UNUSABLE)
@pytest.mark.parametrize(
    "words",
    [
        ["index", "PATH", "--checkpoint", "CLIP"],
        ["index", "PEOPLE", "--checkpoint", "PATH"],
        ["index", "PEOPLE", "--checkpoint", "CLIP", "--index", "PATH"],
        ["query", "PATH", "red"],
        ["query", "PEOPLE", "red", "--index", "PATH"],
        ["serve", "PATH"],
    ],
    ids=" ".join,
)
def test_a_path_that_a_search_cannot_use_is_one_line(call_search, people, clip, tmp_path, closed, unusable, words):
    path = unusable(tmp_path)
    places = {"PATH": path, "PEOPLE": people, "CLIP": clip}
    message = only_error(call_search(*(places.get(word, word) for word in words)))
    assert str(path)[:50] in message
