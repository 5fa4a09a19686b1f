"""Configuration files: which load, what overrides what, and one clear line for every mistake."""

import random
from pathlib import Path

import pytest
import yaml

from misc.builders.architecture import resolve_architecture
from misc.config import loading
from misc.config.loading import DATASETS, DEFAULT_CONFIG, load_config, read_yaml, save_config, to_plain
from misc.config.rules import RULES
from misc.errors import UserError
from misc.study.rows import STUDY
from tests.helpers.mutations import mutated

PUBLISHED = """
device: 5
anno_dir: /data/CUHK-PEDES
image_dir: /data/CUHK-PEDES/imgs
misc:
  seed: 1
experiment:
  input_resolution: [224, 224]
  simclr_mlp: [512, 128, 512]
  simclr_temperature: 0.1
  dropout: 0.05
  eda_alpha: 0.05
  back_trans: true
  backtrans_p: 0.1
  text_length: 77
  mixgen: false
  mixgen_type: cat
  mixgen_p: 0.1
  mixgen_ratio: 0.1
  mvs_image: true
  nitc_ratio: 1.0
  ss: true
  ss_ratio: 0.4
  ritc: true
  ritc_eps: 1.0e-2
  ritc_ratio: 1.0
  mlm: false
  mlm_ratio: 1.0
  cmt_depth: 4
  citc: true
  citc_lambda1: 0.25
  citc_lambda2: 0.25
  citc_ratio: 0.1
  id: false
  id_ratio: 1.0
schedule:
  lr: 1.0e-4
  epoch: 5
  epoch_warmup: 1
  lr_start: 1.0e-6
  lr_end: 5.0e-6
  weight_decay: 0.02
  betas: [0.9, 0.98]
  eps: 1.0e-8
model:
  ckpt_type: original_clip
  saved_path: checkpoint/full
  checkpoint: checkpoint/ViT-B-16.pt
  use_gather: true
  softlabel_ratio: 0.5
  embed_dim: 512
  vocab_size: 49408
log:
  print_period: 50
data:
  batch_size: 80
  test_batch_size: 256
  num_workers: 8
distributed:
  backend: nccl
  url: 'env://'
"""
"""The full recipe, as users of the published code have it; it has no key of this code."""

PUBLISHED_SIMPLIFIED = (
    PUBLISHED.replace("seed: 1", "seed: 0")
    .replace("mvs_image: true", "mvs_image: false")
    .replace("  ss: true", "  ss: false")
    .replace("citc: true", "citc: false")
    .replace("checkpoint/full", "checkpoint/simplified")
)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def flat(nested: dict) -> dict:
    """{"section": {"key": value}} → {"section.key": value}"""
    return {
        f"{section}.{key}" if key else section: item
        for section, value in nested.items()
        for key, item in (value.items() if isinstance(value, dict) else [("", value)])
    }


