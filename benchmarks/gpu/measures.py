"""What is measured on a `Bench`, each against something that runs beside it in turns."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.floor import Floor, matmul_flops_per_second
from benchmarks.gpu.bench import PHASE, Bench, long_examples, mixed_examples, short_examples
from benchmarks.plain_trainer import PlainTrainer
from dpa_ds.adapters.methods import GLOBAL
from dpa_ds.config.schema import GenerationConfig
from dpa_ds.data.tokenize import TokenizedExamples
from dpa_ds.engine.packed_attention import PackedAttention, choose_kernel
from dpa_ds.inference.generation import generate
from tests.tiny import make_tokenizer

ONE_PASS = 16384
"""Tokens a pass that hold all short examples at once, and then have many segments."""
TRAINER_BATCHES = (16, 32, 64)
"""Examples a pass of the Trainer: its best one counts."""
PROFILED_TOKENS = 4
"""Tokens of each answer under the profiler."""
COMMON_IN_NAMES = (
    "void ",
    "at::native::",
    "(anonymous namespace)::",
    "c10::",
    "gpu_kernel_impl_nocast",
    "gpu_kernel_impl",
)
"""In most names of kernels."""
NO_END = -1
"""An end token that no model produces: all answers have the same length."""


def measure_long(bench: Bench) -> None:
    """Rows of equal length: tokens/s, MFU, and the peak of memory, which the plan is for."""
    examples = long_examples(bench.setting)
    tokens = bench.setting.rows * bench.setting.length
    bench.put_step("long", "", bench.build(examples, tokens))


def measure_short(bench: Bench) -> None:
    """The paper's step: what a small budget costs, the prefix saves, and DeepSpeed's timer costs."""
    examples = short_examples(bench.setting)
    bench.put_step("short", "", bench.build(examples, ONE_PASS))
    bench.put_step("short", "recipe's budget", bench.build(examples, bench.config.train.micro_batch_tokens))
    bench.put_step("short", "no shared prefix", bench.build(examples, ONE_PASS, prefix_sharing=False))
    with no_throughput_timer(bench):
        bench.put_step("short", "no throughput timer", bench.build(examples, ONE_PASS))


def measure_mixed(bench: Bench) -> None:
    """Examples of unlike lengths: more padding or more segments."""
    bench.put_step("mixed", "", bench.build(mixed_examples(bench.setting), ONE_PASS))


def measure_attention(bench: Bench) -> None:
    """What the engine chose (on a GPU in 16 bit one call for all examples) against a call for each segment."""
    for name, examples in (("short", short_examples(bench.setting)), ("mixed", mixed_examples(bench.setting))):
        compare_with_segments(bench, name, examples)


def compare_with_segments(bench: Bench, variant: str, examples: TokenizedExamples) -> None:
    """The same step by both kernels, each with the micro-batches that are made for it; loss and gradient must agree."""
    segments = Segments(bench)
    step = bench.build(examples, ONE_PASS)
    result = bench.engine.train_step(step, 0.0)
    with segments:
        step_of_segments = bench.build(examples, ONE_PASS)
        expected = bench.engine.train_step(step_of_segments, 0.0)
    works = {"chosen": lambda: bench.train(step), "segments": lambda: bench.train(step_of_segments)}
    found = bench.in_turns(works, {"segments": segments})
    bench.results.put(
        "attention",
        variant,
        kernel=choose_kernel(bench.base),
        seconds=found,
        times_as_fast=median_ratio(found["segments"], found["chosen"]),
        loss_apart=abs(float(result.loss_share / expected.loss_share) - 1),
        gradient_norm_apart=abs(float(result.grad_norm / expected.grad_norm) - 1),
    )


class Segments:
    """The state in which the engine calls attention for each segment."""

    def __init__(self, bench: Bench) -> None:
        self._engine = bench.engine
        self._chosen = bench.engine.rows
        self._segments = PackedAttention(bench.base, "segments")

    def __enter__(self) -> None:
        self._engine.rows = self._segments

    def __exit__(self, *_: object) -> None:
        self._engine.rows = self._chosen


def measure_floor(bench: Bench) -> None:
    """Short rows against the frozen base alone on the same tokens."""
    examples = short_examples(bench.setting)
    floor = Floor(bench.base, ONE_PASS, time.perf_counter)
    bench.engine.activate(PHASE)  # the floor has frozen the adapters with the base
    step = bench.build(examples, ONE_PASS)
    steps = [list(range(len(examples)))]
    works = {"ours": lambda: bench.train(step), "floor": lambda: floor.run(examples, steps)}
    found = bench.in_turns(works, {"floor": FrozenBase(bench)})
    bench.results.put(
        "floor",
        **bench.speed(step.real_tokens, found["floor"]),
        ours_over_floor=median_ratio(found["ours"], found["floor"]),
    )


class FrozenBase:
    """The state in which no adapter takes part, and none is trained; after it that of the phase."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def __enter__(self) -> None:
        adapters = self._bench.adapters
        adapters.set_mix(adapters.no_mix)
        for adapter in adapters.table:
            adapters.set_trainable(adapter, False)

    def __exit__(self, *_: object) -> None:
        self._bench.engine.activate(PHASE)


