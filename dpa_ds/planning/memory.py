"""Bytes per rank of a training step, by part, for one DeepSpeed layout.

Upper bounds, compared with measured peaks by benchmarks/planner.py.
"""

import math
from dataclasses import dataclass

from dpa_ds.planning.shapes import Shape

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one number of the base, by model.precision."""
LOSS_CHUNK_BYTES = 2**25
"""Most bytes of an fp32 tensor that the loss makes of some of the logits: CHUNK_BYTES of `engine/label_loss.py`."""
SCALE_BYTES = 4
"""Of the fp32 scale of a row (int8), or of a block of weights (nf4)."""
BLOCK = 64
"""Weights in 4 bits that share a scale: `model/quantization.py`."""
PINNED_EXACT_ABOVE = 2**20
"""Bytes above which pinned memory takes its exact size, with pinned_max_cached_size_mb:1 in PYTORCH_ALLOC_CONF."""


@dataclass(frozen=True)
class Lora:
    """Both adapters of a recipe."""

    targets: tuple[str, ...] = ("q_proj", "v_proj")
    rank: int = 8
    local_rank: int = 8
    dropout: bool = False

    def parameters(self, shape: Shape) -> tuple[int, int]:
        """Parameters of the global and of the local adapter. Raises ModelError for a target that the model lacks."""
        return shape.lora_parameters(self.rank, self.targets), shape.lora_parameters(self.local_rank, self.targets)


@dataclass(frozen=True)
class Layout:
    """What decides the memory of a rank."""

    stage: int
    ranks: int
    """Ranks of a group."""
    precision: str = "bf16"
    quantization: str = "none"
    """Of the base's linear layers: none, int8 or nf4; below stage 3."""
    tokens: int = 4096
    """Tokens of one micro-batch, padding included."""
    labels: int = 1024
    """Tokens of these that have a label: logits exist there only."""
    checkpointing: bool = False
    reduce_bucket: int = 500_000_000
    """DeepSpeed's reduce_bucket_size, in elements."""
    overlap: bool = False
    reuse_distance: int = 1_000_000_000
    persistence: int = 100_000
    max_live: int = 1_000_000_000
    prefetch: int = 50_000_000
    """reuse_distance to prefetch: DeepSpeed's settings of stage 3, in elements."""
    offload_params: bool = False
    """The base's share lies outside the GPU (ZeRO-3)."""
    nvme: bool = False
    """There it lies on NVMe, not in the host's memory."""
    pinned: bool = True
    """In the host's memory it is pinned (DeepSpeed's default)."""
    second_share_ranks: int = 1
    """ZeRO++'s hpZ: so many ranks hold the base between them once more; 1: none do."""


def step_bytes(shape: Shape, lora: Lora, layout: Layout) -> dict[str, float]:
    """All parts of a step, in bytes per rank. Raises ModelError for a target that the model lacks."""
    adapters = adapter_bytes(*lora.parameters(shape), layout)
    parts = model_bytes(shape, lora, layout) | adapters | activation_bytes(shape, lora, layout) | buffer_bytes(layout)
    if layout.quantization != "none":
        # While a layer computes its weight exists in `precision` as well, but not at the turn, where the logits are.
        weight = max(inputs * outputs for inputs, outputs in shape.linears.values()) * BYTES[layout.precision]
        parts["dequantized"] = max(0.0, weight - parts["logits"])
    return parts


def base_bytes(shape: Shape, precision: str, quantization: str) -> float:
    """The frozen base, whole: codes and scales of quantised linear layers; `precision` for all that is not quantised.

    That is embedding, output head, norms, biases, and experts in one parameter.
    """
    whole = float(shape.parameters * BYTES[precision])
    if quantization == "none":
        return whole
    for inputs, outputs in shape.linears.values():
        codes, scales = inputs * outputs, outputs
        if quantization == "nf4":
            codes, scales = codes // 2, math.ceil(codes / BLOCK)
        whole += shape.layers * (codes + SCALE_BYTES * scales - inputs * outputs * BYTES[precision])
    return whole


