"""YAML + base + `key.sub=value` → one checked EasyDict.

`config/config.yaml` holds a value for every key that exists; a file need only hold what differs. A file written for the
published code loads unchanged. Every problem found is told in one `UserError`.
"""

import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from easydict import EasyDict

from misc.data.image_operations import wrong_operations
from misc.errors import UserError
from misc.files import whole_file
from misc.retrieval.query_report import CHOICES
from model.heads import attention_heads
from model.transformer import ACTIVATIONS
from text_utils.augmentation import TEXT_OPERATIONS
from text_utils.tokenizer import VOCABULARY_SIZE

CONFIG_FOLDER = Path(__file__).parents[2] / "config"
DEFAULT_CONFIG = CONFIG_FOLDER / "config.yaml"
SIMPLIFIED_CONFIG = CONFIG_FOLDER / "s.config.yaml"
BASE = "base"


@dataclass(frozen=True)
class Rule:
    """What a key may hold: `says` in words, `accepts` as a test on the value (after numbers in strings were read)."""

    says: str
    accepts: Callable[[Any], bool]
    number: bool = False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(low: float, high: float = math.inf, *, open_low: bool = False) -> Rule:
    bounds = f"above {low:g}" if open_low else f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
    return Rule(
        f"a number, {bounds}",
        lambda value: _is_number(value) and low <= value <= high and not (open_low and value == low),
        number=True,
    )


def _integer(low: int, high: float = math.inf) -> Rule:
    bounds = f"at least {low}" if high == math.inf else f"{low} to {high}"
    return Rule(f"an integer, {bounds}", lambda value: _is_integer(value) and low <= value <= high)


def _choice(*values: Any) -> Rule:
    return Rule(
        "one of " + ", ".join("null" if value is None else str(value) for value in values),
        lambda value: any(type(value) is type(choice) and value == choice for choice in values),  # 1 is not 1.0 or true
    )


def _list_of(length: int, item: Rule) -> Rule:
    return Rule(
        f"a list of {length}, each {item.says}",
        lambda value: isinstance(value, list) and len(value) == length and all(map(item.accepts, value)),
        number=item.number,
    )


SWITCH = Rule("true or false", lambda value: isinstance(value, bool))
TEXT = Rule("a text", lambda value: isinstance(value, str) and value != "")
TEXT_OR_NULL = Rule("a text or null", lambda value: value is None or TEXT.accepts(value))
RATIO = _number(0)
PROBABILITY = _number(0, 1)
POSITIVE = _number(0, open_low=True)
BELOW_ONE = Rule(
    "a number, at least 0 and below 1", lambda value: PROBABILITY.accepts(value) and value < 1, number=True
)
SHARE = Rule("a number, above 0 and at most 1", lambda value: PROBABILITY.accepts(value) and value > 0, number=True)
COUNT = _integer(1)
COUNT_OR_NULL = Rule(f"{COUNT.says}, or null", lambda value: value is None or COUNT.accepts(value))
AUTO = "auto"
COUNT_OR_AUTO = Rule(f"{COUNT.says}, or auto", lambda value: value == AUTO or COUNT.accepts(value))
WIDTHS_OR_AUTO = Rule(
    f"{_list_of(3, COUNT).says}, or auto", lambda value: value == AUTO or _list_of(3, COUNT).accepts(value)
)
RESOLUTION = Rule(
    "[height, width] in pixels, or one integer",
    lambda value: COUNT.accepts(value) or _list_of(2, COUNT).accepts(value),
)
OPERATIONS = Rule(
    "operations with their strengths, see config.yaml", lambda value: not wrong_operations(plain(value)), number=True
)
LAYERS = Rule(
    "a list of layers, counted from 1",
    lambda value: isinstance(value, list) and all(map(COUNT.accepts, value)) and len(set(value)) == len(value),
)
DEVICE = Rule(
    "auto, cpu, cuda, or the index of a GPU",
    lambda value: value in ("auto", "cpu", "cuda") or _integer(0).accepts(value),
)

