"""The dataset that a mode reads, and the training loader."""

import json
from types import SimpleNamespace

import pytest
import torch

from misc.builders.data import build_loader, evaluated_data, read_dataset, read_evaluated_split, with_recorded_data
from misc.builders.training import build_objectives
from misc.config.loading import load_config
from misc.data.annotations import read_annotations
from misc.errors import UserError
from misc.system.distributed import Ranks
from tests.helpers.runs import of_dataset
from text_utils.tokenizer import Tokenizer

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def folders(tmp_path):
    """Returns the settings of a dataset whose two folders exist."""
    for name in ("anno", "imgs"):
        (tmp_path / name).mkdir()
    return {"anno_dir": str(tmp_path / "anno"), "image_dir": str(tmp_path / "imgs")}


def chosen(recorded: dict, given: tuple[str, ...] = ()) -> tuple[str, str, str | None, list[str]]:
    config = load_config(overrides=("anno_dir=mine", "image_dir=my_images", "data.dataset=ICFG-PEDES"))
    weights = SimpleNamespace(name="w.pth", config=recorded)
    config, notes = with_recorded_data(config, weights, given)
    return config.anno_dir, config.image_dir, config.data.dataset, notes


def test_the_data_of_a_checkpoint_is_taken_unless_the_user_sets_another(folders):
    recorded = {**folders, "data": {"dataset": "RSTPReid"}}
    anno_dir, image_dir = folders.values()
    mine = ("mine", "my_images", "ICFG-PEDES", [])
    assert chosen(recorded) == (anno_dir, image_dir, "RSTPReid", [])
    assert chosen(recorded, ("anno_dir", "image_dir")) == chosen(recorded, ("anno_dir",)) == mine
    assert chosen(recorded, ("data.dataset",)) == mine  # another name is another dataset
    same = {**folders, "data": {"dataset": "ICFG-PEDES"}}
    assert chosen(same, ("data.dataset",)) == (anno_dir, image_dir, "ICFG-PEDES", [])
    assert chosen(folders) == (anno_dir, image_dir, None, [])  # the published code records no name


@pytest.mark.parametrize("recorded", [{}, {"anno_dir": 3, "image_dir": "x"}, {"anno_dir": "x"}])
def test_weights_that_record_no_data_are_evaluated_on_the_configured_data(recorded):
    assert chosen(recorded) == ("mine", "my_images", "ICFG-PEDES", [])


def test_the_data_of_a_checkpoint_is_taken_without_its_name(folders):
    """`data.dataset=null` only turns the comparison with published counts off."""
    weights = SimpleNamespace(name="w.pth", config={**folders, "data": {"dataset": "RSTPReid"}})
    config, _ = with_recorded_data(load_config(overrides=("data.dataset=null",)), weights, ("data.dataset",))
    assert (config.anno_dir, config.image_dir, config.data.dataset) == (*folders.values(), None)


@pytest.mark.parametrize("key", ["anno_dir", "image_dir"])
def test_data_without_folders_and_name_is_refused(key, folders):
    given = () if key == "anno_dir" else (f"anno_dir={folders['anno_dir']}",)
    config = load_config(overrides=("data.dataset=null", *given))
    with pytest.raises(UserError, match=f"{key}: auto needs data.dataset"):
        read_dataset(config, Tokenizer(), ALONE)
    with pytest.raises(UserError, match=f"{key}: auto needs data.dataset"):
        read_evaluated_split(config, Tokenizer(), [config], ALONE)


def test_data_of_a_checkpoint_that_is_not_here_is_a_warning(folders):
    *data, (note,) = chosen({**folders, "image_dir": "elsewhere/imgs"})
    assert data == ["mine", "my_images", "ICFG-PEDES"]
    assert note.startswith("warning: w.pth was trained on ") and "elsewhere/imgs" in note


def test_a_result_names_dataset_split_and_folder():
    config = load_config(overrides=("anno_dir=data/r", "data.dataset=RSTPReid", "data.evaluate_on=val"))
    assert evaluated_data(config) == "RSTPReid val in data/r"
    config.data.dataset = None
    assert evaluated_data(config) == "val in data/r"


@pytest.mark.parametrize(("text_length", "seen"), [(64, 77), (77, 77), (82, 82), (168, 100)])
def test_captions_keep_as_many_words_as_tokens_but_77_at_least(tiny_dataset, text_length, seen):
    words = [f"w{number}" for number in range(100)]
    annotation = tiny_dataset.anno_dir / "reid_raw.json"
    annotation.write_text(
        json.dumps([entry | {"captions": [" ".join(words)]} for entry in json.loads(annotation.read_text())])
    )
    own = (f"anno_dir={tiny_dataset.anno_dir}", f"image_dir={tiny_dataset.image_dir}", "data.dataset=null")
    config = load_config(overrides=(*own, f"experiment.text_length={text_length}"))
    tokenizer = Tokenizer()
    trained, notes = read_dataset(config, tokenizer, ALONE)
    shorter = load_config(overrides=("experiment.text_length=32",))
    evaluated, _ = read_evaluated_split(config, tokenizer, [shorter, config], ALONE)
    for split in (trained["train"], trained["test"], evaluated["test"]):
        assert split.captions[0].split() == words[:seen]
    assert any(note.startswith(f"captions cut at {text_length} tokens: 24 of 24 in train (by ") for note in notes)


def test_noise_only_changes_the_training_captions(data):
    """48 captions of 12 people; half of them are shuffled."""
    fixed = (*of_dataset(data), "data.dataset=null", "experiment.back_trans=false")
    clean, notes = read_dataset(load_config(overrides=fixed), Tokenizer(), ALONE)
    expected = read_annotations(*data)
    assert clean == expected and not any("noise" in note for note in notes)
    noisy, notes = read_dataset(load_config(overrides=(*fixed, "data.noise=0.5", "misc.seed=3")), Tokenizer(), ALONE)
    assert {name: split == expected[name] for name, split in noisy.items()} == {
        "train": False,
        "val": True,
        "test": True,
    }
    split, found = noisy["train"], expected["train"]
    assert sorted(split.captions) == sorted(found.captions) and split.image_paths == found.image_paths
    people = [int(caption.split()[-1]) - 1 for caption in split.captions]  # a caption ends with its person's number
    moved = sum(one != other for one, other in zip(people, split.caption_identities, strict=True))
    (line,) = [note for note in notes if note.startswith("noise")]
    assert line == (
        f"noise: 24 of 48 training captions (50%) are shuffled among images; {moved} are now at another person"
    )


def test_noise_is_a_share_of_the_images_that_are_used(data):
    fixed = (*of_dataset(data), "data.dataset=null", "data.train_share=0.5", "data.noise=0.5")
    _, notes = read_dataset(load_config(overrides=fixed), Tokenizer(), ALONE)
    assert any(note.startswith("noise: 12 of 24 training captions") for note in notes)


@pytest.mark.parametrize(
    ("value", "device", "expected"),
    [("auto", "cuda", True), ("auto", "cpu", False), ("true", "cpu", True), ("false", "cuda", False)],
)
def test_where_simclr_views_are_finished(tiny_dataset, value, device, expected):
    config = load_config(overrides=("data.batch_size=4", "data.num_workers=0", f"data.simclr_on_device={value}"))
    ranks = Ranks(0, 1, torch.device(device))
    split = read_annotations(*tiny_dataset)["train"]
    loader = build_loader(config, split, build_objectives(config, ranks), Tokenizer(), ranks)
    assert loader.dataset.augmentation.simclr_on_device is expected
