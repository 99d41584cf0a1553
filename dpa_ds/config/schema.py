"""The recipe: typed sections, one owner per number; `--help` prints the docstrings. The DeepSpeed JSON owns what is DeepSpeed's."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

WeightingKind = Literal["auto", "cosine", "centred_cosine", "pearson", "l2", "fixed", "global", "local", "swapped"]
"""pearson, l2: the paper's ablations; fixed: one weight for all; global, local: that adapter alone; swapped: 1 - alpha."""
Encoder = Literal["none", "global", "local"]
"""Adapter that is active while prompts are encoded; none: the frozen base alone."""
MethodName = Literal["feddpa_t", "feddpa_f", "fedit", "fedlora", "local", "centralized"]
RanksPerGroup = int | list[int] | Literal["auto"]


@dataclass(frozen=True)
class ClusterConfig:
    """How the ranks of the job are divided among the clients."""

    ranks_per_group: RanksPerGroup = "auto"
    """Ranks that train one client at a time: a number, a list (groups of unequal size), or auto."""
    timeout_seconds: float = 1800.0
    """Bound on every wait between ranks of one group and on the agreement at start, in seconds."""
    heartbeat_timeout_seconds: float = 60.0
    """A rank that has not been heard of for so long (stopped, cut off, host down) ends its job, in seconds."""
    group: int | None = None
    """This job is one rank group, number 0, 1, ...: each group has a launcher of its own; null: all groups in one job."""
    num_groups: int | None = None
    """With group: number of rank groups of the run; null: one for each client."""
    rendezvous: str | None = None
    """With group: host:port of launch/rendezvous.py, where the groups' leaders meet."""
    device: Literal["auto", "cpu"] = "auto"
    """auto uses the accelerator DeepSpeed finds; cpu forbids it."""


@dataclass(frozen=True)
class ModelConfig:
    """The frozen causal LM that all clients share."""

    path: str = ""
    """Hugging Face model directory, GGUF file, or hub id where there is a hub."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of base and activations; adapters keep an fp32 master. A CPU without native bf16 emulates it, slowly."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""


@dataclass(frozen=True)
class LoraConfig:
    """Both adapters (PEFT LoRA, no bias): h = W0 x + sum of weight * (alpha / rank) * B A x."""

    rank: int = 8
    """Rank r of the global adapter."""
    alpha: float = 16.0
    """LoRA alpha of both adapters; the scale is alpha / rank."""
    dropout: float = 0.05
    """Dropout on the adapter input while training, in [0, 1)."""
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Names of the linear layers to adapt, matched at the end of the module path."""
    local_rank: int | None = None
    """Rank of the local adapter, if it is to differ from `rank`. alpha / rank stays the scale of both."""


@dataclass(frozen=True)
class PartitionConfig:
    """How one data set becomes clients (only for `format: table`)."""

    kind: Literal["column", "iid", "dirichlet"] = "column"
    """column: one client per distinct value; iid: equal random parts; dirichlet: label-skewed parts."""
    column: str | None = None
    """Column to group by (column) or whose label skew is drawn (dirichlet)."""
    num_clients: int | None = None
    """Number of clients, for iid and dirichlet."""
    concentration: float = 0.5
    """Dirichlet concentration, > 0: smaller means more skew."""


@dataclass(frozen=True)
class DataConfig:
    """Private instruction data of every client, and how it becomes tokens."""

    format: Literal["feddpa", "table"] = "feddpa"
    """feddpa: <path>/<C>/local_training_<k>.json and one test *.jsonl; table: any data set with named columns."""
    path: str = ""
    """Folder or file (JSON, JSONL, CSV, parquet, or a datasets folder saved on disk)."""
    test_path: str | None = None
    """Test data in the same format (table), or the test file (feddpa; default: the one *.jsonl in path)."""
    num_clients: int | None = None
    """feddpa: which <C> folder, when there are several."""
    instruction_column: str = "instruction"
    """Column with the instruction."""
    input_column: str | None = None
    """Column with further input, appended to the instruction after a line break; null: there is none."""
    output_column: str = "output"
    """Column with the answer."""
    task_column: str | None = "category"
    """Column naming the task: held-out rows of a task are scored with the clients that train on it."""
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    """How one data set becomes clients (only for format: table)."""
    held_out_fraction: float = 0.0
    """Share of each client's examples kept from training, to tune on, in [0, 1); 0: the test data is held out."""
    template: str = "### Instruction:\n{instruction}\n\n### Response:\n"
    """Prompt template; must contain {instruction} once. The answer and the end token are appended."""
    max_length: int = 512
    """Longest prompt + answer, in tokens; examples that do not fit are reported and left out."""
    cache_dir: str = "~/.cache/dpa_ds"
    """Where tokenised data and converted models are kept."""