def refusal(path: Path = DEFAULT_CONFIG, **arguments) -> str:
    """Returns the message that refuses a configuration, after checking that it is one line."""
    with pytest.raises(UserError) as caught:
        load_config(path, **arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


# ---- loading ---------------------------------------------------------------------------------------------------


def test_the_defaults_contain_exactly_the_keys_that_have_a_rule():
    assert flat(yaml.safe_load(DEFAULT_CONFIG.read_text(encoding="utf-8"))).keys() == RULES.keys()
    assert flat(load_config()).keys() == RULES.keys()


@pytest.mark.parametrize("text", [PUBLISHED, PUBLISHED_SIMPLIFIED], ids=["full", "simplified"])
def test_a_published_configuration_loads_unchanged(tmp_path, text):
    loaded = flat(load_config(write(tmp_path / "published.yaml", text)))
    published = flat(yaml.safe_load(text))
    assert {key: to_plain(loaded[key]) for key in published} == published
    assert loaded["schedule.ratio_factor"] == 5.0  # the published code reads this key, but its files do not contain it


def test_the_defaults_are_the_published_full_recipe():
    defaults = flat(to_plain(resolve_architecture(load_config(), None)))  # `auto` becomes ViT-B/16
    published = flat(yaml.safe_load(PUBLISHED))
    personal = {"device", "anno_dir", "image_dir", "model.saved_path", "model.checkpoint"}
    assert {key: defaults[key] for key in published.keys() - personal} == {
        key: published[key] for key in published.keys() - personal
    }


def test_simplified_differs_from_full_only_in_the_published_values():
    full, simplified = flat(load_config()), flat(load_config(simplified=True))
    different = {key: value for key, value in simplified.items() if value != full[key]}
    saved_path = different.pop("model.saved_path")
    assert saved_path and saved_path != full["model.saved_path"]
    assert different == {
        "misc.seed": 0,
        "experiment.mvs_image": False,
        "experiment.ss": False,
        "experiment.citc": False,
    }
    assert load_config(DEFAULT_CONFIG.with_name("s.config.yaml")) == load_config(simplified=True)


def test_every_file_of_the_project_loads():
    files = sorted(set(DEFAULT_CONFIG.parent.glob("*.yaml")) - {STUDY, DATASETS})
    assert DEFAULT_CONFIG in files and len(files) >= 3
    for path in files:
        assert flat(load_config(path)).keys() == RULES.keys()


def test_simplified_overrides_another_file(tmp_path):
    path = write(tmp_path / "mine.yaml", "experiment: {ss: true, dropout: 0.5}\ndata: {batch_size: 7}\n")
    config = load_config(path, simplified=True)
    assert (config.experiment.ss, config.experiment.dropout, config.data.batch_size) == (False, 0.5, 7)
    assert config.misc.seed == 0


def test_simplified_keeps_the_seed_and_the_folder_of_a_file(tmp_path):
    path = write(tmp_path / "mine.yaml", "misc: {seed: 3}\nmodel: {saved_path: runs/mine}\nexperiment: {citc: true}\n")
    config = load_config(path, simplified=True)
    assert (config.misc.seed, config.model.saved_path, config.experiment.citc) == (3, "runs/mine", False)


def test_a_file_overrides_its_base_whose_path_is_relative_to_the_file(tmp_path, monkeypatch):
    (tmp_path / "files" / "below").mkdir(parents=True)
    write(tmp_path / "files" / "root.yaml", "data: {batch_size: 3, num_workers: 3}\nschedule: {epoch: 3}\n")
    write(tmp_path / "files" / "middle.yaml", "base: root.yaml\ndata: {num_workers: 2}\nschedule: {epoch: 2}\n")
    write(tmp_path / "files" / "below" / "top.yaml", "base: ../middle.yaml\nschedule: {epoch: 1}\n")
    monkeypatch.chdir(tmp_path)
    config = load_config("files/below/top.yaml")
    assert (config.data.batch_size, config.data.num_workers, config.schedule.epoch) == (3, 2, 1)


@pytest.mark.parametrize("text", ["", "# nothing\n", "data:\nmodel: {}\n"], ids=["empty", "comment", "empty sections"])
def test_a_file_that_changes_nothing_returns_the_defaults(tmp_path, text):
    assert load_config(write(tmp_path / "nothing.yaml", text)) == load_config()


def test_overrides_come_last_and_are_yaml():
    overrides = (
        "device=cpu",
        "data.batch_size=3",
        "data.batch_size=40",
        "experiment.ss=false",
        "experiment.input_resolution=[384, 128]",
        "model.checkpoint=null",
        "model.saved_path=runs/a=b",
        "misc.seed=5",
    )
    config = load_config(simplified=True, overrides=overrides)
    assert (config.device, config.data.batch_size, config.experiment.ss, config.misc.seed) == ("cpu", 40, False, 5)
    assert config.experiment.input_resolution == [384, 128] and config.model.checkpoint is None
    assert config.model.saved_path == "runs/a=b"


def test_numbers_that_yaml_reads_as_texts_are_converted(tmp_path):
    assert yaml.safe_load("1e-4") == "1e-4"  # the reason for this conversion
    path = write(tmp_path / "numbers.yaml", "schedule: {lr: 2e-4, betas: [9e-1, 0.98]}\n")
    config = load_config(path, overrides=("schedule.lr_end=1e-5",))
    assert (config.schedule.lr, config.schedule.lr_end, list(config.schedule.betas)) == (2e-4, 1e-5, [0.9, 0.98])
    assert isinstance(load_config(overrides=("schedule.lr=1e-4",)).schedule.lr, float)


def test_resolution_is_height_and_width_or_one_integer():
    assert load_config(overrides=("experiment.input_resolution=[384, 128]",)).experiment.input_resolution == [384, 128]
    assert load_config(overrides=("experiment.input_resolution=64",)).experiment.input_resolution == [64, 64]


def test_a_saved_configuration_loads_again(tmp_path):
    config = load_config(overrides=("schedule.lr=1e-7", "model.saved_path=runs/größer", "data.dataset=null"))
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


# ---- texts and paths -----------------------------------------------------------------------------------------------

TEXT_KEYS = sorted(key for key, rule in RULES.items() if rule.values.text)
PATH_KEYS = sorted(set(TEXT_KEYS) - {"model.context", "distributed.url"})
NAMES = ["007", "2024-05-01", "2024-02-30", "12:30:00", "yes", "1e3", "0x1F", "1_000", ".nan", "<<", "=", "5"]
"""Texts that YAML reads as something else, or refuses."""
WORDS = [*NAMES, "runs/prec #2", "a: b", "[a]", "{a: b", "'a'", '"a', "- a", "&a", "*a", "!a", "%a", " a ", "a\nb"]
"""Texts that can only be given on the command line as they are."""


def test_keys_that_name_files_and_folders_are_paths():
    named = {"anno_dir", "image_dir", "model.checkpoint", "model.saved_path", "data.back_translation_file"}
    assert named < set(PATH_KEYS)
    assert all(flat(load_config())[key] is None or isinstance(flat(load_config())[key], str) for key in TEXT_KEYS)


def test_no_other_key_has_the_name_of_a_text():
    names = {key.rpartition(".")[2] for key in TEXT_KEYS}
    assert [key for key in RULES if key.rpartition(".")[2] in names and key not in TEXT_KEYS] == []


@pytest.mark.parametrize("text", WORDS)
def test_a_text_on_the_command_line_is_taken_as_it_is(text):
    config = load_config(overrides=tuple(f"{key}={text}" for key in TEXT_KEYS))
    assert {flat(config)[key] for key in TEXT_KEYS} == {text}


@pytest.mark.parametrize("text", NAMES)
def test_a_text_in_a_file_is_what_is_written_there(tmp_path, text):
    nested: dict = {}
    for key in TEXT_KEYS:
        section, _, name = key.rpartition(".")
        nested.setdefault(section, []).append(f"{name}: {text}")
    lines = [*nested.pop(""), *(line for key, own in nested.items() for line in (f"{key}:", *(f"  {x}" for x in own)))]
    config = load_config(write(tmp_path / "mine.yaml", "\n".join(lines)))
    assert {flat(config)[key] for key in TEXT_KEYS} == {text}
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_a_text_that_is_merged_from_elsewhere_is_what_is_written_there(tmp_path):
    text = "model: {<<: {saved_path: 007, embed_dim: 7}, checkpoint: &name 2024-05-01}\nimage_dir: *name\n"
    config = load_config(write(tmp_path / "mine.yaml", text))
    assert (config.model.saved_path, config.model.embed_dim) == ("007", 7)
    assert config.model.checkpoint == config.image_dir == "2024-05-01"


def test_a_base_may_have_any_name(tmp_path):
    write(tmp_path / "2024-05-01", "data: {batch_size: 3}\n")
    assert load_config(write(tmp_path / "mine.yaml", "base: 2024-05-01\n")).data.batch_size == 3


@pytest.mark.parametrize("text", ["null", ""])
def test_a_text_may_be_null_only_where_null_has_a_meaning(text):
    assert load_config(overrides=(f"model.checkpoint={text}",)).model.checkpoint is None
    assert "model.saved_path: null" in refusal(overrides=(f"model.saved_path={text}",))


def test_the_home_folder_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for key in PATH_KEYS:
        assert flat(load_config(overrides=(f"{key}=~/a b",)))[key] == f"{tmp_path}/a b"
    write(tmp_path / "base.yaml", "image_dir: ~/imgs\n")
    config = load_config(write(tmp_path / "mine.yaml", "base: ~/base.yaml\nmodel: {saved_path: ~/runs/full}\n"))
    assert (config.image_dir, config.model.saved_path) == (f"{tmp_path}/imgs", f"{tmp_path}/runs/full")
    config = load_config(overrides=("model.saved_path=a~b", "image_dir=~nobody-has-this-name/x"))
    assert (config.model.saved_path, config.image_dir) == ("a~b", "~nobody-has-this-name/x")


@pytest.mark.parametrize("text", ["~", "~/runs"])
def test_a_home_folder_that_does_not_exist_is_refused(monkeypatch, text):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # this user is in no list
    assert f"model.saved_path: {text}: this user has no home folder" in refusal(overrides=(f"model.saved_path={text}",))


def test_a_path_that_no_system_can_have_is_refused(tmp_path):
    assert "image_dir" in refusal(write(tmp_path / "mine.yaml", 'image_dir: "a\\0b"\n'))
    assert "image_dir" in refusal(overrides=("image_dir=\ud800",))


# ---- datasets by name ------------------------------------------------------------------------------------------


def data_of(**arguments) -> tuple[str | None, str, str]:
    config = load_config(**arguments)
    return config.data.dataset, config.anno_dir, config.image_dir


RSTPREID = ("RSTPReid", "data/RSTPReid", "data/RSTPReid/imgs")


def test_the_name_of_a_dataset_switches_its_folders(tmp_path):
    assert data_of() == ("CUHK-PEDES", "data/CUHK-PEDES", "data/CUHK-PEDES/imgs")
    assert data_of(overrides=("data.dataset=RSTPReid",)) == RSTPREID
    path = write(tmp_path / "mine.yaml", "data: {dataset: RSTPReid}\n")
    assert data_of(path=path) == RSTPREID
    assert data_of(path=path, overrides=("data.dataset=ICFG-PEDES",))[1] == "data/ICFG-PEDES"


def test_folders_that_are_set_count_more_than_those_of_the_name(tmp_path):
    three = "anno_dir: mine\nimage_dir: mine/pictures\ndata: {dataset: RSTPReid}\n"
    path = write(tmp_path / "mine.yaml", three)
    assert data_of(path=path) == ("RSTPReid", "mine", "mine/pictures")
    assert data_of(path=path, overrides=("data.dataset=null",)) == (None, "mine", "mine/pictures")
    assert data_of(overrides=("image_dir=mine", "data.dataset=RSTPReid")) == ("RSTPReid", "data/RSTPReid", "mine")
    back = ("anno_dir=auto", "image_dir=auto")
    assert data_of(path=path, overrides=back) == RSTPREID


def test_a_saved_configuration_has_the_folders_of_the_name(tmp_path, monkeypatch):
    save_config(load_config(overrides=("data.dataset=RSTPReid",)), tmp_path / "saved.yaml")
    monkeypatch.setattr(loading, "DATASETS", write(tmp_path / "moved.yaml", "RSTPReid: {anno_dir: a, image_dir: b}\n"))
    assert data_of(path=tmp_path / "saved.yaml") == RSTPREID


def test_own_names_can_be_added(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "DATASETS", write(tmp_path / "own.yaml", "campus: {anno_dir: a, image_dir: b}\n"))
    assert data_of(overrides=("data.dataset=campus",)) == ("campus", "a", "b")
    assert f"CUHK-PEDES is not in {tmp_path / 'own.yaml'}: add it there, or set anno_dir and image_dir" in refusal()
    assert refusal(overrides=("anno_dir=a",)).endswith("or set image_dir")
    given = ("anno_dir=a", "image_dir=b")
    assert data_of(overrides=given) == ("CUHK-PEDES", "a", "b")
    message = refusal(overrides=("data.dataset=Campus", *given))
    assert "data.dataset: Campus" in message and "campus" in message and "RSTPReid" in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("RSTPReid: data/RSTPReid\n", "RSTPReid: data/RSTPReid should be"),
        ("RSTPReid: {anno_dir: a}\n", "RSTPReid: {anno_dir: a} should be"),
        ("RSTPReid: {anno_dir: a, image_dir: [b]}\n", "RSTPReid: {anno_dir: a, image_dir: [b]} should be"),
        ("RSTPReid: {anno_dir: a, image_dir: b, split: c}\n", "should be {anno_dir: FOLDER, image_dir: FOLDER}"),
        ("RSTPReid:\n", "RSTPReid: null should be"),
        ("2024: {anno_dir: a, image_dir: b}\n", "the name 2024 is not a text"),
        ("- RSTPReid\n", "should contain keys and values"),
        ("RSTPReid: {\n", "is not valid YAML"),
    ],
)
def test_a_mistake_in_the_list_of_datasets_is_refused_with_the_file(tmp_path, monkeypatch, text, part):
    path = write(tmp_path / "datasets.yaml", text)
    monkeypatch.setattr(loading, "DATASETS", path)
    message = refusal()
    assert part in message and str(path) in message


