"""The documents name only what exists: paths, anchors, options, keys, make targets, modules and rows of the study.

A document can introduce names that do not exist, as examples: `<!-- examples: model/new_loss.py experiment.new -->`.
"""

import contextlib
import importlib.util
import io
import os
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import yaml

from misc.commands.study import STUDY_TABLES

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
)
README_WORDS = 1800
FOLDERS = (".ci", ".github", "benchmarks", "config", "docs", "image", "misc", "model", "tests", "text_utils")
FILES = (
    r"(?:main|search)\.py|Makefile|LICENSE|CITATION\.cff|(?:CONTRIBUTING|README)\.md|pyproject\.toml|"
    r"requirements[\w*-]*\.txt"
)
"""Folders and files at the top of the repository; what users make (data, runs, out) is not followed."""
PARSERS = {
    "main.py": ("main.py",),
    "search.py index": ("search.py", "index"),
    "search.py query": ("search.py", "query"),
    "search.py serve": ("search.py", "serve"),
    "misc.data.audit": ("misc.data.audit",),
    "misc.data.back_translation": ("misc.data.back_translation",),
    "misc.pedestrians": ("misc.pedestrians",),
    "benchmarks": ("benchmarks",),
    "benchmarks.chunks": ("benchmarks.chunks",),
    "benchmarks.gpu": ("benchmarks.gpu",),
    "benchmarks.search": ("benchmarks.search",),
}
"""Commands of this project, each with the script or module that parses it, and its subcommand."""
OTHER_TOOLS = {
    "torchrun": "--standalone --nproc_per_node --nnodes --node_rank --master_addr --master_port --max-restarts",
    "docker": "--shm-size",
    "hf": "--local-dir",
    "pip": "--upgrade --index-url --no-deps",
    "uv": "--torch-backend",
    "srun": "--kill-on-bad-exit",
    "sbatch": "--signal",
    "git": "--depth",
    "pytest": "--durations",
    "ruff": "--check --fix",
}
"""Options of other tools that the documents name."""
TAKE_OVERRIDES = ("main.py", "benchmarks", "benchmarks.chunks")
"""Commands whose arguments `key=value` set the configuration."""


class Code(NamedTuple):
    """A piece of code in a document: a code span, or a line of a block with the lines that continue it."""

    line: int
    text: str
    language: str | None = None
    """Of the block; None for a code span."""


class Problem(NamedTuple):
    """A name that does not exist."""

    line: int
    name: str
    what: str


@dataclass
class Document:
    """A document, taken apart."""

    path: Path
    code: list[Code] = field(default_factory=list)
    blocks: list[Code] = field(default_factory=list)
    links: list[tuple[int, str]] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    examples: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)


def take_apart(path: Path, text: str) -> Document:
    """Code, links and anchors of a Markdown text; `path` is where relative links start."""
    document = Document(path)
    block: list[tuple[int, str]] | None = None
    language = ""
    for number, line in enumerate(text.splitlines(), start=1):
        fence = re.match(r"\s*```(\w*)", line)
        if fence and block is None:
            block, language = [], fence[1]
        elif fence:
            document.blocks.append(
                Code(block[0][0], "\n".join(text for _, text in block), language) if block else Code(number, "")
            )
            document.code += joined(block, language)
            block = None
        elif block is not None:
            block.append((number, line))
        else:
            read_prose(document, number, line)
    if block is not None:
        document.problems.append(Problem(block[0][0] if block else 0, "```", "this block does not end"))
    return document


