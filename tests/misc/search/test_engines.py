"""Engines find the same as comparing all features; `search.py query` prints and draws the results."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from misc.errors import UserError
from misc.search import engines
from misc.search.engine import EngineChoice, Exact
from misc.search.gallery import Encoded, Gallery, Info, default_index, held_index, write_generation, write_info
from misc.search.pictures import Picture
from misc.search.searcher import LONGEST_DESCRIPTION, checked_description
from tests.helpers.runs import only_error
from tests.helpers.searching import GELU, encoder_of, features_one_by_one, paths_of, save_picture, write_clip


def clustered(count: int, width: int, clusters: int, seed: int = 0) -> torch.Tensor:
    """Random features (count, width), L2-normalised, in clusters: approximate search needs clusters to work."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(clusters, width, generator=generator), dim=1)
    noise = F.normalize(torch.randn(count, width, generator=generator), dim=1)
    return F.normalize(centres[torch.randint(clusters, (count,), generator=generator)] + 0.8 * noise, dim=1)


def write_index(folder: Path, features: torch.Tensor, names: list[str] | None = None) -> Gallery:
    """Writes an index whose first generation has the features."""
    names = names or [f"{number:05}.jpg" for number in range(len(features))]
    pictures = [Picture(name, 1, 1) for name in names]
    info = Info("clip.pt", [], "f" * 64, features.shape[1])
    with held_index(folder):
        encoded = Encoded(folder, info.fingerprint, features.shape[1])
        encoded.add(pictures, features)
        info = write_generation(folder, info, sorted(pictures), None, encoded)
        write_info(folder, info)
        encoded.close()
    return Gallery(folder, info)


def by_hand(features: torch.Tensor, query: torch.Tensor, count: int) -> list[tuple[float, int]]:
    """Compares a query with all features in float64: the best scores with their rows."""
    scores = (features.double().numpy() @ query.double().numpy()).tolist()
    return sorted(((score, row) for row, score in enumerate(scores)), key=lambda pair: -pair[0])[:count]


# ---- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pictures", "count"), [(1, 1), (7, 10), (300, 1), (300, 10), (1000, 128)])
def test_exact_search_finds_what_comparing_all_finds(monkeypatch, pictures, count):
    monkeypatch.setattr("misc.search.engine.BLOCK", 128)  # several blocks, the last one short
    features = clustered(pictures, 16, 5)
    queries = clustered(4, 16, 5, seed=1)
    found = Exact(features).search(queries, count)
    for query, (scores, rows) in zip(queries, found, strict=True):
        expected = by_hand(features, query, count)
        assert rows.tolist() == [row for _, row in expected]
        np.testing.assert_allclose(scores.numpy(), [score for score, _ in expected], atol=1e-6)


def test_pictures_with_equal_scores_are_in_the_order_of_their_rows(monkeypatch):
    monkeypatch.setattr("misc.search.engine.BLOCK", 4)
    features = torch.eye(2)[torch.tensor([1, 0, 1, 0, 0, 1, 1, 0, 1, 1])]
    ((scores, rows),) = Exact(features).search(torch.tensor([[1.0, 0.0]]), 10)
    assert rows.tolist() == [1, 3, 4, 7, 0, 2, 5, 6, 8, 9]
    assert scores.tolist() == [1.0] * 4 + [0.0] * 6


def test_queries_together_find_what_they_find_alone():
    features, queries = clustered(500, 16, 5), clustered(9, 16, 5, seed=1)
    together = Exact(features).search(queries, 10)
    for query, (scores, rows) in zip(queries, together, strict=True):
        ((alone, rows_alone),) = Exact(features).search(query[None], 10)
        assert rows.tolist() == rows_alone.tolist()
        torch.testing.assert_close(scores, alone, rtol=0, atol=1e-6)


# ---- faiss ----------------------------------------------------------------------------------------------------------


def test_faiss_finds_nearly_all_of_the_nearest_pictures(tmp_path):
    pytest.importorskip("faiss", reason="needs requirements-search.txt")
    gallery = write_index(tmp_path / "index", clustered(20_000, 32, 400))
    settings, notes = engines.build(gallery, EngineChoice("faiss"))
    assert settings == {"name": "faiss"} and notes[0].startswith("recall@10 against exact search")
    write_info(gallery.index, Info(**{**vars(gallery.info), "engine": settings}))
    gallery = Gallery(gallery.index, Info(**{**vars(gallery.info), "engine": settings}))
    engine = engines.open_engine(gallery)
    queries = clustered(50, 32, 400, seed=1)
    recalls = []
    pairs = zip(engine.search(queries, 10), Exact(gallery.features).search(queries, 10), strict=True)
    for query, ((scores, rows), (_, exact)) in zip(queries, pairs, strict=True):
        torch.testing.assert_close(scores, gallery.features[rows] @ query, rtol=0, atol=1e-6)  # exact
        assert (scores.diff() <= 0).all() and len(rows) == 10
        recalls.append(len(set(rows.tolist()) & set(exact.tolist())) / 10)
    assert sum(recalls) / len(recalls) > 0.95
    assert float(notes[0].rpartition(" ")[2]) > 0.95
    assert isinstance(engines.open_engine(gallery, "exact"), Exact)


