"""Embeddings and answers of a batch with a weight per row, against one prompt at a time by plain transformers and PEFT."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig, OPTConfig, OPTForCausalLM

from dpa_ds.adapters.adapter_model import AdapterModel, global_local_mix
from dpa_ds.adapters.methods import adapter_table
from dpa_ds.config.schema import Encoder, GenerationConfig, LoraConfig
from dpa_ds.data.references import REPRESENTATIONS
from dpa_ds.inference import generation
from dpa_ds.inference.decoding_check import Decoding
from dpa_ds.inference.embedding import batches, embed
from dpa_ds.inference.generation import generate
from dpa_ds.inference.search import BeamSearch, Sampling, build_warpers
from tests import plain, tiny

TARGETS = ["q_proj", "v_proj"]
PAD, EOS = 257, 256
LENGTHS = (1, 3, 12, 1, 7, 5, 12, 2)
ALPHAS = torch.tensor([0.0, 0.3, 0.7, 1.0, 1.0, 0.5, 0.0, 0.9])
NEW_TOKENS = 8
END_SOON = 4.0
"""Added to the logit of the end token, so that rows end at different places."""


def draw_prompts(lengths: Sequence[int] = LENGTHS, seed: int = 7) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def draw_states(dual: AdapterModel, seed: int = 3, size: float = 0.3) -> dict[str, plain.State]:
    """Random weights of both adapters, installed in `dual`: neither is near zero, so each changes every answer."""
    generator = torch.Generator().manual_seed(seed)
    states = {
        a: {key: size * torch.randn(shape, generator=generator) for key, shape in dual.shapes[a].items()}
        for a in dual.table
    }
    for adapter in dual.table:
        dual.load_state(adapter, states[adapter])
    return states


class Models:
    """The model under test, and the same written plainly, with the same random adapters."""

    def __init__(self, folder: Path) -> None:
        # Not tied: a random model with tied embeddings repeats its last token, whatever the adapters.
        self.directory = tiny.make_model(folder, tie_word_embeddings=False)
        base = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32)
        lora = LoraConfig(rank=4, alpha=8.0, dropout=0.1, target_modules=TARGETS)
        self.dual = AdapterModel(base, adapter_table(lora), lora)
        self.states = draw_states(self.dual)
        self.plain = plain.Plain(self.directory, 4, 8.0, TARGETS, lr=0.0, clip=0.0)
        for adapter in self.dual.table:
            self.plain.load(adapter, self.states[adapter])
        self.plain.model.eval()

    def alone(self, adapter: Encoder) -> Any:
        """The base without PEFT, or with one adapter that plain PEFT knows as its only one."""
        base = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32).eval()
        if adapter == "none":
            return base
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = peft.PeftModel(base, config)
        peft.set_peft_model_state_dict(model, self.states[adapter])
        return model.eval()

    def generate(self, prompts: Sequence[Sequence[int]], alphas: torch.Tensor, beams: int, **more: Any) -> Any:
        return generate(self.dual, prompts, alphas, GenerationConfig(beams, NEW_TOKENS), PAD, [more.get("eos", EOS)])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("decoding") / "model")


@torch.no_grad()
def plain_generate(model: Any, prompts: Sequence[Sequence[int]], beams: int, eos: int = EOS) -> list[list[int]]:
    """One call of transformers with left padding and a mask; no cache of ours."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": PAD, "eos_token_id": eos}
    tokens = model.generate(input_ids=ids, attention_mask=mask, num_beams=beams, **settings)
    answers = []
    for row in tokens[:, longest:].tolist():
        end = next((i for i, token in enumerate(row) if token == eos), len(row))
        answers.append(row[:end])
    return answers


# ---- states ---------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40), budget=st.integers(1, 100))
@settings(deadline=None)
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    found = batches(lengths, budget)
    assert sorted(row for batch in found for row in batch) == list(range(len(lengths)))
    in_order = [lengths[row] for batch in found for row in batch]
    assert in_order == sorted(lengths, reverse=True), "longest first"
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget
    for batch, following in itertools.pairwise(found):
        assert (len(batch) + 1) * lengths[batch[0]] > budget, f"{following} would have fitted"


