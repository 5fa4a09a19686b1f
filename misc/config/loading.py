"""Loads a configuration: merges a YAML file, its base and `key.sub=value` arguments into one checked EasyDict.

`config/config.yaml` has a value for every key that exists; another file only needs the keys that differ. A file written
for the published code loads unchanged. All problems are reported in one `UserError`.
"""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import yaml
from easydict import EasyDict

from misc.config.rules import AUTO, RULES, contradictions
from misc.data.statistics import PUBLISHED_COUNTS
from misc.errors import UserError, shown
from misc.files import atomic_file, expanded, is_file, resolved

CONFIG_FOLDER = Path(__file__).parents[2] / "config"
DEFAULT_CONFIG = CONFIG_FOLDER / "config.yaml"
SIMPLIFIED_CONFIG = CONFIG_FOLDER / "s.config.yaml"
DATASETS = CONFIG_FOLDER / "datasets.yaml"
BASE = "base"
TEXTS = {key.rpartition(".")[2] for key, rule in RULES.items() if rule.values.text} | {BASE}
"""The names of the keys whose values are texts. No other key has one of these names."""
NULLS = ("", "null", "Null", "NULL")
"""What means null on the command line if a text is expected."""
FOLDERS = ("anno_dir", "image_dir")
"""The keys that a name in `config/datasets.yaml` stands for."""


def load_config(
    path: str | Path = DEFAULT_CONFIG, *, simplified: bool = False, row: Any = None, overrides: tuple[str, ...] = ()
) -> EasyDict:
    """Reads a configuration file and its base, applies the arguments, and checks the result.

    Args:
        path: a YAML file; a relative `base:` in it is relative to the folder of the file.
        simplified: use the losses of `config/s.config.yaml`, and its other values if the file keeps the default.
        row: a row of the paper's study (`misc.study.rows.Row`); `Row.settings_over` decides what it overrides.
        overrides: `key=value` or `section.key=value`, the value in YAML, or a text as it is; they override everything
            else.

    Returns: an EasyDict with every key of `RULES`. `anno_dir` and `image_dir` are only `auto` if there is no
        `data.dataset`.

    Raises UserError if a key is unknown, or a value has the wrong type or is out of range; it lists all of them.
    """
    datasets = read_datasets()
    layers = [("config/config.yaml", _flatten(read_yaml(DEFAULT_CONFIG), DEFAULT_CONFIG))]
    layers += _read_with_base(Path(path), seen=())
    if simplified:
        layers.append((str(SIMPLIFIED_CONFIG), _simplified(layers)))
    if row is not None:
        file = {key: value for _, values in layers for key, value in values.items()}
        default, file = (_with_folders(values, datasets) for values in (layers[0][1], file))
        layers.append((f"the study's row {row.name}", row.settings_over(default, file)))
    layers += [("command line", dict([_parse_override(override)])) for override in overrides]

    problems, merged = [], {}
    for source, values in layers:
        for key, value in values.items():
            if key not in RULES:
                problems.append(f"unknown key {key!r} in {source}{_nearest(key)}")
                continue
            allowed = RULES[key].values
            value = _read_numbers(value) if allowed.number else value
            if allowed.accepts(value):
                try:
                    merged[key] = allowed.convert(value)
                except UserError as error:
                    problems.append(f"{key}: {error}")
                continue
            wrong = "; ".join(allowed.problems(value)) if allowed.problems else f"should be {allowed.description}"
            problems.append(f"{key}: {_as_yaml(value)} in {source} {wrong}")
    problems += [f"{key} is missing from config/config.yaml" for key in RULES.keys() - layers[0][1].keys()]
    if not problems:
        merged = _with_folders(merged, datasets)
        problems = [*_dataset_problems(merged, datasets), *contradictions(merged)]
    if problems:
        raise UserError("configuration: " + "; ".join(problems))
    return _nest(merged)


def read_datasets() -> dict[str, dict[str, str]]:
    """Reads `config/datasets.yaml`.

    Returns: `anno_dir` and `image_dir` of each dataset, by its name.

    Raises UserError if the file is not valid YAML, or an entry has anything but these two texts.
    """
    datasets = {}
    for name, folders in (read_yaml(DATASETS) if is_file(DATASETS) else {}).items():
        if not isinstance(name, str):
            raise UserError(f"{DATASETS}: the name {name!r} is not a text: put it into quotes")
        whole = isinstance(folders, dict) and folders.keys() == set(FOLDERS)
        if not whole or not all(RULES[key].values.accepts(folder) for key, folder in folders.items()):
            raise UserError(
                f"{DATASETS}: {name}: {_as_yaml(folders)} should be {{anno_dir: FOLDER, image_dir: FOLDER}}"
            )
        datasets[name] = {key: RULES[key].values.convert(folder) for key, folder in folders.items()}
    return datasets


