"""Bytes per rank of a training step, by part, for one DeepSpeed layout. Upper bounds, measured by benchmarks/memory.py."""

from dataclasses import dataclass

from dpa_ds.planning.shapes import Shape

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


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
    offload_params: bool = False
    dropped: int = 0
    """With lora.dropout: inputs of a layer's adapted linear layers, summed."""


def model_bytes(shape: Shape, layout: Layout) -> dict[str, float]:
    """The frozen base: all of it below stage 3, else 1/ranks of it and what is gathered at once.

    DeepSpeed 0.19.8 keeps a gathered parameter while it is used again within `reuse_distance` elements of its trace.
    At the turn from forward to backward these are the last reuse_distance / 2 (with recomputation / 3); a single layer
    at least. Parameters of at most `persistence` elements stay gathered.
    """
    b = BYTES[layout.precision]
    if layout.stage < 3:
        return {"base": shape.parameters * b}
    small = shape.layers * sum(i * o for i, o in shape.linears.values() if i * o <= layout.persistence)
    kept = layout.reuse_distance // (3 if layout.checkpointing else 2)
    gathered = min(shape.parameters, max(kept, shape.layer_parameters, shape.vocab * shape.hidden))
    share = 0.0 if layout.offload_params else shape.parameters * b / layout.ranks
    return {"base": share, "gathered": min(shape.parameters, gathered + small) * b}


def adapter_bytes(trained: int, layout: Layout) -> dict[str, float]:
    """Both adapters (2 x `trained` parameters): working copy, fp32 master and gradient, two moments of the active one.

    Stage 0 in fp32 needs no second master. From stage 1 on masters and moments are divided, from 2 on gradients.
    """
    b, ranks = BYTES[layout.precision], layout.ranks
    split = ranks if layout.stage >= 1 else 1
    master = 0 if layout.stage == 0 and b == 4 else 8 * trained / split
    return {
        "adapters": 2 * trained * b / (ranks if layout.stage == 3 else 1),
        "gradients": 4 * trained / (ranks if layout.stage >= 2 else 1),
        "optimizer": master + 8 * trained / split,
    }


def activation_bytes(shape: Shape, layout: Layout) -> dict[str, float]:
    """What autograd keeps at the turn from forward to backward, and the logits.

    A layer keeps per token: both norms' inputs in fp32 (8 h), the adapters' input (b h), q and the attention's output
    (2 b q), k and v (2 b kv), gate, its activation and up (3 b f). A frozen linear layer keeps none of its inputs, but
    under ZeRO-3 DeepSpeed's own linear function does: b (h + f) more. With checkpointing a layer keeps its input, b h,
    and one layer at a time all of the above. The loss holds three fp32 tensors at label positions: 12 x labels x vocab.
    Dropout keeps each adapted layer's input once more for the adapter in training, and its mask in the same width.
    """
    b, h, f = BYTES[layout.precision], shape.hidden, shape.intermediate
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = 8 * h + b * (h + 2 * q + 2 * kv + 3 * f) + (b * (h + f) if layout.stage == 3 else 0)
    layer += 2 * b * layout.dropped
    logits = 12.0 * layout.labels * shape.vocab
    if not layout.checkpointing:
        return {"activations": float(shape.layers * layer * layout.tokens), "logits": logits}
    kept = float(shape.layers * b * h * layout.tokens)
    return {"activations": kept + max(0.0, layer * layout.tokens - logits), "logits": logits}


def buffer_bytes(layout: Layout) -> dict[str, float]:
    """DeepSpeed's reduce bucket: made in full, however few parameters are trained; two at stages 1, 2 with overlap_comm.

    Stage 1 in bf16 with fp32 gradient accumulation (BF16_Optimizer) and stage 0 have none.
    """
    b = BYTES[layout.precision]
    if layout.stage == 0 or (layout.stage == 1 and layout.precision == "bf16"):
        return {"buckets": 0.0}
    return {"buckets": float(layout.reduce_bucket * b * (2 if layout.overlap and layout.stage < 3 else 1))}


def step_bytes(shape: Shape, trained: int, layout: Layout) -> dict[str, float]:
    """All parts, in bytes per rank; `trained` is the number of parameters of one adapter."""
    return (
        model_bytes(shape, layout)
        | adapter_bytes(trained, layout)
        | activation_bytes(shape, layout)
        | buffer_bytes(layout)
    )
