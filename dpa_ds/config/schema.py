"""The recipe: typed sections whose fields carry their unit, their range and their help.

`--help` prints the docstrings, and validate.py tests each value against what is written beside its field. Every
number has one owner: what is DeepSpeed's alone stands in the DeepSpeed JSON (`engine.deepspeed_config`), not here.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dpa_ds.config.ranges import (
    ANY_PATH,
    BILLION,
    CLIENT_FILES,
    CLIENTS,
    GROUP_SIZES,
    LINEAR_LAYERS,
    MILLION,
    PATH,
    PLAIN_NAME,
    PRIVATE_DIR,
    SECONDS,
    SHORT_NAME,
    TASK_NAMES,
    TEMPERATURE,
    TEMPLATE,
    YEAR_SECONDS,
    above,
    all_of,
    at_least,
    at_most,
    each_within,
    not_empty,
    required_path,
    within,
)

WeightingKind = Literal[
    "auto", "cosine", "centred_cosine", "pearson", "l2", "fixed", "global", "local", "swapped", "none"
]
"""pearson, l2: the paper's ablations; fixed: one alpha for all; global, local: that adapter alone; swapped: 1-alpha;
none: no adapter, the base alone."""
Encoder = Literal["none", "global", "local"]
"""Adapter that is active while prompts are embedded; none: the frozen base alone."""
PAPER_TEMPLATE = "### Instruction:\n{instruction}\n\n### Response:\n"
"""The prompt of the paper's experiments."""
MethodName = Literal["feddpa_t", "feddpa_f", "fedit", "fedlora", "local", "centralized"]
RanksPerGroup = int | list[int] | Literal["auto"]
TargetModules = list[str] | Literal["all-linear"]
ALL_LINEAR = "all-linear"
"""`lora.target_modules` of every linear layer but the output head."""


@dataclass(frozen=True)
class ClusterConfig:
    """How the ranks of the job are divided among the clients."""

    ranks_per_group: RanksPerGroup = field(default="auto", metadata=GROUP_SIZES)
    """Ranks that train one client at a time: a number, a list (groups of unequal size), or auto."""
    timeout_seconds: float = field(default=1800.0, metadata=SECONDS)
    """Bound on every wait between ranks of one group and on the comparison of all ranks at start, in seconds."""
    heartbeat_timeout_seconds: float = field(default=60.0, metadata=at_least(2, up_to=YEAR_SECONDS))
    """A rank that sends no heartbeat for so long (stopped, cut off, host down) ends its job, in seconds."""
    group: int | None = field(default=None, metadata=at_least(0, up_to=MILLION, or_null="for all groups in one job"))
    """This job is one rank group, number 0, 1, ...: each group has its own launcher; null: all groups in one job."""
    num_groups: int | None = field(default=None, metadata=at_least(1, up_to=MILLION, or_null="for one group a client"))
    """With group: number of rank groups of the run; null: one for each client."""
    rendezvous: str | None = None
    """With group: host:port of launch/rendezvous.py, where the groups' leaders meet."""
    device: Literal["auto", "cpu"] = "auto"
    """auto uses the accelerator DeepSpeed finds; cpu forbids it."""


@dataclass(frozen=True)
class ModelConfig:
    """The frozen causal LM that all clients share."""

    path: str = field(default="", metadata=required_path("give a model directory, a GGUF file or a hub id"))
    """Hugging Face model directory, GGUF file, or hub id where there is a hub."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of base and activations (adapters keep an fp32 master); auto: bf16 where it is native, else fp32."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Bits of the base's linear layers, by bitsandbytes: int8 (8), nf4 (4), none: as the files are. ZeRO 0 to 2."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation of transformers; auto: sdpa where the model has it, else eager."""

    @property
    def numbers(self) -> str:
        """In what the base computes, and what its linear layers are stored in: fp32, or bf16+nf4."""
        if self.quantization == "none":
            return self.precision
        return f"{self.precision}+{self.quantization}"


