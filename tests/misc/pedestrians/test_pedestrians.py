"""The generated dataset: its files, and that its captions describe what its images show."""

import json
import re
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from misc.errors import UserError
from misc.pedestrians import (
    Item,
    Person,
    Shot,
    Sight,
    describe,
    draw_dataset,
    draw_pedestrian,
    imagine_identity,
    imagine_person,
    see,
    take_shot,
)
from misc.pedestrians.__main__ import main
from misc.pedestrians.colours import COLOURS, HAIR_COLOURS

SMALL = {"train_identities": 3, "val_identities": 1, "test_identities": 2, "images_per_identity": 3, "workers": 1}
COLOUR_SYNONYMS = {"gray": "grey", "violet": "purple", "sky blue": "light blue", "pale blue": "light blue"}
COLOUR_SYNONYMS |= {"blonde": "blond", "fair": "blond"}
# A word that names a thing → the kinds of which one must be in sight.
TELLTALES = {
    "glasses|spectacles": {"glasses"},
    "beard|facial": {"beard"},
    "phone": {"phone"},
    "umbrella": {"umbrella"},
    "scarf": {"scarf"},
    "backpack|rucksack|school bag": {"backpack"},
    "suitcase|trolley": {"suitcase"},
    "handbag|purse": {"handbag"},
    "satchel|shoulder bag|messenger": {"shoulder bag"},
    "shopping|carrier|tote": {"shopping bag"},
    "cap|beanie|knitted|woolly|wide-brimmed|sun hat": {"cap", "beanie", "hat"},
    "ponytail": {"ponytail"},
    "bun": {"bun"},
    "logo|print": {"logo"},
    "stripes|striped": {"striped"},
    "checks|checked|plaid": {"checked"},
    "dots": {"dotted"},
    "over an? [a-z ]+ shirt|underneath": {"open"},
    "the camera|the viewer": {"front", "back", "side"},
    "towards|facing the camera|forward": {"front"},
    "behind|away|the back to": {"back"},
    "sideways|profile|side": {"side"},
    "walking": {"walking"},
    "standing": {"standing"},
    "he": {"man"},
    "she": {"woman"},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "pedestrians"
    draw_dataset(folder, **SMALL)
    return folder


def encounters(count: int) -> list[tuple[Person, Shot]]:
    """People, each in one shot."""
    people = [imagine_identity(identity, images=1, seed=7) for identity in range(count)]
    return [(person, portraits[0].shot) for person, portraits in people]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / name).read_text())


def test_annotations_have_the_form_of_cuhk_pedes(dataset: Path) -> None:
    entries = read(dataset, "reid_raw.json")
    assert len(entries) == (3 + 1 + 2) * 3
    for entry in entries:
        assert set(entry) == {"split", "id", "file_path", "captions", "processed_tokens"}
        assert entry["file_path"].split("/")[0] in {"cam_a", "cam_b", "CUHK01", "CUHK03", "Market"}
        assert len(set(entry["captions"])) == 2
        for caption, tokens in zip(entry["captions"], entry["processed_tokens"], strict=True):
            assert tokens == re.findall(r"[a-z-]+", caption.lower())
        with Image.open(dataset / "imgs" / entry["file_path"]) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (48, 96))
    assert len({entry["file_path"] for entry in entries}) == len(entries)


def test_splits_share_no_identity(dataset: Path) -> None:
    identities = {split: set() for split in ("train", "val", "test")}
    for entry in read(dataset, "reid_raw.json"):
        identities[entry["split"]].add(entry["id"])
    assert {split: len(ids) for split, ids in identities.items()} == {"train": 3, "val": 1, "test": 2}
    assert len(set.union(*identities.values())) == 6


def test_back_translation_differs_from_its_caption(dataset: Path) -> None:
    captions = {entry["file_path"]: entry["captions"] for entry in read(dataset, "reid_raw.json")}
    translated = {entry["file_path"]: entry["captions_bt"] for entry in read(dataset, "back_translation.json")}
    assert translated.keys() == captions.keys()
    for path, paraphrases in translated.items():
        assert len(paraphrases) == len(captions[path])
        assert all(ours != theirs for ours, theirs in zip(captions[path], paraphrases, strict=True))


def test_number_of_workers_changes_no_byte(dataset: Path, tmp_path: Path) -> None:
    draw_dataset(tmp_path / "again", **SMALL | {"workers": 2})
    assert files_of(tmp_path / "again") == files_of(dataset)