def measure_trainer(bench: Bench) -> None:
    """Short rows against Hugging Face's Trainer with PEFT, on a second base: the same weights, examples and loss."""
    plain = PlainTrainer(
        bench.random_base(), make_tokenizer(), bench.config.lora, bench.config.train, bench.device, time.perf_counter
    )
    batches = TRAINER_BATCHES
    if bench.setting.model == "tiny":
        batches = TRAINER_BATCHES[:1]  # a dry run needs one
    found = []
    for batch in batches:
        try:
            found.append(compare_with_trainer(bench, plain, batch))
        except torch.OutOfMemoryError as error:
            bench.results.put("trainer", f"batch {batch}", error=str(error)[:200])
            bench.free()
    best = min(found, key=lambda one: one["times_as_fast"])
    bench.results.put("trainer", **best)


def compare_with_trainer(bench: Bench, plain: PlainTrainer, batch: int) -> dict[str, Any]:
    """Put how fast the Trainer is with `batch` examples a pass; what is compared with it."""
    examples = short_examples(bench.setting)
    steps = [list(range(len(examples)))]

    def ours() -> float:  # as the Trainer's, from examples to a step
        return float(bench.train(bench.build(examples, ONE_PASS)))

    _, losses = plain.run(PHASE, bench.states, examples, steps, batch)
    trainer_seconds = []
    for _ in range(bench.setting.repeats):
        # Two steps, because its first one starts the loader.
        seconds, _ = plain.run(PHASE, bench.states, examples, steps * 2, batch)
        trainer_seconds.append(seconds / 2)
    our_seconds = bench.in_turns({"ours": ours})["ours"]
    compared = {
        "batch": batch,
        "times_as_fast": round(statistics.median(trainer_seconds) / statistics.median(our_seconds), 3),
        "loss_apart": abs(losses[0] / ours() - 1),
    }
    bench.results.put(
        "trainer", f"batch {batch}", **bench.speed(int(examples.offsets[-1]), trainer_seconds), **compared
    )
    return compared


def measure_answers(bench: Bench) -> None:
    """Answers with a weight for each row, against the same model with one adapter merged into its weights."""
    for num_rows in bench.setting.answer_rows:
        answer_rows(bench, num_rows)


def answer_rows(bench: Bench, num_rows: int) -> None:
    """One batch of `num_rows` answers."""
    setting = bench.setting
    ids = random_prompts(bench, num_rows)
    prompts = ids.tolist()
    ids = ids.to(bench.device)
    alphas = torch.linspace(0.1, 0.9, num_rows)
    config = GenerationConfig(num_beams=1, max_new_tokens=setting.new_tokens)
    num_new = num_rows * setting.new_tokens

    def weighted() -> None:
        answers = generate(bench.adapters, prompts, alphas, config, pad_id=0, end_ids=[NO_END])
        assert sum(map(len, answers)) == num_new

    def merged() -> None:
        answers = bench.base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=setting.new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=NO_END,
            pad_token_id=0,
        )
        assert answers.numel() == ids.numel() + num_new

    found = bench.in_turns({"weighted": weighted, "merged": merged}, {"merged": MergedAdapter(bench)})
    seconds = statistics.median(found["weighted"])
    bench.results.put(
        "answers",
        f"{num_rows} rows",
        num_new_tokens=num_new,
        tokens_per_second=round(num_new / seconds, 1),
        ms_a_pass=round(1e3 * seconds / setting.new_tokens, 2),
        merged_ms_a_pass=round(1e3 * statistics.median(found["merged"]) / setting.new_tokens, 2),
        weighted_to_merged=median_ratio(found["merged"], found["weighted"]),
        seconds=found,
    )