def known_datasets(datasets: dict[str, dict[str, str]]) -> list[str]:
    """Returns the names that `data.dataset` may have: those with published counts, then the others of `datasets`."""
    return list(dict.fromkeys((*PUBLISHED_COUNTS, *datasets)))


def _with_folders(values: dict[str, Any], datasets: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Replaces `auto` folders by those of `data.dataset`, if it is one of `datasets`. Values may be unchecked."""
    name = values.get("data.dataset")
    folders = datasets.get(name, {}) if isinstance(name, str) else {}
    return values | {key: folder for key, folder in folders.items() if values.get(key) == AUTO}


def _dataset_problems(values: dict[str, Any], datasets: dict[str, dict[str, str]]) -> Iterator[str]:
    name, known = values["data.dataset"], known_datasets(datasets)
    if name is None:
        return
    if name not in known:
        yield f"data.dataset: {name} should be null or one of {', '.join(known)}; {DATASETS} may have further names"
        return
    if missing := " and ".join(key for key in FOLDERS if values[key] == AUTO):
        yield f"data.dataset: {name} is not in {DATASETS}: add it there, or set {missing}"


def save_config(config: EasyDict, path: Path) -> None:
    """Writes the merged configuration as YAML that `load_config` reads again."""
    with atomic_file(path) as file:
        file.write(yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True).encode())


def to_plain(value: Any) -> Any:
    """Converts EasyDicts and tuples to plain dicts and lists, which YAML and checkpoints can contain."""
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """Converts {"section": {"key": value}} to {"section.key": value}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= {f"{key}.{sub}": item for sub, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat


DEEPEST, MOST_NODES, LARGEST_FILE = 100, 100_000, 1_000_000
"""Limits of a YAML file: of its depth, of its values with those that aliases repeat, and of its bytes."""
TOO_DEEP = f"it is nested more than {DEEPEST} times: remove brackets or aliases"
STRING = "tag:yaml.org,2002:str"
READ_AS_OTHERS = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "int", "merge", "timestamp", "value")}
"""What YAML may read a text as, if it has no quotes."""
_SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C, if it is available


class _ConfigurationLoader(_SafeLoader):  # type: ignore[misc, valid-type] # which one is only known when it runs
    """Loads YAML with two differences. A key that appears twice is refused; PyYAML silently keeps the last one. A value
    that should be a text is one, whatever else YAML reads it as: 007 and 2024-05-01 are names."""

    def flatten_mapping(self, node):
        super().flatten_mapping(node)
        node.value = [
            (key, _as_text(value) if isinstance(key, yaml.ScalarNode) and key.value in TEXTS else value)
            for key, value in node.value
        ]

    def construct_mapping(self, node, deep=False):
        written = list(node.value)  # the call below adds the keys of a merge key `<<` to the node
        mapping = super().construct_mapping(node, deep)
        seen: dict[Any, int] = {}
        for key_node, _ in written:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if key in seen:
                raise UserError(f"key {key!r} appears twice, in lines {seen[key]} and {line}: delete one")
            seen[key] = line
        return mapping


def _parse_yaml(source: str | TextIO) -> Any:
    """Reads YAML.

    Raises UserError if a key appears twice, or if aliases make it too deep or too large; any other exception if it is
    not valid.
    """
    text = source if isinstance(source, str) else source.read()
    _check_depth(text)
    loader = _ConfigurationLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if _count_nodes(root, {}) > MOST_NODES:
            raise UserError(f"it has more than {MOST_NODES:,} values: use fewer aliases")
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _check_depth(text: str) -> None:
    """Raises UserError if YAML is nested too deeply: old releases of its parser crash then, as they have no limit."""
    depth = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise UserError(TOO_DEEP)


def _count_nodes(node: yaml.Node, known: dict[int, int], depth: int = 0) -> int:
    """Returns how many nodes there are below a node and including it, each as often as an alias repeats it.

    Args:
        known: the numbers of other nodes, by their `id`.

    Raises UserError if they are too deep, which they also are if a node contains itself.
    """
    if depth > DEEPEST:
        raise UserError(TOO_DEEP)
    if id(node) not in known:
        items = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for item in items for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_count_nodes(part, known, depth + 1) for part in parts)
    return known[id(node)]