# ---- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("experiment.dropot=0.1", "experiment.dropout"),
        ("schedule.epochs=3", "schedule.epoch"),
        ("exprience.mlm=true", "experiment.mlm"),
        ("dta.batchsize=3", "data.batch_size"),
        ("model.lr=0.1", "schedule.lr"),
        ("batch_size=3", "data.batch_size"),
        ("devise=cpu", "device"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(override, nearest):
    message = refusal(overrides=(override,))
    assert repr(override.partition("=")[0]) in message and repr(nearest) in message


def test_a_section_is_not_a_key():
    assert "unknown key 'data'" in refusal(overrides=("data=4",))


def test_an_unknown_key_of_a_file_is_refused_with_the_file(tmp_path):
    path = write(tmp_path / "mine.yaml", "data: {batchsize: 3}\n5: x\nzzzz: 1\n")
    message = refusal(path)
    assert all(part in message for part in ("'data.batchsize'", "'data.batch_size'", "'5'", "'zzzz'", str(path)))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("device=gpu", "index of a GPU"),
        ("device=-1", "index of a GPU"),
        ("device=true", "index of a GPU"),
        ("image_dir=", "a text"),
        ("misc.seed=-1", "an integer"),
        ("misc.precision=half", "bf16"),
        ("experiment.input_resolution=[224]", "[height, width]"),
        ("experiment.input_resolution=[224, 0]", "[height, width]"),
        ("experiment.text_length=2", "3 to 1024"),
        ("experiment.dropout=1.5", "0 to 1"),
        ("experiment.dropout=.nan", "0 to 1"),
        ("experiment.mixgen_ratio=0.6", "0 to 0.5"),
        ("experiment.mixgen_type=dog", "cat, ori"),
        ("experiment.ss=maybe", "true or false"),
        ("experiment.ss=1", "true or false"),
        ("experiment.ss_ratio=true", "a number"),
        ("experiment.simclr_mlp=[512, 128]", "list of 3"),
        ("experiment.simclr_mlp=automatic", "auto"),
        ("model.patch_size=0", "at least 1"),
        ("model.embed_dim=half", "or auto"),
        ("model.activation=relu", "auto, quick_gelu, gelu"),
        ("experiment.simclr_temperature=0", "above 0"),
        ("experiment.cmt_depth=0", "at least 1"),
        ("schedule.epoch=2.5", "an integer"),
        ("schedule.lr=fast", "a number"),
        ("schedule.lr=.inf", "a number"),
        ("schedule.lr=0", "above 0"),
        ("schedule.lr_end=-0.5", "at least 0"),
        ("schedule.betas=[0.9, 1.0]", "list of 2"),  # 1 would divide by zero in AdamW
        ("model.ckpt_type=clip", "original_clip, saved"),
        ("model.vocab_size=100", "49408"),
        ("model.vocab_size=49408.0", "49408"),
        ("data.batch_size=0", "at least 1"),
        ("data.batch_size=big", "an integer"),
        ("data.dataset=cuhk-pedes", "CUHK-PEDES"),
        ("data.noise=1.5", "0 to 1"),
        ("data.evaluate_on=train", "test, val"),
        ("distributed.backend=mpi", "nccl, gloo"),
    ],
)
def test_an_invalid_value_is_refused(override, expected):
    key, _, value = override.partition("=")
    message = refusal(overrides=(override,))
    assert key in message and expected in message and (value or "null") in message


