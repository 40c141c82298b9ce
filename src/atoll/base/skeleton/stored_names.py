"""What the tensors of a checkpoint are called in the model that transformers makes of it: renamed, or merged with others of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, convert_and_load_state_dict_in_model, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig

_HEADS = ("lm_head.weight", "embed_out.weight")
"""GPT-NeoX keeps its head under the one name in checkpoints and under the other in the model."""


class StoredNames:
    """The library's own rules for one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        mapping = get_model_conversion_mapping(model)
        self._renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        self._converters = [one for one in mapping if isinstance(one, WeightConverter)]
        self._by_pattern = {pattern: one for one in self._converters for pattern in one.source_patterns}
        self._prefix = model.base_model_prefix
        self._needless = tuple(model._keys_to_ignore_on_load_unexpected or ())
        self._tensors = model.state_dict()
        self._known: dict[str, tuple[tuple[str, ...], bool]] = {}

    def of(self, stored: str) -> tuple[str, ...]:
        """The names of the model's tensors that a stored one is in, or a part of; none where the model does not take it.

        Source: transformers 5.23.0, core_model_loading.py, convert_and_load_state_dict_in_model.
        """
        return self._look_up(stored)[0]

    def converted(self, stored: str) -> bool:
        """Whether a stored tensor is another one in the model, and not only of another name."""
        return self._look_up(stored)[1]

    def whole(self, stored: str) -> str:
        """A stored name with the leading component that a checkpoint of the bare decoder leaves out."""
        return stored if not self._prefix or stored.startswith(f"{self._prefix}.") else f"{self._prefix}.{stored}"

    def merge_into(self, model: PreTrainedModel, stored: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Put stored tensors into the model as the library does it, those together that are one there."""
        if stored:
            config = LoadStateDictConfig(dtype=dtype, weight_mapping=[*self._renamings, *self._converters])
            convert_and_load_state_dict_in_model(model, stored, config)

    def _look_up(self, stored: str) -> tuple[tuple[str, ...], bool]:
        if stored not in self._known:
            self._known[stored] = self._found(stored)
        return self._known[stored]

    def _found(self, stored: str) -> tuple[tuple[str, ...], bool]:
        name, pattern = rename_source_key(stored, self._renamings, self._converters, self._prefix, self._tensors)
        if name not in self._tensors:
            name, pattern = rename_source_key(stored, [], [], self._prefix, self._tensors)
        if name not in self._tensors and stored in _HEADS:
            name = next((head for head in _HEADS if head in self._tensors), name)
        if name not in self._tensors:
            return (), False
        if pattern is None:
            return (name,), False
        first, *others = self._by_pattern[pattern].target_patterns
        return (name, *(name.replace(first, other) for other in others)), True

    def not_taken(self, stored: Iterable[str]) -> tuple[str, ...]:
        """Those of the stored tensors that the model has no place for, but for those that the library knows to be needless."""
        return tuple(one for one in stored if not self.of(one) and not any(re.search(pattern, one) for pattern in self._needless))

    def missing(self, stored: Iterable[str], tied: Mapping[str, str]) -> tuple[str, ...]:
        """The model's tensors that none of the stored ones is for; one of two tied tensors is enough."""
        found = {name for one in stored for name in self.of(one)}
        found |= {twin for twin, name in tied.items() if name in found} | {name for twin, name in tied.items() if twin in found}
        return tuple(name for name in self._tensors if name not in found)