@dataclass(frozen=True)
class MethodConfig:
    """Which schedule of phases is trained."""

    name: MethodName = "feddpa_t"
    """feddpa_t / feddpa_f: the method; the others are baselines."""
    alpha: float = 0.5
    """Weight of the local adapter in the local phase, in [0, 1]; the global one has 1 - alpha."""
    phase_order: Literal["global_first", "local_first"] = "global_first"
    """feddpa_t: the paper's order, or that of its published code."""
    global_source: Literal["own", "aggregated"] = "own"
    """feddpa_t: the local phase trains beside the client's own new global adapter, or this round's average."""


@dataclass(frozen=True)
class FederationConfig:
    """Rounds, sampling of clients and aggregation."""

    num_rounds: int = 20
    """Federated rounds; a finished run is extended by raising this."""
    client_fraction: float = 1.0
    """Share of the clients drawn in each round, in (0, 1]; at least one is drawn."""
    stratify_by_group: bool = False
    """Draw the same number of clients from every rank group, so that no group idles."""
    aggregation_weights: Literal["uniform", "num_examples"] = "uniform"
    """Weight of a client's update in the average."""
    compression: Literal["fp32", "int16"] = "fp32"
    """int16: updates travel in half of the bytes, for slow networks; what rounding leaves over goes with the next update."""
    aggregation: Literal["mean"] = "mean"
    """What the clients' updates amount to: their weighted mean."""
    server_optimizer: Literal["sgd", "momentum"] = "sgd"
    """What the server makes of it: sgd, with rate 1 FedAvg; momentum: FedAvgM."""
    server_learning_rate: float = 1.0
    """Rate eta of the server optimizer."""
    server_momentum: float = 0.9
    """Momentum b of the server optimizer momentum."""
    timeout_seconds: float = 3600.0
    """Bound on every wait among the leaders, in seconds: the slowest client's round must fit in."""
    min_clients: int = 1
    """With cluster.group: rounds continue without lost groups as long as those present host so many clients."""
    max_update_norm: float | None = None
    """Largest L2 norm of a client's change of the global adapter that may enter the average; null: any finite one."""
    on_bad_update: Literal["skip", "stop"] = "skip"
    """A client that diverged or exceeds max_update_norm: continue without it and undo its round, or stop the run."""


@dataclass(frozen=True)
class TrainConfig:
    """One phase of one client."""

    batch_size: int = 64
    """Examples per optimizer step of a client, whatever the number of ranks."""
    micro_batch_tokens: int = 4096
    """Upper bound on one forward pass on one rank, in tokens with padding; a longer example is passed alone."""
    local_epochs: float = 10.0
    """Passes over the client's data per phase (a fraction is allowed); not used where max_steps is given."""
    max_steps: int | None = None
    """Optimizer steps per phase, instead of local_epochs."""
    learning_rate: float = 3e-4
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate within a phase; linear and cosine end at 0."""
    weight_decay: float = 0.0
    """AdamW weight decay, decoupled (per step: learning rate x weight decay)."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas: decay of the first and of the second moment, each in [0, 1)."""
    adam_epsilon: float = 1e-8
    """AdamW epsilon, added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this norm; 0 turns clipping off."""
    keep_optimizer_state: bool = False
    """Keep each client's local AdamW state between rounds instead of starting afresh."""


@dataclass(frozen=True)
class EngineConfig:
    """DeepSpeed."""

    deepspeed_config: str = "ds_configs/zero1.json"
    """DeepSpeed JSON: ZeRO stage, offload, buckets and communication only."""