def model_bytes(shape: Shape, lora: Lora, layout: Layout) -> dict[str, float]:
    """The frozen base: all of it below stage 3, else 1/ranks of it and what is gathered at once, of the adapters too.

    DeepSpeed 0.19.8 keeps a gathered parameter while it is used again within `reuse_distance` elements of its trace.
    At the turn from forward to backward these are the last reuse_distance / 2, a single layer at least, and `prefetch`
    elements more are on their way. With recomputation it does not release what its prefetcher passed over: measured,
    what is gathered grows to the larger of reuse distance and max_live, and up to twice the prefetch bucket on its way.
    Parameters of at most `persistence` elements stay gathered, and in some runs the embedding does, too.
    """
    element = BYTES[layout.precision]
    base = base_bytes(shape, layout.precision, layout.quantization)
    if layout.stage < 3:
        return {"base": base}
    whole = _divided_parameters(shape, lora, layout)
    staying = _small_parameters(shape, layout) + shape.embedding_parameters
    if layout.checkpointing:
        gathered = min(whole, max(layout.reuse_distance, layout.max_live) + staying)
        gathered += min(whole // 2, 2 * layout.prefetch)
    else:
        gathered = min(whole, _kept_at_the_turn(shape, layout) + staying)
    share = base / layout.ranks
    second_ranks = min(layout.second_share_ranks, layout.ranks)
    if second_ranks > 1:
        share += base / second_ranks
    if layout.offload_params:
        share = 0.0
    return {"base": share, "gathered": gathered * element}


def host_bytes(shape: Shape, layout: Layout, exact_above: float = PINNED_EXACT_ABOVE) -> float:
    """The share of an offloaded base in the host's memory; none on NVMe, whose buffers are left out.

    DeepSpeed pins each parameter's share for itself, and torch (2.13, CachingHostAllocator.h) rounds what it pins up to
    a power of two, so that it can be used again once it is freed: 44 GB for 13B in bf16, which has 26. Of more than
    `exact_above` bytes nothing is kept for another use, and nothing rounded. Not measured on a GPU.
    """
    if layout.nvme or not layout.offload_params:
        return 0.0
    total = 0
    for elements, num_tensors in shape.tensors:
        size = math.ceil(elements / layout.ranks) * BYTES[layout.precision]
        if layout.pinned and size <= exact_above:
            size = _power_of_two_from(size)
        total += num_tensors * size
    return float(total)


def gathered_parameters(shape: Shape, lora: Lora, layout: Layout) -> int:
    """Elements that a group gathers in one forward and backward pass under ZeRO-3. The floor: the base once.

    Gathered again is what was released before the backward pass reads it: not the embedding, whose gradient nobody
    needs, and not what lies at the turn. Recomputation reads a layer twice in a row: gathered once.
    """
    whole = _divided_parameters(shape, lora, layout)
    again = whole - _kept_at_the_turn(shape, layout)
    if not shape.tied:
        again -= shape.embedding_parameters
    return whole + max(0, again)


def adapter_bytes(global_parameters: int, local_parameters: int, layout: Layout) -> dict[str, float]:
    """Both adapters: working copy, fp32 master and moments; the fp32 gradient of the one in training.

    Stage 0 in fp32 needs no second master. From stage 1 on masters and moments are divided, from 2 on gradients.
    """
    both = global_parameters + local_parameters
    working: float = both * BYTES[layout.precision]
    gradients: float = 4 * max(global_parameters, local_parameters)
    optimizer: float = 8 * both
    if layout.stage > 0 or layout.precision != "fp32":  # else the working copy is the master
        optimizer += 4 * both
    if layout.stage >= 1:
        optimizer /= layout.ranks
    if layout.stage >= 2:
        gradients /= layout.ranks
    if layout.stage == 3:
        working /= layout.ranks
    return {"adapters": working, "gradients": gradients, "optimizer": optimizer}


def activation_bytes(shape: Shape, lora: Lora, layout: Layout) -> dict[str, float]:
    """What autograd keeps at the turn from forward to backward, and the logits.

    With checkpointing a layer keeps its input, and one layer at a time all of `_layer_activations`. The gradient of the
    logits is written over them (`engine/label_loss.py`).
    """
    element = BYTES[layout.precision]
    # Where both adapters take part, their A and B are kept once more, stacked (adapters/mixed_lora.py).
    stacked = element * sum(lora.parameters(shape)) // shape.layers
    one_layer = float(_layer_activations(shape, lora, layout) * layout.tokens + stacked)
    logits = _logit_bytes(shape, layout)
    if not layout.checkpointing:
        return {"activations": shape.layers * one_layer, "logits": logits}
    inputs_of_layers = float(shape.layers * element * shape.hidden * layout.tokens)
    return {"activations": inputs_of_layers + max(0.0, one_layer - logits), "logits": logits}


def _logit_bytes(shape: Shape, layout: Layout) -> float:
    """The logits at label positions, and what the loss makes of one chunk of them.

    That is its exponentials in fp32, and where the logits have 16 bits their fp32 copy.
    """
    num = float(layout.labels * shape.vocab)
    element = BYTES[layout.precision]
    chunk = min(LOSS_CHUNK_BYTES, 4 * num)
    if element < 4:
        chunk *= 2
    return element * num + chunk


def buffer_bytes(layout: Layout) -> dict[str, float]:
    """DeepSpeed's reduce bucket: made in full, however few parameters are trained.

    Two at stages 1 and 2 with overlap_comm. Stage 0 has none, nor has stage 1 in bf16 with fp32 gradient accumulation
    (BF16_Optimizer).
    """
    if layout.stage == 0 or (layout.stage == 1 and layout.precision == "bf16"):
        return {"buckets": 0.0}
    size = float(layout.reduce_bucket * BYTES[layout.precision])
    if layout.overlap and layout.stage < 3:
        size *= 2
    return {"buckets": size}


def _layer_activations(shape: Shape, lora: Lora, layout: Layout) -> int:
    """Bytes per token that a decoder layer keeps, with b = bytes of a number, h = hidden, f = intermediate.

    Both norms' inputs in fp32 (8 h), q and the attention's output (2 b q), k and v (2 b kv), gate, its activation and
    up (3 b f). A frozen linear layer keeps none of its inputs, but under ZeRO-3 DeepSpeed's own linear function does;
    an adapter in training keeps those of its layers, and b x rank in its middle. Layers with the same input share it;
    that of o_proj is a copy of the attention's output (`engine/packed_attention.py`). With dropout an adapted layer
    keeps an input of its own, and a mask for each of two adapters in the same width.
    """
    element = BYTES[layout.precision]
    kept = 8 * shape.hidden
    kept += element * (2 * shape.query_width + 2 * shape.key_width)
    if shape.experts:
        # Of each expert that it takes, a token's input and output beside the three. Not measured.
        kept += element * shape.active_experts * (3 * shape.intermediate + 2 * shape.hidden)
    else:
        kept += element * 3 * shape.intermediate
    kept += element * sum(_kept_inputs(shape, lora, layout).values())
    kept += element * len(lora.targets) * max(lora.rank, lora.local_rank)
    if lora.dropout:
        kept += 3 * element * sum(shape.linears[name][0] for name in lora.targets)
    return kept


def _kept_inputs(shape: Shape, lora: Lora, layout: Layout) -> dict[str, int]:
    """Inputs of linear layers that autograd keeps, and their width."""
    # An input is kept once, however many layers read it.
    read_by = {
        "attention": ("q_proj", "k_proj", "v_proj"),
        "output": ("o_proj",),
        "mlp": ("gate_proj", "up_proj"),
        "down": ("down_proj",),
    }
    kept = {}
    for name, readers in read_by.items():
        if readers[0] not in shape.linears:  # of experts
            continue
        # With dropout an adapted layer reads a copy of its own, which `_layer_activations` counts.
        adapted = not lora.dropout and not set(readers).isdisjoint(lora.targets)
        if layout.stage == 3 or adapted:
            kept[name] = shape.linears[readers[0]][0]
    return kept


def _power_of_two_from(size: int) -> int:
    return int(2 ** (size - 1).bit_length())


def _divided_parameters(shape: Shape, lora: Lora, layout: Layout) -> int:
    """What ZeRO-3 divides: the base, and the A and B of more than `persistence` elements."""
    num = shape.parameters
    for rank in (lora.rank, lora.local_rank):
        for name in lora.targets:
            for width in shape.linears[name]:
                if rank * width > layout.persistence:
                    num += shape.layers * rank * width
    return num


def _small_parameters(shape: Shape, layout: Layout) -> int:
    """Elements of the base in linear layers of at most `persistence` elements."""
    num = 0
    for inputs, outputs in shape.linears.values():
        if inputs * outputs <= layout.persistence:
            num += shape.layers * inputs * outputs
    return num


def _kept_at_the_turn(shape: Shape, layout: Layout) -> int:
    largest = max(layout.reuse_distance // 2, shape.layer_parameters, shape.embedding_parameters)
    return largest + layout.prefetch
