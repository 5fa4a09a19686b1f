"""Back-translation. A stand-in, a plain function from texts to texts, replaces the models, except in the tests of
Marian itself."""

import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from misc.data import back_translation
from misc.data.annotations import read_annotations
from misc.data.back_translation import Models, choose_device, load_translator, main
from misc.errors import UserError
from text_utils.cleaning import clean_caption


class StandIn:
    """A translator that records its batches, and raises `error` at batch number `stop_at`, counted from 0."""

    def __init__(self, stop_at: int | None = None, error: type[BaseException] = KeyboardInterrupt):
        self.batches: list[list[str]] = []
        self.stop_at, self.error = stop_at, error

    def __call__(self, captions: list[str]) -> list[str]:
        if len(self.batches) == self.stop_at:
            raise self.error
        self.batches.append(captions)
        return [f"Again: {caption}" for caption in captions]

    @property
    def seen(self) -> list[str]:
        return [caption for batch in self.batches for caption in batch]


Start = Callable[..., tuple[int, str]]


@pytest.fixture
def start(monkeypatch, capsys) -> Start:
    """Runs the command with a stand-in. Returns: its status, and its stderr without the progress bar."""

    def call(annotation: Path, out: Path, *options: str, translator=None) -> tuple[int, str]:
        monkeypatch.setattr(back_translation, "load_translator", lambda models, device: translator or StandIn())
        status = main([str(annotation), str(out), *options])
        return status, re.sub(
            r"\rback-translating:.*?caption/s\]|\rback-translating:.*?s/caption\]", "", capsys.readouterr().err
        ).strip()

    return call


CAPTIONS = [
    "A red shirt.",
    "Blue jeans, and a long grey coat!",
    "A hat.",
    "",
    "  A hat. ",
    "Été \ud800 \x00 \u2028",
    "x",
]
PARTIAL = "out.json.partial"


def write_annotation(folder: Path, captions: list[str] = CAPTIONS) -> Path:
    path = folder / "train_reid.json"
    entries = [
        {"id": number, "file_path": f"{number % 3}.jpg", "captions": [caption, f"Number {number}"]}
        for number, caption in enumerate(captions)
    ]
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def refused(outcome: tuple[int, str], *parts: str) -> None:
    status, message = outcome
    assert status == 2
    assert message.startswith("error: ")
    assert "\n" not in message
    for part in parts:
        assert part in message


# The forms


def test_back_translations_reach_the_training(tiny_dataset, start):
    out = tiny_dataset.anno_dir / "back_translation.json"
    assert start(tiny_dataset.anno_dir / "reid_raw.json", out) == (0, "")
    splits = read_annotations(*tiny_dataset, back_translation_file=out)
    for split in splits.values():
        assert split.back_translations == [clean_caption(f"Again: {caption}") for caption in split.captions]


@pytest.mark.parametrize(
    "name, path_field, fields",
    [
        ("reid_raw.json", "file_path", {"split": "train", "id": 1, "processed_tokens": [["a"]]}),
        ("ICFG-PEDES.json", "file_path", {"split": "train", "id": 1}),
        ("data_captions.json", "img_path", {"split": "train", "id": 1}),
        ("train_reid.json", "file_path", {"id": 1, "captions_bt": ["of old"]}),
        ("own.json", "file_path", {}),
    ],
)
def test_forms(tmp_path, start, name, path_field, fields):
    entries = [fields | {path_field: "a/1.jpg", "captions": ["One.", " Two.\n"]}]
    (tmp_path / name).write_text(json.dumps(entries))
    assert start(tmp_path / name, tmp_path / "out.json") == (0, "")
    expected = [{"file_path": "a/1.jpg", "captions_bt": ["Again: One.", "Again: Two."]}]
    assert json.loads((tmp_path / "out.json").read_text()) == expected


def test_a_path_that_is_listed_twice_keeps_both_entries(tmp_path, start):
    """The reader joins them in the order of the lists."""
    entries = [
        {"split": "train", "id": 1, "file_path": "a.jpg", "captions": ["One"]},
        {"split": "test", "id": 2, "file_path": "b.jpg", "captions": ["Two"]},
        {"split": "train", "id": 1, "file_path": "a.jpg", "captions": ["Three", "Four"]},
    ]
    (tmp_path / "reid_raw.json").write_text(json.dumps(entries))
    start(tmp_path / "reid_raw.json", tmp_path / "out.json")
    splits = read_annotations(tmp_path, tmp_path, back_translation_file=tmp_path / "out.json")
    assert splits["train"].back_translations == ["again one", "again three", "again four"]
    assert splits["test"].back_translations == ["again two"]


