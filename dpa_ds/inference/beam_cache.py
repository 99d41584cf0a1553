"""A key-value cache for beams that grow from one prompt, without the copies that transformers' own cache makes of it.

transformers 5.24 appends a token to the cache by copying all of it, and reorders it by copying all of it again: with 4 beams,
prompts of 100 tokens and a model of 135M parameters that was half of the time on a CPU.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer


def expand_for_beams(cache: Cache, num_beams: int, num_new_tokens: int) -> None:
    """Give every prompt's row in `cache` to each of its beams, with room for `num_new_tokens`.

    Row i becomes rows i x num_beams to (i + 1) x num_beams - 1, as in `generate`. A layer of a kind other than full
    attention (such as a sliding window) stays what it is.
    """
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = _BeamLayer(layer, num_beams, num_new_tokens)
        else:
            layer.batch_repeat_interleave(num_beams)  # type: ignore[union-attr]


def can_keep_rows(cache: Cache) -> bool:
    """Whether `keep_rows` works on every layer."""
    return all(isinstance(layer, _BeamLayer) for layer in cache.layers)


def keep_rows(cache: Cache, kept: torch.Tensor) -> None:
    """Drop all rows but `kept` (indices among those that are there), whole prompts with all their beams.

    `reorder_cache` continues to be reported in terms of the rows that there were at first.
    """
    for layer in cache.layers:
        assert isinstance(layer, _BeamLayer), "can_keep_rows"
        layer.keep_rows(kept)


class _BeamLayer(DynamicLayer):
    """Keys and values (rows, heads, tokens, head size) in a buffer of their final size; the prompt's part stays in place.

    Beam search exchanges rows only among the beams of one prompt, whose prompt parts are equal.
    """

    def __init__(self, prompt: DynamicLayer, num_beams: int, num_new_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        keys, values = prompt.keys, prompt.values
        assert keys is not None, "a prompt that was computed"
        assert values is not None
        self._prompt_length = self._length = keys.shape[-2]
        self._buffers = [_roomy(states, num_beams, num_new_tokens) for states in (keys, values)]
        self._rows = torch.arange(len(self._buffers[0]), device=keys.device)
        """Which of the first rows are still there."""
        self._num_first_rows = len(self._rows)
        self.device, self.is_initialized = keys.device, True
        self.keys, self.values = self._filled()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states of new tokens, (rows, heads, new tokens, head size); all states so far."""
        start, self._length = self._length, self._length + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self._length] = states
        self.keys, self.values = filled = self._filled()
        return filled

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i takes the new tokens of row `beam_idx[i]`, a beam of the same prompt."""
        new = slice(self._prompt_length, self._length)
        place = torch.empty(self._num_first_rows, dtype=torch.long, device=self._rows.device)
        place[self._rows] = torch.arange(len(self._rows), device=self._rows.device)
        taken = place[beam_idx.to(place.device)[self._rows]]
        for buffer in self._buffers:
            buffer[:, :, new] = buffer[:, :, new].index_select(0, taken)

    def keep_rows(self, kept: torch.Tensor) -> None:
        """Of the rows that are there, keep those with indices `kept`."""
        self._rows = self._rows[kept]
        self._buffers = [buffer.index_select(0, kept) for buffer in self._buffers]
        self.keys, self.values = self._filled()

    def _filled(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (buffer[:, :, : self._length] for buffer in self._buffers)
        return keys, values


def _roomy(states: torch.Tensor, num_beams: int, num_new_tokens: int) -> torch.Tensor:
    """`states` of each prompt for each of its beams, in a buffer with room for new tokens."""
    rows, heads, length, size = states.shape
    buffer = states.new_zeros(rows * num_beams, heads, length + num_new_tokens, size)
    buffer.view(rows, num_beams, heads, length + num_new_tokens, size)[:, :, :, :length] = states[:, None]
    return buffer