@pytest.mark.parametrize("encoder", ["none", "global", "local"])
@torch.no_grad()
def test_states_equal_those_of_plain_models_one_by_one(models: Models, encoder: Encoder) -> None:
    prompts, reference = draw_prompts(), models.alone(encoder)
    assert [len(batch) for batch in batches(LENGTHS, 16)] == [1, 1, 2, 4], "several batches, and some with padding"
    models.dual.peft_model.train()  # dropout 0.1: encode must turn it off
    for batch_tokens in (16, 1, 1000):
        states = embed(models.dual, encoder, prompts, PAD, batch_tokens)
        for i, prompt in enumerate(prompts):
            hidden = reference(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
            expected = {"last_token": hidden[-1], "mean": hidden.mean(dim=0)}
            for name in REPRESENTATIONS:
                torch.testing.assert_close(states[name][i], expected[name], rtol=0, atol=1e-5, msg=f"{name} of {i}")
    assert not models.dual.base_model.base_model._forward_hooks, "the hook is gone"


def test_opt_which_passes_over_its_inner_model_has_embeddings() -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=50,
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=1,
        ffn_dim=16,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    base = OPTForCausalLM(config).eval()
    prompt = [5, 9, 7]
    expected = base.model(input_ids=torch.tensor([prompt]), use_cache=False).last_hidden_state[0].detach()
    lora = LoraConfig(target_modules=["q_proj"])
    found = embed(AdapterModel(base, adapter_table(lora), lora), "none", [prompt, prompt[:2]], 1, 100)
    torch.testing.assert_close(found["last_token"][0], expected[-1])
    torch.testing.assert_close(found["mean"][0], expected.mean(dim=0))


def test_two_embeddings_of_a_prompt_travel_to_the_host_and_no_hidden_states(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU in place of a GPU: what `.cpu()` is asked for is what would travel."""
    travelled = []
    plain_cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: travelled.append(tensor.numel()) or plain_cpu(tensor))
    prompts = [[3, 4, 5, 6], [7, 8], [9, 10, 11]]
    found = embed(models.dual, "none", prompts, PAD, 8)
    assert travelled == [found["mean"].numel(), found["last_token"].numel()]


def test_encoders_differ(models: Models) -> None:
    """Else the comparison with plain models could not fail; and the state depends on the last token's place."""
    prompts = draw_prompts()
    found = [embed(models.dual, e, prompts, PAD, 16)["last_token"] for e in ("none", "global", "local")]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert float((found[one] - found[other]).norm(dim=1).min()) > 0.1
    backwards = embed(models.dual, "none", prompts[::-1], PAD, 16)["last_token"]
    torch.testing.assert_close(backwards.flip(0), found[0], rtol=0, atol=1e-5)


# ---- answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 4])
def test_a_mixed_batch_answers_as_each_row_alone(models: Models, beams: int) -> None:
    """Against itself one by one, and against plain PEFT one by one."""
    prompts = draw_prompts()
    models.dual.peft_model.train()
    answers = models.generate(prompts, ALPHAS, beams)
    assert len({tuple(answer) for answer in answers}) == len(prompts)
    for i, (prompt, alpha) in enumerate(zip(prompts, ALPHAS, strict=True)):
        assert models.generate([prompt], alpha[None], beams) == [answers[i]], i
        models.plain.mix(1 - float(alpha), float(alpha))
        assert plain_generate(models.plain.model, [prompt], beams) == [answers[i]], i


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_at_the_ends_one_adapter_alone_answers(models: Models, alpha: float, beams: int) -> None:
    """In a batch of its own, where the other adapter is not computed, and as part of a mixed batch."""
    prompts = draw_prompts()
    expected = plain_generate(models.alone("local" if alpha else "global"), prompts, beams)
    assert models.generate(prompts, torch.full((len(prompts),), alpha), beams) == expected
    others = torch.full((len(prompts),), 0.4)
    assert models.generate(prompts * 2, torch.cat([torch.full_like(others, alpha), others]), beams)[:8] == expected


@pytest.mark.parametrize("beams", [1, 4])
def test_the_prefilled_cache_changes_nothing(models: Models, beams: int) -> None:
    """A padded batch by one plain call, where all rows have one weight; the same weight as a number."""
    prompts = draw_prompts(seed=11)
    models.plain.mix(0.7, 0.3)
    expected = plain_generate(models.plain.model, prompts, beams)
    assert models.generate(prompts, torch.full((len(prompts),), 0.3), beams) == expected
    assert models.generate(prompts, torch.full((len(prompts),), 0.8), beams) != expected


@pytest.mark.parametrize("beams", [1, 4])
def test_prompts_of_one_token(models: Models, beams: int) -> None:
    """Nothing to compute ahead."""
    prompts, alphas = draw_prompts([1] * 4, seed=5), torch.tensor([0.0, 1.0, 0.5, 0.2])
    answers = models.generate(prompts, alphas, beams)
    for prompt, alpha, answer in zip(prompts, alphas.tolist(), answers, strict=True):
        models.plain.mix(1 - alpha, alpha)
        assert plain_generate(models.plain.model, [prompt], beams) == [answer]


@pytest.mark.parametrize("beams", [1, 4])
def test_answers_end_before_the_end_token(models: Models, beams: int) -> None:
    """The end token is one that the model does say, so that rows of one batch end at different places."""
    prompts = draw_prompts()
    open_end = models.generate(prompts, ALPHAS, beams)
    for eos in [answer[i] for answer in open_end for i in (3, 5)]:
        answers = models.generate(prompts, ALPHAS, beams, eos=eos)
        if min(map(len, answers)) < NEW_TOKENS == max(map(len, answers)):
            break
    else:
        raise AssertionError("no row ends early")
    for prompt, alpha, answer in zip(prompts, ALPHAS.tolist(), answers, strict=True):
        assert eos not in answer
        models.plain.mix(1 - alpha, alpha)
        assert plain_generate(models.plain.model, [prompt], beams, eos) == [answer]
    if beams == 1:
        assert answers == [a[: a.index(eos)] if eos in a else a for a in open_end]


@contextmanager
def ends_sooner(base: Any, by: float) -> Iterator[None]:
    """Flat logits, and `by` on top of the end token's: answers of all lengths, and beams that come back from behind."""

    def bend(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return 0.5 * logits + by * (torch.arange(logits.shape[-1]) == EOS)

    with base.get_output_embeddings().register_forward_hook(bend):
        yield


@pytest.mark.parametrize("beams", [1, 2, 3, 5])
@pytest.mark.parametrize("by", [1.5, 2.0, 2.5])
def test_a_batch_answers_as_transformers_does(models: Models, beams: int, by: float) -> None:
    """The same padded batch, of prompts that end at different steps; by the library's own search and cache."""
    lengths: list[int] = []
    models.plain.mix(0.7, 0.3)
    for seed, num_prompts in enumerate((5, 8, 20)):
        prompts = draw_prompts(([3, 14, 1, 9, 2, 6, 5, 4] * 3)[:num_prompts], seed=seed)
        with ends_sooner(models.plain.model.get_base_model(), by):
            expected = plain_generate(models.plain.model, prompts, beams)
        with ends_sooner(models.dual.base_model, by):
            found = models.generate(prompts, torch.full((len(prompts),), 0.3), beams)
        assert found == expected, seed
        lengths += map(len, found)
    assert len(set(lengths)) >= 5, "answers of few lengths show little"


SAMPLED = [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 1.3, "top_k": 50, "top_p": 0.9}]
"""Settings of sampling, beside a temperature of 1."""


def sampling(seed: int = 0, **settings: Any) -> GenerationConfig:
    return GenerationConfig(**{"num_beams": 1, "max_new_tokens": NEW_TOKENS, "temperature": 1.0, **settings}, seed=seed)


def seed_of(*words: int) -> int:
    return int.from_bytes(hashlib.sha256(str(words).encode()).digest()[:8], "little") >> 1


@torch.no_grad()
def plain_sample(model: Any, prompt: list[int], config: GenerationConfig) -> list[int]:
    """One prompt without a cache: the warpers that transformers builds, and torch's draw."""
    settings = {"do_sample": True, "temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    theirs = transformers.GenerationConfig(**settings, num_beams=1)
    warpers = model.get_base_model()._get_logits_processor(theirs)
    answer: list[int] = []
    for number in range(config.max_new_tokens):
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[:, -1].float()
        generator = torch.Generator().manual_seed(seed_of(seed_of(config.seed, *prompt), number))
        probabilities = warpers(torch.tensor([prompt + answer]), logits).softmax(dim=-1)
        token = int(torch.multinomial(probabilities, 1, generator=generator))
        if token == EOS:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize("settings", SAMPLED, ids=str)
def test_a_sampled_batch_is_what_transformers_warpers_and_torch_draw_one_by_one(
    models: Models, settings: dict[str, Any]
) -> None:
    """Prompts that end leave the batch, and take their random numbers with them."""
    prompts, found = draw_prompts(), {}
    for seed in (0, 1):
        config = sampling(seed, **settings)
        with ends_sooner(models.dual.base_model, 2.5):
            found[seed] = generate(models.dual, prompts, ALPHAS, config, PAD, [EOS])
            halves = [generate(models.dual, prompts[i::2], ALPHAS[i::2], config, PAD, [EOS]) for i in (1, 0)]
        assert [halves[1][0], halves[0][0]] == found[seed][:2]
        assert [answer for pair in zip(halves[1], halves[0], strict=True) for answer in pair] == found[seed]
        for prompt, alpha, answer in zip(prompts, ALPHAS.tolist(), found[seed], strict=True):
            models.plain.mix(1 - alpha, alpha)
            with ends_sooner(models.plain.model.get_base_model(), 2.5):
                assert plain_sample(models.plain.model, prompt, config) == answer
    assert found[0] != found[1], "another seed, another answer"
    assert len(set(map(len, found[0] + found[1]))) >= 3, "answers of few lengths show little"


def test_prompts_one_by_one_are_sampled_as_in_a_batch(models: Models) -> None:
    arguments = (models.dual, draw_prompts(), ALPHAS, sampling(), PAD, [EOS])
    assert generate(*arguments, decoding=Decoding.ALONE) == generate(*arguments)


@pytest.mark.parametrize("settings", [{"temperature": 0.001}, {"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_sampling_among_one_token_is_greedy(models: Models, settings: dict[str, Any]) -> None:
    prompts = draw_prompts()
    greedy = models.generate(prompts, ALPHAS, 1)
    assert generate(models.dual, prompts, ALPHAS, sampling(**settings), PAD, [EOS]) == greedy
    assert generate(models.dual, prompts, ALPHAS, sampling(), PAD, [EOS]) != greedy


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 2.0}, {"temperature": 1.5, "top_k": 6, "top_p": 0.85}], ids=str
)
def test_tokens_have_the_probabilities_of_the_warped_logits(settings: dict[str, Any]) -> None:
    """Over prompts and over seeds alike, and the second token does not depend on the first: chi-square at 0.1 %."""
    logits = torch.tensor([1.0, 0.2, -0.5, 2.0, 0.0, -1.0, 0.7, 1.4])
    num_draws = 6000
    config = sampling(**settings)
    warped = build_warpers(config)(torch.zeros(1, 0), logits[None].clone())
    expected = warped.softmax(dim=-1)[0].double()
    possible = expected > 0
    assert possible.sum() == (len(logits) if "top_k" not in settings else 5)

    search = Sampling([[i] for i in range(num_draws)], config, [EOS], torch.device("cpu"))
    first, second = (search.advance(logits.expand(num_draws, -1))[0] for _ in range(2))
    over_seeds = torch.cat([
        Sampling([[7]], replace(config, seed=seed), [EOS], torch.device("cpu")).advance(logits[None])[0]
        for seed in range(num_draws)
    ])  # fmt: skip
    num_possible = int(possible.sum())
    for drawn in (first, second, over_seeds):
        counts = torch.bincount(drawn, minlength=len(logits)).double()
        assert counts[~possible].sum() == 0
        assert chi_square(counts[possible], num_draws * expected[possible]) < CRITICAL[num_possible - 1]
        # The comparison can fail: it knows a temperature that is another by a half.
        other = (warped[0] / 1.5).softmax(dim=-1).double()
        assert chi_square(counts[possible], num_draws * other[possible]) > CRITICAL[num_possible - 1]
    pairs = torch.bincount(first * len(logits) + second, minlength=len(logits) ** 2).double().view(len(logits), -1)
    together = num_draws * expected[possible, None] * expected[None, possible]
    assert chi_square(pairs[possible][:, possible], together) < CRITICAL[num_possible**2 - 1]


CRITICAL = {4: 18.47, 7: 24.32, 24: 51.18, 63: 103.44}
"""Degrees of freedom -> what chi-square exceeds once in 1000 times."""


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_a_finished_prompt_keeps_its_answer() -> None:
    """Where it is computed for company: its running beams continue, and may end better than expected."""
    end = 3
    search = BeamSearch(num_prompts=1, num_beams=2, max_new_tokens=8, end_ids=[end], device=torch.device("cpu"))
    search.advance(torch.tensor([[0.30, 0.20, 0.05, 0.45]] * 2).log())
    search.advance(torch.tensor([[0.04, 0.03, 0.03, 0.90], [0.40, 0.35, 0.15, 0.10]]).log())
    assert search.answers().tolist() == [[0, end]]
    assert search.unfinished.tolist() == [False], "two ended, and the best running answer is worse"
    for _ in range(5):
        search.advance(torch.tensor([[0.97, 0.01, 0.01, 0.01]] * 2).log())
    search.advance(torch.tensor([[0.01, 0.01, 0.01, 0.97]] * 2).log())
    assert search.answers().tolist() == [[0, *[end] * 7]]


def test_tokens_are_streamed_as_they_come(models: Models) -> None:
    """One prompt and one beam; what the library's own search hands to a streamer."""

    class Recorder:
        def __init__(self) -> None:
            self.put_so_far: list[list[int]] = []
            self.ended = 0

        def put(self, tokens: torch.Tensor) -> None:
            self.put_so_far.append(tokens.flatten().tolist())

        def end(self) -> None:
            self.ended += 1

    (prompt,) = draw_prompts([6])
    ours, theirs = Recorder(), Recorder()
    models.plain.mix(0.7, 0.3)
    with ends_sooner(models.plain.model.get_base_model(), 1.5):
        models.plain.model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            streamer=theirs,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
    with ends_sooner(models.dual.base_model, 1.5):
        config = GenerationConfig(1, NEW_TOKENS)
        (answer,) = generate(models.dual, [prompt], torch.tensor([0.3]), config, PAD, [EOS], streamer=ours)
    assert ours.put_so_far == theirs.put_so_far
    assert ours.put_so_far[0] == prompt
    assert len(ours.put_so_far) > 2
    assert [*itertools.chain(*ours.put_so_far[1:])][: len(answer)] == answer
    assert ours.ended == theirs.ended == 1


@pytest.mark.parametrize("beams", [1, 4])
def test_finished_rows_are_not_computed(models: Models, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch computes as many rows as its prompts alone would, together: in a batch of 16, none for company."""
    monkeypatch.setattr(generation, "WORTH_COPYING", 1.0)
    prompts, alphas = draw_prompts([2, 5, 9, 3] * 4, seed=2), torch.linspace(0.1, 0.9, 16)
    base, rows = models.dual.base_model, list[int]()

    def count(_module: Any, inputs: Any, _output: Any) -> None:
        rows.append(len(inputs[0]))

    def end_soon(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits + END_SOON * (torch.arange(logits.shape[-1]) == EOS)

    hooks = [
        base.get_input_embeddings().register_forward_hook(count),
        base.get_output_embeddings().register_forward_hook(end_soon),
    ]
    try:
        answers = models.generate(prompts, alphas, beams)
        together = rows[1:]  # after the prompts
        rows.clear()
        alone = [models.generate([prompt], alphas[i : i + 1], beams)[0] for i, prompt in enumerate(prompts)]
    finally:
        for hook in hooks:
            hook.remove()
    assert answers == alone
    assert sum(together) == sum(rows) - len(prompts)  # each began with a row of its prompt
    assert sum(together) < 0.8 * len(together) * len(prompts) * beams, "no row ended early enough to tell anything"


def test_weights_change_answers(models: Models) -> None:
    (prompt,) = draw_prompts([6])
    alphas = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    answers = models.generate([prompt] * 5, alphas, 1)
    assert len({tuple(answer) for answer in answers}) >= 4
    models.dual.set_mix(
        global_local_mix(0.5)
    )  # what a batch leaves behind is overwritten by the next call, of any size
    before = embed(models.dual, "local", [prompt], PAD, 100)["mean"]
    assert models.generate([prompt] * 2, alphas[1:3], 4) != answers[1:3]
    assert torch.equal(embed(models.dual, "local", [prompt], PAD, 100)["mean"], before)
    assert models.generate([prompt] * 5, alphas, 1) == answers


ARCHITECTURES: dict[str, tuple[Any, list[str]]] = {
    # learned absolute positions: a row must not notice its padding
    "gpt2": (GPT2Config(vocab_size=258, n_positions=64, n_embd=32, n_layer=2, n_head=4), ["c_attn"]),
    # a window shorter than the prompts: the cache forgets
    "sliding": (
        MistralConfig(
            vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=4, max_position_embeddings=128,
        ),
        TARGETS,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures(name: str, beams: int) -> None:
    config, targets = ARCHITECTURES[name]
    config.initializer_range, config.bos_token_id, config.eos_token_id, config.pad_token_id = 0.3, None, EOS, PAD
    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_config(config).eval()
    lora = LoraConfig(rank=4, alpha=8.0, dropout=0.0, target_modules=targets)
    dual = AdapterModel(base, adapter_table(lora), lora)
    draw_states(dual)
    prompts = draw_prompts()
    answers = generate(dual, prompts, ALPHAS, GenerationConfig(beams, NEW_TOKENS), PAD, [EOS])
    states = embed(dual, "none", prompts, PAD, 16)["last_token"]
    assert len({tuple(answer) for answer in answers}) == len(prompts)
    for i, (prompt, alpha) in enumerate(zip(prompts, ALPHAS, strict=True)):
        dual.set_mix(global_local_mix(alpha[None].repeat_interleave(beams)))
        assert plain_generate(base, [prompt], beams) == [answers[i]], i
        dual.set_mix(dual.no_mix)
        with torch.no_grad():
            hidden = base(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(states[i], hidden[0, -1], rtol=0, atol=1e-5)


# ---- weights --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_each_rows_weights_in_every_layer(models: Models) -> None:
    """Output minus base output is (1 - alpha) times the global adapter's and alpha times the local one's."""
    models.dual.peft_model.eval()
    layers = [module for module in models.dual.peft_model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 4
    x = torch.randn(len(ALPHAS), 5, 32, generator=torch.Generator().manual_seed(1))

    def added(layer: Any, mix: torch.Tensor) -> torch.Tensor:
        models.dual.set_mix(mix)
        return layer(x) - layer.base_layer(x)

    for layer in layers:
        one, other = added(layer, global_local_mix(0.0)), added(layer, global_local_mix(1.0))
        weight = ALPHAS[:, None, None]
        assert float((one - other).abs().mean()) > 0.1
        both = added(layer, global_local_mix(ALPHAS))
        torch.testing.assert_close(both, (1 - weight) * one + weight * other, rtol=0, atol=2e-5)
        assert float(added(layer, models.dual.no_mix).abs().max()) == 0.0, "neither"


@torch.no_grad()
def test_weights_sum_to_one(models: Models) -> None:
    """Where both adapters are the same one, the mix does not matter."""
    states, ids = models.states, torch.tensor(draw_prompts([9] * len(ALPHAS)))
    models.dual.peft_model.eval()
    models.dual.load_state("local", states["global"])
    models.dual.set_mix(global_local_mix(0.0))
    expected = models.dual.peft_model(input_ids=ids).logits
    models.dual.set_mix(global_local_mix(ALPHAS))
    torch.testing.assert_close(models.dual.peft_model(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
    models.dual.load_state("local", states["local"])
    assert float((models.dual.peft_model(input_ids=ids).logits - expected).abs().max()) > 0.1