def test_seed_changes_the_people(dataset: Path, tmp_path: Path) -> None:
    draw_dataset(tmp_path / "other", **SMALL | {"seed": 1})
    assert read(tmp_path / "other", "reid_raw.json") != read(dataset, "reid_raw.json")


def test_complete_dataset_is_left_as_it_is(dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("misc.pedestrians.dataset.draw_pedestrian", None)  # drawing anything would fail
    draw_dataset(dataset, **SMALL)
    assert f"{dataset} already contains these pedestrians" in capsys.readouterr().out


def test_other_arguments_are_refused(dataset: Path) -> None:
    before = files_of(dataset)
    with pytest.raises(UserError, match="was drawn with .*give a new folder"):
        draw_dataset(dataset, **SMALL | {"seed": 5})
    assert files_of(dataset) == before


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="contains something other"):
        draw_dataset(tmp_path, **SMALL)
    assert files_of(tmp_path) == {"thesis.txt": b"years of work"}


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    draw_dataset(tmp_path, **SMALL)
    assert (tmp_path / "reid_raw.json").is_file()


def test_interrupted_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def draw_two(*arguments):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(draw_pedestrian(*arguments))
        return drawn[-1]

    monkeypatch.setattr("misc.pedestrians.dataset.draw_pedestrian", draw_two)
    with pytest.raises(KeyboardInterrupt):
        draw_dataset(tmp_path / "demo", **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["train_identities", "height", "workers"])
def test_sizes_below_one_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is 0"):
        draw_dataset(tmp_path / "demo", **SMALL | {name: 0})


def test_command_line(tmp_path: Path, capsys) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    main([str(tmp_path / "demo"), *options, "--height=64", "--width=32", "--seed=3"])
    with Image.open(next((tmp_path / "demo" / "imgs").rglob("*.jpg"))) as image:
        assert image.size == (32, 64)
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "demo")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("give a new folder, or remove it\n")


def test_images_of_one_person_differ_and_show_the_same_clothes() -> None:
    for identity in range(20):
        person, portraits = imagine_identity(identity, images=4, seed=0)
        assert len({portrait.shot.camera for portrait in portraits}) == 4
        images = [np.asarray(draw_pedestrian(person, portrait.shot), dtype=float) for portrait in portraits]
        assert all(np.abs(images[0] - image).mean() > 5 for image in images[1:])
        sights = [see(person, portrait.shot) for portrait in portraits]
        assert len({(s.gender, s.upper[:2], s.lower, s.shoes, s.hat, s.scarf, s.umbrella) for s in sights}) == 1


def test_most_people_differ_in_the_colours_of_two_garments_hair_and_shoes() -> None:
    people = [imagine_person(Random(seed)) for seed in range(1000)]
    looks = {(p.upper[:2], p.lower, p.shoes.colour, p.hair.colour) for p in people}
    assert len(looks) > 950


def pixels(person: Person, shot: Shot) -> np.ndarray:
    return np.asarray(draw_pedestrian(person, shot), dtype=int)


def clearly_different(image: np.ndarray, other: np.ndarray) -> int:
    """The number of pixels that differ clearly."""
    return int((np.abs(image - other).sum(-1) > 40).sum())


def recoloured(item: Item, colours: dict) -> Item:
    ours = np.array(colours[item.colour])
    return item._replace(colour=max(colours, key=lambda name: np.abs(np.array(colours[name]) - ours).sum()))


@pytest.mark.slow
def test_everything_in_sight_can_be_seen() -> None:
    """The image changes if a thing that a caption may name gets another colour, or is removed."""
    for person, shot in encounters(40):
        sight, image = see(person, shot), pixels(person, shot)
        for name in ("upper", "lower", "shoes", "hat", "bag", "scarf", "umbrella", "hair"):
            item = getattr(sight, name)
            if item and item.kind not in ("bald", "hood"):  # a hood has the colour of its hoodie
                other = recoloured(getattr(person, name), HAIR_COLOURS if name == "hair" else COLOURS)
                changed = pixels(replace(person, **{name: other}), shot)
                assert clearly_different(image, changed) >= 10, (name, person, shot)
        for name in ("glasses", "beard"):
            if getattr(sight, name):
                changed = pixels(replace(person, **{name: False}), shot)
                assert clearly_different(image, changed) >= 3, (name, person, shot)
        if sight.upper.pattern == "open":
            other = recoloured(Item("shirt", person.inner_colour), COLOURS).colour
            assert clearly_different(image, pixels(replace(person, inner_colour=other), shot)) >= 10
        if sight.phone:
            assert clearly_different(image, pixels(person, replace(shot, arms="hanging"))) >= 10


