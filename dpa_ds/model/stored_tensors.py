"""Which tensors of a checkpoint's files make a parameter of the model.

The names of files and of the model differ for many families (`embed_out` is `lm_head`), and some parameters are made of
several tensors (the weights of a layer's experts lie in one). transformers (5.24) has a table of both, which its own
loading reads; this is that table for loading under ZeRO-3, which needs a part of each tensor.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from dpa_ds.errors import ModelError

PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
"""Stored types, by safetensors' names, whose numbers are the weights themselves."""


class StoredTensors:
    """The tensors of a checkpoint, under the names of `model`. A context: files are open inside.

    Args:
        files: name of a stored tensor -> its file.
    """

    def __init__(self, model: PreTrainedModel, files: Mapping[str, Path]) -> None:
        self._model = model
        self._files = files
        self._stack = ExitStack()
        self._opened: dict[Path, Any] = {}
        self._plain: dict[str, str] = {}
        """Name in the model -> name in the files."""
        self._converters: dict[str, WeightConverter] = {}
        """Name in the model -> what makes it of several, to which tensors were added."""
        self._converted: dict[str, torch.Tensor] = {}
        """What a converter made beside the parameter that was asked for."""

    def __enter__(self) -> Self:
        for path in set(self._files.values()):
            self._opened[path] = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        self._find_sources()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._plain or name in self._converters

    def get(self, name: str) -> torch.Tensor | Any:
        """The tensor `name` of the model: whole where it is made of several, else what can be sliced without reading.

        Raises:
            ModelError: the files do not have it, or not as plain numbers.
        """
        if name in self._plain:
            return self._slice_of(self._plain[name])
        for target in self._targets_that_may_make(name):
            if name in self._converted:
                break
            made = self._converters.pop(target).convert(target, model=self._model, config=self._model.config)
            for made_name, tensor in made.items():
                self._converted[made_name] = tensor[0] if isinstance(tensor, list) else tensor
        if name not in self._converted:
            raise ModelError(
                f"the checkpoint has no tensor {name!r}: it belongs to another model, or stores this architecture "
                "in a layout that ZeRO-3 loading does not know; use a ds_configs/ file below stage 3"
            )
        return self._converted.pop(name)

    def _targets_that_may_make(self, name: str) -> list[str]:
        """Where the converters are kept that make `name`: its own name, or the first of several that one makes."""
        if name in self._converters:
            return [name]
        return [target for target, converter in self._converters.items() if len(converter.target_patterns) > 1]

    def _slice_of(self, stored: str) -> Any:
        found = self._opened[self._files[stored]].get_slice(stored)
        if found.get_dtype() not in PLAIN_DTYPES:
            raise ModelError(
                f"tensor {stored!r} is stored as {found.get_dtype()}, which loading under ZeRO-3 does not take for a "
                "weight: use a ds_configs/ file below stage 3, or the model in 16 bits"
            )
        return found

    def _find_sources(self) -> None:
        model = self._model
        transforms = get_model_conversion_mapping(model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        names = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for stored in sorted(self._files, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, names)
            if name not in names:  # as transformers does: perhaps only a prefix is missing
                name, pattern = rename_source_key(stored, [], [], model.base_model_prefix, names)
            if pattern is None:
                self._plain[name] = stored
                continue
            converter = self._converters.setdefault(name, deepcopy(by_pattern[pattern]))
            converter.add_tensor(name, stored, pattern, self._reader_of(stored))

    def _reader_of(self, stored: str) -> Any:
        def read() -> torch.Tensor:
            tensor: torch.Tensor = self._slice_of(stored)[:]
            return tensor

        return read