def test_a_seed_that_torch_cannot_take_is_refused():
    assert "misc.seed" in refusal(overrides=("misc.seed=99999999999999999999999",))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["experiment.input_resolution=[224, 100]"], ["experiment.input_resolution: [224, 100]", "patch_size: 16"]),
        (["experiment.input_resolution=100"], ["experiment.input_resolution: [100, 100]", "model.patch_size: 16"]),
        (["model.vision_heads=5"], ["model.vision_heads: 5", "model.vision_width: 768"]),
        (["model.text_width=500", "model.text_heads=8"], ["model.text_heads: 8", "model.text_width: 500"]),
        (["schedule.epoch_warmup=6"], ["schedule.epoch_warmup: 6", "schedule.epoch: 5"]),
        (
            ["model.embed_dim=256", "experiment.simclr_mlp=[512, 128, 512]"],
            ["experiment.simclr_mlp: [512, 128, 512]", "model.embed_dim: 256"],
        ),
        (["experiment.nitc_ratio=0", "experiment.ritc=false"], ["experiment.nitc_ratio: 0", "experiment.ritc"]),
        (["experiment.nitc_ratio=0", "experiment.ritc_ratio=0"], ["experiment.nitc_ratio: 0", "experiment.ritc"]),
        (["experiment.mlm=true", "experiment.ss=false", "model.embed_dim=200"], ["model.embed_dim: 200", "mlm"]),
    ],
)
def test_values_that_contradict_each_other_are_refused(overrides, parts):
    """Also if one of them is `auto`, as soon as the weights are known; here they are random, of ViT-B/16."""
    with pytest.raises(UserError) as caught:
        resolve_architecture(load_config(overrides=tuple(overrides)), None)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["experiment.input_resolution=100", "model.patch_size=16"],
            ["input_resolution: [100, 100]", "model.patch_size: 16"],
        ),
        (["model.vision_heads=5", "model.vision_width=64"], ["model.vision_heads: 5", "model.vision_width: 64"]),
    ],
)
def test_contradictions_that_do_not_depend_on_weights_are_refused_while_loading(overrides, parts):
    message = refusal(overrides=tuple(overrides))
    assert all(part in message for part in parts), message