RULES: dict[str, Rule] = {
    "device": DEVICE,
    "anno_dir": TEXT,
    "image_dir": TEXT,
    "misc.seed": _integer(0, 2**32 - 1),
    "misc.precision": _choice("auto", "bf16", "fp16", "fp32"),
    "experiment.input_resolution": RESOLUTION,
    "experiment.text_length": _integer(3, 1024),
    "experiment.dropout": PROBABILITY,
    "experiment.image_operations": OPERATIONS,
    "experiment.image_pool": COUNT_OR_NULL,
    "experiment.text_operation": _choice(*TEXT_OPERATIONS, None),
    "experiment.eda_alpha": PROBABILITY,
    "experiment.wordnet": TEXT,
    "experiment.back_trans": SWITCH,
    "experiment.backtrans_p": PROBABILITY,
    "experiment.mixgen": SWITCH,
    "experiment.mixgen_type": _choice("cat", "ori"),
    "experiment.mixgen_p": PROBABILITY,
    "experiment.mixgen_ratio": _number(0, 0.5),
    "experiment.nitc_ratio": RATIO,
    "experiment.nitc_labels": _choice("identity", "pair"),
    "experiment.mvs_image": SWITCH,
    "experiment.mvs_text": SWITCH,
    "experiment.ss": SWITCH,
    "experiment.ss_text": SWITCH,
    "experiment.ss_ratio": RATIO,
    "experiment.simclr_mlp": WIDTHS_OR_AUTO,
    "experiment.simclr_temperature": POSITIVE,
    "experiment.ritc": SWITCH,
    "experiment.ritc_eps": POSITIVE,
    "experiment.ritc_ratio": RATIO,
    "experiment.citc": SWITCH,
    "experiment.citc_lambda1": RATIO,
    "experiment.citc_lambda2": RATIO,
    "experiment.citc_ratio": RATIO,
    "experiment.mlm": SWITCH,
    "experiment.mlm_ratio": RATIO,
    "experiment.cmt_depth": COUNT,
    "experiment.id": SWITCH,
    "experiment.id_ratio": RATIO,
    "experiment.sdm": SWITCH,
    "experiment.sdm_ratio": RATIO,
    "experiment.sdm_scale": POSITIVE,
    "experiment.sdm_eps": POSITIVE,
    "schedule.epoch": COUNT,
    "schedule.epoch_warmup": _integer(0),
    "schedule.lr": POSITIVE,
    "schedule.lr_start": RATIO,
    "schedule.lr_end": RATIO,
    "schedule.ratio_factor": POSITIVE,
    "schedule.weight_decay": RATIO,
    "schedule.betas": _list_of(2, BELOW_ONE),
    "schedule.eps": POSITIVE,
    "model.ckpt_type": _choice("original_clip", "saved"),
    "model.checkpoint": TEXT_OR_NULL,
    "model.saved_path": TEXT,
    "model.use_gather": SWITCH,
    "model.gather_gradient": SWITCH,
    "model.lock_bottom": SWITCH,
    "model.frozen_text_layers": LAYERS,
    "model.dropped_text_layers": LAYERS,
    "model.adaptation": _choice("coop", "clip_adapter", None),
    "model.context": TEXT,
    "model.adapter_ratio": PROBABILITY,
    "model.grad_checkpointing": SWITCH,
    "model.softlabel_ratio": PROBABILITY,
    "model.activation": _choice(AUTO, *ACTIVATIONS),
    "model.embed_dim": COUNT_OR_AUTO,
    "model.vocab_size": _choice(VOCABULARY_SIZE),
    "model.patch_size": COUNT_OR_AUTO,
    "model.vision_width": COUNT_OR_AUTO,
    "model.vision_layers": COUNT_OR_AUTO,
    "model.vision_heads": COUNT_OR_AUTO,
    "model.text_width": COUNT_OR_AUTO,
    "model.text_layers": COUNT_OR_AUTO,
    "model.text_heads": COUNT_OR_AUTO,
    "log.print_period": COUNT,
    "log.checkpoint_period": _integer(0),
    "log.tensorboard": SWITCH,
    "log.wandb": SWITCH,
    "log.sheet": _integer(0),
    "log.sheet_choice": _choice(*CHOICES),
    "log.profile": SWITCH,
    "data.dataset": _choice("CUHK-PEDES", "ICFG-PEDES", "RSTPReid", None),
    "data.train_share": SHARE,
    "data.back_translation_file": TEXT_OR_NULL,
    "data.evaluate_on": _choice("test", "val"),
    "data.batch_size": COUNT,
    "data.chunk_size": COUNT_OR_NULL,
    "data.test_batch_size": COUNT,
    "data.num_workers": _integer(0),
    "distributed.backend": _choice("nccl", "gloo"),
    "distributed.url": TEXT,
}
"""Every key that exists; `config/config.yaml` has the same keys and tells what they mean."""