# The captions that are translated


def test_equal_captions_are_translated_once_and_empty_ones_not_at_all(tmp_path, start):
    translator = StandIn()
    annotation = write_annotation(tmp_path, ["A hat.", "", " \n", " A hat.", "a hat."])
    assert start(annotation, tmp_path / "out.json", translator=translator) == (0, "")
    assert sorted(translator.seen) == ["A hat.", *(f"Number {i}" for i in range(5)), "a hat."]
    firsts = [entry["captions_bt"][0] for entry in json.loads((tmp_path / "out.json").read_text())]
    assert firsts == ["Again: A hat.", "", "", "Again: A hat.", "Again: a hat."]


def test_batches(tmp_path, start):
    translator = StandIn()
    start(write_annotation(tmp_path), tmp_path / "out.json", "--batch-size", "5", translator=translator)
    assert [len(batch) for batch in translator.batches] == [5, 5, 2]
    lengths = [len(caption) for caption in translator.seen]
    assert lengths == sorted(lengths, reverse=True)


def test_nothing_is_loaded_if_there_is_nothing_to_translate(tmp_path):
    (tmp_path / "own.json").write_text(json.dumps([{"file_path": "a.jpg", "captions": ["", " "]}]))
    assert main([str(tmp_path / "own.json"), str(tmp_path / "out.json"), "--to-french", str(tmp_path / "none")]) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == [{"file_path": "a.jpg", "captions_bt": ["", ""]}]
    assert not (tmp_path / PARTIAL).exists()


def test_a_translator_that_loses_texts_is_a_bug(tmp_path, start):
    with pytest.raises(ValueError, match="zip"):
        start(write_annotation(tmp_path), tmp_path / "out.json", translator=lambda captions: captions[1:])


# Stopping and continuing


def test_continuing_after_any_batch(tmp_path, start):
    annotation, out = write_annotation(tmp_path), tmp_path / "out.json"
    undisturbed = StandIn()
    start(annotation, tmp_path / "undisturbed.json", "--batch-size", "3", translator=undisturbed)
    for stop_at in range(len(undisturbed.batches)):
        first, second = StandIn(stop_at), StandIn()
        outcome = start(annotation, out, "--batch-size", "3", translator=first)
        assert outcome == (130, "stopped: run the same command again to continue")
        assert not out.exists()
        assert (tmp_path / PARTIAL).exists() == (stop_at > 0)
        assert start(annotation, out, "--batch-size", "3", translator=second) == (0, "")
        assert first.batches + second.batches == undisturbed.batches
        assert out.read_bytes() == (tmp_path / "undisturbed.json").read_bytes()
        assert not (tmp_path / PARTIAL).exists()
        out.unlink()


def test_continuing_after_an_error_that_is_not_a_user_error(tmp_path, start):
    annotation, out = write_annotation(tmp_path), tmp_path / "out.json"
    first, second = StandIn(2, error=ZeroDivisionError), StandIn()
    with pytest.raises(ZeroDivisionError):
        start(annotation, out, "--batch-size", "3", translator=first)
    assert start(annotation, out, translator=second) == (0, "")
    assert not set(first.seen) & set(second.seen)


def test_killed_at_any_point_of_writing(tmp_path, start):
    """Only the end of the progress file can be missing: it is cut within lines and at their ends."""
    annotation, out, partial = write_annotation(tmp_path), tmp_path / "out.json", tmp_path / PARTIAL
    undisturbed = StandIn()
    start(annotation, tmp_path / "undisturbed.json", "--batch-size", "5", translator=undisturbed)
    expected = (tmp_path / "undisturbed.json").read_bytes()
    start(annotation, out, "--batch-size", "5", translator=StandIn(stop_at=2))
    written = partial.read_bytes()
    ends = [place + shift for place in range(len(written)) if written[place] == ord("\n") for shift in (0, 1)]
    for size in sorted({*range(0, len(written), 17), *ends}):
        partial.write_bytes(written[:size])
        translator = StandIn()
        assert start(annotation, out, "--batch-size", "5", translator=translator) == (0, "")
        kept = max(0, written[:size].count(b"\n") - 1)  # without the line of the models
        assert translator.batches == undisturbed.batches[kept:]
        assert out.read_bytes() == expected
        out.unlink()