def _as_text(node: yaml.Node) -> yaml.Node:
    """Returns a number, a date and the like as the text that is written there, and other values as they are."""
    if isinstance(node, yaml.ScalarNode) and node.tag in READ_AS_OTHERS:
        return yaml.ScalarNode(STRING, node.value, node.start_mark, node.end_mark)
    return node


def read_yaml(path: Path) -> dict:
    """Reads the keys and values of a YAML file.

    Raises UserError if it cannot be read, is not valid YAML, or contains a key twice.
    """
    if not is_file(path):
        raise UserError(f"configuration file {path} does not exist: give an existing YAML file to --config")
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"it has {path.stat().st_size:,} bytes, so it is no configuration: give another file")
        with path.open(encoding="utf-8") as file:
            content = _parse_yaml(file)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    except Exception as error:  # many kinds: not UTF-8, a date that does not exist, a tag that does not fit
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is not valid YAML: {reason}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} should contain keys and values, not {_as_yaml(content)}")
    return content


def _read_with_base(path: Path, seen: tuple[Path, ...]) -> list[tuple[str, dict[str, Any]]]:
    """Reads a file and its bases. Returns: (name, values) of each, the base before the file."""
    if resolved(path) in seen:
        raise UserError(f"{path}: following `base:` leads back to the file itself: remove one `base:`")
    content = read_yaml(path)
    base = content.get(BASE)
    layers = []
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{path}: base: {_as_yaml(base)} should be the name of a YAML file")
        file = path.parent / expanded(base)
        if not is_file(file):
            raise UserError(f"{path}: base: {base} does not exist: give a file relative to {path.parent}")
        layers = _read_with_base(file, (*seen, resolved(path)))
    return [*layers, (str(path), _flatten(content, path))]


def _simplified(layers: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Returns the losses of the simplified recipe, and its seed and folder if the user's file does not set them."""
    default, file = layers[0][1], {key: value for _, values in layers for key, value in values.items()}
    simplified = _flatten(read_yaml(SIMPLIFIED_CONFIG), SIMPLIFIED_CONFIG)
    return {
        key: value
        for key, value in simplified.items()
        if key.startswith("experiment.") or file.get(key) == default.get(key)
    }


def _flatten(content: dict, path: Path) -> dict[str, Any]:
    """Flattens the content of a file, without `base` and empty sections."""
    sections = {key.split(".")[0] for key in RULES if "." in key}
    for key in content.keys() & sections:
        if not isinstance(content[key], dict | None):
            raise UserError(f"{path}: {key}: {_as_yaml(content[key])} should be a section with keys below it")
    kept = {key: value for key, value in content.items() if key != BASE and not (key in sections and value is None)}
    return {str(key): value for key, value in flatten(kept).items()}


def _nest(flat: dict[str, Any]) -> EasyDict:
    nested: dict[str, Any] = {}
    for key in RULES:
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = flat[key]
    return EasyDict(nested)


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(
            f"argument {override!r} should be key=value, for example data.batch_size=40, or an option (see --help)"
        )
    if key in RULES and RULES[key].values.text:
        return key, None if text in NULLS else text
    try:
        return key, _parse_yaml(text)
    except UserError as error:
        raise UserError(f"argument {override!r}: {error}") from error
    except Exception as error:  # as in `read_yaml`
        raise UserError(f"argument {override!r}: its value is not valid YAML") from error


def _read_numbers(value: Any) -> Any:
    """Converts texts such as 1e-4 to numbers: YAML only reads 1.0e-4 as a number."""
    if isinstance(value, list):
        return [_read_numbers(item) for item in value]
    if isinstance(value, dict):
        return {key: _read_numbers(item) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _nearest(key: str) -> str:
    """Returns ", did you mean …?" for a misspelt key. A key in the wrong section counts as near."""
    same_name = [known for known in RULES if known.rpartition(".")[2] == key.rpartition(".")[2]]
    near = same_name or difflib.get_close_matches(key, RULES, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else f" (config/{DEFAULT_CONFIG.name} lists all keys)"


def _as_yaml(value: Any) -> str:
    try:
        text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n")
    except ValueError:  # Python does not print an integer of thousands of digits
        text = shown(value)
    return " ".join(text.split())