ARCHITECTURE_KEYS = (
    "patch_size",
    "vision_width",
    "vision_layers",
    "vision_heads",
    "vocab_size",
    "text_width",
    "text_layers",
    "text_heads",
    "embed_dim",
    "activation",
)
"""Keys of the section `model` that decide what the towers compute, named as `TBPSCLIP` takes them."""


def load_config(
    path: str | Path = DEFAULT_CONFIG, *, simplified: bool = False, row: Any = None, overrides: tuple[str, ...] = ()
):
    """Reads a configuration file with what it is based on, and checks it.

    Args:
        path: a YAML file; a relative `base:` in it is looked for beside it.
        simplified: takes the losses of `config/s.config.yaml`, and its other values where the file keeps the default.
        row: of the paper's study (`misc.study.Row`), whose settings count more than the file's.
        overrides: `key=value` or `section.key=value`, the value in YAML; they count last.

    Returns: an EasyDict with every key of `RULES`.

    Raises UserError, naming every unknown or misspelt key, wrong type and value out of range.
    """
    layers = [("config/config.yaml", _flatten(read_yaml(DEFAULT_CONFIG), DEFAULT_CONFIG))]
    layers += _read_with_base(Path(path), seen=())
    if simplified:
        layers.append((str(SIMPLIFIED_CONFIG), _simplified(layers)))
    if row is not None:
        file = {key: value for _, values in layers for key, value in values.items()}
        layers.append((f"the study's row {row.name}", row.settings_over(layers[0][1], file)))
    layers += [("command line", dict([_parse_override(override)])) for override in overrides]

    problems, merged = [], {}
    for source, values in layers:
        for key, value in values.items():
            rule = RULES.get(key)
            if rule is None:
                problems.append(f"unknown key {key!r} in {source}{_nearest(key)}")
                continue
            value = _read_numbers(value) if rule.number else value
            if not rule.accepts(value):
                says = "; ".join(wrong_operations(value)) if rule is OPERATIONS else f"should be {rule.says}"
                problems.append(f"{key}: {_as_yaml(value)} in {source} {says}")
            merged[key] = value
    problems += [f"{key} is missing from config/config.yaml" for key in RULES.keys() - merged.keys()]
    if not problems:
        problems = list(_contradictions(merged))
    if problems:
        raise UserError("configuration: " + "; ".join(problems))
    return _nest(merged)


def settle(config: EasyDict, architecture: dict[str, Any], source: str | None = None) -> EasyDict:
    """The configuration with a value in place of every `auto` of the architecture.

    Args:
        config: as `load_config` gives it; unchanged.
        architecture: a value for each of `ARCHITECTURE_KEYS`.
        source: the weights that have this architecture, and no other; None where it is only what is usual.

    Raises UserError where the configuration says something else than the weights, or contradicts itself now.
    """
    settled = EasyDict(plain(config))
    settled.model.update({key: architecture[key] for key in ARCHITECTURE_KEYS if config.model[key] == AUTO})
    if config.experiment.simclr_mlp == AUTO:
        width = settled.model.embed_dim
        settled.experiment.simclr_mlp = [width, 128, width]  # paper: 512, 128, 512
    problems = list(_contradictions(flatten(settled)))
    differing = [key for key in ARCHITECTURE_KEYS if settled.model[key] != architecture[key]]
    if source is not None and differing:
        here = ", ".join(f"model.{key}: {config.model[key]}" for key in differing)
        there = ", ".join(f"{key} {architecture[key]}" for key in differing)
        keys = " ".join(f"model.{key}={AUTO}" for key in differing)
        problems.append(f"{here} does not fit {source}, which has {there}: set {keys}")
    if problems:
        raise UserError("configuration: " + "; ".join(problems))
    return settled


