"""One DeepSpeed engine that holds all adapters for the whole run.

Each adapter is a named optimizer group. `activate` does everything a phase change needs in one
call; nobody sets requires_grad, the mix or learning rates elsewhere. Why: under ZeRO 2 and 3 a
frozen parameter still gets a zero gradient, and an idle group with a learning rate drifts as far as
the active one.

A full adapter state exists on the leader only: it is gathered there, and spread from there, in one
flat buffer that is freed at once. Every other rank holds its working copy and its ZeRO share of the
master.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import deepspeed
import pydantic
import torch
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from dpa_ds.adapters.adapter_model import AdapterModel, global_local_mix
from dpa_ds.adapters.methods import Phase
from dpa_ds.adapters.state import MOMENTS, AdapterState, flatten
from dpa_ds.config.schema import TrainConfig
from dpa_ds.config.validate import show
from dpa_ds.data.batching import IGNORE_INDEX, MicroBatch, StepBatch
from dpa_ds.distributed.device import send
from dpa_ds.distributed.world import World
from dpa_ds.engine.label_loss import cross_entropy_sum
from dpa_ds.engine.master_weights import Fragment, forget_order_of_modules, locate_masters
from dpa_ds.engine.packed_attention import PackedAttention, describe_attention, takes_packed_rows
from dpa_ds.engine.packing_check import choose_rows
from dpa_ds.engine.profiling import Profile
from dpa_ds.engine.rows import PaddedRows, Rows, SingleRows
from dpa_ds.errors import ConfigError

logger = logging.getLogger(__name__)

UNTRAINED = "untrained"
"""Name of the optimizer group of what no phase trains."""
UNSUPPORTED = {
    "round_robin_gradients": "it moves the adapters' masters to other ranks than DeepSpeed's own map says",
    "zero_quantized_weights": "it gathers the adapters as 8 bits too",
    "zero_quantized_gradients": "it sums the adapters' gradients as 4 bits",
    # DeepSpeed (0.19.8) leaves it to its caller to quantise, and then takes fp16 alone.
    "zero_quantized_nontrainable_weights": "it has no effect on weights that are read from files",
}
"""Key of zero_optimization -> why it is refused."""


def build_deepspeed_json(
    file_json: Mapping[str, Any], path: str, train: TrainConfig, precision: str, world_size: int
) -> dict[str, Any]:
    """The DeepSpeed config of one rank group: the JSON file's keys plus those that the recipe owns.

    Args:
        path: of the JSON file, for messages.
        world_size: ranks of the group.

    Raises:
        ConfigError: the file asks for what DeepSpeed or this project does not do.
    """
    _check_by_deepspeed(file_json, path)
    zero = file_json.get("zero_optimization", {})
    _check_zero(zero, path, world_size)
    merged = dict(file_json)
    # The optimizer is torch's AdamW wherever its state is; DeepSpeed wants to hear that this is meant.
    if merged.setdefault("zero_force_ds_cpu_optimizer", False) and "offload_optimizer" in zero:
        raise ConfigError(
            f"{path}: zero_force_ds_cpu_optimizer true does not go with offload_optimizer, because the adapters have "
            "torch's AdamW: leave zero_force_ds_cpu_optimizer out"
        )
    # Gradient accumulation is driven by hand (one boundary per optimizer step): DeepSpeed sees
    # micro-batches of 1.
    merged["train_batch_size"] = world_size
    merged["train_micro_batch_size_per_gpu"] = 1
    merged["gradient_accumulation_steps"] = 1
    merged["gradient_clipping"] = train.max_grad_norm
    merged["steps_per_print"] = None
    # It synchronises host and device before every micro-batch.
    merged["timers"] = {"throughput": {"enabled": False}, **merged.get("timers", {})}
    # Gradients are summed over the ranks in fp32, as every rank sums its own: DeepSpeed's default is the
    # training precision. Those of adapters are too few bytes to save on.
    merged.setdefault("communication_data_type", "fp32")
    for kind in ("fp16", "bf16"):
        merged[kind] = {**merged.get(kind, {}), "enabled": precision == kind}
    return merged


class StepResult(NamedTuple):
    """What one optimizer step gave on this rank; scalars on the device, so that nobody waits for them."""

    loss_share: torch.Tensor
    """This rank's share of the loss: the sum over ranks is the loss of the step."""
    grad_norm: torch.Tensor
    """Norm of the whole gradient before clipping."""
    applied: bool
    """False where DeepSpeed skipped the step because its gradient was not finite."""


