"""Build a model without weights, of the class that the library loads for a configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.auto_factory import _get_model_class

from atoll.errors import ArchitectureError

_BESIDE_TEXT = ("vision_", "visual.", "audio_", "multi_modal_projector.", "model.vision_", "model.visual.", "model.audio_",
                "model.multi_modal_projector.")  # fmt: skip


def auto_class_of(config: Any) -> Any:
    """The auto class that loads a model which generates text: for text alone, else for text beside images; None where there is none.

    Of a wrapper of the second kind the language model is trained, under the names that it has in the whole.
    """
    both = (AutoModelForCausalLM, AutoModelForImageTextToText)
    return next((auto for auto in both if type(config) in auto._model_mapping), None)


def config_of_text(config: Any) -> Any:
    """The part of a wrapper's configuration that its text model is made of, where the library loads that model alone.

    Source: transformers 5.23.0, models/auto/auto_factory.py, from_pretrained.
    """
    model_class = _get_model_class(config, auto_class_of(config)._model_mapping)
    alone = model_class.config_class is type(config).sub_configs.get("text_config")
    return config.get_text_config() if alone else config


def build(source: str, config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model on the meta device. A `dtype` is torch's default for all threads meanwhile.

    Raises: ArchitectureError for a configuration that no model can be made of.
    """
    try:
        # Unlike accelerate's init_empty_weights this holds for one thread only: others may make modules meanwhile.
        with torch.device("meta"):
            model: PreTrainedModel = auto_class_of(config).from_config(config, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, AssertionError, IndexError) as problem:
        text = next((line for line in str(problem).strip().splitlines() if line.strip()), type(problem).__name__)
        raise ArchitectureError(
            "no model can be made of config.json", where=source, got=text[:200], expected="sizes that fit each other",
            do="install what it asks for, or give the config.json that belongs to the weights",
        ) from None  # fmt: skip
    return model


def left_in_files(config: Any, stored_type: str) -> tuple[str, ...]:
    """How the names of tensors begin that a text model does not take from its checkpoint: what sees and hears beside it in a wrapper, where
    the library loads the text model alone, and layers that predict further tokens. `stored_type` is the model_type of the checkpoint.

    Source: DeepSeek-V3 (arXiv 2412.19437, section 2.2) keeps them as blocks after the last one, others under a name of their own.
    """
    text = config.get_text_config()
    blocks, more = getattr(text, "num_hidden_layers", 0), getattr(text, "num_nextn_predict_layers", None) or 0
    beside = _BESIDE_TEXT if stored_type != config.model_type else ()
    more_blocks = (f"{prefix}layers.{number}." for prefix in ("model.", "") for number in range(blocks, blocks + more))
    return (*beside, *more_blocks, "mtp.", "model.mtp")


def body_of(model: PreTrainedModel) -> Any:
    """What makes hidden states of tokens: the model without its head."""
    body = model.base_model
    return body if body is not model else next(child for child in model.children() if isinstance(child, PreTrainedModel))


def text_path_of(model: PreTrainedModel) -> str:
    """Path of the text model in the whole, "model.language_model"; "" where it is not a part of it."""
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), "")


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a projection of the library's two classes, which quantizers know; a subclass may compute something else."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"