def save_config(config: EasyDict, path: Path) -> None:
    """Writes the merged configuration as YAML that `load_config` reads again."""
    with whole_file(path) as file:
        file.write(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True).encode())


def plain(value: Any) -> Any:
    """EasyDicts and tuples as the plain dicts and lists that YAML and checkpoints hold."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """{"section": {"key": value}} → {"section.key": value}."""
    flat = {}
    for key, value in config.items():
        flat |= {f"{key}.{sub}": item for sub, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def resolution(config: EasyDict) -> tuple[int, int]:
    """(height, width) in pixels."""
    value = config.experiment.input_resolution
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _contradictions(values: dict[str, Any]) -> Iterator[str]:
    """Values that are right one by one and wrong together; an `auto` is not known yet and contradicts nothing."""
    size = values["experiment.input_resolution"]
    patch = values["model.patch_size"]
    if patch != AUTO and any(side % patch for side in ([size] if isinstance(size, int) else size)):
        yield f"experiment.input_resolution: {size} should be multiples of model.patch_size: {patch}"
    kernel = values["experiment.image_operations"].get("gaussian_blur", 1)
    shortest = size if isinstance(size, int) else min(size)
    if kernel // 2 >= shortest:
        yield f"experiment.image_operations: gaussian_blur: {kernel} is too wide for an image of {size}: lower it"
    for tower in ("vision", "text"):
        width, heads = values[f"model.{tower}_width"], values[f"model.{tower}_heads"]
        if AUTO not in (width, heads) and width % heads:
            yield f"model.{tower}_heads: {heads} should divide model.{tower}_width: {width}"
    if values["schedule.epoch_warmup"] > values["schedule.epoch"]:
        yield f"schedule.epoch_warmup: {values['schedule.epoch_warmup']} should be at most schedule.epoch: " + str(
            values["schedule.epoch"]
        )
    width, widths = values["model.embed_dim"], values["experiment.simclr_mlp"]
    if (values["experiment.ss"] or values["experiment.ss_text"]) and AUTO not in (width, widths) and widths[0] != width:
        yield f"experiment.simclr_mlp: {widths} should begin with model.embed_dim: {width}"
    if values["experiment.mlm"] and width != AUTO and width % attention_heads(width):
        yield f"model.embed_dim: {width} should be a multiple of 64 for experiment.mlm, whose heads have 64 channels"
    off = [not values[f"experiment.{loss}"] or values[f"experiment.{loss}_ratio"] == 0 for loss in ("ritc", "sdm")]
    if values["experiment.nitc_ratio"] == 0 and all(off):
        yield "experiment.nitc_ratio: 0 without experiment.ritc or sdm leaves no loss that ranks: turn one on"
    layers, dropped = values["model.text_layers"], values["model.dropped_text_layers"]
    for key in ("frozen", "dropped"):
        beyond = [] if layers == AUTO else [n for n in values[f"model.{key}_text_layers"] if n > layers]
        if beyond:
            yield f"model.{key}_text_layers: there is no layer {beyond[0]} among model.text_layers: {layers}"
    if layers != AUTO and len(dropped) >= layers:
        yield f"model.dropped_text_layers: {dropped} leaves none of model.text_layers: {layers}"
    if both := sorted(set(dropped) & set(values["model.frozen_text_layers"])):
        yield f"model.frozen_text_layers: {both[0]} is in model.dropped_text_layers too: delete one"
    heads = [loss for loss in ("ss", "ss_text", "mlm", "id") if values[f"experiment.{loss}"]]
    if values["model.adaptation"] is not None and heads:
        yield (
            f"experiment.{heads[0]}: its head cannot train with model.adaptation: {values['model.adaptation']}, which "
            f"freezes all else: set experiment.{heads[0]}=false"
        )


class _UniqueKeyLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # written in C where there is a library for it
    """PyYAML keeps the last of two equal keys silently; this one refuses them."""

    def construct_mapping(self, node, deep=False):
        written = list(node.value)  # the call below takes what a merge key `<<` refers to into the node
        mapping = super().construct_mapping(node, deep)
        seen: dict[Any, int] = {}
        for key_node, _ in written:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if key in seen:
                raise UserError(
                    f"{node.start_mark.name}: key {key!r} stands twice, in lines {seen[key]} and {line}: delete one"
                )
            seen[key] = line
        return mapping


def read_yaml(path: Path) -> dict:
    """Keys and values of a YAML file. Raises UserError where it does not exist, is none, or has a key twice."""
    if not path.is_file():
        raise UserError(f"configuration file {path} does not exist: give an existing YAML file to --config")
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, _UniqueKeyLoader)
    except UserError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold keys and values, not {_as_yaml(content)}")
    return content


def _read_with_base(path: Path, seen: tuple[Path, ...]) -> list[tuple[str, dict[str, Any]]]:
    """The file's layers, its base's first."""
    if path.resolve() in seen:
        raise UserError(f"{path}: its base leads back to itself: remove one `base:`")
    content = read_yaml(path)
    base = content.get(BASE)
    layers = []
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{path}: base: {_as_yaml(base)} should be the name of a YAML file")
        if not (path.parent / base).is_file():
            raise UserError(f"{path}: base: {base} does not exist beside it: correct the name")
        layers = _read_with_base(path.parent / base, (*seen, path.resolve()))
    return [*layers, (str(path), _flatten(content, path))]


def _simplified(layers: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The simplified recipe's losses; its seed and folder only where the user's file has none of its own."""
    default, file = layers[0][1], {key: value for _, values in layers for key, value in values.items()}
    simplified = _flatten(read_yaml(SIMPLIFIED_CONFIG), SIMPLIFIED_CONFIG)
    return {
        key: value
        for key, value in simplified.items()
        if key.startswith("experiment.") or file.get(key) == default.get(key)
    }


