"""Instance-wise dynamic weighting: how much of the local adapter a test prompt gets.

    alpha(x) = clamp(scale * mean over i of similarity(e(x), e(r_i)), 0, 1)

e is the embedding of a prompt, r_1 .. r_S are prompts of the client's own training data (FedDPA,
section 3.4, where the similarity is the cosine and scale, there lambda, is 0.5). Raw cosines of
embeddings are nearly constant, because all of them share a large common component;
`centred_cosine`, ours, subtracts the federation's reference mean first.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dpa_ds.adapters import methods
from dpa_ds.adapters.methods import GLOBAL, LOCAL, build_schedule
from dpa_ds.config.schema import Encoder, MethodConfig, WeightingConfig
from dpa_ds.data.references import Representation
from dpa_ds.errors import ConfigError

BASE_ALONE = "none"
"""Kind that leaves both adapters out."""
CONSTANT = ("fixed", GLOBAL, LOCAL, BASE_ALONE)
"""Kinds whose weight does not depend on the prompt."""
DEFAULT_SCALE = {"centred_cosine": 1.0}
PAPER_SCALE = 0.5
EPSILON = 1e-8
"""An embedding shorter than this has no direction: its cosine with anything is 0."""


@dataclass(frozen=True)
class Weighting:
    """`WeightingConfig` with nothing left to decide."""

    kind: str
    scale: float
    """lambda; for `fixed` the weight itself."""
    representation: Representation
    encoder: Encoder

    @property
    def is_constant(self) -> bool:
        """The weight does not depend on the prompt: nothing need be embedded."""
        return self.kind in CONSTANT


def resolve_weighting(config: WeightingConfig, method: MethodConfig, num_clients: int) -> Weighting:
    """What the recipe's `weighting` means for the run's method.

    The reference mean of a federation of one client is the client's own: subtracted, it takes away
    what the client's prompts have in common, measured as a mean cosine of 0.004 to own and to other
    prompts alike. `auto` then means `cosine`.

    Args:
        num_clients: of the federation.

    Raises:
        ConfigError: centred_cosine is asked for, and there is one client.
    """
    if config.kind == "centred_cosine" and num_clients == 1:
        raise ConfigError(
            "weighting.kind centred_cosine subtracts the reference mean of the federation, which with one "
            "client is the client's own, and leaves nothing that tells its prompts from others: use "
            "weighting.kind cosine"
        )
    kind = _resolve_kind(config, method, num_clients)
    match kind:
        case methods.GLOBAL | "none":
            return Weighting(kind, 0.0, config.representation, "none")
        case methods.LOCAL:
            return Weighting(kind, 1.0, config.representation, "none")
        case "fixed":
            alpha = method.alpha if config.scale is None else config.scale
            return Weighting(kind, alpha, config.representation, "none")
    scale = config.scale
    if scale is None:
        scale = DEFAULT_SCALE.get(kind, PAPER_SCALE)
    encoder: Encoder = "none" if kind == "centred_cosine" else LOCAL
    if config.encoder != "auto":
        encoder = config.encoder
    assert kind != "centred_cosine" or encoder == "none", "config/validate.py"
    return Weighting(kind, scale, config.representation, encoder)


def _resolve_kind(config: WeightingConfig, method: MethodConfig, num_clients: int) -> str:
    """`weighting.kind`, and for `auto` what fits the method."""
    if config.kind != "auto":
        return config.kind
    schedule = build_schedule(method)
    if schedule.weighted_by_instance:
        return "centred_cosine" if num_clients > 1 else "cosine"
    return LOCAL if schedule.inference_alpha == 1.0 else GLOBAL


def instance_weights(
    weighting: Weighting, embeddings: torch.Tensor, references: torch.Tensor, reference_mean: torch.Tensor
) -> torch.Tensor:
    """Weight alpha of the local adapter for each prompt, (n,) in [0, 1].

    Args:
        embeddings: (n, hidden) of the prompts.
        references: (S, hidden) of the client's own prompts, by the same encoder.
        reference_mean: (hidden,) of the federation; used by `centred_cosine` only.
    """
    match weighting.kind:
        case "fixed" | methods.GLOBAL | methods.LOCAL | "none":
            return torch.full((len(embeddings),), weighting.scale)
        case "cosine" | "swapped":
            similarity = mean_cosine(embeddings, references)
        case "centred_cosine":
            similarity = mean_cosine(embeddings - reference_mean, references - reference_mean)
        case "pearson":
            similarity = mean_cosine(_less_own_mean(embeddings), _less_own_mean(references))
        case "l2":
            # The paper names the measure without a formula: here 1 for equal directions, 0 for opposite.
            # Not by the matrix product that cdist takes for more than 25 rows: where embeddings are
            # near, it is 1e-4 wrong.
            exact = "donot_use_mm_for_euclid_dist"
            distances = torch.cdist(_unit(embeddings), _unit(references), compute_mode=exact)
            similarity = 1 - distances.mean(dim=1) / 2
        case _:
            raise AssertionError(weighting.kind)
    alpha = (weighting.scale * similarity).clamp(0.0, 1.0)
    return 1 - alpha if weighting.kind == "swapped" else alpha


def mean_cosine(embeddings: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Mean of each embedding's cosines with the S references, (n,)."""
    # One dot product with the mean of their unit vectors, instead of S products.
    return _unit(embeddings) @ _unit(references).mean(dim=0)


def describe_weighting(weighting: Weighting, num_references: int) -> str:
    """One line for reports."""
    match weighting.kind:
        case methods.GLOBAL | methods.LOCAL:
            return f"{weighting.kind} adapter alone"
        case "none":
            return "no adapter, the base alone"
        case "fixed":
            return f"fixed alpha {weighting.scale:g}"
    encoder = "frozen base" if weighting.encoder == "none" else f"{weighting.encoder} adapter"
    return (
        f"{weighting.kind}, lambda {weighting.scale:g}, {num_references} references, {weighting.representation}, "
        f"encoded by the {encoder}"
    )


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return F.normalize(vectors, dim=1, eps=EPSILON)


def _less_own_mean(vectors: torch.Tensor) -> torch.Tensor:
    """Each of the rows less the mean of its own coordinates."""
    return vectors - vectors.mean(dim=1, keepdim=True)