@dataclass(frozen=True)
class _SentBatch:
    """A micro-batch on its way to the device: the host does not wait until it is there."""

    inputs: dict[str, Any]
    """What the model takes: input_ids of shape (rows, tokens of a row), and what tells examples of a row apart."""
    positions: torch.Tensor
    """Where a label is predicted in the rows one after the other, shape (labels,); at least one."""
    targets: torch.Tensor
    """The labels, shape (labels,)."""


class AdapterEngine:
    """All adapters in one DeepSpeed engine. Every method is collective: all ranks of the group."""

    def __init__(
        self,
        adapters: AdapterModel,
        world: World,
        train: TrainConfig,
        ds_json: dict[str, Any],
        profile: Profile | None = None,
    ) -> None:
        self.adapters = adapters
        self.world = world
        self._train = train
        self._profile = profile or Profile(None, world)
        optimizer = torch.optim.AdamW(_optimizer_groups(adapters), betas=train.adam_betas, eps=train.adam_epsilon)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=adapters.peft_model, optimizer=optimizer, config=ds_json, dist_init_required=False
        )
        if self.engine.dp_world_size != world.world_size:
            raise ConfigError(
                f"the DeepSpeed JSON divides the rank group ({self.engine.dp_world_size} of "
                f"{world.world_size} ranks are data-parallel): leave tensor, sequence and pipeline "
                "parallelism out"
            )
        self.stage = int(self.engine.zero_optimization_stage())
        if self.stage == 3:
            _register_weights_of_mixed_layers(adapters)
        # Without ZeRO and in fp32 DeepSpeed returns the optimizer it was given; else it wraps it.
        self._inner = getattr(self.optimizer, "optimizer", self.optimizer)
        self._fragments = {
            adapter: locate_masters(self.optimizer, self.stage, world.rank, parameters)
            for adapter, parameters in adapters.parameters.items()
        }
        # Dynamic loss scaling (fp16) must not carry over from one client to the next: hosting would leave a trace.
        self._scaler = getattr(self.optimizer, "loss_scaler", getattr(self.optimizer, "loss_scale_config", None))
        self._fresh_scaler = self.read_scaler()
        self._trainable: str | None = None
        self._positions: torch.Tensor | None = None
        head = adapters.base_model.get_output_embeddings()
        head.register_forward_pre_hook(self._select_positions)
        self.rows = self._choose_rows()
        """How examples are placed in the rows of a pass."""
        logger.info(f"attention {describe_attention(adapters.base_model)}; rows {self.rows.description}")

    @torch.no_grad()
    def _choose_rows(self) -> Rows:
        self.adapters.set_mix(global_local_mix(alpha=0.0))
        self.engine.eval()
        base = self.adapters.base_model

        def placed(rows: Rows, micro_batch: MicroBatch) -> torch.Tensor:
            sent = self._send(micro_batch, rows)
            with rows:
                return self._logits(sent)[0]

        def alone(sequence: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.engine(
                input_ids=send(sequence[None], self.world.device), use_cache=False
            ).logits
            return logits[0]

        candidates: list[Rows] = [PaddedRows(), SingleRows()]
        if takes_packed_rows(base):
            candidates.insert(0, PackedAttention(base))
        rows = choose_rows(candidates, placed, alone, self.adapters.vocab_size, type(base).__name__)
        self.adapters.forget_stacked()
        return rows

    # ---- phases -----------------------------------------------------------------------------------------------

    def activate(self, phase: Phase) -> None:
        """Make `phase.trainable` trainable beside the other, frozen adapter, with `phase.alpha` as the mix.

        Sets mix, requires_grad and every group's lr and weight decay, and resets the optimizer
        state of the adapter that starts (both moments and the step count, in every ZeRO sub-group).
        """
        self._profile.begin_phase(phase.trainable)
        if self.stage == 3 and self._trainable is None:
            forget_order_of_modules(self.optimizer)
        with self._profile.region("phase switch"):
            self.adapters.set_mix(global_local_mix(phase.alpha))
            for adapter in self.adapters.table:
                self.adapters.set_trainable(adapter, adapter == phase.trainable)
            for group in self._inner.param_groups:
                group["lr"] = 0.0
                group["weight_decay"] = 0.0
            self._group(phase.trainable)["weight_decay"] = self._train.weight_decay
            self.reset_optimizer_state(phase.trainable)
            self.write_scaler(self._fresh_scaler)
            if self.stage == 3:  # a frozen parameter's share is never written again, but still tested for overflow
                self.optimizer.grad_partitions_flat_buffer.zero_()
            self._trainable = phase.trainable

    def train_step(self, step: StepBatch, learning_rate: float) -> StepResult:
        """One optimizer step of the active phase on this rank's micro-batches.

        The loss is the mean over the label tokens of the whole step, on all ranks: a mean of means
        would depend on the rank count.
        """
        assert self._trainable is not None, "activate(phase) first"
        with self._profile.region("steps"):
            self._group(self._trainable)["lr"] = learning_rate
            # Walking through all modules takes the host some ms: not for every step. Those who leave training call
            # eval() of the whole base.
            if not self.adapters.base_model.training:
                self.engine.train()
            loss_share = torch.zeros((), device=self.world.device)
            sent_batches = [self._send(micro_batch, self.rows) for micro_batch in step.micro_batches]
            for sent in sent_batches:
                # By hand, because the number of micro-batches differs from step to step.
                self.engine.set_gradient_accumulation_boundary(sent is sent_batches[-1])
                with self.rows:
                    loss = self._loss_sum(sent) / step.num_label_tokens
                    loss_share += loss.detach()
                    # DeepSpeed averages gradients over the ranks; ours are to be summed.
                    self.engine.backward(loss * self.world.world_size)
            grad_norm = self._apply_gradients()
        self._profile.end_step()
        return StepResult(loss_share, grad_norm, bool(self.engine.was_step_applied()))

    def loss(self, steps: Sequence[StepBatch], mix: torch.Tensor) -> float:
        """Mean loss per label token over `steps`, with this mix (`AdapterModel.set_mix`), dropout off."""
        with self._profile.region("held-out loss"), torch.no_grad():
            self.adapters.set_mix(mix)
            self.engine.eval()
            loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
            num_label_tokens = 0
            for step in steps:
                num_label_tokens += step.num_label_tokens
                for micro_batch in step.micro_batches:
                    with self.rows:
                        loss_sum += self._loss_sum(self._send(micro_batch, self.rows))
            self.adapters.forget_stacked()  # else they would stay in memory during training
            return float(self.world.all_reduce_(loss_sum)) / num_label_tokens

    def _apply_gradients(self) -> torch.Tensor:
        """Clip and step; the norm before clipping, a scalar on the device."""
        if self.optimizer is self._inner:
            # DeepSpeed does not keep the norm of an fp32 step without ZeRO. Taken before the step,
            # which clears the gradients; they are averaged over ranks by then.
            norm = torch.nn.utils.get_total_norm(self._gradients())
            self.engine.step()
        else:
            self.engine.step()
            norm = self.engine.get_global_grad_norm()
        if norm is None:  # a step that was skipped has none
            norm = 0.0
        return torch.as_tensor(norm, device=self.world.device).float()

    def _gradients(self) -> list[torch.Tensor]:
        gradients = []
        for group in self._inner.param_groups:
            gradients += [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        return gradients

    def _send(self, micro_batch: MicroBatch, rows: Rows) -> _SentBatch:
        """All that a forward pass takes, on its way to the device."""
        # Found on the CPU, where targets are: on a GPU it would wait for the device.
        positions = (micro_batch.targets != IGNORE_INDEX).nonzero().flatten()
        if len(positions) == 0:  # a dummy, so that all ranks run the same collectives: one ignored position
            positions = torch.zeros(1, dtype=torch.int64)
        device = self.world.device
        return _SentBatch(
            inputs=rows.inputs(micro_batch, device),
            positions=send(positions, device),
            targets=send(micro_batch.targets[positions], device),
        )

    def _loss_sum(self, sent: _SentBatch) -> torch.Tensor:
        """Cross-entropy summed over the label tokens, fp32. Logits are computed at labelled
        positions only."""
        logits = self._logits(sent)
        # (1, labels, vocab) -> (labels, vocab); indexing would copy the gradient.
        return cross_entropy_sum(logits.flatten(0, 1), sent.targets)

    def _logits(self, sent: _SentBatch) -> torch.Tensor:
        """Where a label is predicted, (1, labels, vocabulary)."""
        self._positions = sent.positions
        logits: torch.Tensor = self.engine(use_cache=False, **sent.inputs).logits
        return logits

    def _select_positions(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor] | None:
        """Pre-hook of the output head: (batch, seq_len, hidden) -> (1, number of labels, hidden)."""
        if self._positions is None:
            return None
        positions = self._positions
        # Once for each forward pass: others, such as generate()'s, want the logits they ask for.
        self._positions = None
        return (inputs[0].flatten(0, 1).index_select(0, positions).unsqueeze(0),)

    def _group(self, adapter: str) -> dict[str, Any]:
        return next(group for group in self._inner.param_groups if group["name"] == adapter)

    # ---- adapter state ----------------------------------------------------------------------------------------

    def read_state(self, adapter: str) -> AdapterState | None:
        """Full fp32 master weights of `adapter`, on CPU, on the leader; None on the others."""
        with self._profile.region("gather adapters"):
            return self._gather(adapter, _master)

    @torch.no_grad()
    def write_state(self, adapter: str, state: AdapterState | None) -> None:
        """Install the leader's `state` in the fp32 master and in the working copy. What others pass is not looked at.

        In both, because only the next step would bring the one to the other.
        """
        with self._profile.region("install adapters"):
            keys = self.adapters.shapes[adapter].keys()
            assert not self.world.is_leader or (state or {}).keys() == keys, "adapter state of another model"
            flat = self._spread(state, self._num_parameters(adapter))
            for key, values in self._split(adapter, flat).items():
                parameter, fragment = self.adapters.parameters[adapter][key], self._fragments[adapter][key]
                if fragment is not None:
                    fragment.of(fragment.flat).copy_(fragment.part_of(values))
                    if self.stage == 3:
                        partition = parameter.ds_tensor.view(-1)  # type: ignore[attr-defined]
                        partition[: fragment.numel].copy_(fragment.part_of(values))
                if self.stage == 3:
                    # hpZ's second share has the old values. DeepSpeed makes it again from the first.
                    parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]
                # ZeRO 0 to 2, and ZeRO-3's small parameters that stay gathered.
                if parameter.numel() == values.numel():
                    parameter.data.copy_(values.view_as(parameter))
            self.adapters.forget_stacked()

    def read_optimizer_state(self, adapter: str) -> AdapterState | None:
        """AdamW moments of `adapter` as `exp_avg.<key>` and `exp_avg_sq.<key>`, and the step count as `step`.

        On CPU, on the leader; None on the others.
        """
        with self._profile.region("gather adapters"):
            state = {"step": torch.tensor([self._step_count(adapter)])}
            for moment in MOMENTS:
                gathered = self._gather(adapter, partial(self._moment, moment))
                if gathered is not None:
                    state |= {f"{moment}.{key}": value for key, value in gathered.items()}
            return state if self.world.is_leader else None

    @torch.no_grad()
    def write_optimizer_state(self, adapter: str, state: AdapterState | None) -> None:
        """Inverse of `read_optimizer_state`: install the leader's `state`. What others pass is not looked at."""
        with self._profile.region("install adapters"):
            num_parameters = self._num_parameters(adapter)
            flat = self._spread(state, 2 * num_parameters + 1)
            # `flatten` sorts the keys: exp_avg.*, exp_avg_sq.*, step.
            *moments, step = torch.split(flat, [num_parameters, num_parameters, 1])
            for moment, values in zip(MOMENTS, moments, strict=True):
                for key, part in self._split(adapter, values).items():
                    fragment = self._fragments[adapter][key]
                    if fragment is not None:
                        self._moment(moment, fragment).copy_(fragment.part_of(part))
                        self._optimizer_entry(fragment)["step"].copy_(step[0])

    def read_scaler(self) -> dict[str, float]:
        """fp16: the numbers of the dynamic loss scale; else empty."""
        if self._scaler is None:
            return {}
        return {name: value for name, value in vars(self._scaler).items() if type(value) in (int, float)}

    def write_scaler(self, state: Mapping[str, float]) -> None:
        """Inverse of `read_scaler`."""
        if self._scaler is not None:
            vars(self._scaler).update(state)

    @torch.no_grad()
    def reset_optimizer_state(self, adapter: str) -> None:
        """Zero both moments and the step count of `adapter`: as if AdamW had just been made."""
        for fragment in self._fragments[adapter].values():
            if fragment is not None:
                for value in self._inner.state.get(fragment.flat, {}).values():
                    value.zero_()

    def _step_count(self, adapter: str) -> float:
        """AdamW steps taken since the last reset; a rank without fragments learns it from the others."""
        total = torch.zeros(2, dtype=torch.float64)  # of the steps, and of the fragments that count them
        for key, fragment in self._fragments[adapter].items():
            # At stage 0 AdamW passes over what is never trained, and does not count.
            if fragment is not None and self.adapters.table[adapter].is_trained(key):
                total += torch.tensor([float(self._optimizer_entry(fragment)["step"]), 1.0])
        self.world.all_reduce_(total)
        return float(total[0] / total[1])

    def _moment(self, moment: str, fragment: Fragment) -> torch.Tensor:
        return fragment.of(self._optimizer_entry(fragment)[moment])

    def _optimizer_entry(self, fragment: Fragment) -> dict[str, torch.Tensor]:
        """AdamW's state of the flat tensor that holds `fragment`, made where no step was taken yet."""
        entry: dict[str, torch.Tensor] = self._inner.state[fragment.flat]
        if not entry:
            entry["step"] = torch.zeros(())
            for moment in MOMENTS:
                entry[moment] = torch.zeros_like(fragment.flat)
        return entry

    def _gather(self, adapter: str, values_of: Callable[[Fragment], torch.Tensor]) -> AdapterState | None:
        """On the leader, full tensors from every rank's fragments: the sum of buffers that are zero elsewhere."""
        buffer = torch.zeros(self._num_parameters(adapter), device=self.world.device)
        for key, values in self._split(adapter, buffer).items():
            fragment = self._fragments[adapter][key]
            if fragment is not None:
                fragment.part_of(values).copy_(values_of(fragment))
        if self.stage > 0:  # at stage 0 every rank holds all of it
            self.world.all_reduce_(buffer)
        if not self.world.is_leader:
            return None
        shapes = self.adapters.shapes[adapter]
        parts = self._split(adapter, buffer.cpu())
        # Copies, because safetensors does not save tensors that share memory.
        return {key: parts[key].view(shapes[key]).clone() for key in shapes}

    def _spread(self, state: AdapterState | None, size: int) -> torch.Tensor:
        """The leader's `state` as `flatten` orders it, shape (size,), on every rank's device."""
        if self.world.is_leader:
            assert state is not None, "the leader has the state"
            flat = flatten(state).to(self.world.device)
            assert len(flat) == size, "adapter state of another model"
        else:
            flat = torch.empty(size, device=self.world.device)
        return self.world.broadcast_(flat)

    def _split(self, adapter: str, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of the parameters in `flat`, each flat as well; `shapes` has the keys sorted, as
        `flatten` does."""
        sizes = {key: math.prod(shape) for key, shape in self.adapters.shapes[adapter].items()}
        return dict(zip(sizes, torch.split(flat, list(sizes.values())), strict=True))

    def _num_parameters(self, adapter: str) -> int:
        return sum(math.prod(shape) for shape in self.adapters.shapes[adapter].values())


def _master(fragment: Fragment) -> torch.Tensor:
    return fragment.of(fragment.flat)


def _optimizer_groups(adapters: AdapterModel) -> list[dict[str, Any]]:
    """A group named after each adapter, with the matrices that it trains, and one with what no
    adapter trains.

    What is never trained is in the optimizer too, so that its fp32 master is where the others are,
    but in a group whose learning rate and weight decay stay 0.
    """
    members: dict[str, list[torch.nn.Parameter]] = defaultdict(list)
    for name, spec in adapters.table.items():
        for key, parameter in adapters.parameters[name].items():
            group = name if spec.is_trained(key) else UNTRAINED
            members[group].append(parameter)
    return [{"params": params, "name": name, "lr": 0.0, "weight_decay": 0.0} for name, params in members.items()]


def _register_weights_of_mixed_layers(adapters: AdapterModel) -> None:
    """Tell ZeRO-3 which weights a mixed layer reads.

    DeepSpeed gathers a parameter when the module that owns it is called; a mixed layer reads the
    weights of modules that it does not call.
    """
    for layer in adapters.layers:
        for weight in layer.uncalled_weights():
            deepspeed.zero.register_external_parameter(layer, weight)


def _check_zero(zero: Mapping[str, Any], path: str, world_size: int) -> None:
    """Raise ConfigError for what DeepSpeed's types accept and this project does not."""
    if zero.get("offload_optimizer", {}).get("device") == "nvme":
        raise ConfigError(
            f"{path}: offload_optimizer.device nvme is not supported: only the adapters have optimizer "
            "state, and it fits in memory; use cpu, or offload_param for the frozen base"
        )
    read = DeepSpeedZeroConfig(**zero)
    for key, reason in UNSUPPORTED.items():
        if getattr(read, key):
            raise ConfigError(f"{path}: zero_optimization.{key} is not supported: {reason}; remove it")
    # DeepSpeed lowers it to the ranks of the group, and asserts the rest.
    partition_size = max(1, min(read.zero_hpz_partition_size, world_size))
    if world_size % partition_size != 0:
        raise ConfigError(
            f"{path}: zero_optimization.zero_hpz_partition_size {partition_size} does not divide the rank group "
            f"of {world_size} ranks: set it to the group's ranks on one host"
        )


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
                f"{path}: DeepSpeed refuses {key}: {first['msg']}, got {show(first['input'])}: correct it, "
                "or leave it out"
            ) from error