def _flatten(content: dict, path: Path) -> dict[str, Any]:
    """`flatten` of a file's content, without `base` and sections that hold nothing."""
    sections = {key.split(".")[0] for key in RULES if "." in key}
    for key in content.keys() & sections:
        if not isinstance(content[key], dict | None):
            raise UserError(f"{path}: {key}: {_as_yaml(content[key])} should be a section with keys below it")
    held = {key: value for key, value in content.items() if key != BASE and not (key in sections and value is None)}
    return {str(key): value for key, value in flatten(held).items()}


def _nest(flat: dict[str, Any]) -> EasyDict:
    nested: dict[str, Any] = {}
    for key in RULES:
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = flat[key]
    return EasyDict(nested)


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"argument {override!r} should be key=value, as in data.batch_size=40, or an option of --help")
    try:
        return key, yaml.load(text, _UniqueKeyLoader)
    except UserError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"argument {override!r}: its value is not valid YAML") from error


def _read_numbers(value: Any) -> Any:
    """YAML reads 1e-4 as a text (only 1.0e-4 is a number to it); people mean the number."""
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
    """ ", did you mean …?" for a misspelt key; a right key in the wrong section counts as near."""
    same_name = [known for known in RULES if known.rpartition(".")[2] == key.rpartition(".")[2]]
    near = same_name or difflib.get_close_matches(key, RULES, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else f" (keys: see {DEFAULT_CONFIG.name})"


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n")
    return " ".join(text.split())
