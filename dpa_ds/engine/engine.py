"""One DeepSpeed engine that holds both adapters for the whole run.

The adapters are two named optimizer groups. `activate` does everything a phase change needs in one call; nobody
sets requires_grad, active adapters, scales or learning rates elsewhere. Why: under ZeRO 2 and 3 a frozen
parameter still gets a zero gradient, and an idle group with a learning rate drifts as far as the active one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import deepspeed
import pydantic
import torch
import torch.nn.functional as F
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from dpa_ds.adapters.adapter_model import AdapterModel, global_local_mix
from dpa_ds.adapters.methods import Phase
from dpa_ds.adapters.state import AdapterState
from dpa_ds.config.schema import RunConfig, TrainConfig
from dpa_ds.config.validate import show
from dpa_ds.data.batching import IGNORE_INDEX, MicroBatch, StepBatch
from dpa_ds.distributed.world import World
from dpa_ds.engine.master_weights import Fragment, locate_masters
from dpa_ds.engine.packed_attention import PackedAttention
from dpa_ds.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_deepspeed_json(file_json: Mapping[str, Any], config: RunConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config of one rank group: the JSON file's keys plus those that the recipe owns.

    Gradient accumulation is driven by hand (one boundary per optimizer step), so DeepSpeed sees micro-batches of 1.
    """
    offload = file_json.get("zero_optimization", {}).get("offload_optimizer", {})
    if offload.get("device") == "nvme":
        raise ConfigError(
            f"{config.engine.deepspeed_config}: offload_optimizer.device nvme is not supported: only the adapters have "
            "optimizer state, and it fits in memory; use cpu, or offload_param for the frozen base"
        )
    _check_by_deepspeed(file_json, config.engine.deepspeed_config)
    merged = dict(file_json)
    merged |= {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.max_grad_norm,
        "steps_per_print": None,
    }
    for precision in ("fp16", "bf16"):
        merged[precision] = {**merged.get(precision, {}), "enabled": config.model.precision == precision}
    return merged


def _check_by_deepspeed(file_json: Mapping[str, Any], path: str) -> None:
    """Raise ConfigError for what DeepSpeed's own types refuse, before the base is loaded."""
    sections = {"zero_optimization": DeepSpeedZeroConfig, "fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config}
    for section, kind in sections.items():
        try:
            kind(**file_json.get(section, {}))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, (section, *first["loc"])))[:200]
            raise ConfigError(
                f"{path}: DeepSpeed refuses {key}: {first['msg']}, got {show(first['input'])}: correct it, or leave it out"
            ) from error