def test_sizes_of_random_weights_are_configured_or_those_of_vit_b16():
    config = resolve_architecture(load_config(overrides=("model.vision_width=192", "model.embed_dim=256")), None)
    model = config.model
    assert (model.vision_width, model.vision_heads, model.vision_layers, model.patch_size) == (192, 3, 12, 16)
    assert (model.text_width, model.text_heads, model.text_layers, model.activation) == (512, 8, 12, "quick_gelu")
    assert config.experiment.simclr_mlp == [256, 128, 256]


def test_a_resumed_run_keeps_its_sizes():
    """They do not depend on `model.checkpoint`, which may have changed."""
    begun = resolve_architecture(load_config(overrides=("model.vision_width=192", "model.vision_layers=3")), None)
    saved = to_plain(begun)
    assert resolve_architecture(load_config(), None, saved) == begun


def test_the_width_of_a_loss_that_is_off_contradicts_nothing():
    assert load_config(overrides=("model.embed_dim=256", "experiment.ss=false")).model.embed_dim == 256


def test_all_problems_are_reported_together(tmp_path):
    path = write(tmp_path / "mine.yaml", "experiment: {dropot: 0.1, ss: 3}\nmodel: {lr: 3}\n")
    message = refusal(path, overrides=("data.batch_size=0", "nonsense=1"))
    parts = ("'experiment.dropot'", "experiment.ss: 3", "'model.lr'", "data.batch_size: 0", "'nonsense'")
    assert all(part in message for part in parts)