@dataclass(frozen=True)
class LoraConfig:
    """Both adapters (PEFT LoRA, no bias): h = W0 x + sum of mix * scale * B A x."""

    rank: int = field(default=8, metadata=at_least(1, up_to=MILLION))
    """Rank r of the global adapter."""
    alpha: float = field(default=16.0, metadata=above(0, up_to=MILLION))
    """LoRA alpha of both adapters; the scale is alpha / rank, or what `scaling` says."""
    scaling: Literal["standard", "rslora"] = "standard"
    """Scale of both adapters: standard: alpha / rank; rslora: alpha / root of rank (PEFT's use_rslora)."""
    dropout: float = field(default=0.05, metadata=within("[0, 1)"))
    """Dropout on the adapter input while training, in [0, 1)."""
    target_modules: TargetModules = field(default_factory=lambda: ["q_proj", "v_proj"], metadata=LINEAR_LAYERS)
    """Linear layers to adapt: names, matched at the end of the module path; all-linear: all but the output head."""
    local_rank: int | None = field(default=None, metadata=at_least(1, up_to=MILLION, or_null="for lora.rank"))
    """Rank of the local adapter, if it is to differ from `rank`. The scale, of alpha and `rank`, stays that of both."""


@dataclass(frozen=True)
class PartitionConfig:
    """How one data set becomes clients (only for `format: table`)."""

    kind: Literal["column", "iid", "dirichlet"] = "column"
    """column: one client per distinct value; iid: equal random parts; dirichlet: label-skewed parts."""
    column: str | None = None
    """Column to group by (column) or whose labels are skewed (dirichlet)."""
    num_clients: int | None = field(default=None, metadata=at_most(MILLION))
    """Number of clients, for iid and dirichlet."""
    concentration: float = field(default=0.5, metadata=at_most(MILLION))
    """Dirichlet concentration, > 0: smaller means more skew."""


@dataclass(frozen=True)
class DataConfig:
    """Private instruction data of every client, and how it becomes tokens."""

    format: Literal["feddpa", "table"] = "feddpa"
    """feddpa: <path>/<C>/local_training_<k>.json and one test *.jsonl; table: any data set with named columns."""
    path: str = field(default="", metadata=required_path("give the file or folder of the clients' data"))
    """File, folder or pattern of files, or hub id; with {client}, the file or folder of each client (format: table)."""
    test_path: str | None = field(default=None, metadata=PATH)
    """Test data in the same format (table), or the test file (feddpa; default: the one *.jsonl in path)."""
    split: str = field(default="train", metadata=not_empty())
    """Split of path that is trained on, where a folder, a saved data set or a data set of the hub has several."""
    test_split: str = field(default="test", metadata=not_empty())
    """Split of test_path that is scored on, where it has several; test_path may be the same as path."""
    clients: list[str] | None = field(default=None, metadata=CLIENT_FILES)
    """With {client} in path: names of the clients, where hosts have their own clients' files only; null: as found."""
    num_clients: int | None = field(
        default=None, metadata=at_least(1, up_to=MILLION, or_null="for the only folder there is")
    )
    """feddpa: which <C> folder, when there are several."""
    instruction_column: str = "instruction"
    """Column with the instruction."""
    input_column: str | None = None
    """Column with further input, appended to the instruction after a line break; null: there is none."""
    output_column: str = "output"
    """Column with the answer."""
    task_column: str | None = "category"
    """Column of tasks: a task's held-out rows go to the clients that train on it. None: a column's clients are."""
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    """How one data set becomes clients (only for format: table)."""
    held_out_fraction: float = field(default=0.0, metadata=within("[0, 1)"))
    """Share of each client's examples kept from training, to tune on, in [0, 1); 0: the test data is held out."""
    template: str = field(default="auto", metadata=TEMPLATE)
    """chat: the tokenizer's chat template; or a text with {instruction}; auto: chat if any, else the paper's."""
    train_on: Literal["all", "last"] = "all"
    """Answers of a conversation that are trained on: all, or the last one alone."""
    max_length: int = field(default=512, metadata=at_least(2, up_to=10 * MILLION))
    """Longest prompt + answer, in tokens; examples that do not fit are reported and left out."""
    cache_dir: str = field(default="~/.cache/dpa_ds", metadata=all_of(ANY_PATH, not_empty()))
    """Where tokenised data and converted models are kept."""
    # The last one: below it the class sees this field where it would see the function.
    field: str | None = None
    """Field of a .json file that is one object in which the rows are, such as data in {"data": [...]}."""


