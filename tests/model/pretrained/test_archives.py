"""Archives that are damaged, or made to be read wrong: right tensors or one line."""

import contextlib
import json
import pickle
import random
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from misc.errors import UserError
from model.architecture import Sizes
from model.pretrained import archives
from model.pretrained.archives import open_archive
from model.pretrained.settings import Settings, settings_from_checkpoint, settings_from_hugging_face
from model.pretrained.settings import settings_from_open_clip as from_open_clip
from tests.helpers.mutations import mutated
from tests.model.pretrained.test_reading import assert_equal_states, save_torchscript

STATE = {"text_projection": torch.arange(60.0).reshape(6, 10), "logit_scale": torch.tensor(2.5)}


def save_old(state: dict[str, Tensor], path: Path) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def save_new(state: dict[str, Tensor], path: Path) -> Path:
    torch.save(state, path)
    return path


SAVE = {"TorchScript": save_torchscript, "torch.save": save_new, "before 1.6": save_old}
ARCHIVES = ("TorchScript", "torch.save")


def rewritten(path: Path, change: Callable[[str, bytes], bytes], **options) -> Path:
    """Writes an archive again, with right checksums, and other contents of its records."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_archive(path)
    return str(caught.value)


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ARCHIVES)
def test_an_archive_that_was_written_again_is_read(tmp_path, form):
    path = rewritten(SAVE[form](STATE, tmp_path / "weights.pt"), lambda _, content: content)
    found = open_archive(path)[1]
    assert_equal_states({name: found[name] for name in STATE}, STATE)


@pytest.mark.parametrize("form", ARCHIVES)
def test_a_record_that_is_shorter_than_its_tensor_is_refused(tmp_path, form):
    def shorten(name: str, content: bytes) -> bytes:
        return content[:200] if len(content) == 240 else content

    refusal(rewritten(SAVE[form](STATE, tmp_path / "weights.pt"), shorten))


@pytest.mark.parametrize("form", SAVE)
@pytest.mark.parametrize("share", ["all", "a part"])
def test_a_tensor_that_is_larger_than_its_storage_is_refused(tmp_path, form, share):
    """torch itself enlarges the storage, or reads what follows in the file."""
    path = SAVE[form]({"text_projection": torch.arange(7.0), "logit_scale": torch.tensor(2.5)}, tmp_path / "weights.pt")
    tuples = {"TorchScript": b"(K%ct"}.get(form, b"K%c\x85")
    old, new = (7, 9) if share == "all" else (1, 2)  # the size, or the stride

    def enlarge(name: str, content: bytes) -> bytes:
        assert not name.endswith("data.pkl") or tuples % old in content
        return content.replace(tuples % old, tuples % new) if name.endswith("data.pkl") else content

    if form == "before 1.6":
        path.write_bytes(enlarge("data.pkl", path.read_bytes()))
    else:
        rewritten(path, enlarge)
    refusal(path)


def test_a_storage_that_claims_more_elements_than_its_record_is_refused(tmp_path):
    """torch maps the file, and would read the next record."""
    path = save_new({"text_projection": torch.arange(7.0)}, tmp_path / "weights.pt")
    rewritten(path, lambda name, content: content.replace(b"K\x07", b"K\x09") if name.endswith(".pkl") else content)
    assert "28 bytes for 9 elements" in refusal(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("form", ARCHIVES)
@pytest.mark.parametrize("record", ["data.pkl", "data/0"])
def test_a_record_that_is_there_twice_is_refused(tmp_path, form, record):
    path = SAVE[form](STATE, tmp_path / "weights.pt")
    with zipfile.ZipFile(path, "a") as archive:
        name = next(name for name in archive.namelist() if name.endswith(record))
        archive.writestr(name, bytes(240))
    assert f"{record} is in it twice" in refusal(path)


@pytest.mark.parametrize("form", ARCHIVES)
def test_compressed_tensors_are_refused(tmp_path, form):
    path = SAVE[form](STATE, tmp_path / "weights.pt")
    assert "is compressed" in refusal(rewritten(path, lambda _, content: content, compression=zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("form", ARCHIVES)
def test_an_archive_that_unpacks_to_much_more_than_its_size_is_refused(tmp_path, form, monkeypatch):
    monkeypatch.setattr(archives, "MOST_CODE", 100_000)
    path = SAVE[form](STATE, tmp_path / "weights.pt")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/code.py", bytes(200_000))
    assert path.stat().st_size < 20_000
    assert "it unpacks to " in refusal(path)


def test_modules_that_contain_each_other_many_times_are_read_once(tmp_path, monkeypatch):
    """Each of 40 modules contains the next one twice: there are 2^40 paths."""
    module_class = type("A", (), {"__module__": "__torch__"})
    monkeypatch.setitem(sys.modules, "__torch__", SimpleNamespace(A=module_class))
    module = module_class()
    for _ in range(40):
        outer = module_class()
        outer.a = outer.b = module
        module = outer
    pickled = pickle.dumps(module, protocol=2)
    path = save_torchscript(STATE, tmp_path / "weights.pt")
    rewritten(path, lambda name, content: pickled if name.endswith("data.pkl") else content)
    assert open_archive(path) == ("TorchScript archive", {})


# ---- state that an archive could leave behind -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    ["__torch__ A", "torch._utils _rebuild_tensor_v2", "collections OrderedDict", "torch FloatStorage"],
)
@pytest.mark.parametrize("attribute", [b"__setstate__", b"__defaults__", b"__init__", b"x"])
def test_an_archive_leaves_nothing_behind(tmp_path, changed, attribute):
    """Its pickle sets an attribute of a class or function."""
    name = b"X" + len(attribute).to_bytes(4, "little") + attribute
    state = b"N}" + name + b"ccollections\nOrderedDict\ns\x86"
    pickled = b"\x80\x02c" + changed.replace(" ", "\n").encode() + b"\n" + state + b"b."
    bad = rewritten(
        save_torchscript(STATE, tmp_path / "bad.pt"),
        lambda name, content: pickled if name.endswith("data.pkl") else content,
    )
    with contextlib.suppress(UserError):
        open_archive(bad)
    found = open_archive(save_torchscript(STATE, tmp_path / "good.pt"))[1]
    assert_equal_states({name: found[name] for name in STATE}, STATE)


# ---- number formats and settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "F8_E4M3", "U64", "C64", "X9"])
def test_safetensors_of_unusual_number_formats_are_read_or_refused(tmp_path, dtype):
    from model.pretrained.weights import read_weights

    header = json.dumps({"logit_scale": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "weights.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(UserError):  # at least, there are no other tensors
        read_weights(tmp_path / "weights.safetensors")


ODD = [
    None,
    [],
    {},
    "x",
    True,
    -1,
    0,
    1 << 70,
    10**400,
    1 << 99_999,
    1e308,
    float("nan"),
    [[]],
    {"a": 1},
    [10**400] * 3,
]
CONFIGS = {
    "open_clip": {
        "embed_dim": 512,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "head_width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
        | {"clean_captions": True},
    },
    "Hugging Face": {
        "model_type": "clip",
        "projection_dim": 512,
        "vision_config": {"hidden_act": "gelu", "image_size": 224, "num_attention_heads": 12, "layer_norm_eps": 1e-5},
        "text_config": {"hidden_act": "gelu", "num_attention_heads": 8, "hidden_size": 512, "vocab_size": 49408},
        "processor": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, "size": {"height": 224}}
        | {"clean_captions": True},
    },
    "checkpoint": {
        "experiment": {"input_resolution": [224, 224]},
        "model": {"activation": "gelu", "text_heads": 8, "vision_heads": 12, "text_layers": 12, "patch_size": 16}
        | {"dropped_text_layers": [1]},
    },
}
READ = {
    "open_clip": lambda config: from_open_clip(
        {key: value for key, value in config.items() if key != "preprocess_cfg"}, config["preprocess_cfg"]
    ),
    "Hugging Face": lambda config: settings_from_hugging_face(config, config["processor"]),
    "checkpoint": settings_from_checkpoint,
}
SIZES = Sizes(**dict.fromkeys(Sizes._fields, 512))


@pytest.mark.parametrize("kind", CONFIGS)
def test_settings_of_odd_types_are_read_or_refused(kind):
    whole, refused = CONFIGS[kind], 0
    assert isinstance(READ[kind](whole), Settings)
    places = [(section, key) for section, values in whole.items() if isinstance(values, dict) for key in values]
    places += [(section, None) for section in whole if section not in ("preprocess_cfg", "processor")]
    for section, key in places:
        for value in [*ODD, *([torch.zeros(2)] if kind == "checkpoint" else [])]:  # JSON has no tensors
            changed = whole | {section: value if key is None else whole[section] | {key: value}}
            try:
                READ[kind](changed).check(SIZES._replace(vocab_size=49408))
            except UserError as error:
                refused += 1
                assert len(str(error)) <= 1500
    assert refused > 100


# ---- mutations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", SAVE)
def test_a_mutated_file_is_read_right_or_refused(tmp_path, form):
    path, draw, refused = SAVE[form](STATE, tmp_path / "weights.pt"), random.Random(form), 0
    content = path.read_bytes()
    for _ in range(150):
        path.write_bytes(mutated(content, draw))
        try:
            open_archive(path)
        except UserError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("form", ARCHIVES)
def test_a_mutated_pickle_with_a_right_checksum_gives_stored_numbers_or_is_refused(tmp_path, form):
    path, draw, refused = SAVE[form](STATE, tmp_path / "weights.pt"), random.Random(form), 0
    content, stored = path.read_bytes(), {*range(60), 2.5}
    for _ in range(300):
        path.write_bytes(content)
        rewritten(path, lambda name, record: mutated(record, draw) if name.endswith("data.pkl") else record)
        try:
            found = open_archive(path)[1]
        except UserError:
            refused += 1
            continue
        for value in found.values() if isinstance(found, dict) else []:
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                assert {*value.flatten().tolist()} <= stored
    assert refused > 50


def test_a_mutated_safetensors_file_is_read_or_refused(tmp_path):
    from safetensors.torch import save_file

    path, draw, refused = tmp_path / "weights.safetensors", random.Random(0), 0
    save_file(STATE, path)
    content = path.read_bytes()
    for _ in range(200):
        path.write_bytes(mutated(content[:100], draw) + content[100:])
        try:
            open_archive(path)
        except UserError:
            refused += 1
    assert refused > 50
