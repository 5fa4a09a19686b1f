"""`main.py --export`: writes weights for open_clip, Hugging Face or ONNX."""

from pathlib import Path

import torch
import torch.nn.functional as F
from easydict import EasyDict

from misc.builders.architecture import architecture_of
from misc.builders.model import build_export, build_saved_model, initial_weights
from misc.config.rules import RULES
from misc.errors import UserError
from misc.retrieval.metrics import check_features
from misc.run.log import RunLog
from misc.system.distributed import Ranks
from model.pretrained.export import check_export, export
from model.tbps_clip import TBPSCLIP
from text_utils.tokenizer import END, START, Tokenizer


def export_weights(config: EasyDict, ranks: Ranks, form: str, out: str) -> None:
    """Writes the weights that a run would start from into the folder `out`, at their own resolution and text length."""
    if out.partition("=")[0] in RULES:
        raise UserError(f"--export {form} {out}: {out} is a setting: name the folder to write, --export FORM OUT")
    check_export(form, Path(out))
    weights = initial_weights(config, ranks)
    if weights is None:
        raise UserError("--export: model.checkpoint is null: set it to the weights to export")
    model, config, weight_notes = build_saved_model(config, weights)
    with RunLog(None, is_main=ranks.is_main) as log:
        for line in weight_notes:
            log.line(line)
        if ranks.is_main:
            _check_encoders(model.eval(), architecture_of(config).resolution)
            log.line(export(form, Path(out), build_export(config, model.eval(), weights, Tokenizer())))


@torch.inference_mode()
def _check_encoders(model: TBPSCLIP, resolution: tuple[int, int]) -> None:
    """Raises UserError if the encoders give invalid features: no tool could use them."""
    image, caption = torch.zeros(1, 3, *resolution), torch.tensor([[START, END]])
    features = torch.cat([model.encode_image(image), model.encode_text(caption)])
    check_features(F.normalize(features, dim=1), ["--export: a grey image", "--export: an empty caption"])
