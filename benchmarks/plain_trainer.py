"""The same phase as a practitioner writes it without this project: Hugging Face Trainer on a PEFT model.

Two active LoRA adapters with weights (or one), padding to the longest row of each batch, logits at all positions,
gradient accumulation, the Trainer's own AdamW, schedule and clipping.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from dpa_ds.adapters.methods import GLOBAL, LOCAL, Phase
from dpa_ds.adapters.state import AdapterState
from dpa_ds.config.schema import LoraConfig, TrainConfig
from dpa_ds.data.batching import IGNORE_INDEX
from dpa_ds.data.tokenize import TokenizedExamples


class PlainTrainer:
    """Runs phases on its own copy of the model, in one process without DistributedDataParallel."""

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        lora: LoraConfig,
        train: TrainConfig,
        device: torch.device,
        clock: Callable[[], float],
    ) -> None:
        self._train, self._device, self._clock, self._bf16 = train, device, clock, base.dtype == torch.bfloat16
        self._folder = tempfile.TemporaryDirectory()
        tokenizer.padding_side = "right"
        self._collator = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORE_INDEX)
        config = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.target_modules),
            task_type="CAUSAL_LM",
        )
        self.model = peft.PeftModel(base, config, adapter_name="global")
        self.model.add_adapter("local", config)

    def run(
        self,
        phase: Phase,
        states: dict[str, AdapterState],
        examples: TokenizedExamples,
        steps: Sequence[Sequence[int]],
        device_batch_size: int,
    ) -> tuple[float, list[float]]:
        """One phase from `states` over the examples of `steps`, which all have the same number of them.

        Returns:
            seconds of the training loop, and the loss of every optimizer step.
        """
        self._activate(phase, states)
        rows = [_row(examples, index) for step in steps for index in step]
        timer = _Timer(self._clock)
        with _no_launcher():
            trainer = Trainer(
                model=self.model,
                args=self._arguments(len(steps), device_batch_size),
                train_dataset=rows,
                data_collator=self._collator,
                callbacks=[timer],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        assert trainer.model_wrapped is self.model, "the Trainer wrapped the model: its time would include that"
        return timer.seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def computed_tokens(self, examples: TokenizedExamples, step: Sequence[int], device_batch_size: int) -> int:
        """Tokens of one step, padding included."""
        batches = [step[start : start + device_batch_size] for start in range(0, len(step), device_batch_size)]
        return sum(len(batch) * max(examples.length(index) for index in batch) for batch in batches)

    def _activate(self, phase: Phase, states: dict[str, AdapterState]) -> None:
        for adapter in (GLOBAL, LOCAL):
            peft.set_peft_model_state_dict(self.model, states[adapter], adapter_name=adapter)
        weights = {GLOBAL: 1.0 - phase.alpha, LOCAL: phase.alpha}
        self.model.base_model.set_adapter([adapter for adapter in (GLOBAL, LOCAL) if weights[adapter] > 0])
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(f".{phase.trainable}." in name)
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer):
                for adapter in (GLOBAL, LOCAL):
                    layer.set_scale(adapter, weights[adapter])

    def _arguments(self, max_steps: int, device_batch_size: int) -> TrainingArguments:
        train = self._train
        # One loss a step is logged, as the engine reads one gradient norm a step: both wait for the device once.
        return TrainingArguments(
            output_dir=self._folder.name,
            per_device_train_batch_size=device_batch_size,
            gradient_accumulation_steps=train.batch_size // device_batch_size,
            max_steps=max_steps,
            learning_rate=train.learning_rate,
            lr_scheduler_type=train.lr_schedule,
            max_grad_norm=train.max_grad_norm,
            train_sampling_strategy="sequential",
            bf16=self._bf16,
            use_cpu=self._device.type == "cpu",
            dataloader_pin_memory=self._device.type != "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )


class _Timer(TrainerCallback):
    """Seconds from the first batch to the last optimizer step; building the Trainer is not counted."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self.seconds = clock, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._started = self._clock()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = self._clock() - self._started


@contextlib.contextmanager
def _no_launcher() -> Iterator[None]:
    """Hide the rank variables set for DeepSpeed's world of one rank: the Trainer would take DDP for it."""
    hidden = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _row(examples: TokenizedExamples, index: int) -> dict[str, list[int]]:
    tokens = examples.input_ids(index).tolist()
    labels = [IGNORE_INDEX] * len(tokens)
    for start, stop in examples.label_spans(index):
        labels[start:stop] = tokens[start:stop]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}