def test_a_key_that_appears_twice_is_refused(tmp_path):
    path = write(tmp_path / "mine.yaml", "data:\n  batch_size: 1\n  num_workers: 0\n  batch_size: 2\n")
    message = refusal(path)
    assert all(part in message for part in ("'batch_size'", str(path), "2 and 4"))
    assert "'data'" in refusal(write(path, "data: {batch_size: 1}\ndata: {num_workers: 1}\n"))


@pytest.mark.parametrize("value", ["5", "[1, 2]", "text"])
def test_a_section_without_keys_is_refused(tmp_path, value):
    path = write(tmp_path / "mine.yaml", f"data: {value}\n")
    message = refusal(path)
    assert f"data: {value}" in message and str(path) in message


@pytest.mark.parametrize("text", ["- 1\n", "just text\n", "5\n"])
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path, text):
    path = write(tmp_path / "mine.yaml", text)
    assert str(path) in refusal(path)


@pytest.mark.parametrize(
    "text",
    [
        "data: {batch_size: 1\n",
        "data:\n\tbatch_size: 1\n",
        "a: \x00\n",
        b"\xff\xfe\x00",
        "anno_dir: {{ folder }}\n",  # a template that was not filled in: in YAML, a key that is a mapping
        "device: 2024-02-30\n",  # looks like a date, but is invalid
        "anno_dir: !!python/object/apply:os.getcwd []\n",
    ],
    ids=["open bracket", "tab", "control character", "not UTF-8", "template", "date", "code"],
)
def test_invalid_yaml_is_refused(tmp_path, text):
    path = write(tmp_path / "mine.yaml", text)
    assert str(path) in refusal(path)


