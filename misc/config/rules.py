"""The table of configuration keys: which values each accepts, and how resume, study and search treat it."""

import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from misc.data.image_operations import wrong_operations
from misc.files import expanded
from model.architecture import Architecture
from model.heads import attention_heads
from model.preprocessing import INTERPOLATIONS, PREPROCESSINGS
from model.transformer import ACTIVATIONS
from text_utils.augmentation import TEXT_OPERATIONS
from text_utils.tokenizer import VOCABULARY_SIZE

AUTO = "auto"
LARGEST_INTEGER = 2**31 - 1


@dataclass(frozen=True)
class Values:
    """A set of accepted values.

    Attributes:
        description: the accepted values in words, for messages.
        accepts: whether a value is one of them.
        number: whether a text such as 1e-4 is read as a number first.
        text: whether the value is a text, or null. Then it is taken as it is written, not read as YAML: `007` and
            `a # b` are names.
        problems: lists what is wrong with a value, if the description is not enough.
        convert: turns an accepted value into the one form that the program uses.
    """

    description: str
    accepts: Callable[[Any], bool]
    number: bool = False
    text: bool = False
    problems: Callable[[Any], list[str]] | None = None
    convert: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Rule:
    """Everything that is known about one configuration key.

    Attributes:
        values: the values that the key accepts.
        may_change: a resumed run may have another value, because it does not decide what is trained. The data is
            compared by content instead, the batch size by its product with the number of ranks, the precision by the
            number format that is used.
        file_wins: in a study, the value of the user's configuration file counts more than the row's: data, weights,
            seed, schedule and sizes.
        for_search: may be given to `search.py index --set`, for weights that do not record it.
    """

    values: Values
    may_change: bool = False
    file_wins: bool = False
    for_search: bool = False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_path(value: Any) -> bool:
    try:
        return isinstance(value, str) and value != "" and "\0" not in value and bool(os.fsencode(value))
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _number(low: float, high: float = math.inf, *, open_low: bool = False) -> Values:
    bounds = f"above {low:g}" if open_low else f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
    return Values(
        f"a number, {bounds}",
        lambda value: _is_number(value) and low <= value <= high and not (open_low and value == low),
        number=True,
    )


def _integer(low: int, high: int = LARGEST_INTEGER) -> Values:
    bounds = f"at least {low} and below 2^31" if high == LARGEST_INTEGER else f"{low} to {high}"
    return Values(f"an integer, {bounds}", lambda value: _is_integer(value) and low <= value <= high)


def _choice(*values: Any) -> Values:
    return Values(
        "one of " + ", ".join("null" if value is None else str(value) for value in values),
        lambda value: any(type(value) is type(choice) and value == choice for choice in values),  # 1 is not 1.0 or true
    )


def _list_of(length: int, item: Values) -> Values:
    return Values(
        f"a list of {length}, each {item.description}",
        lambda value: isinstance(value, list) and len(value) == length and all(map(item.accepts, value)),
        number=item.number,
    )


SWITCH = Values("true or false", lambda value: isinstance(value, bool))
SWITCH_OR_AUTO = Values("auto, true or false", lambda value: value == AUTO or isinstance(value, bool))
NAME_OR_NULL = Values("a text or null", lambda value: value is None or (isinstance(value, str) and value != ""))
TEXT = Values("a text", lambda value: isinstance(value, str) and value != "", text=True)
PATH = Values("a text, the path of a file or folder", _is_path, text=True, convert=expanded)
PATH_OR_NULL = Values(
    f"{PATH.description}, or null",
    lambda value: value is None or _is_path(value),
    text=True,
    convert=lambda value: value if value is None else expanded(value),
)
RATIO = _number(0)
PROBABILITY = _number(0, 1)
POSITIVE = _number(0, open_low=True)
BELOW_ONE = Values(
    "a number, at least 0 and below 1", lambda value: PROBABILITY.accepts(value) and value < 1, number=True
)
SHARE = Values("a number, above 0 and at most 1", lambda value: PROBABILITY.accepts(value) and value > 0, number=True)
COUNT = _integer(1)
COUNT_OR_NULL = Values(f"{COUNT.description}, or null", lambda value: value is None or COUNT.accepts(value))
COUNT_OR_AUTO = Values(f"{COUNT.description}, or auto", lambda value: value == AUTO or COUNT.accepts(value))


