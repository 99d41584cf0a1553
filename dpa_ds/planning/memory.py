"""Bytes per rank of a training step, by part, for one DeepSpeed layout. Upper bounds, measured by benchmarks/planner.py."""

from dataclasses import dataclass

from dpa_ds.planning.shapes import Shape

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Lora:
    """Both adapters of a recipe."""

    targets: tuple[str, ...] = ("q_proj", "v_proj")
    rank: int = 8
    local_rank: int = 8
    dropout: bool = False

    def parameters(self, shape: Shape) -> tuple[int, int]:
        """Of the global and of the local adapter. ModelError: a target that the model lacks."""
        return shape.lora_parameters(self.rank, self.targets), shape.lora_parameters(self.local_rank, self.targets)


@dataclass(frozen=True)
class Layout:
    """What decides the memory of a rank."""

    stage: int
    ranks: int
    precision: str = "bf16"
    tokens: int = 4096
    """Tokens of one micro-batch, padding included."""
    labels: int = 1024
    """Of these, with a label: logits exist there only."""
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
    """The base's share lies in the host's memory (ZeRO-3)."""


def model_bytes(shape: Shape, lora: Lora, layout: Layout) -> dict[str, float]:
    """The frozen base: all of it below stage 3, else 1/ranks of it and what is gathered at once, of the adapters too.

    DeepSpeed 0.19.8 keeps a gathered parameter while it is used again within `reuse_distance` elements of its trace.
    At the turn from forward to backward these are the last reuse_distance / 2, a single layer at least, and `prefetch`
    elements more are on their way. With recomputation it does not release what its prefetcher passed over: measured,
    what is gathered grows to the larger of reuse distance and max_live, and up to twice the prefetch bucket on its way.
    Parameters of at most `persistence` elements stay gathered, and from run to run the embedding does, too, or does not.
    """
    b = BYTES[layout.precision]
    if layout.stage < 3:
        return {"base": shape.parameters * b}
    small = shape.layers * sum(i * o for i, o in shape.linears.values() if i * o <= layout.persistence)
    small += shape.vocab * shape.hidden
    share = 0.0 if layout.offload_params else shape.parameters * b / layout.ranks
    whole = _divided_parameters(shape, lora, layout)
    if layout.checkpointing:
        kept = min(whole, max(layout.reuse_distance, layout.max_live) + small)
        return {"base": share, "gathered": (kept + min(whole // 2, 2 * layout.prefetch)) * b}
    return {"base": share, "gathered": min(whole, _kept_at_the_turn(shape, layout) + small) * b}


def gathered_parameters(shape: Shape, lora: Lora, layout: Layout) -> int:
    """Elements that a group gathers in one forward and backward pass under ZeRO-3. The floor: the base once.

    Anew what was released before the backward pass reads it: not the embedding, whose gradient nobody needs, and not what lies
    at the turn. Recomputation reads a layer twice in a row: gathered once.
    """
    whole = _divided_parameters(shape, lora, layout)
    unread = 0 if shape.tied else shape.vocab * shape.hidden
    return max(whole, 2 * whole - unread - _kept_at_the_turn(shape, layout))


def _divided_parameters(shape: Shape, lora: Lora, layout: Layout) -> int:
    """The base, and the A and B of more than `persistence` elements."""
    parts = [r * size for r in (lora.rank, lora.local_rank) for name in lora.targets for size in shape.linears[name]]
    return shape.parameters + shape.layers * sum(part for part in parts if part > layout.persistence)


def _kept_at_the_turn(shape: Shape, layout: Layout) -> int:
    return max(layout.reuse_distance // 2, shape.layer_parameters, shape.vocab * shape.hidden) + layout.prefetch


def adapter_bytes(global_parameters: int, local_parameters: int, layout: Layout) -> dict[str, float]:
    """Both adapters: working copy, fp32 master and moments; the fp32 gradient of the one in training.

    Stage 0 in fp32 needs no second master. From stage 1 on masters and moments are divided, from 2 on gradients.
    """
    b, ranks, both = BYTES[layout.precision], layout.ranks, global_parameters + local_parameters
    master = 0 if layout.stage == 0 and b == 4 else 4 * both
    return {
        "adapters": both * b / (ranks if layout.stage == 3 else 1),
        "gradients": 4 * max(global_parameters, local_parameters) / (ranks if layout.stage >= 2 else 1),
        "optimizer": (master + 8 * both) / (ranks if layout.stage >= 1 else 1),
    }


def activation_bytes(shape: Shape, lora: Lora, layout: Layout) -> dict[str, float]:
    """What autograd keeps at the turn from forward to backward, and the logits.

    A layer keeps per token: both norms' inputs in fp32 (8 h), q and the attention's output (2 b q), k and v (2 b kv),
    gate, its activation and up (3 b f). A frozen linear layer keeps none of its inputs, but under ZeRO-3 DeepSpeed's
    own linear function does; an adapter in training keeps those of its layers, and b x rank in its middle. Layers with
    the same input share it; that of o_proj is a copy of the attention's output (`model/packing.py`).
    Where both adapters take part it keeps both once more, stacked (`model/mixed_lora.py`).
    With dropout an adapted layer keeps an input of its own, and a mask for each of two adapters in the same width.
    With checkpointing a layer keeps its input, b h, and one layer at a time all of the above.
    The loss holds three fp32 tensors at label positions: 12 x labels x vocab.
    """
    b, h, f = BYTES[layout.precision], shape.hidden, shape.intermediate
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = 8 * h + b * (2 * q + 2 * kv + 3 * f)
    inputs = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "o_proj": "output"}
    inputs |= {"gate_proj": "mlp", "up_proj": "mlp", "down_proj": "down"}
    kept = set(inputs.values()) if layout.stage == 3 else set()
    if not lora.dropout:
        kept |= {inputs[name] for name in lora.targets}
    layer += b * sum({"attention": h, "output": q, "mlp": h, "down": f}[one] for one in kept)
    layer += b * len(lora.targets) * max(lora.rank, lora.local_rank)
    if lora.dropout:
        layer += 3 * b * sum(shape.linears[name][0] for name in lora.targets)
    one_layer = float(layer * layout.tokens + b * sum(lora.parameters(shape)) // shape.layers)
    logits = 12.0 * layout.labels * shape.vocab
    if not layout.checkpointing:
        return {"activations": shape.layers * one_layer, "logits": logits}
    inputs_of_layers = float(shape.layers * b * h * layout.tokens)
    return {"activations": inputs_of_layers + max(0.0, one_layer - logits), "logits": logits}


def buffer_bytes(layout: Layout) -> dict[str, float]:
    """DeepSpeed's reduce bucket: made in full, however few parameters are trained; two at stages 1, 2 with overlap_comm.

    Stage 1 in bf16 with fp32 gradient accumulation (BF16_Optimizer) and stage 0 have none.
    """
    b = BYTES[layout.precision]
    if layout.stage == 0 or (layout.stage == 1 and layout.precision == "bf16"):
        return {"buckets": 0.0}
    return {"buckets": float(layout.reduce_bucket * b * (2 if layout.overlap and layout.stage < 3 else 1))}


def step_bytes(shape: Shape, lora: Lora, layout: Layout) -> dict[str, float]:
    """All parts, in bytes per rank. ModelError: a target that the model lacks."""
    adapters = adapter_bytes(*lora.parameters(shape), layout)
    return model_bytes(shape, lora, layout) | adapters | activation_bytes(shape, lora, layout) | buffer_bytes(layout)