@dataclass(frozen=True)
class WeightingConfig:
    """Weight alpha of the local adapter, for each test instance: alpha = scale x mean similarity to own prompts."""

    kind: WeightingKind = "auto"
    """auto: centred_cosine (less the clients' mean state) for feddpa_t and feddpa_f, one client: cosine; else the adapter."""
    scale: float | None = None
    """lambda; null: 0.5 (the paper's), 1.0 for centred_cosine. kind fixed: the weight itself; null: method.alpha."""
    num_references: int = 5
    """S, prompts of a client's own training data that a test prompt is compared with, drawn once per run."""
    representation: Literal["last_token", "mean"] = "last_token"
    """State of a prompt: the last layer's at its last token, or their mean over its tokens."""
    encoder: Literal["auto", Encoder] = "auto"
    """Adapter that is active, at full strength, while prompts are encoded. auto: local, for centred_cosine none."""


@dataclass(frozen=True)
class GenerationConfig:
    """How answers are decoded; never sampled."""

    num_beams: int = 4
    """Beams; 1: greedy."""
    max_new_tokens: int = 80
    """Longest answer, in tokens."""
    batch_tokens: int = 16384
    """Upper bound on rows (instances x beams) x longest prompt with answer of a batch; does not change answers (fp32)."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss and scores while training, and what launch/evaluate.py scores."""

    every_rounds: int = 1
    """Held-out loss after every n rounds (always before the first and after the last); 0: only those two."""
    max_examples: int = 50
    """Held-out examples per client for the loss."""
    scores_every_rounds: int = 0
    """While training: generate and score answers to a few instances of every trained task after every n rounds; 0: never."""
    split: Literal["test", "held_out"] = "test"
    """What is scored: the test data, or (to tune) what data.held_out_fraction keeps from training."""
    instances_per_task: int | None = None
    """Test instances of each task, the first ones of the file; null: all (while training 4)."""
    clients: list[int] | None = None
    """launch/evaluate.py: ids of the clients to score; null: all."""
    tasks: list[str] | None = None
    """launch/evaluate.py: tasks to score; null: all of the test data."""
    sharding: Literal["auto", "never", "always"] = "auto"
    """launch/evaluate.py: divide the base among the ranks (ZeRO-3) where it does not fit one of them; slow."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved when; a run that ended early continues by the same command."""

    every_steps: int | None = None
    """Save inside a phase after every n optimizer steps; null: by time alone."""
    every_minutes: float | None = 10.0
    """Save inside a phase so often; null: by steps alone. Between clients and rounds it is always saved."""
    keep_rounds: int = 2
    """Complete rounds to keep; the older ones are deleted."""
    grace_seconds: float = 25.0
    """After SIGTERM, SIGUSR1 or Ctrl-C every rank has saved and ended within this time, in seconds."""


@dataclass(frozen=True)
class TrackingConfig:
    """Where numbers go."""

    tensorboard: bool = True
    """Write TensorBoard events to <run>/tensorboard."""
    profile: bool = False
    """Trace a few steps of each phase, and tell what the first round's time went into: <run>/profile (`--profile`)."""
    log_every_seconds: float = 20.0
    """Seconds between progress lines where the output is not a terminal."""


@dataclass(frozen=True)
class RunConfig:
    """Federated training of dual adapters over one frozen LLM."""

    name: str = "run"
    """Name of the run: results go to <output_dir>/<name>."""
    output_dir: str = "runs"
    """Folder of all runs, on a file system that every host sees."""
    seed: int = 0
    """Fixes initial adapters, sampling of clients, order of examples and dropout."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: resume where the run stopped, or begin; never: refuse a folder with results; must: refuse to start from scratch."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """How the ranks of the job are divided among the clients."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The frozen causal LM that all clients share."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The two LoRA adapters of every client, global and local."""
    data: DataConfig = field(default_factory=DataConfig)
    """Private instruction data of every client, and how it becomes tokens."""
    method: MethodConfig = field(default_factory=MethodConfig)
    """What is trained, in which order."""
    federation: FederationConfig = field(default_factory=FederationConfig)
    """Rounds, sampling of clients and aggregation."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """One phase of one client."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """DeepSpeed."""
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    """Weight of the local adapter for each test instance."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """How answers are decoded."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out loss and scores."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is saved when."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where numbers go."""

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return Path(self.output_dir) / self.name