def test_faiss_with_few_pictures_is_exact(tmp_path):
    pytest.importorskip("faiss", reason="needs requirements-search.txt")
    gallery = write_index(tmp_path / "index", clustered(5, 16, 2))
    settings, _ = engines.build(gallery, EngineChoice("faiss"))
    engine = engines.open_engine(Gallery(gallery.index, Info(**{**vars(gallery.info), "engine": settings})))
    query = clustered(1, 16, 2, seed=3)
    ((scores, rows),) = engine.search(query, 10)
    assert rows.tolist() == [row for _, row in by_hand(gallery.features, query[0], 10)]


def test_lists_left_by_a_crash_are_not_used_for_other_pictures(make_index, people, monkeypatch):
    pytest.importorskip("faiss", reason="needs requirements-search.txt")
    from misc.search import indexing

    make_index(people, "--engine", "faiss")
    save_picture(people / "new.jpg", "yellow")

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(indexing, "write_info", crash)
        assert make_index(people).status == 130
    save_picture(people / "newer.jpg", "cyan")
    assert "recall@10" in make_index(people).out  # built again
    assert "recall@10" not in make_index(people).out  # nothing has changed


def test_damaged_lists_are_reported(make_index, call_search, people):
    pytest.importorskip("faiss", reason="needs requirements-search.txt")
    make_index(people, "--engine", "faiss")
    file = default_index(people) / "faiss_1.index"
    file.write_bytes(file.read_bytes()[:100])
    assert "faiss_1.index is missing or damaged" in only_error(call_search("query", people, "red"))
    file.unlink()
    assert make_index(people).status == 0 and call_search("query", people, "red").status == 0
    content = bytearray(file.read_bytes())
    content[-5] ^= 1  # faiss itself does not find this
    file.write_bytes(content)
    assert "faiss_1.index is missing or damaged" in only_error(call_search("query", people, "red"))
    assert make_index(people).status == 0 and call_search("query", people, "red").status == 0


def test_faiss_lists_are_not_compared_with_an_old_checksum(make_index, call_search, people):
    pytest.importorskip("faiss", reason="needs requirements-search.txt")
    for engine in ("faiss", "exact", "faiss"):
        assert make_index(people, "--engine", engine).status == 0
        assert call_search("query", people, "red").status == 0


def test_faiss_from_the_command_line(make_index, call_search, people):
    pytest.importorskip("faiss", reason="needs requirements-search.txt")
    make_index(people)
    expected = call_search("query", people, "a red coat").out
    outcome = make_index(people, "--engine", "faiss")
    assert outcome.status == 0 and "recall@10" in outcome.out
    assert call_search("query", people, "a red coat").out == expected
    save_picture(people / "new.jpg", "yellow")
    assert "recall@10" in make_index(people).out  # the index keeps its engine
    assert "new.jpg" in call_search("query", people, "a red coat").out
    make_index(people, "--engine", "exact")
    assert not list(default_index(people).glob("faiss*"))
    with pytest.raises(SystemExit):
        call_search("query", people, "a red coat", "--engine", "faiss")


# ---- Qdrant, in the local mode of its client ------------------------------------------------------------------------


@pytest.mark.slow
def test_qdrant_follows_the_index(make_index, call_search, people, tmp_path):
    pytest.importorskip("qdrant_client", reason="needs requirements-search.txt")
    address = ("--qdrant", tmp_path / "database")
    given = ("--engine", "qdrant", *address)
    make_index(people)
    exact = call_search("query", people, "a red coat").out
    outcome = make_index(people, *given)
    assert "collection people_index: 7 pictures sent, 0 deleted" in outcome.out, outcome.err
    assert scores_of(call_search("query", people, "a red coat", *address).out) == scores_of(exact)

    save_picture(people / "new.jpg", "yellow")
    save_picture(people / "a.jpg", "cyan")
    (people / "b.JPEG").unlink()
    assert "2 pictures sent, 1 deleted" in make_index(people, *given).out
    assert "0 pictures sent, 0 deleted" in make_index(people, *given).out
    found = scores_of(call_search("query", people, "a red coat", *address).out)
    assert found == scores_of(call_search("query", people, "a red coat", "--engine", "exact").out)
    assert {"new.jpg", "a.jpg"} <= {path for path, _ in found} and "b.JPEG" not in {path for path, _ in found}