def read_prose(document: Document, number: int, line: str) -> None:
    """Adds what a line outside of blocks holds."""
    if examples := re.match(r"<!-- examples: (.*?) -->", line):
        document.examples |= set(examples[1].split())
        return
    if heading := re.match(r"#+ (.*)", line):
        slug = anchor(heading[1])
        same = sum(1 for known in document.anchors if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", known))
        document.anchors.add(f"{slug}-{same}" if same else slug)
    if line.count("`") % 2:
        document.problems.append(Problem(number, line.strip()[:40], "this line holds part of a code span: join it"))
        return
    document.code += [Code(number, span) for span in re.findall(r"`([^`]+)`", line)]
    document.links += [(number, target) for target in re.findall(r"\]\(([^)\s]+)\)", line)]


def joined(block: list[tuple[int, str]], language: str) -> Iterator[Code]:
    """The lines of a block, those that end with a backslash together with the next."""
    start, text = 0, ""
    for number, line in block:
        start, text = (start if text else number), text + line
        if text.endswith("\\"):
            text = text[:-1]
            continue
        yield Code(start, text, language)
        text = ""


def anchor(heading: str) -> str:
    """A heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading).lower()).strip().replace(" ", "-")


@lru_cache
def document_at(path: Path) -> Document:
    return take_apart(path, path.read_text(encoding="utf-8"))


def expand(text: str) -> list[str]:
    """`a/{b,c}.py` → `a/b.py`, `a/c.py`."""
    braces = re.search(r"\{([^{}]*)\}", text)
    if not braces:
        return [text]
    return [
        whole
        for part in braces[1].split(",")
        for whole in expand(text[: braces.start()] + part.strip() + text[braces.end() :])
    ]


# what exists


@lru_cache
def known_keys() -> frozenset[str]:
    """Keys of config/config.yaml, as `section.key`."""
    content = yaml.safe_load((ROOT / "config/config.yaml").read_text(encoding="utf-8"))
    nested = {f"{section}.{key}" for section, value in content.items() if isinstance(value, dict) for key in value}
    return frozenset(nested | {key for key, value in content.items() if not isinstance(value, dict)})


@lru_cache
def known_sections() -> frozenset[str]:
    return frozenset(key.partition(".")[0] for key in known_keys() if "." in key)


@lru_cache
def known_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([\w.-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@lru_cache
def known_rows() -> dict[str, frozenset[str]]:
    """The rows of each table of config/study.yaml, as `table/row`."""
    tables = yaml.safe_load((ROOT / "config/study.yaml").read_text(encoding="utf-8"))["tables"]
    return {title: frozenset(f"{title}/{row}".rstrip("/") for row in table["rows"]) for title, table in tables.items()}


@lru_cache
def python_files() -> frozenset[str]:
    """Names of all Python files."""
    roots = [ROOT.glob("*.py"), *((ROOT / folder).rglob("*.py") for folder in FOLDERS)]
    return frozenset(path.name for paths in roots for path in paths)


@lru_cache
def options_of(command: str) -> frozenset[str]:
    """Options of a command of `PARSERS`, from its `--help`."""
    program, *subcommand = PARSERS[command]
    output = io.StringIO()
    arguments = [program, *subcommand, "--help"]
    with (
        patch.object(sys, "argv", arguments),
        patch.dict(os.environ, COLUMNS="200"),
        contextlib.redirect_stdout(output),
        contextlib.suppress(SystemExit),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # a module of a package that is imported already
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=False)
    options = frozenset(re.findall(r"(?<![\w-])--[a-z][\w-]*", output.getvalue()))
    assert "--help" in options, f"{command} --help printed {output.getvalue()!r}"
    return options


def every_option() -> frozenset[str]:
    """Options of all commands, of this project and others."""
    others = {option for options in OTHER_TOOLS.values() for option in options.split()}
    return frozenset(others).union(*(options_of(command) for command in PARSERS))


def module_exists(name: str) -> bool:
    """Whether a module, or something in one, has this dotted name."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


# commands


class Command(NamedTuple):
    """A command: `tool` is a key of `PARSERS` or `OTHER_TOOLS`, or None if the words do not begin with a known one."""

    tool: str | None
    words: list[str]


def commands(code: Code) -> Iterator[Command]:
    """The commands in a line of code, torchrun's apart from those of the script that it runs."""
    if code.language not in (None, "", "bash", "sh", "shell", "console"):
        return
    for part in re.split(r"&&|\|\||[;|]", re.sub(r"(^|\s)#.*", "", code.text)):
        try:
            words = shlex.split(part)
        except ValueError:
            words = part.split()
        while words and (re.fullmatch(r"[A-Z_]+=.*", words[0]) or words[0] in ("do", "$", "(")):
            words = words[1:]
        if words:
            yield from split_command([words[0].removeprefix(".venv/bin/"), *words[1:]])


def split_command(words: list[str]) -> Iterator[Command]:
    program, rest = words[0], words[1:]
    if program == "torchrun" and "main.py" in rest:
        script = rest.index("main.py")
        yield Command("torchrun", rest[:script])
        yield Command("main.py", rest[script + 1 :])
    elif re.fullmatch(r"python3?", program) and rest[:1] == ["-m"] and len(rest) > 1:
        yield Command(rest[1] if rest[1] in PARSERS | OTHER_TOOLS else None, rest[2:])
    elif re.fullmatch(r"python3?", program) and rest:
        yield from split_command(rest)
    elif program == "search.py":
        tool = f"search.py {rest[0]}" if rest else None
        yield Command(tool if tool in PARSERS else None, rest)
    else:
        yield Command(program if program in PARSERS | OTHER_TOOLS else None, words)


# checks


def check_links(document: Document) -> Iterator[Problem]:
    for line, target in document.links:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        place = (document.path.parent / path).resolve() if path else document.path
        if path and not (place.exists() and place.is_relative_to(ROOT)):
            yield Problem(line, target, "there is no such file")
        elif fragment and fragment not in (document if place == document.path else document_at(place)).anchors:
            yield Problem(line, target, "there is no such heading")


def check_paths(document: Document) -> Iterator[Problem]:
    for code in document.code:
        for token in re.split(r"[\s'\"=();]+", code.text):
            token = token.rstrip(".,:")
            if "://" in token or re.search(r"[…<>$]", token):
                continue
            if re.match(rf"(?:{'|'.join(map(re.escape, FOLDERS))})/", token) or re.fullmatch(FILES, token):
                for path in expand(token):
                    if not (any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()):
                        yield Problem(code.line, path, "there is no such path")
            elif re.fullmatch(r"\w+\.py", token) and token not in python_files():
                yield Problem(code.line, token, "there is no Python file of this name")


def check_options(document: Document) -> Iterator[Problem]:
    for code in document.code:
        for tool, words in commands(code):
            known = options_of(tool) if tool in PARSERS else OTHER_TOOLS[tool].split() if tool else every_option()
            for word in words:
                option = re.match(r"--[A-Za-z][\w-]*", word)
                if option and option[0] not in known:
                    yield Problem(code.line, option[0], f"{tool or 'no command'} has no such option")


def check_keys(document: Document) -> Iterator[Problem]:
    dotted = rf"(?<![\w./-])(?:{'|'.join(known_sections())})(?:\.(?:\w+|\{{[\w, ]+\}}))+(?![\w(/])"
    for code in document.code:
        if code.language in ("python", "yaml"):
            continue
        for found in re.findall(dotted, code.text):
            for key in expand(found):
                if key not in known_keys() and not module_exists(key):
                    yield Problem(code.line, key, "there is no such key in config/config.yaml")
        for tool, words in commands(code):
            for word in words if tool in TAKE_OVERRIDES else ():
                key, equals, _ = word.partition("=")
                if equals and not word.startswith("-") and "." not in key and key not in known_keys() | {"key"}:
                    yield Problem(code.line, key, "there is no such key in config/config.yaml")
    for block in document.blocks:
        if block.language == "yaml":
            yield from check_yaml(block)


def check_yaml(block: Code) -> Iterator[Problem]:
    """A block of YAML that has any section or key of the configuration has nothing else."""
    content = yaml.safe_load(block.text)
    if not isinstance(content, dict) or not content.keys() & (known_sections() | known_keys()):
        return
    for key, value in content.items():
        names = [f"{key}.{sub}" for sub in value] if key in known_sections() and isinstance(value, dict) else [key]
        for name in names:
            if name not in known_keys() | {"base"}:
                yield Problem(block.line, name, "there is no such key in config/config.yaml")


def check_targets(document: Document) -> Iterator[Problem]:
    for code in document.code:
        for _, words in commands(code):
            for target in words[1:] if words[:1] == ["make"] else ():
                if re.fullmatch(r"[\w.-]+", target) and not target.startswith("-") and target not in known_targets():
                    yield Problem(code.line, target, "there is no such target in the Makefile")


def check_modules(document: Document) -> Iterator[Problem]:
    for code in document.code:
        for module in re.findall(r"python3? -m ([\w.]+)", code.text):
            if not module_exists(module):
                yield Problem(code.line, module, "there is no such module")


def check_rows(document: Document) -> Iterator[Problem]:
    rows = frozenset().union(*known_rows().values())
    for code in document.code:
        named = [row for row in re.findall(r"--study ([\w./-]+)", code.text) if not row.isupper()]
        if code.language is None and re.fullmatch(r"[\w.-]+(/[\w.-]+)+", code.text):
            table = code.text.partition("/")[0]
            named += [code.text] if table in known_rows() and table not in FOLDERS else []
        for row in named:
            if row not in rows | STUDY_TABLES.keys():
                yield Problem(code.line, row, "there is no such row in config/study.yaml")


CHECKS: tuple[Callable[[Document], Iterator[Problem]], ...] = (
    check_links,
    check_paths,
    check_options,
    check_keys,
    check_targets,
    check_modules,
    check_rows,
)


def problems(document: Document) -> list[Problem]:
    """Everything that a document names and that does not exist, in the order of its lines."""
    found = document.problems + [problem for check in CHECKS for problem in check(document)]
    return sorted({problem for problem in found if problem.name not in document.examples})


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_a_document_names_exists(name):
    found = problems(document_at(ROOT / name))
    assert not found, "\n" + "\n".join(f"{name}:{line}: {what}: {wrong}" for line, wrong, what in found)


def test_readme_is_one_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS


BAD = {
    "[x](docs/nowhere.md)": "docs/nowhere.md",
    "[x](README.md#no-such-heading)": "README.md#no-such-heading",
    "[x](#no-such-heading)": "#no-such-heading",
    "`misc/nowhere.py`": "misc/nowhere.py",
    "`config/{config,nowhere}.yaml`": "config/nowhere.yaml",
    "`tests/golden/nowhere_*.npz`": "tests/golden/nowhere_*.npz",
    "`requirements-nowhere.txt`": "requirements-nowhere.txt",
    "`nowhere.py`": "nowhere.py",
    "`--no-such-option`": "--no-such-option",
    "`python main.py --results 3`": "--results",
    "`torchrun --resume main.py`": "--resume",
    "`torchrun --standalone main.py --standalone`": "--standalone",
    "```\npython search.py index crops --port 80\n```": "--port",
    "```\npython -m benchmarks \\\n    --steps 3\n```": "--steps",
    "`data.batchsize=40`": "data.batchsize",
    "`experiment.{ss,nowhere}`": "experiment.nowhere",
    "`python main.py imagedir=x`": "imagedir",
    "```yaml\ndata:\n  nowhere: 3\n```": "data.nowhere",
    "`make nowhere`": "nowhere",
    "```\ngit clone x && make PYTHON=python3 demos\n```": "demos",
    "`python -m misc.nowhere`": "misc.nowhere",
    "`python main.py --study losses/nowhere`": "losses/nowhere",
    "`tricks/nowhere`": "tricks/nowhere",
    "a `code span that\ngoes on` here": "a `code span that",
}


@pytest.mark.parametrize("text", BAD)
def test_a_made_up_name_is_found(text):
    found = problems(take_apart(ROOT / "made_up.md", text))
    assert BAD[text] in {problem.name for problem in found}


def test_the_line_of_a_made_up_name_is_that_in_the_document():
    (problem,) = problems(
        take_apart(ROOT / "made_up.md", "# Title\n\n```\nmake demo\nmake nowhere  # a comment\n```\n")
    )
    assert problem == (5, "nowhere", "there is no such target in the Makefile")


def test_what_exists_is_no_problem():
    text = """# A title: with `code`

[here](#a-title-with-code), [there](README.md), [elsewhere](https://example.org/nowhere)
`config/{config,study}.yaml`, `tests/golden/*.npz`, `data/CUHK-PEDES/imgs`, `runs/full/config.yaml`, `--sheet 20`
`experiment.{ss,ritc}`, `model.checkpoint=openai`, `make demo`, `make soak KILLS=20`, `losses/ss_i`, `losses/…`

```
torchrun --standalone --nproc_per_node=4 main.py --simplified data.batch_size=40 anno_dir=data/x   # --nowhere
for row in $(python main.py --study list); do python main.py --study $row --overwrite; done
python main.py --study few_shot/0.05/coop
```

```yaml
base: config.yaml
anno_dir: data/x
data:
  dataset: null
```
"""
    assert problems(take_apart(ROOT / "made_up.md", text)) == []


def test_names_that_are_given_as_examples_may_not_exist():
    text = "<!-- examples: model/new.py experiment.new -->\n`model/new.py`, `experiment.new=true`, `experiment.newer`"
    assert [problem.name for problem in problems(take_apart(ROOT / "made_up.md", text))] == ["experiment.newer"]


def count_lines(name: str) -> int:
    """Counts the lines of code in a file or folder, without subfolders that have a row of their own in the tree."""
    path = ROOT / name
    if path.is_file():
        files = [path]
    else:
        found = path.rglob("*") if name in ("misc/search/", "tests/") else path.glob("*")
        files = [file for file in found if file.suffix in (".py", ".yaml", ".html", ".css", ".js")]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def test_the_line_counts_of_the_directory_tree_are_about_right():
    rows = re.findall(r"^(\S+) +~(\d+)  ", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 15
    counts = {name: (int(printed), count_lines(name)) for name, printed in rows}
    assert {name: pair for name, pair in counts.items() if abs(pair[0] - pair[1]) > 0.15 * pair[1]} == {}