class AdapterEngine:
    """Both adapters in one DeepSpeed engine. Every method is collective over the rank group."""

    def __init__(self, adapters: AdapterModel, world: World, train: TrainConfig, ds_json: dict[str, Any]) -> None:
        self.adapters, self.world, self._train = adapters, world, train
        self.packing = PackedAttention(adapters.base_model)
        optimizer = torch.optim.AdamW(_optimizer_groups(adapters), betas=train.adam_betas, eps=train.adam_epsilon)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=adapters.peft_model, optimizer=optimizer, config=ds_json, dist_init_required=False
        )
        self.stage = int(self.engine.zero_optimization_stage())
        if self.stage == 3:
            # DeepSpeed gathers a parameter when the module that owns it is called. A mixed layer reads the weights of modules
            # that it does not call.
            for layer in adapters.layers:
                for weight in layer.adapter_weights():
                    deepspeed.zero.register_external_parameter(layer, weight)
        self._inner = getattr(self.optimizer, "optimizer", self.optimizer)
        self._fragments = {
            adapter: locate_masters(self.optimizer, self.stage, world.rank, adapters.parameters[adapter])
            for adapter in adapters.table
        }
        if self.engine.dp_world_size != world.world_size:
            raise ConfigError(
                f"the DeepSpeed JSON divides the rank group ({self.engine.dp_world_size} of {world.world_size} ranks are "
                "data-parallel): leave tensor, sequence and pipeline parallelism out"
            )
        # Dynamic loss scaling (fp16) must not carry over from one phase or client to the next.
        self._scaler = getattr(self.optimizer, "loss_scaler", getattr(self.optimizer, "loss_scale_config", None))
        self._fresh_scaler = vars(self._scaler).copy() if self._scaler is not None else {}
        self._trains: str | None = None
        self._positions: torch.Tensor | None = None
        head = adapters.base_model.get_output_embeddings()
        head.register_forward_pre_hook(self._select_positions)

    # ---- phases -----------------------------------------------------------------------------------------------

    def activate(self, phase: Phase) -> None:
        """Make `phase.trainable` trainable beside the other, frozen adapter, with `phase.alpha` as the mix.

        Sets mix, requires_grad and both groups' lr and weight decay, and resets the optimizer state of the adapter
        that starts (both moments and the step count, in every ZeRO sub-group).
        """
        self.adapters.set_mix(global_local_mix(phase.alpha))
        for adapter in self.adapters.table:
            self.adapters.set_trainable(adapter, adapter == phase.trainable)
        for group in self._inner.param_groups:
            group["lr"] = 0.0
            group["weight_decay"] = self._train.weight_decay if group["name"] == phase.trainable else 0.0
        self.reset_optimizer_state(phase.trainable)
        if self._scaler is not None:
            vars(self._scaler).update(self._fresh_scaler)
        if self.stage == 3:  # a frozen parameter's share is never written again, but still tested for overflow
            self.optimizer.grad_partitions_flat_buffer.zero_()
        self._trains = phase.trainable

    def train_step(self, step: StepBatch, learning_rate: float) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """One optimizer step of the active phase on this rank's micro-batches.

        The loss is the mean over the label tokens of the whole step, on all ranks: a mean of means would depend on
        the rank count.

        Returns:
            this rank's share of the loss (the sum over ranks is the loss of the step) and the gradient norm before
            clipping, scalars on the device; and whether the step was applied: DeepSpeed skips one whose gradient is
            not finite.
        """
        assert self._trains is not None, "activate(phase) first"
        self._group(self._trains)["lr"] = learning_rate
        self.engine.train()
        share = torch.zeros((), device=self.world.device)
        for i, micro_batch in enumerate(step.micro_batches):
            self.engine.set_gradient_accumulation_boundary(i == len(step.micro_batches) - 1)
            with self.packing:
                loss = self._loss_sum(micro_batch) / step.num_label_tokens
                share += loss.detach()
                # DeepSpeed averages gradients over the ranks; ours are to be summed.
                self.engine.backward(loss * self.world.world_size)
        norm = self._gradient_norm_of_stage_zero() if self.optimizer is self._inner else None
        self.engine.step()
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        norm = torch.as_tensor(0.0 if norm is None else norm, device=self.world.device).float()
        return share, norm, bool(self.engine.was_step_applied())

    def _gradient_norm_of_stage_zero(self) -> torch.Tensor:
        """DeepSpeed does not keep the norm of an fp32 step without ZeRO. Gradients are already averaged over ranks."""
        gradients = [
            parameter.grad
            for group in self._inner.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        return torch.nn.utils.get_total_norm(gradients)

    @torch.no_grad()
    def loss(self, steps: Sequence[StepBatch], mix: torch.Tensor) -> float:
        """Mean loss per label token over `steps`, the adapters mixed as `AdapterModel.set_mix` says, dropout off."""
        self.adapters.set_mix(mix)
        self.engine.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for step in steps:
            for micro_batch in step.micro_batches:
                with self.packing:
                    total[0] += float(self._loss_sum(micro_batch))
            total[1] += step.num_label_tokens / self.world.world_size
        self.world.all_reduce_(total)
        return float(total[0] / total[1])

    def _loss_sum(self, micro_batch: MicroBatch) -> torch.Tensor:
        """Cross-entropy summed over the label tokens, fp32. Logits are computed at labelled positions only."""
        # Found on the CPU, where targets are: on a GPU it would wait for the device.
        positions = (micro_batch.targets != IGNORE_INDEX).nonzero().flatten()
        if len(positions) == 0:  # a dummy, so that all ranks run the same collectives: one ignored position
            positions = torch.zeros(1, dtype=torch.int64)
        device = self.world.device
        self._positions = positions.to(device)
        logits = self.engine(
            input_ids=micro_batch.input_ids[None].to(device),
            position_ids=micro_batch.position_ids[None].to(device),
            use_cache=False,
            **self.packing.arguments(micro_batch, device),
        ).logits
        return F.cross_entropy(
            logits[0].float(), micro_batch.targets[positions].to(device), ignore_index=IGNORE_INDEX, reduction="sum"
        )

    def _select_positions(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor] | None:
        """Pre-hook of the output head: (batch, seq_len, hidden) -> (1, number of labels, hidden)."""
        if self._positions is None:
            return None
        positions, self._positions = self._positions, None
        return (inputs[0].flatten(0, 1).index_select(0, positions).unsqueeze(0),)

    def _group(self, adapter: str) -> dict[str, Any]:
        return next(group for group in self._inner.param_groups if group["name"] == adapter)

    # ---- adapter state ----------------------------------------------------------------------------------------

    def read_state(self, adapter: str) -> AdapterState:
        """Full fp32 master weights of `adapter`, on CPU, on every rank of the group."""
        return self._gather(adapter, lambda fragment: fragment.flat)

    @torch.no_grad()
    def write_state(self, adapter: str, state: AdapterState) -> None:
        """Install `state` in the fp32 master and in the working copy (the next step alone would update the copy)."""
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        assert shapes == self.adapters.shapes[adapter], "adapter state of another model"
        for key, parameter in self.adapters.parameters[adapter].items():
            flat = state[key].reshape(-1)
            fragment = self._fragments[adapter][key]
            if fragment is not None:
                fragment.of(fragment.flat).copy_(flat[fragment.start : fragment.start + fragment.numel])
            if self.stage == 3 and fragment is not None:
                partition = parameter.ds_tensor.view(-1)  # type: ignore[attr-defined]
                partition[: fragment.numel].copy_(flat[fragment.start : fragment.start + fragment.numel])
            if parameter.numel() == flat.numel():  # ZeRO 0-2, and ZeRO-3's small parameters that stay gathered
                parameter.data.copy_(state[key])

    def read_optimizer_state(self, adapter: str) -> AdapterState:
        """AdamW moments of `adapter` as `exp_avg.<key>` and `exp_avg_sq.<key>`, and the step count as `step`."""
        state: AdapterState = {"step": torch.tensor([self._step_count(adapter)])}
        for moment in MOMENTS:
            gathered = self._gather(adapter, self._moment(moment))
            state |= {f"{moment}.{key}": value for key, value in gathered.items()}
        return state

    @torch.no_grad()
    def write_optimizer_state(self, adapter: str, state: AdapterState) -> None:
        """Inverse of `read_optimizer_state`."""
        for key, fragment in self._fragments[adapter].items():
            if fragment is None:
                continue
            entry = self._optimizer_entry(fragment)
            entry["step"].fill_(float(state["step"]))
            for moment in MOMENTS:
                flat = state[f"{moment}.{key}"].reshape(-1)
                fragment.of(entry[moment]).copy_(flat[fragment.start : fragment.start + fragment.numel])

    def read_scaler(self) -> dict[str, float]:
        """fp16: the numbers of the dynamic loss scale; else empty."""
        state = vars(self._scaler) if self._scaler is not None else {}
        return {name: value for name, value in state.items() if type(value) in (int, float)}

    def write_scaler(self, state: Mapping[str, float]) -> None:
        """Inverse of `read_scaler`."""
        if self._scaler is not None:
            vars(self._scaler).update(state)

    @torch.no_grad()
    def reset_optimizer_state(self, adapter: str) -> None:
        """Zero both moments and the step count of `adapter`: as if AdamW had just been made."""
        for fragment in self._fragments[adapter].values():
            for value in self._inner.state.get(fragment.flat, {}).values() if fragment else ():
                value.zero_()

    def _step_count(self, adapter: str) -> float:
        """AdamW steps taken since the last reset; a rank without fragments learns it from the others."""
        steps = [
            float(self._optimizer_entry(fragment)["step"])
            for key, fragment in self._fragments[adapter].items()
            if fragment and self.adapters.table[adapter].trains(key)
        ]
        total = self.world.all_reduce_(torch.tensor([sum(steps), float(len(steps))], dtype=torch.float64))
        return float(total[0] / total[1])

    def _moment(self, name: str) -> Callable[[Fragment], torch.Tensor]:
        return lambda fragment: self._optimizer_entry(fragment)[name]

    def _optimizer_entry(self, fragment: Fragment) -> dict[str, torch.Tensor]:
        """AdamW's state of the flat tensor that holds `fragment`, made where no step was taken yet."""
        entry = self._inner.state[fragment.flat]
        if not entry:
            entry["step"] = torch.zeros(())
            entry |= {moment: torch.zeros_like(fragment.flat) for moment in MOMENTS}
        result: dict[str, torch.Tensor] = entry
        return result

    def _gather(self, adapter: str, flat_of: Callable[[Fragment], torch.Tensor]) -> AdapterState:
        """Assemble full tensors from every rank's fragments: one all-reduce of a buffer that is zero elsewhere."""
        shapes = self.adapters.shapes[adapter]
        total = sum(torch.Size(shape).numel() for shape in shapes.values())
        buffer = torch.zeros(total, device=self.world.device)
        state, offset = {}, 0
        for key, fragment in self._fragments[adapter].items():
            if fragment is not None:
                start = offset + fragment.start
                buffer[start : start + fragment.numel].copy_(fragment.of(flat_of(fragment)))
            offset += torch.Size(shapes[key]).numel()
        if self.stage > 0:  # at stage 0 every rank holds all of it
            self.world.all_reduce_(buffer)
        buffer = buffer.cpu()
        offset = 0
        for key, shape in shapes.items():
            numel = torch.Size(shape).numel()
            state[key] = buffer[offset : offset + numel].view(shape).clone()
            offset += numel
        return state


def _optimizer_groups(adapters: AdapterModel) -> list[dict[str, Any]]:
    """A group named after each adapter, with the matrices that it trains, and one with what no adapter trains.

    What is never trained is in the optimizer too, so that its fp32 master is where the others are, but in a group whose
    learning rate and weight decay stay 0.
    """
    groups, untrained = [], []
    for name, spec in adapters.table.items():
        trained = [parameter for key, parameter in adapters.parameters[name].items() if spec.trains(key)]
        untrained += [parameter for key, parameter in adapters.parameters[name].items() if not spec.trains(key)]
        groups.append({"params": trained, "name": name})
    groups.append({"params": untrained, "name": "untrained"})
    # DeepSpeed takes no empty group.
    return [{**group, "lr": 0.0, "weight_decay": 0.0} for group in groups if group["params"]]