def test_a_value_of_two_lines_is_reported_in_one(tmp_path):
    assert "data.dataset" in refusal(write(tmp_path / "mine.yaml", 'data: {dataset: "a\\nb"}\n'))


@pytest.mark.parametrize("override", ["foo", "=5", "", "data.batch_size=[", "data.dataset=2024-02-30"])
def test_an_argument_that_is_not_an_override_is_refused(override):
    assert repr(override) in refusal(overrides=(override,))


ALIASES = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))
ENDLESS = {
    "aliases": ("a0: &a0 x\n" + ALIASES, "values"),
    "aliases in sections": ("data: &a0 {x: 1}\n" + ALIASES, "values"),
    "a list that contains itself": ("data: &a [*a]", "nested"),
    "a section that contains itself": ("data: &a {x: *a}", "nested"),
    "a merge of itself": ("data: &a {<<: *a}", "nested"),
    "100,000 brackets": ("data: " + "[" * 100_000, "nest"),
    "100,000 braces": ("data: " + "{a: " * 100_000, "nest"),
    "100,000 dashes": ("data:\n  " + "- " * 100_000, "nest"),
}


@pytest.mark.parametrize("case", ENDLESS)
def test_yaml_that_is_too_deep_or_too_large_is_refused(tmp_path, case):
    text, word = ENDLESS[case]
    assert word in refusal(write(tmp_path / "mine.yaml", text)).lower()
    assert refusal(overrides=(f"data.batch_size={{{text.partition(': ')[2]}}}",))


