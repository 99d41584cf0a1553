"""A key-value cache for beams that grow from one prompt, without the copies that transformers makes.

transformers 5.24 appends a token to its cache by copying all of it, and reorders it by copying all
of it again: with 4 beams, prompts of 100 tokens and a model of 135M parameters that was half of the
time on a CPU.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer


def expand_for_beams(cache: Cache, num_rows: int, num_beams: int, num_new_tokens: int) -> None:
    """Give each of the `num_rows` prompts' rows in `cache` to each of its beams, with room for `num_new_tokens`.

    Row i becomes rows i x num_beams to (i + 1) x num_beams - 1. From then on `cache.reorder_cache`
    may exchange rows only among the beams of one prompt.
    """
    beams_of_rows = torch.arange(num_rows).repeat_interleave(num_beams)
    for i, layer in enumerate(cache.layers):
        # Not one of its subclasses: a sliding window, for instance, forgets tokens of the prompt.
        if type(layer) is DynamicLayer:
            cache.layers[i] = _BeamLayer(layer, num_beams, num_new_tokens)
        else:
            # All kinds of layers have it, and it takes more rows than there are.
            layer.reorder_cache(beams_of_rows)  # type: ignore[arg-type]


def keep_rows(cache: Cache, kept: torch.Tensor) -> None:
    """Drop all rows but `kept`, (k,) indices: whole prompts with all their beams."""
    for layer in cache.layers:
        if isinstance(layer, _BeamLayer):
            layer.keep_rows(kept)
        else:
            # All kinds of layers reorder by index_select, which also takes fewer rows than there are.
            layer.reorder_cache(kept)  # type: ignore[arg-type]


class _BeamLayer(DynamicLayer):
    """Keys and values, (rows, heads, tokens, head size), in buffers of their final size.

    The prompt's part stays in place: it is the same in all beams that exchange rows.
    """

    def __init__(self, prompt: DynamicLayer, num_beams: int, num_new_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        assert prompt.keys is not None, "a prompt that was computed"
        assert prompt.values is not None
        self._prompt_length = prompt.keys.shape[-2]
        self._length = self._prompt_length
        self._key_buffer = _with_room(prompt.keys, num_beams, num_new_tokens)
        self._value_buffer = _with_room(prompt.values, num_beams, num_new_tokens)
        self.device = prompt.keys.device
        self.is_initialized = True
        self._show_filled()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values of new tokens, (rows, heads, new tokens, head size); all so far."""
        start = self._length
        self._length += key_states.shape[-2]
        self._key_buffer[:, :, start : self._length] = key_states
        self._value_buffer[:, :, start : self._length] = value_states
        return self._show_filled()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i takes the new tokens of row `beam_idx[i]`, a beam of the same prompt."""
        new = slice(self._prompt_length, self._length)
        for buffer in (self._key_buffer, self._value_buffer):
            buffer[:, :, new] = buffer[:, :, new].index_select(0, beam_idx)

    def keep_rows(self, kept: torch.Tensor) -> None:
        """Drop all rows but `kept`, (k,) indices."""
        self._key_buffer = self._key_buffer.index_select(0, kept)
        self._value_buffer = self._value_buffer.index_select(0, kept)
        self._show_filled()

    def _show_filled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the filled part of the buffers what transformers sees."""
        self.keys = self._key_buffer[:, :, : self._length]
        self.values = self._value_buffer[:, :, : self._length]
        return self.keys, self.values


def _with_room(prompt: torch.Tensor, num_beams: int, num_new_tokens: int) -> torch.Tensor:
    """Keys or values of each prompt for each of its beams, in a buffer with room for new tokens."""
    rows, heads, length, size = prompt.shape
    buffer = prompt.new_zeros(rows * num_beams, heads, length + num_new_tokens, size)
    # Copied straight into place: repeat_interleave would need the memory once more.
    by_prompt = buffer.view(rows, num_beams, heads, length + num_new_tokens, size)
    by_prompt[:, :, :, :length] = prompt[:, None]
    return buffer