def random_prompts(bench: Bench, num_rows: int) -> torch.Tensor:
    """Prompts of equal length, (rows, tokens)."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(3, bench.shape.vocab, (num_rows, bench.setting.prompt), generator=draw)


class MergedAdapter:
    """The state with the global adapter in the base's weights, and none beside them: transformers alone decodes."""

    def __init__(self, bench: Bench) -> None:
        self._adapters = bench.adapters

    def __enter__(self) -> None:
        self._adapters.set_mix(self._adapters.no_mix)
        self._adapters.peft_model.merge_adapter([GLOBAL])

    def __exit__(self, *_: object) -> None:
        self._adapters.peft_model.unmerge_adapter()


def measure_host(bench: Bench) -> None:
    """The share of a step, and of decoding, in which the device computes: in the rest it waits for the host."""
    for name, examples in (("long", long_examples(bench.setting)), ("short", short_examples(bench.setting))):
        step = bench.build(examples, ONE_PASS)
        put_busy_share(bench, name, partial(bench.train, step))
    prompts = random_prompts(bench, max(bench.setting.answer_rows)).tolist()
    alphas = torch.linspace(0.1, 0.9, len(prompts))
    config = GenerationConfig(num_beams=1, max_new_tokens=PROFILED_TOKENS)
    put_busy_share(
        bench, "answers", lambda: generate(bench.adapters, prompts, alphas, config, pad_id=0, end_ids=[NO_END])
    )


def put_busy_share(bench: Bench, variant: str, work: Callable[[], Any]) -> None:
    """Seconds of `work` without a profiler; with one, seconds of its kernels, and of the operators that launch them."""
    work()
    wall = bench.seconds(work)
    activities = [ProfilerActivity.CPU]
    if bench.on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        work()
        bench.synchronize()
    kernels = []
    operators = []
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            kernels.append(event)
        elif event.device_type == DeviceType.CPU and not event.is_user_annotation:
            operators.append(event)
    busy = sum(map(device_seconds, kernels))
    bench.results.put(
        "host",
        variant,
        wall_seconds=round(wall, 4),
        busy_seconds=round(busy, 4) if bench.on_gpu else None,
        busy_share=round(busy / wall, 3) if bench.on_gpu else None,
        num_kernels=sum(event.count for event in kernels),
        operators=longest(operators, device_seconds),
        on_host=longest(operators, host_seconds),
        kernels=longest(kernels, device_seconds),
    )


def longest(events: list[Any], seconds: Callable[[Any], float]) -> list[tuple[str, float, int]]:
    """Name, milliseconds and number of calls of the ten that take most `seconds`."""
    events = sorted(events, key=seconds, reverse=True)[:10]
    return [(kernel_name(event.key), round(1e3 * seconds(event), 2), event.count) for event in events]


def kernel_name(name: str) -> str:
    """The name without what all kernels of torch have in common, so that what tells them apart is not cut off."""
    for common in COMMON_IN_NAMES:
        name = name.replace(common, "")
    return name[:160]


def median_ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Of what was measured in the same turns."""
    return round(statistics.median(one / other for one, other in zip(seconds, others, strict=True)), 3)


def device_seconds(event: Any) -> float:
    """What the kernels of one name took, or those that an operator has launched, in seconds."""
    return float(event.self_device_time_total) / 1e6


def host_seconds(event: Any) -> float:
    """What an operator took on the host, without those that it has called, in seconds."""
    return float(event.self_cpu_time_total) / 1e6


def measure_matmul(bench: Bench) -> None:
    """A large matrix product: of the published peak, what is to be had."""
    flops = matmul_flops_per_second(bench.base.dtype, bench.device, time.perf_counter)
    bench.results.put("matmul", tflops=round(flops / 1e12, 3), share_of_peak=round(flops / bench.peak_flops, 3))


@contextmanager
def no_throughput_timer(bench: Bench) -> Iterator[None]:
    """DeepSpeed's throughput timer (0.19.8) waits for the device before each forward pass."""
    timer = bench.engine.engine.tput_timer.config
    was = timer.enabled
    timer.enabled = False
    try:
        yield
    finally:
        timer.enabled = was


MEASURES = {
    "long": measure_long,
    "short": measure_short,
    "answers": measure_answers,
    "trainer": measure_trainer,
    "floor": measure_floor,
    "mixed": measure_mixed,
    "attention": measure_attention,
    "host": measure_host,
    "matmul": measure_matmul,
}
"""By the names that `Setting.measures` has."""