def _or_auto(values: Values) -> Values:
    return Values(
        f"{values.description}, or auto",
        lambda value: value == AUTO or values.accepts(value),
        number=values.number,
        convert=lambda value: value if value == AUTO else values.convert(value),
    )


WIDTHS_OR_AUTO = Values(
    f"{_list_of(3, COUNT).description}, or auto", lambda value: value == AUTO or _list_of(3, COUNT).accepts(value)
)
RESOLUTION = Values(
    "[height, width] in pixels, or one integer",
    lambda value: COUNT.accepts(value) or _list_of(2, COUNT).accepts(value),
    convert=lambda value: [value, value] if isinstance(value, int) else value,
)
OPERATIONS = Values(
    "operations with their strengths, see config.yaml",
    lambda value: not wrong_operations(value),
    number=True,
    problems=wrong_operations,
)
LAYERS = Values(
    "a list of layers, counted from 1",
    lambda value: isinstance(value, list) and all(map(COUNT.accepts, value)) and len(set(value)) == len(value),
)
DEVICE = Values(
    "auto, cpu, cuda, or the index of a GPU",
    lambda value: value in ("auto", "cpu", "cuda") or _integer(0).accepts(value),
)

RULES: dict[str, Rule] = {
    "device": Rule(DEVICE, may_change=True),
    "anno_dir": Rule(PATH, may_change=True, file_wins=True),
    "image_dir": Rule(PATH, may_change=True, file_wins=True),
    "misc.seed": Rule(_integer(0, 2**32 - 1), file_wins=True),
    "misc.precision": Rule(_choice("auto", "bf16", "fp16", "fp32"), may_change=True, file_wins=True),
    "misc.compile": Rule(SWITCH, may_change=True, file_wins=True),
    "experiment.input_resolution": Rule(RESOLUTION, file_wins=True, for_search=True),
    "experiment.text_length": Rule(_integer(3, 1024), file_wins=True),
    "experiment.dropout": Rule(PROBABILITY),
    "experiment.image_operations": Rule(OPERATIONS),
    "experiment.image_pool": Rule(COUNT_OR_NULL),
    "experiment.text_operation": Rule(_choice(*TEXT_OPERATIONS, None)),
    "experiment.eda_alpha": Rule(PROBABILITY),
    "experiment.wordnet": Rule(PATH),
    "experiment.back_trans": Rule(SWITCH),
    "experiment.backtrans_p": Rule(PROBABILITY),
    "experiment.mixgen": Rule(SWITCH),
    "experiment.mixgen_type": Rule(_choice("cat", "ori")),
    "experiment.mixgen_p": Rule(PROBABILITY),
    "experiment.mixgen_ratio": Rule(_number(0, 0.5)),
    "experiment.nitc_ratio": Rule(RATIO),
    "experiment.nitc_labels": Rule(_choice("identity", "pair")),
    "experiment.mvs_image": Rule(SWITCH),
    "experiment.mvs_text": Rule(SWITCH),
    "experiment.ss": Rule(SWITCH),
    "experiment.ss_text": Rule(SWITCH),
    "experiment.ss_ratio": Rule(RATIO),
    "experiment.simclr_mlp": Rule(WIDTHS_OR_AUTO),
    "experiment.simclr_temperature": Rule(POSITIVE),
    "experiment.ritc": Rule(SWITCH),
    "experiment.ritc_eps": Rule(POSITIVE),
    "experiment.ritc_ratio": Rule(RATIO),
    "experiment.citc": Rule(SWITCH),
    "experiment.citc_lambda1": Rule(RATIO),
    "experiment.citc_lambda2": Rule(RATIO),
    "experiment.citc_ratio": Rule(RATIO),
    "experiment.mlm": Rule(SWITCH),
    "experiment.mlm_ratio": Rule(RATIO),
    "experiment.cmt_depth": Rule(COUNT),
    "experiment.id": Rule(SWITCH),
    "experiment.id_ratio": Rule(RATIO),
    "experiment.sdm": Rule(SWITCH),
    "experiment.sdm_ratio": Rule(RATIO),
    "experiment.sdm_scale": Rule(POSITIVE),
    "experiment.sdm_eps": Rule(POSITIVE),
    "schedule.epoch": Rule(_integer(1, 1_000_000), file_wins=True),
    "schedule.epoch_warmup": Rule(_integer(0), file_wins=True),
    "schedule.lr": Rule(POSITIVE, file_wins=True),
    "schedule.lr_start": Rule(RATIO, file_wins=True),
    "schedule.lr_end": Rule(RATIO, file_wins=True),
    "schedule.ratio_factor": Rule(POSITIVE, file_wins=True),
    "schedule.weight_decay": Rule(RATIO, file_wins=True),
    "schedule.betas": Rule(_list_of(2, BELOW_ONE), file_wins=True),
    "schedule.eps": Rule(POSITIVE, file_wins=True),
    "preprocessing.kind": Rule(_choice(AUTO, *PREPROCESSINGS), may_change=True, for_search=True),
    "preprocessing.resolution": Rule(_or_auto(RESOLUTION), may_change=True, for_search=True),
    "preprocessing.interpolation": Rule(_choice(AUTO, *INTERPOLATIONS), may_change=True, for_search=True),
    "preprocessing.mean": Rule(_or_auto(_list_of(3, PROBABILITY)), may_change=True, for_search=True),
    "preprocessing.deviation": Rule(_or_auto(_list_of(3, POSITIVE)), may_change=True, for_search=True),
    "preprocessing.clean_captions": Rule(SWITCH_OR_AUTO, may_change=True, for_search=True),
    "model.ckpt_type": Rule(_choice("original_clip", "saved")),
    "model.checkpoint": Rule(PATH_OR_NULL, may_change=True, file_wins=True),
    "model.saved_path": Rule(PATH, may_change=True),
    "model.use_gather": Rule(SWITCH),
    "model.gather_gradient": Rule(SWITCH),
    "model.lock_bottom": Rule(SWITCH),
    "model.frozen_text_layers": Rule(LAYERS),
    "model.dropped_text_layers": Rule(LAYERS),
    "model.adaptation": Rule(_choice("coop", "clip_adapter", None)),
    "model.context": Rule(TEXT),
    "model.adapter_ratio": Rule(PROBABILITY),
    "model.grad_checkpointing": Rule(SWITCH, may_change=True),
    "model.softlabel_ratio": Rule(PROBABILITY),
    "model.activation": Rule(_choice(AUTO, *ACTIVATIONS), for_search=True),
    "model.embed_dim": Rule(COUNT_OR_AUTO),
    "model.vocab_size": Rule(_choice(VOCABULARY_SIZE)),
    "model.patch_size": Rule(COUNT_OR_AUTO),
    "model.vision_width": Rule(COUNT_OR_AUTO),
    "model.vision_layers": Rule(COUNT_OR_AUTO),
    "model.vision_heads": Rule(COUNT_OR_AUTO, for_search=True),
    "model.text_width": Rule(COUNT_OR_AUTO),
    "model.text_layers": Rule(COUNT_OR_AUTO),
    "model.text_heads": Rule(COUNT_OR_AUTO, for_search=True),
    "log.print_period": Rule(COUNT, may_change=True),
    "log.checkpoint_period": Rule(_integer(0), may_change=True),
    "log.tensorboard": Rule(SWITCH, may_change=True),
    "log.wandb": Rule(SWITCH, may_change=True),
    "log.initial_evaluation": Rule(SWITCH, may_change=True),
    "log.sheet": Rule(_integer(0), may_change=True),
    "log.sheet_choice": Rule(_choice("random", "hardest"), may_change=True),
    "log.profile": Rule(SWITCH, may_change=True),
    "data.dataset": Rule(NAME_OR_NULL, may_change=True, file_wins=True),
    "data.train_share": Rule(SHARE),
    "data.noise": Rule(PROBABILITY),
    "data.back_translation_file": Rule(PATH_OR_NULL, may_change=True),
    "data.evaluate_on": Rule(_choice("test", "val")),
    "data.batch_size": Rule(COUNT, may_change=True, file_wins=True),
    "data.chunk_size": Rule(COUNT_OR_NULL, may_change=True),
    "data.simclr_on_device": Rule(SWITCH_OR_AUTO, may_change=True),
    "data.test_batch_size": Rule(COUNT, may_change=True),
    "data.skip_unreadable": Rule(SWITCH, may_change=True),
    "data.num_workers": Rule(_integer(0), may_change=True),
    "distributed.backend": Rule(_choice("nccl", "gloo"), may_change=True),
    "distributed.url": Rule(TEXT, may_change=True),
}
"""Every key that exists. `config/config.yaml` has the same keys and explains them."""