def test_what_the_view_hides_is_not_in_sight() -> None:
    for person, shot in encounters(10):
        person = replace(person, glasses=True, beard=True, upper=Item("t-shirt", "red", "logo", "white"))
        behind = replace(shot, view="back", arms="hanging")
        sight = see(person, behind)
        assert not sight.glasses
        assert not sight.beard
        assert sight.upper.pattern == "plain"
        plain = Item("t-shirt", "red")
        without = replace(person, glasses=False, beard=False, upper=plain)
        assert (pixels(person, behind) == pixels(without, behind)).all()


@pytest.mark.parametrize("bag_side, far_side", [("left", "right"), ("right", "left")])
def test_the_far_side_hides_its_bag_and_the_head_a_phone(bag_side: str, far_side: str) -> None:
    for person, shot in encounters(5):
        person = replace(person, bag_side=bag_side, bag=Item("handbag", "red"), umbrella=None)
        shot = replace(shot, arms="phone")
        near, far = (see(person, replace(shot, view=view)) for view in (bag_side, far_side))
        assert near.bag == person.bag
        assert not near.phone  # the phone is in the other hand
        assert far.bag is None
        assert far.phone
        assert not see(person, replace(shot, view="back")).phone


def facts_of(sight: Sight) -> tuple[set[str], set[str]]:
    """The kinds, patterns, view and gait in sight, and the colours."""
    items = [value for value in vars(sight).values() if isinstance(value, Item)]
    facts = {sight.gender, sight.view, sight.gait} | {item.kind for item in items} | {item.pattern for item in items}
    facts |= {name for name in ("glasses", "beard", "phone") if getattr(sight, name)}
    return facts, {item.colour for item in items} | {item.second_colour for item in items}


def colours_named(text: str) -> set[str]:
    for synonym, colour in COLOUR_SYNONYMS.items():
        text = re.sub(rf"\b{synonym}\b", colour, text)
    named = re.findall(rf"\b({'|'.join(sorted([*COLOURS, *HAIR_COLOURS], key=len, reverse=True))})\b", text)
    return set(named)


@pytest.fixture(scope="module")
def captions() -> list[tuple[Sight, str]]:
    """A caption and its paraphrase of each of 600 shots."""
    sights = [see(person, shot) for person, shot in encounters(600)]
    return [(sight, text) for index, sight in enumerate(sights) for text in describe(sight, Random(index))]


def test_captions_name_only_what_is_in_sight(captions: list[tuple[Sight, str]]) -> None:
    spoken = set()
    for sight, text in captions:
        facts, colours = facts_of(sight)
        for words, kinds in TELLTALES.items():
            if re.search(rf"\b({words})\b", text.lower()):
                spoken.add(words)
                assert facts & kinds, (words, text, sight)
        if "ginger" in colours:
            colours.add("red")  # people say red hair
        assert colours_named(text) <= colours, (text, sight)
    assert spoken == TELLTALES.keys()


def test_captions_name_most_of_what_distinguishes_people(captions: list[tuple[Sight, str]]) -> None:
    for name in ("upper", "lower"):
        garments = [(getattr(sight, name), text) for sight, text in captions if getattr(sight, name)]
        named = [item.colour in colours_named(text) for item, text in garments]
        assert np.mean(named) > 0.85
    lengths = [len(text.split()) for _, text in captions]
    assert np.percentile(lengths, 10) > 15
    assert np.percentile(lengths, 90) < 40


def test_captions_are_clean_english_and_seldom_alike(captions: list[tuple[Sight, str]]) -> None:
    for _, text in captions:
        assert re.fullmatch(r"[A-Z][A-Za-z,-]*( [A-Za-z-]+[,.]?)*\.", text), text
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|\b(\w+) \1\b", text), text
    assert len({text for _, text in captions}) > 0.99 * len(captions)


def test_shots_vary_in_view_and_gait() -> None:
    shots = [take_shot(Random(seed), "cam_a") for seed in range(100)]
    assert {shot.view for shot in shots} == {"front", "back", "left", "right"}
    assert {shot.gait for shot in shots} == {"walking", "standing"}