@pytest.mark.parametrize("address", ["http://attacker.example:6333", "/tmp/attacker"])
def test_the_address_in_an_index_is_not_used(make_index, call_search, people, monkeypatch, address):
    """An index may come from another person. Its server would get the key; its folder could run code."""
    qdrant = pytest.importorskip("misc.search.qdrant", reason="needs requirements-search.txt")
    connected = []
    monkeypatch.setattr(qdrant, "QdrantClient", lambda **options: connected.append(options))
    monkeypatch.setenv("QDRANT_API_KEY", "secret")
    make_index(people)
    file = default_index(people) / "index.json"
    settings = {"name": "qdrant", "address": address, "collection": "c"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"engine": settings}))
    for command in (("query", people, "red"), ("index", people), ("serve", people)):
        line = only_error(call_search(*command))
        assert address in line and "--qdrant ADDRESS" in line and "--engine exact" in line
    assert connected == []
    assert call_search("query", people, "red", "--engine", "exact").status == 0
    assert make_index(people, "--engine", "exact").status == 0 and connected == []


def scores_of(out: str) -> list[tuple[str, float]]:
    rows = [line.split("\t") for line in out.splitlines()]
    return [(path, round(float(score), 3)) for _, score, path in rows]


def test_a_checkpoint_of_another_width_replaces_the_collection(make_index, call_search, people, tmp_path):
    pytest.importorskip("qdrant_client", reason="needs requirements-search.txt")
    address = ("--qdrant", tmp_path / "database")
    make_index(people, "--engine", "qdrant", *address)
    other = ("--checkpoint", write_clip(tmp_path / "other.pt", seed=1, embed=64), "--set", GELU)
    assert "7 pictures sent, 0 deleted" in make_index(people, *other, "--overwrite", "--engine", "qdrant", *address).out
    assert call_search("query", people, "red", *address).out.count("\n") == 7


def test_a_collection_of_another_program_is_not_changed(make_index, call_search, people, tmp_path):
    qdrant_client = pytest.importorskip("qdrant_client", reason="needs requirements-search.txt")
    client = qdrant_client.QdrantClient(path=str(tmp_path / "database"))
    parameters = qdrant_client.models.VectorParams(size=4, distance=qdrant_client.models.Distance.DOT)
    client.create_collection("people_index", vectors_config=parameters)
    client.close()
    given = ("--engine", "qdrant", "--qdrant", tmp_path / "database")
    make_index(people)
    outcome = make_index(people, *given)
    assert outcome.status == 2 and "--collection" in outcome.err.splitlines()[-1]
    assert call_search("query", people, "red").status == 0  # the index has not changed
    assert make_index(people, *given, "--collection", "mine").status == 0


def test_a_qdrant_server_that_does_not_answer_is_reported(make_index, people):
    pytest.importorskip("qdrant_client", reason="needs requirements-search.txt")
    line = only_error(make_index(people, "--engine", "qdrant", "--qdrant", "http://127.0.0.1:9"))
    assert line.startswith("error: Qdrant at http://127.0.0.1:9 does not answer")
    assert "--qdrant http://HOST:6333" in only_error(make_index(people, "--engine", "qdrant"))
    assert "is not an address" in only_error(make_index(people, "--engine", "qdrant", "--qdrant", "localhost:6333"))
    assert "does not answer" in only_error(make_index(people, "--engine", "qdrant", "--qdrant", people / "a.jpg"))


def test_an_update_after_a_crash_does_not_send_pictures_again(make_index, people, tmp_path, monkeypatch):
    pytest.importorskip("qdrant_client", reason="needs requirements-search.txt")
    from misc.search import indexing

    given = ("--engine", "qdrant", "--qdrant", tmp_path / "database")
    make_index(people)

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(indexing, "write_info", crash)
        assert make_index(people, *given).status == 130
    assert "0 pictures sent" in make_index(people, *given).out


# ---- missing packages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "module"), [("faiss", "faiss"), ("qdrant", "qdrant_client")])
def test_a_missing_package_is_one_line(make_index, call_search, people, monkeypatch, engine, module, tmp_path):
    make_index(people)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == module else find(name))
    line = only_error(make_index(people, "--engine", engine, *(("--qdrant", tmp_path) if engine == "qdrant" else ())))
    assert module in line and "pip install -r requirements-search.txt" in line
    file = default_index(people) / "index.json"
    settings = {"name": engine, "address": "http://127.0.0.1:9", "collection": "c"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"engine": settings}))
    assert "pip install -r requirements-search.txt" in only_error(call_search("query", people, "red"))


