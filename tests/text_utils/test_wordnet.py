"""The reader of WordNet's files, tested with a small database in their format."""

import multiprocessing
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from misc.errors import UserError
from tests.helpers.tiny_wordnet import LICENCE, write_wordnet
from text_utils.wordnet import WordNet

INSTALLED = Path("/usr/share/wordnet")
MANY = [f"many{number}" for number in range(17)]
SYNSETS = {
    "noun": [
        ("n", ["jersey", "T-shirt", "tee_shirt"]),
        ("n", ["red", "redness", "crimson"]),
        ("n", ["Bolshevik", "Marxist", "red"]),
        ("n", ["bag", "handbag"]),
        ("n", ["bass", "Bass", "Bass_Strait"]),
        ("n", MANY),
        ("n", ["alone"]),
    ],
    "verb": [("v", ["bag", "pocket"])],
    "adj": [("a", ["red", "crimson"]), ("s", ["galore(ip)", "abounding(p)"]), ("s", ["main(a)", "primary"])],
    "adv": [("r", ["quickly", "apace", "chop-chop"])],
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A database with `SYNSETS`."""
    return write_wordnet(tmp_path / "dict", SYNSETS)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("jersey", ["t-shirt", "tee shirt"]),
        ("T-Shirt", ["jersey", "tee shirt"]),
        ("tee shirt", ["jersey", "t-shirt"]),
        ("red", ["bolshevik", "crimson", "marxist", "redness"]),
        ("bag", ["handbag", "pocket"]),
        ("bass", ["bass strait"]),
        ("galore", ["abounding"]),
        ("abounding", ["galore"]),
        ("primary", ["main"]),
        ("apace", ["chop-chop", "quickly"]),
        ("many0", sorted(MANY[1:])),
        ("alone", []),
        ("bags", []),
        ("ba", []),
        ("1", []),
        ("", []),
        ("\ud800", []),
    ],
)
def test_synonyms_are_the_other_words_of_all_synsets(folder, word, expected):
    assert WordNet(folder).synonyms(word) == expected


def test_a_change_of_the_list_changes_no_later_answer(folder):
    wordnet = WordNet(str(folder))
    wordnet.synonyms("bag").clear()
    assert wordnet.synonyms("bag") == ["handbag", "pocket"]


def test_the_files_are_read_once(folder):
    wordnet = WordNet(folder)
    shutil.rmtree(folder)
    assert wordnet.synonyms("quickly") == ["apace", "chop-chop"]


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_it_works_in_worker_processes(folder, method):
    wordnet = WordNet(folder)
    wordnet.synonyms("bag")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as workers:
        found = list(workers.map(wordnet.synonyms, ["bag", "main", "man"]))
    assert found == [["handbag", "pocket"], ["primary"], []]


def test_a_pickle_contains_the_path_and_not_the_database(folder):
    assert len(pickle.dumps(WordNet(folder).synonyms)) < 1000


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def remove_one_file(folder: Path) -> None:
    (folder / "data.verb").unlink()


def make_a_file_of_it(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")


def cut_the_index(folder: Path) -> None:
    path = folder / "index.noun"
    path.write_text(path.read_text().rstrip()[:-3])


def cut_the_index_early(folder: Path) -> None:
    path = folder / "index.adv"
    path.write_text(path.read_text() + "slowly r")


def misspell_an_offset(folder: Path) -> None:
    path = folder / "index.adv"
    path.write_text(path.read_text().rstrip()[:-8] + "@")


def empty_the_index(folder: Path) -> None:
    (folder / "index.adj").write_text(LICENCE)


def cut_the_data(folder: Path) -> None:
    path = folder / "data.noun"
    path.write_text(path.read_text()[:200])


def change_line_ends(folder: Path) -> None:
    path = folder / "data.adj"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def write_bytes_that_are_no_text(folder: Path) -> None:
    (folder / "index.verb").write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    "damage",
    [
        remove,
        remove_one_file,
        make_a_file_of_it,
        cut_the_index,
        cut_the_index_early,
        misspell_an_offset,
        empty_the_index,
        cut_the_data,
        change_line_ends,
        write_bytes_that_are_no_text,
    ],
)
def test_a_missing_or_damaged_database_is_reported_with_the_remedy(folder, damage):
    WordNet(folder)
    damage(folder)
    with pytest.raises(UserError) as caught:
        WordNet(folder)
    message = str(caught.value)
    assert message.startswith(f"experiment.wordnet: {folder} ")
    assert "apt install wordnet-base" in message and "/usr/share/wordnet" in message and "`dict` folder" in message
    assert "int()" not in message  # Python's own message helps nobody


@pytest.mark.skipif(not INSTALLED.is_dir(), reason="needs Debian's package wordnet-base")
def test_the_real_database_gives_the_synonyms_of_its_own_program():
    """Expects the synonyms that WordNet 3.0's program `wn WORD -over` lists."""
    wordnet = WordNet(INSTALLED)
    assert wordnet.synonyms("t-shirt") == ["jersey", "tee shirt"]
    assert wordnet.synonyms("backpack") == ["back pack", "haversack", "knapsack", "pack", "packsack", "rucksack"]
    assert wordnet.synonyms("galore") == ["abounding"]
    expected = "apace chop-chop cursorily promptly quick rapidly speedily"
    assert wordnet.synonyms("quickly") == expected.split()