@dataclass(frozen=True)
class MethodConfig:
    """Which schedule of phases is trained."""

    name: MethodName = "feddpa_t"
    """feddpa_t / feddpa_f: the method; the others are baselines."""
    alpha: float = field(default=0.5, metadata=within("[0, 1]"))
    """Share of the local adapter in the local phase, in [0, 1]; the global one has 1 - alpha."""
    phase_order: Literal["global_first", "local_first"] = "global_first"
    """feddpa_t: the paper's order, or that of its published code."""
    global_source: Literal["own", "aggregated"] = "own"
    """feddpa_t: the local phase trains beside the client's own new global adapter, or this round's average."""


@dataclass(frozen=True)
class FederationConfig:
    """Rounds, sampling of clients, aggregation and the server's step."""

    num_rounds: int = field(default=20, metadata=at_least(1, up_to=100_000))
    """Federated rounds; a finished run is extended by raising this."""
    client_fraction: float = field(default=1.0, metadata=within("(0, 1]"))
    """Share of the clients sampled in each round, in (0, 1]; at least one is sampled."""
    stratify_by_group: bool = False
    """Sample the same number of clients from every rank group, so that no group idles."""
    aggregation_weights: Literal["uniform", "num_examples"] = "uniform"
    """What a client's update counts by in the average: all the same, or by its number of training examples."""
    aggregation: Literal["mean"] = "mean"
    """Rule that turns the clients' updates into one pseudo-gradient; mean: their average by aggregation_weights."""
    compression: Literal["fp32", "int16"] = "fp32"
    """int16: updates travel in half of the bytes, for slow networks; rounding errors are added to the next update."""
    server_optimizer: Literal["sgd", "momentum"] = "sgd"
    """How the pseudo-gradient changes the global adapter: sgd (FedAvg at a learning rate of 1), momentum (FedAvgM)."""
    server_learning_rate: float = field(default=1.0, metadata=above(0, up_to=1000))
    """Learning rate of the server optimizer; 1: the global adapter moves by the whole pseudo-gradient."""
    server_momentum: float = field(default=0.9, metadata=within("[0, 1)"))
    """momentum: share of the last step's velocity that is kept (FedAvgM, Hsu et al. 2019), in [0, 1)."""
    timeout_seconds: float = field(default=3600.0, metadata=SECONDS)
    """Bound on every wait among the leaders, in seconds: the slowest client's round must fit in."""
    min_clients: int = field(default=1, metadata=at_least(1, up_to=MILLION))
    """With cluster.group: rounds continue without lost groups as long as the groups present host so many clients."""
    max_update_norm: float | None = field(default=None, metadata=above(0, up_to=1e30, or_null="for no bound"))
    """Largest L2 norm of a client's change of the global adapter that may enter the average; null: any finite one."""
    on_bad_update: Literal["skip", "stop"] = "skip"
    """A client that diverged or exceeds max_update_norm: continue without it and undo its round, or stop the run."""


@dataclass(frozen=True)
class TrainConfig:
    """One phase of one client."""

    batch_size: int = field(default=64, metadata=at_least(1, up_to=MILLION))
    """Examples per optimizer step of a client, whatever the number of ranks."""
    micro_batch_tokens: int = field(default=4096, metadata=at_least(1, up_to=BILLION))
    """Upper bound on one forward pass on one rank, in tokens with padding; a longer example is passed alone."""
    local_epochs: float = field(default=10.0, metadata=above(0, up_to=1000))
    """Passes over the client's data per phase (a fraction is allowed); not used where max_steps is given."""
    max_steps: int | None = field(
        default=None, metadata=at_least(1, up_to=100_000, or_null="to train for train.local_epochs")
    )
    """Optimizer steps per phase, instead of local_epochs."""
    learning_rate: float = field(default=3e-4, metadata=above(0, up_to=1e30))
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate within a phase; linear and cosine end at 0."""
    warmup_ratio: float = field(default=0.0, metadata=within("[0, 1)"))
    """Share of each phase's steps, rounded up, in which the learning rate rises from 0, in [0, 1); 0: no warm-up."""
    weight_decay: float = field(default=0.0, metadata=at_least(0, up_to=1000))
    """AdamW weight decay, decoupled (per step: learning rate x weight decay)."""
    adam_betas: tuple[float, float] = field(default=(0.9, 0.999), metadata=each_within("[0, 1)"))
    """AdamW betas: decay of the first and of the second moment, each in [0, 1)."""
    adam_epsilon: float = field(default=1e-8, metadata=above(0, up_to=1))
    """AdamW epsilon, added to the root of the second moment."""
    max_grad_norm: float = field(default=1.0, metadata=at_least(0, up_to=1e30, note="0 turns clipping off"))
    """Clip the gradient to this norm; 0 turns clipping off."""
    keep_optimizer_state: bool = False
    """Keep each client's local AdamW state between rounds instead of starting from zero."""