@pytest.mark.parametrize("value", ["9" * 400, "-" + "9" * 400, "1e400", "0x" + "f" * 9000, "9" * 5000, "10000000000"])
def test_a_number_of_many_digits_is_refused(value):
    integers = [key for key in RULES if RULES[key].values.accepts(8) and not RULES[key].values.accepts(8.5)]
    numbers = [key for key in RULES if RULES[key].values.accepts(0.5)]
    assert len(integers) > 20 and len(numbers) > 20
    for key in [*integers, *(numbers if len(value) != 11 else ())]:
        assert key in refusal(overrides=(f"{key}={value}",))


def test_a_billion_epochs_are_refused():
    assert "1 to 1000000" in refusal(overrides=("schedule.epoch=1000000000",))


@pytest.mark.parametrize("text", ["data: {batch_size: TEXT}", "? TEXT\n: 1", "TEXT", "base: TEXT"])
def test_a_message_about_a_long_text_is_short(tmp_path, text):
    message = refusal(write(tmp_path / "mine.yaml", text.replace("TEXT", "long" * 5000)))
    assert 500 < len(message) <= 1500
    assert len(refusal(overrides=("long" * 5000,))) <= 1500


def test_a_mutated_file_loads_or_is_refused(tmp_path):
    content, draw, refused = PUBLISHED.encode(), random.Random(0), 0
    for _ in range(250):
        try:
            load_config(write(tmp_path / "mine.yaml", mutated(content, draw)))
        except UserError:
            refused += 1
    assert 50 < refused < 250


TAGS = [
    "!!timestamp a",
    "!!bool a",
    '!!int ""',
    "!!float x",
    "!!binary a",
    "!!set {a, b}",
    "!!pairs [a: 1]",
    "!!omap {}",
]


@pytest.mark.parametrize("value", TAGS)
def test_a_tag_that_does_not_fit_is_refused(tmp_path, value):
    refusal(write(tmp_path / "mine.yaml", f"device: {value}\n"))
    refusal(overrides=(f"device={value}",))


def test_a_missing_file_is_refused(tmp_path):
    assert str(tmp_path / "none.yaml") in refusal(tmp_path / "none.yaml")
    assert str(tmp_path) in refusal(tmp_path)


def test_a_file_of_another_kind_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    """An annotation is YAML too, and parsing it would take minutes."""
    monkeypatch.setattr("misc.config.loading._ConfigurationLoader", lambda source: pytest.fail("it was parsed"))
    with pytest.raises(UserError, match=r"reid_raw\.json: it has 2,000,003 bytes"):
        read_yaml(write(tmp_path / "reid_raw.json", "[" + "1," * 1_000_000 + "1]"))


def test_a_missing_base_is_refused_with_the_file_that_names_it(tmp_path):
    path = write(tmp_path / "mine.yaml", "base: nowhere.yaml\n")
    message = refusal(path)
    assert "nowhere.yaml" in message and str(path) in message
    assert "base: 5" in refusal(write(path, "base: 5\n"))


def test_a_circle_of_bases_is_refused(tmp_path):
    path = write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    assert str(path) in refusal(path) and "base" in refusal(path)
    assert "itself" in refusal(write(tmp_path / "own.yaml", "base: own.yaml\n"))
