"""Greedy search, sampling and beam search over a batch of prompts: from the logits of a step to the tokens of the next.

Token for token what `generate` of transformers (5.24) finds with `do_sample=False` and its defaults
(length penalty 1, `early_stopping=False`); tests/unit/test_decoding.py compares the two. It is
written out because `generate` computes every row of a batch until the last one ends, and offers no
way to leave out those that did. Sampling draws from the same distribution as `do_sample=True`, but
each prompt by random numbers of its own, so that no other prompt of the batch has part in its answer.
"""

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dpa_ds.config.schema import GenerationConfig

IMPOSSIBLE = -1.0e9
"""Score of what must not be chosen. Added to a score it replaces it: fp32 keeps 7 digits."""


class GreedySearch:
    """The likeliest token at every step. One row for each of n prompts."""

    def __init__(self, num_prompts: int, end_ids: Sequence[int], device: torch.device) -> None:
        self.unfinished = torch.ones(num_prompts, dtype=torch.bool, device=device)
        """(n,): the answer has no end token yet."""
        self._filler = end_ids[0]
        self._end_ids = torch.tensor(end_ids, device=device)
        self._tokens = torch.empty(num_prompts, 0, dtype=torch.long, device=device)

    def advance(self, logits: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Append a token to every row: the new tokens, (n,). No row continues another one.

        Args:
            logits: (n, vocabulary) of the last token.
        """
        # In fp32 like transformers: among equal logits it may matter which dtype is searched.
        tokens = self._choose(logits.float())
        tokens = torch.where(self.unfinished, tokens, self._filler)
        self.unfinished = ~torch.isin(tokens, self._end_ids)
        self._tokens = torch.cat([self._tokens, tokens[:, None]], dim=1)
        return tokens, None

    def keep(self, prompts: torch.Tensor) -> None:
        """Drop all prompts but these, (k,) indices."""
        self.unfinished = self.unfinished[prompts]
        self._tokens = self._tokens[prompts]

    def answers(self) -> torch.Tensor:
        """The answers so far, (n, steps), filled up with end tokens."""
        return self._tokens

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(dim=-1)


class Sampling(GreedySearch):
    """A random token at every step, by its probability after temperature, top_k and top_p.

    What is drawn is a function of `generation.seed`, of the prompt, and of the number of the token: the same
    in any batch, on any rank, and for every client.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        end_ids: Sequence[int],
        device: torch.device,
    ) -> None:
        super().__init__(len(prompts), end_ids, device)
        self._seeds = [_fold(config.seed, *prompt) for prompt in prompts]
        self._warp = build_warpers(config)
        self._generator = torch.Generator(device)

    def keep(self, prompts: torch.Tensor) -> None:
        """Drop all prompts but these, (k,) indices."""
        super().keep(prompts)
        self._seeds = [self._seeds[index] for index in prompts.tolist()]

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        num_tokens = self._tokens.shape[1]
        probabilities = self._warp(self._tokens, logits).softmax(dim=-1)  # type: ignore[arg-type]
        drawn = []
        for seed, of_prompt in zip(self._seeds, probabilities, strict=True):
            self._generator.manual_seed(_fold(seed, num_tokens))
            drawn.append(torch.multinomial(of_prompt, 1, generator=self._generator))
        return torch.cat(drawn)