@dataclass(frozen=True)
class EngineConfig:
    """DeepSpeed."""

    deepspeed_config: str = field(
        default="ds_configs/zero1.json", metadata=required_path("such as ds_configs/zero1.json")
    )
    """DeepSpeed JSON: ZeRO stage, offload, buckets and communication only."""


@dataclass(frozen=True)
class WeightingConfig:
    """Share alpha of the local adapter, for each test instance: scale x mean similarity to own prompts."""

    kind: WeightingKind = "auto"
    """auto: centred_cosine (less the clients' mean) for feddpa_t and feddpa_f, one client: cosine; else one adapter."""
    scale: float | None = field(
        default=None, metadata=at_least(0, up_to=MILLION, or_null="for the default of weighting.kind")
    )
    """lambda; null: 0.5 (the paper's), 1.0 for centred_cosine. kind fixed: alpha itself; null: method.alpha."""
    num_references: int = field(default=5, metadata=at_least(1, up_to=10_000))
    """S, prompts of a client's own training data that a test prompt is compared with, chosen once per run."""
    representation: Literal["last_token", "mean"] = "last_token"
    """Embedding of a prompt: the last layer's output at its last token, or the mean over its tokens."""
    encoder: Literal["auto", Encoder] = "auto"
    """Adapter that is active, at full strength, while prompts are embedded. auto: local, for centred_cosine none."""


