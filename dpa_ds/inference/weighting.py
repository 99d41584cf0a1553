"""Instance-wise dynamic weighting: how much of the local adapter a test prompt gets.

    alpha(x) = clamp(scale * mean over i of similarity(e(x), e(r_i)), 0, 1)

e is the state of a prompt, r_1 .. r_S are prompts of the client's own training data (FedDPA, section 3.4, where the
similarity is the cosine and scale, there lambda, is 0.5). Raw cosines of hidden states are nearly constant, because the states
share a large common component; `centred_cosine`, ours, subtracts the federation's mean state first.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from dpa_ds.adapters import methods
from dpa_ds.adapters.methods import GLOBAL, LOCAL, Schedule
from dpa_ds.config.schema import Encoder, RunConfig
from dpa_ds.data.references import Representation
from dpa_ds.errors import ConfigError

CONSTANT = ("fixed", GLOBAL, LOCAL)
"""Kinds whose weight does not depend on the prompt."""
DEFAULT_SCALE = {"centred_cosine": 1.0}
PAPER_SCALE = 0.5
EPSILON = 1e-8
"""A state shorter than this has no direction: its cosine with anything is 0."""


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
        """The weight does not depend on the prompt: nothing need be encoded."""
        return self.kind in CONSTANT


def resolve_weighting(config: RunConfig, schedule: Schedule, num_clients: int) -> Weighting:
    """What `config.weighting` means for the run's method.

    The mean state of a federation of one client is the client's own: subtracted, it takes away what the client's prompts
    have in common, measured as a mean cosine of 0.004 to own and to other prompts alike. `auto` then means `cosine`.

    Args:
        num_clients: of the federation.

    Raises:
        ConfigError: centred_cosine is asked for, and there is one client.
    """
    chosen = config.weighting
    kind: str = chosen.kind
    if kind == "centred_cosine" and num_clients == 1:
        raise ConfigError(
            "weighting.kind centred_cosine subtracts the mean state of the federation, which with one client is the client's "
            "own, and leaves nothing that tells its prompts from others: use weighting.kind cosine"
        )
    if kind == "auto":
        alone = LOCAL if schedule.inference_alpha == 1.0 else GLOBAL
        by_instance = "centred_cosine" if num_clients > 1 else "cosine"
        kind = by_instance if schedule.weighted_by_instance else alone
    encoder: Encoder = LOCAL if chosen.encoder == "auto" else chosen.encoder
    if chosen.encoder == "auto" and kind == "centred_cosine":
        encoder = "none"
    scale = DEFAULT_SCALE.get(kind, PAPER_SCALE) if chosen.scale is None else chosen.scale
    assert kind != "centred_cosine" or encoder == "none", "config_checks"
    weighting = Weighting(kind, scale, chosen.representation, encoder)
    match kind:
        case "fixed":
            alpha = config.method.alpha if chosen.scale is None else chosen.scale
            return replace(weighting, scale=alpha, encoder="none")
        case methods.GLOBAL | methods.LOCAL:
            return replace(weighting, scale=float(kind == LOCAL), encoder="none")
    return weighting


def instance_weights(
    weighting: Weighting, states: torch.Tensor, references: torch.Tensor, reference_mean: torch.Tensor
) -> torch.Tensor:
    """Weight alpha of the local adapter for each prompt, (n,) in [0, 1].

    Args:
        states: (n, hidden) of the prompts.
        references: (S, hidden) of the client's own prompts, by the same encoder.
        reference_mean: (hidden,) of the federation; used by `centred_cosine` only.
    """
    match weighting.kind:
        case "fixed" | methods.GLOBAL | methods.LOCAL:
            return torch.full((len(states),), weighting.scale)
        case "cosine" | "swapped":
            similarity = mean_cosine(states, references)
        case "centred_cosine":
            similarity = mean_cosine(states - reference_mean, references - reference_mean)
        case "pearson":
            similarity = mean_cosine(*(x - x.mean(dim=1, keepdim=True) for x in (states, references)))
        case "l2":
            # The paper names the measure without a formula: 1 for equal directions, 0 for opposite ones.
            # Not by the matrix product that cdist takes for more than 25 rows: near states come out 1e-4 wrong.
            exact = "donot_use_mm_for_euclid_dist"
            similarity = 1 - torch.cdist(_unit(states), _unit(references), compute_mode=exact).mean(dim=1) / 2
        case _:
            raise AssertionError(weighting.kind)
    alpha = (weighting.scale * similarity).clamp(0.0, 1.0)
    return 1 - alpha if weighting.kind == "swapped" else alpha


def mean_cosine(states: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Mean of each state's cosines with the S references, (n,): ONE dot product with the mean of their unit vectors."""
    return _unit(states) @ _unit(references).mean(dim=0)


def describe_weighting(weighting: Weighting, num_references: int) -> str:
    """One line for reports."""
    match weighting.kind:
        case methods.GLOBAL | methods.LOCAL:
            return f"{weighting.kind} adapter alone"
        case "fixed":
            return f"fixed alpha {weighting.scale:g}"
    encoder = "frozen base" if weighting.encoder == "none" else f"{weighting.encoder} adapter"
    return (
        f"{weighting.kind}, lambda {weighting.scale:g}, {num_references} references, {weighting.representation}, "
        f"encoded by the {encoder}"
    )


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return F.normalize(vectors, dim=1, eps=EPSILON)