def test_missing_packages_of_the_page_are_reported_in_one_line(make_index, call_search, people, monkeypatch):
    make_index(people)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "uvicorn" else find(name))
    line = only_error(call_search("serve", people))
    assert "uvicorn" in line and "pip install -r requirements-search.txt" in line


# ---- query ----------------------------------------------------------------------------------------------------------


def test_a_query_prints_the_first_results_and_draws_them(make_index, call_search, people, clip):
    make_index(people)
    outcome = call_search("query", people, "a man in a red coat", "--results", 3)
    assert outcome.status == 0, outcome.err
    encoder = encoder_of(clip)
    names = paths_of(people)
    scores = features_one_by_one(people, clip, names) @ encoder.encode_descriptions(["a man in a red coat"])[0]
    expected = sorted(zip(scores.tolist(), names, strict=True), reverse=True)[:3]
    rows = [line.split("\t") for line in outcome.out.splitlines()]
    assert [(rank, path) for rank, _, path in rows] == [(str(n), path) for n, (_, path) in enumerate(expected, 1)]
    np.testing.assert_allclose([float(score) for _, score, _ in rows], [score for score, _ in expected], atol=1e-4)
    assert outcome.err.startswith("3 of 7 pictures, in ")
    sheet = Path(outcome.err.splitlines()[-1].removeprefix("sheet: "))
    assert sheet == default_index(people) / "sheets" / "a_man_in_a_red_coat.png"
    assert Image.open(sheet).width > 300


def test_a_picture_finds_itself_first(make_index, call_search, people, tmp_path):
    make_index(people)
    (people / "deep" / "e.jpg").rename(tmp_path / "query.jpg")
    outcome = call_search("query", people, "--image", tmp_path / "query.jpg", "--sheet", tmp_path / "sheet.png")
    assert outcome.out.splitlines()[0] == "1\t1.0000\tdeep/e.jpg"
    assert "without 1 that cannot be read now" in outcome.err and (tmp_path / "sheet.png").is_file()


def test_a_threshold_removes_results_with_lower_scores(make_index, call_search, people):
    make_index(people)
    all_scores = [score for _, score in scores_of(call_search("query", people, "red").out)]
    kept = [
        score for _, score in scores_of(call_search("query", people, "red", "--threshold", all_scores[2] - 1e-3).out)
    ]
    assert kept == all_scores[: len(kept)] and 3 <= len(kept) < 7
    outcome = call_search("query", people, "red", "--threshold", 1)
    assert (outcome.status, outcome.out) == (0, "")
    assert outcome.err.startswith(f"0 of 7 pictures; the best score is {all_scores[0]:.4f}, in ")


def test_mistakes_in_a_query_are_reported_in_one_line(make_index, call_search, people, tmp_path):
    make_index(people)
    assert "TEXT" in only_error(call_search("query", people))
    assert "TEXT" in only_error(call_search("query", people, "red", "--image", people / "a.jpg"))
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in (("lost.jpg", "No such file"), ("pipe.jpg", "not a regular"), ("x" * 300, "name too long")):
        line = only_error(call_search("query", people, "--image", tmp_path / name))
        assert name in line and reason in line and "give another file" in line
    assert (
        "--sheet" in call_search("query", people, "red", "--sheet", tmp_path / "no" / "sheet.png").err.splitlines()[-1]
    )
    assert "--sheet ." in only_error(call_search("query", people, "red", "--sheet", "."))
    assert "is not a folder" in only_error(call_search("query", tmp_path / "nowhere", "red"))
    assert "empty" in only_error(call_search("query", people, "  "))
    other = write_clip(tmp_path / "other.pt", seed=1)
    assert "another checkpoint" in only_error(call_search("query", people, "red", "--checkpoint", other))
    for arguments in (("--results", "0"), ("--threshold", "2"), ("--threshold", "nan"), ("--results", "x")):
        with pytest.raises(SystemExit) as ended:
            call_search("query", people, "red", *arguments)
        assert ended.value.code == 2


@pytest.mark.parametrize("text", ["a\x00b", "\x1b[31mred", "red\x7f", "\x85", "\ud800", "", " \n\t", "x" * 501])
def test_invalid_descriptions_are_refused(text):
    with pytest.raises(UserError):
        checked_description(text)


def test_valid_descriptions_are_accepted():
    assert checked_description("  a man\tin\r\n red ") == "a man in red"
    assert checked_description("穿红色外套的女人 😀 e\u0301\u200d") == "穿红色外套的女人 😀 e\u0301\u200d"
    assert len(checked_description("x" * LONGEST_DESCRIPTION)) == LONGEST_DESCRIPTION