@dataclass(frozen=True)
class GenerationConfig:
    """How answers are decoded: searched for the likeliest, or with a temperature sampled."""

    num_beams: int = field(default=4, metadata=at_least(1, up_to=1000, note="1: greedy"))
    """Number of beams; 1: greedy."""
    max_new_tokens: int = field(default=80, metadata=at_least(1, up_to=MILLION))
    """Longest answer, in tokens."""
    batch_tokens: int = field(default=16384, metadata=at_least(1, up_to=BILLION))
    """Upper bound on sequences (instances x beams) x their length, of a batch; does not change answers (fp32)."""
    temperature: float = field(default=0.0, metadata=TEMPERATURE)
    """Logits are divided by it, and tokens sampled; 0: the likeliest answer, by num_beams. Needs num_beams 1."""
    top_k: int = field(default=0, metadata=at_least(0, up_to=MILLION, note="0: of all"))
    """Sampled among the k likeliest tokens; 0: among all."""
    top_p: float = field(default=1.0, metadata=within("(0, 1]"))
    """Sampled among the likeliest tokens that together have this probability, in (0, 1]; 1: among all."""
    seed: int = field(default=0, metadata=at_least(0, up_to=2**63 - 1))
    """Of sampling. An answer is a function of this seed and of its prompt, model and weight; another seed, another."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss and scores while training, and what launch/evaluate.py scores."""

    every_rounds: int = field(
        default=1, metadata=at_least(0, up_to=BILLION, note="0 evaluates only before and after training")
    )
    """Held-out loss after every n rounds (always before the first and after the last); 0: only those two."""
    max_examples: int = field(default=50, metadata=at_least(1, up_to=BILLION))
    """Held-out examples per client for the loss."""
    scores_every_rounds: int = field(
        default=0, metadata=at_least(0, up_to=BILLION, note="0: no answers while training")
    )
    """Generate and score answers to a few instances of every trained task after every n rounds; 0: never."""
    split: Literal["test", "held_out"] = "test"
    """What is scored: the test data, or (to tune) what data.held_out_fraction keeps from training."""
    instances_per_task: int | None = field(default=None, metadata=at_least(1, up_to=BILLION, or_null="for all"))
    """Test instances of each task, the first ones of the file; null: all (while training 4)."""
    clients: list[int | str] | None = field(default=None, metadata=CLIENTS)
    """launch/evaluate.py: ids or names of the clients to score; null: all."""
    tasks: list[str] | None = field(default=None, metadata=TASK_NAMES)
    """launch/evaluate.py: tasks to score; null: all of the test data."""
    sharding: Literal["auto", "never", "always"] = "auto"
    """launch/evaluate.py: divide the base among the ranks (ZeRO-3) where it does not fit one of them; slow."""
    examples: bool = False
    """Show prompts, right answers and answers of clients in summary.json and report.md, five of the best and worst."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved when; the same command resumes a run that ended early."""

    every_steps: int | None = field(default=None, metadata=at_least(1, up_to=BILLION, or_null="to save by time"))
    """Save inside a phase after every n optimizer steps; null: by time alone."""
    every_minutes: float | None = field(
        default=10.0, metadata=above(0, up_to=YEAR_SECONDS // 60, or_null="to save by steps")
    )
    """Save inside a phase this often; null: by steps alone. Each client and each round is saved anyway."""
    keep_rounds: int = field(default=2, metadata=at_least(1, up_to=MILLION))
    """Complete rounds to keep; the older ones are deleted."""
    grace_seconds: float = field(default=25.0, metadata=SECONDS)
    """After SIGTERM, SIGUSR1 or Ctrl-C every rank has saved and ended within this time, in seconds."""


@dataclass(frozen=True)
class MetricsConfig:
    """What of the clients' numbers leaves their rank group."""

    share: Literal["per_client", "sums"] = "per_client"
    """per_client: losses and counts of each client are in the common folder; sums: sums and means over clients only."""


@dataclass(frozen=True)
class TrackingConfig:
    """Where numbers go."""

    tensorboard: bool = True
    """Write TensorBoard events to <run>/tensorboard."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Copy metrics.jsonl to Weights & Biases; offline: to <run>/trackers/wandb alone, without a network."""
    mlflow: str | None = field(default=None, metadata=PATH)
    """Copy metrics.jsonl to MLflow: folder of a file store, or address of a server (http://...); null: none."""
    project: str = field(default="dpa_ds", metadata=not_empty())
    """Project of Weights & Biases, experiment of MLflow."""
    profile: bool = False
    """Trace a few steps of each phase, and report where the first round's time went: <run>/profile (`--profile`)."""
    quiet: bool = False
    """Show warnings, errors and the final result only (`--quiet`); the log file has every line."""
    log_every_seconds: float = field(default=20.0, metadata=at_least(0, up_to=YEAR_SECONDS))
    """Seconds between progress lines where the output is not a terminal."""


@dataclass(frozen=True)
class RunConfig:
    """Federated training of dual adapters over one frozen LLM."""

    name: str = field(default="run", metadata=all_of(PLAIN_NAME, SHORT_NAME))
    """Name of the run: results go to <output_dir>/<name>."""
    output_dir: str = field(default="runs", metadata=required_path())
    """Folder of all runs, on a file system that every host sees."""
    private_dir: str | None = field(default=None, metadata=PRIVATE_DIR)
    """What clients keep to themselves goes to <private_dir>/<name>; {group}: the rank group; null: to output_dir."""
    seed: int = field(default=0, metadata=at_least(0, up_to=2**63 - 1))
    """Fixes initial adapters, sampling of clients, order of examples and dropout."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: resume where the run stopped, or start; never: refuse a folder with results; must: fail without them."""
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
    """Rounds, sampling of clients, aggregation and the server's step."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """One phase of one client."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """DeepSpeed."""
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    """Share of the local adapter, for each test instance."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """How answers are decoded."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out loss and scores."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is saved when."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """What of the clients' numbers leaves their rank group."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where numbers go."""

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return Path(self.output_dir) / self.name