def test_killed_before_the_last_file_was_written(tmp_path, start, monkeypatch):
    """The next call then loads no model."""
    annotation, out = write_annotation(tmp_path), tmp_path / "out.json"

    def fails(path: Path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(back_translation, "atomic_file", fails)
        assert start(annotation, out)[0] == 130
    assert not out.exists()
    assert start(annotation, out, translator=StandIn(stop_at=0)) == (0, "")
    assert out.exists()


def test_the_progress_bar_starts_at_what_is_done(tmp_path, monkeypatch, capsys):
    annotation, out = write_annotation(tmp_path), tmp_path / "out.json"
    monkeypatch.setattr(back_translation, "load_translator", lambda models, device: StandIn(stop_at=2))
    main([str(annotation), str(out), "--batch-size", "3"])
    assert " 0/12 " in capsys.readouterr().err
    main([str(annotation), str(out), "--batch-size", "3"])
    printed = capsys.readouterr().err
    assert " 6/12 " in printed
    assert " 0/12 " not in printed


def test_a_full_disk(tmp_path, start, full_disk):
    annotation, out = write_annotation(tmp_path), tmp_path / "out.json"
    first, second = StandIn(), StandIn()
    full_disk(300)
    refused(
        start(annotation, out, "--batch-size", "3", translator=first),
        str(out),
        "free some space",
        "run the same command again",
    )
    full_disk()
    assert start(annotation, out, "--batch-size", "3", translator=second) == (0, "")
    assert len(first.batches) > 1
    assert first.batches[:-1] + second.batches == first.batches + second.batches[1:]  # only the unsaved batch again


def test_models_are_not_mixed(tmp_path, start):
    annotation, out = write_annotation(tmp_path), tmp_path / "out.json"
    start(annotation, out, "--to-french", "mine", "--batch-size", "3", translator=StandIn(stop_at=2))
    kept = (tmp_path / PARTIAL).read_bytes()
    translator = StandIn()
    refused(start(annotation, out, translator=translator), PARTIAL, "--to-french mine", Models().to_english, "remove")
    assert (translator.batches, (tmp_path / PARTIAL).read_bytes()) == ([], kept)
    assert start(annotation, out, "--to-french", "mine", translator=translator) == (0, "")


def test_a_progress_file_without_translations_is_replaced(tmp_path, start):
    annotation, out = write_annotation(tmp_path), tmp_path / "out.json"
    (tmp_path / PARTIAL).write_text('{"to_french": "mine", "to_english": "mine"}\n')
    assert start(annotation, out) == (0, "")


def test_models_that_cannot_be_loaded_leave_nothing_behind(tmp_path, monkeypatch, capsys):
    annotation, out = write_annotation(tmp_path), tmp_path / "out.json"

    def fails(models, device):
        raise UserError("no such model")

    monkeypatch.setattr(back_translation, "load_translator", fails)
    assert main([str(annotation), str(out)]) == 2
    assert capsys.readouterr().err == "error: no such model\n"
    assert list(tmp_path.iterdir()) == [annotation]


def test_two_at_the_same_time(tmp_path, start):
    annotation, out = write_annotation(tmp_path), tmp_path / "out.json"
    stand_in = StandIn()

    def translator(captions):
        refused(start(annotation, out, translator=StandIn()), PARTIAL, "another process")
        return stand_in(captions)

    assert start(annotation, out, translator=translator) == (0, "")


def test_a_file_that_another_process_created_meanwhile_is_kept(tmp_path, start):
    annotation, out = write_annotation(tmp_path), tmp_path / "out.json"

    def translator(captions):
        out.write_text("of somebody else")
        return captions

    refused(start(annotation, out, translator=translator), "out.json already exists")
    assert out.read_text() == "of somebody else"
    out.unlink()
    assert start(annotation, out, translator=StandIn(stop_at=0)) == (0, "")


# Mistakes


@pytest.mark.parametrize("content", ["years of work", "years\nof\nwork\n", '{"a": "b"}\n', "[]\n", '{"to_french": \n'])
def test_a_progress_file_of_another_program(tmp_path, start, content):
    (tmp_path / PARTIAL).write_text(content)
    refused(start(write_annotation(tmp_path), tmp_path / "out.json"), PARTIAL, "move it away")
    assert (tmp_path / PARTIAL).read_text() == content


@pytest.mark.parametrize("line", ['{"A ha\n', "\x00\x00\n", '["a"]\n', '{"a": null}\n', "\n"])
def test_a_damaged_line_in_the_progress_file(tmp_path, start, line):
    annotation, out, partial = write_annotation(tmp_path), tmp_path / "out.json", tmp_path / PARTIAL
    start(annotation, out, "--batch-size", "3", translator=StandIn(stop_at=2))
    head, *rest = partial.read_text().splitlines(keepends=True)
    partial.write_text("".join([head, line, *rest]))
    refused(start(annotation, out), PARTIAL, "line 2", "remove")
    assert partial.read_text() == "".join([head, line, *rest])


@pytest.mark.parametrize(
    "content, parts",
    [
        (None, ["is not a file"]),
        ("{]", ["cannot be read as JSON"]),
        ('{"a": 1}', ["expected a JSON list"]),
        ("[]", ["empty list"]),
        ("[3]", ["entry 1 (counted from 1) is 3"]),
        ('[{"captions": ["a"]}]', ["entry 1", "no `file_path`"]),
        ('[{"file_path": "a.jpg", "captions": ["a"]}, {"file_path": "a.jpg"}]', ["entry 2", "no `captions`"]),
        ('[{"file_path": "a.jpg", "captions": "a"}]', ["entry 1", "`captions: 'a'`"]),
        ('[{"file_path": "../a.jpg", "captions": ["a"]}]', ["entry 1", "'../a.jpg'"]),
    ],
)
def test_bad_annotations(tmp_path, start, content, parts):
    if content is not None:
        (tmp_path / "own.json").write_text(content)
    refused(start(tmp_path / "own.json", tmp_path / "out.json"), "own.json", *parts)
    assert not (tmp_path / PARTIAL).exists()


def test_bad_places(tmp_path, start):
    annotation = write_annotation(tmp_path)
    before = annotation.read_bytes()
    refused(start(annotation, annotation), f"{annotation} already exists")
    refused(start(annotation, tmp_path), f"{tmp_path} already exists")
    refused(start(annotation, tmp_path / "none" / "out.json"), f"{tmp_path / 'none'} is not a folder")
    refused(start(annotation, annotation / "out.json"), f"{annotation} is not a folder")
    refused(start(annotation, tmp_path / ("long" * 100)), "cannot be accessed")
    (tmp_path / PARTIAL).mkdir()
    refused(start(annotation, tmp_path / "out.json"), PARTIAL, "cannot be written")
    assert annotation.read_bytes() == before


@pytest.mark.parametrize("size", ["0", "-1"])
def test_bad_batch_sizes(tmp_path, start, size):
    outcome = start(write_annotation(tmp_path), tmp_path / "out.json", f"--batch-size={size}")
    refused(outcome, f"--batch-size {size}")


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:x", "cuda:99", ""])
def test_bad_devices(tmp_path, start, name):
    refused(start(write_annotation(tmp_path), tmp_path / "out.json", "--device", name), f"--device {name}")


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("package", ["transformers", "sentencepiece"])
def test_missing_packages(tmp_path, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert main([str(write_annotation(tmp_path)), str(tmp_path / "out.json")]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: {package}")
    assert message.endswith("pip install transformers sentencepiece")
    assert not (tmp_path / PARTIAL).exists()


# Marian itself


@pytest.fixture(scope="module")
def marian(tmp_path_factory) -> tuple[Path, Path]:
    """Two folders like those of the hub, with tiny models of random weights and small vocabularies."""
    folder = tmp_path_factory.mktemp("marian")
    english = ["A person in a red jacket, number 3.", "Someone is wearing a blue shirt and walks to place 4."]
    french = ["Une personne en veste rouge, numéro 3.", "Quelqu'un porte une chemise bleue et va à la place 4."]
    write_marian(folder / "to_french", english, french, seed=6)
    write_marian(folder / "to_english", french, english, seed=7)
    return folder / "to_french", folder / "to_english"


def write_marian(folder: Path, source: list[str], target: list[str], seed: int) -> None:
    import sentencepiece
    from transformers import MarianConfig, MarianMTModel

    folder.mkdir()
    pieces = {"</s>": 0, "<unk>": 1}
    for name, sentences in (("source", source), ("target", target)):
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=written,
            vocab_size=45,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        (folder / f"{name}.spm").write_bytes(written.getvalue())
        processor = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
        for number in range(3, processor.get_piece_size()):  # after <unk>, <s> and </s>
            pieces.setdefault(processor.id_to_piece(number), len(pieces))
    padding = pieces.setdefault("<pad>", len(pieces))
    (folder / "vocab.json").write_text(json.dumps(pieces))
    (folder / "tokenizer_config.json").write_text("{}")
    sizes = {"d_model": 16, "max_position_embeddings": 512, "init_std": 1.0, "scale_embedding": True}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 16}
    torch.manual_seed(seed)
    model = MarianMTModel(
        MarianConfig(
            vocab_size=len(pieces), pad_token_id=padding, eos_token_id=0, decoder_start_token_id=padding, **sizes
        )
    )
    model.generation_config.num_beams = 2
    model.generation_config.bad_words_ids = [[padding]]  # like the hub's
    model.save_pretrained(folder)


TEXTS = ["A red shirt.", "Someone walks to place 4 in a blue jacket.", "a", "Number 3 \ud800 \x00 \u2028 é 衣"]


@pytest.fixture
def short(monkeypatch) -> Iterator[None]:
    """Limits texts to 12 tokens, because random models rarely end them, and uses one thread, which is faster here."""
    monkeypatch.setattr(back_translation, "MAX_TOKENS", 12)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
def test_marian_translates_there_and_back(marian, short):
    from transformers import MarianMTModel, MarianTokenizer

    translate = load_translator(Models(*map(str, marian)), torch.device("cpu"))
    expected = TEXTS
    for folder in marian:
        tokenizer, model = MarianTokenizer.from_pretrained(folder), MarianMTModel.from_pretrained(folder)
        texts = [text.replace("\ud800", "?") for text in expected]
        tokens = [tokenizer(text, return_tensors="pt", truncation=True, max_length=12) for text in texts]
        ids = [model.generate(**inputs, max_length=12)[0] for inputs in tokens]
        expected = [tokenizer.decode(output, skip_special_tokens=True) for output in ids]
    assert len(set(expected)) > 2
    assert translate(TEXTS) == expected  # one by one above: padding changes nothing


def test_marian_cuts_long_captions(marian, short):
    translate = load_translator(Models(*map(str, marian)), torch.device("cpu"))
    short_text, long_text = "a blue shirt " * 20, "a blue shirt " * 1000
    assert translate([short_text]) == translate([long_text])


def test_the_command_with_marian(tmp_path, marian, short, tiny_dataset):
    annotation, out = str(tiny_dataset.anno_dir / "reid_raw.json"), tmp_path / "out.json"
    assert main([annotation, str(out), "--device=cpu", f"--to-french={marian[0]}", f"--to-english={marian[1]}"]) == 0
    splits = read_annotations(*tiny_dataset, back_translation_file=out)
    assert all(splits["train"].back_translations)


@pytest.mark.parametrize("damaged", ["source.spm", "vocab.json", "config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"\x00\xff"])
def test_damaged_models(tmp_path, marian, damaged, content):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in marian[1].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / damaged).unlink()
    if content is not None:
        (folder / damaged).write_bytes(content)
    with pytest.raises(UserError, match=f"--to-english {folder} cannot be loaded .*get it again"):
        load_translator(Models(str(marian[0]), str(folder)), torch.device("cpu"))


def test_models_that_cannot_be_downloaded(monkeypatch):
    import transformers

    def fails(name, **options):
        raise OSError("We couldn't connect to 'https://huggingface.co'.\nCheck your connection.")

    monkeypatch.setattr(transformers.AutoModelForSeq2SeqLM, "from_pretrained", fails)
    with pytest.raises(UserError) as caught:
        load_translator(Models(), torch.device("cpu"))
    for part in ("--to-french Helsinki-NLP/opus-mt-en-fr", "couldn't connect", "hf download", "--to-french FOLDER"):
        assert part in str(caught.value)