def build_warpers(config: GenerationConfig) -> LogitsProcessorList:
    """What transformers does to logits before it samples, in its order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(config.temperature)])
    if config.top_k > 0:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        warpers.append(TopPLogitsWarper(config.top_p))
    return warpers


class BeamSearch:
    """The likeliest `num_beams` answers of each of n prompts. A prompt's rows are neighbours.

    Running answers have no end token yet. Of those that ended, the ones with the best mean
    log-probability per token are kept, `num_beams` of them.
    """

    def __init__(
        self, num_prompts: int, num_beams: int, max_new_tokens: int, end_ids: Sequence[int], device: torch.device
    ) -> None:
        self.unfinished = torch.ones(num_prompts, dtype=torch.bool, device=device)
        """(n,): a running answer may still become better than one that ended."""
        self._num_beams = num_beams
        self._max_new_tokens = max_new_tokens
        self._filler = end_ids[0]
        self._end_ids = torch.tensor(end_ids, device=device)
        # All of shape (n, beams, ...).
        self._running = torch.empty(num_prompts, num_beams, 0, dtype=torch.long, device=device)
        self._running_scores = torch.zeros(num_prompts, num_beams, device=device)
        # The beams of a prompt begin alike: the first step continues only one of them.
        self._running_scores[:, 1:] = IMPOSSIBLE
        self._ended = torch.empty_like(self._running)
        self._ended_scores = torch.full((num_prompts, num_beams), IMPOSSIBLE, device=device)
        self._has_ended = torch.zeros(num_prompts, num_beams, dtype=torch.bool, device=device)

    def advance(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a token to every row.

        Args:
            logits: (n x beams, vocabulary) of the last token.

        Returns:
            the new tokens, and the rows that they continue, (n x beams,) each.
        """
        num_prompts, num_beams = self._running_scores.shape
        vocabulary = logits.shape[-1]
        log_probs = F.log_softmax(logits.float(), dim=-1).view(num_prompts, num_beams, vocabulary)
        totals = self._running_scores[:, :, None] + log_probs
        # Twice as many as there are beams: each beam ends in one way only, so half of them run on.
        scores, positions = totals.flatten(1).topk(2 * num_beams)
        parents = positions // vocabulary
        tokens = positions % vocabulary
        answers = torch.cat([_take(self._running, parents), tokens[:, :, None]], dim=2)
        ends = torch.isin(tokens, self._end_ids)
        if answers.shape[2] == self._max_new_tokens:
            ends = torch.ones_like(ends)
        self._collect_ended(answers, scores, ends)

        scores = scores + ends * IMPOSSIBLE
        chosen = scores.topk(num_beams).indices
        self._running = _take(answers, chosen)
        self._running_scores = _take(scores, chosen)
        self._update_unfinished()
        first_rows = num_beams * torch.arange(num_prompts, device=logits.device)
        parent_rows = first_rows[:, None] + _take(parents, chosen)
        return self._running[:, :, -1].flatten(), parent_rows.flatten()

    def keep(self, prompts: torch.Tensor) -> None:
        """Drop all prompts but these, (k,) indices."""
        self.unfinished = self.unfinished[prompts]
        self._running = self._running[prompts]
        self._running_scores = self._running_scores[prompts]
        self._ended = self._ended[prompts]
        self._ended_scores = self._ended_scores[prompts]
        self._has_ended = self._has_ended[prompts]

    def answers(self) -> torch.Tensor:
        """The best answers that ended, (n, steps), filled up with end tokens. Any, where none has."""
        return self._ended[:, 0]

    def _collect_ended(self, answers: torch.Tensor, scores: torch.Tensor, ends: torch.Tensor) -> None:
        """Keep the best of the answers that ended before, and of those that do now.

        Args:
            answers: (n, 2 x beams, tokens), the best first.
            scores, ends: of these, (n, 2 x beams): log-probability, and whether it ends.
        """
        # An end counts among the best `num_beams` continuations; the other half is there to run on.
        ends = ends.clone()
        ends[:, self._num_beams :] = False
        scores = scores / answers.shape[2]
        scores = scores + ~self.unfinished[:, None] * IMPOSSIBLE
        scores = scores + ~ends * IMPOSSIBLE
        ended_before = F.pad(self._ended, (0, 1), value=self._filler)
        answers = torch.cat([ended_before, answers], dim=1)
        scores = torch.cat([self._ended_scores, scores], dim=1)
        ends = torch.cat([self._has_ended, ends], dim=1)
        best = scores.topk(self._num_beams).indices
        self._ended = _take(answers, best)
        self._ended_scores = _take(scores, best)
        self._has_ended = _take(ends, best)

    def _update_unfinished(self) -> None:
        """A prompt is finished when all its beams ended better than its best running answer is now.

        A heuristic, and transformers' default: that answer's mean per token might still rise.
        """
        best_running = self._running_scores[:, 0] / self._running.shape[2]
        worst_ended = self._ended_scores.min(dim=1).values
        all_ended = self._has_ended.all(dim=1)
        self.unfinished &= ~all_ended | (best_running > worst_ended)


def _fold(*words: int) -> int:
    """One 63-bit seed from several words."""
    return int.from_bytes(hashlib.sha256(str(words).encode()).digest()[:8], "little") >> 1


def _take(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Entries of dimension 1 of `values`, (n, m, ...), at `indices`, (n, k): (n, k, ...)."""
    rows = torch.arange(len(values), device=values.device)
    return values[rows[:, None], indices]