ENCODER_KEYS = tuple(field.name for field in fields(Architecture) if f"model.{field.name}" in RULES)
"""Fields of `Architecture` that are keys of the section `model`; the input size and the text length are keys of
`experiment`."""


def contradictions(values: dict[str, Any]) -> Iterator[str]:
    """Finds values that are valid one by one and contradict each other. An `auto` is not known yet and is skipped.

    Args:
        values: by `section.key`, each accepted by its rule and converted.
    """
    size, patch = values["experiment.input_resolution"], values["model.patch_size"]
    if patch != AUTO and any(side % patch for side in size):
        yield f"experiment.input_resolution: {size} should be multiples of model.patch_size: {patch}"
    kernel = values["experiment.image_operations"].get("gaussian_blur", 1)
    if kernel // 2 >= min(size):
        yield f"experiment.image_operations: gaussian_blur: {kernel} is too wide for an image of {size}: lower it"
    for encoder in ("vision", "text"):
        width, heads = values[f"model.{encoder}_width"], values[f"model.{encoder}_heads"]
        if AUTO not in (width, heads) and width % heads:
            yield f"model.{encoder}_heads: {heads} should divide model.{encoder}_width: {width}"
    warmup, epochs = values["schedule.epoch_warmup"], values["schedule.epoch"]
    if warmup > epochs:
        yield f"schedule.epoch_warmup: {warmup} should be at most schedule.epoch: {epochs}"
    width, widths = values["model.embed_dim"], values["experiment.simclr_mlp"]
    if (values["experiment.ss"] or values["experiment.ss_text"]) and AUTO not in (width, widths) and widths[0] != width:
        yield f"experiment.simclr_mlp: {widths} should begin with model.embed_dim: {width}"
    if values["experiment.mlm"] and width != AUTO and width % attention_heads(width):
        yield f"model.embed_dim: {width} should be a multiple of 64 for experiment.mlm, whose heads have 64 channels"
    off = [not values[f"experiment.{loss}"] or values[f"experiment.{loss}_ratio"] == 0 for loss in ("ritc", "sdm")]
    if values["experiment.nitc_ratio"] == 0 and all(off):
        yield "experiment.nitc_ratio: 0 also needs experiment.ritc or experiment.sdm: turn one of them on"
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
            f"freezes everything else: set experiment.{heads[0]}=false"
        )
