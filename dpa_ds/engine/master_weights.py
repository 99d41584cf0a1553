"""Where DeepSpeed keeps the fp32 master of each adapter parameter on this rank, for every ZeRO stage.

The one place that knows the insides of DeepSpeed's optimizers (0.19.8). Its own accessors do not
serve: under ZeRO-3 `safe_get_full_fp32_param` returns None for a frozen parameter,
`safe_set_full_fp32_param` fails where the size is not a multiple of the ranks, and there is none
that resets a step count.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Fragment:
    """Where this rank keeps the fp32 master of (a part of) one parameter."""

    flat: torch.Tensor
    """Flat fp32 tensor, the key of the inner optimizer's state."""
    offset: int
    """First element in `flat`."""
    start: int
    """First element of the flattened parameter."""
    numel: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """This fragment of `flat`, or of a state tensor of the same layout, as a view."""
        return flat.detach().view(-1)[self.offset : self.offset + self.numel]

    def part_of(self, values: torch.Tensor) -> torch.Tensor:
        """The same elements of the flattened parameter `values`, as a view."""
        return values[self.start : self.start + self.numel]


def locate_masters(
    optimizer: Any, stage: int, rank: int, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, Fragment | None]:
    """This rank's fragment of each parameter's fp32 master; None where other ranks hold all of it.

    Args:
        optimizer: what `deepspeed.initialize` returned.
        stage: its ZeRO stage.
        rank: this rank within the group.
        parameters: by key, each in one of the optimizer's groups.
    """
    match stage:
        case 0:
            return _of_stage_zero(optimizer, parameters)
        case 1 | 2:
            return {key: _of_stage_one_or_two(optimizer, parameter) for key, parameter in parameters.items()}
        case _:
            return {key: _of_stage_three(optimizer, parameter, rank) for key, parameter in parameters.items()}


def _of_stage_zero(optimizer: Any, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, Fragment | None]:
    if isinstance(optimizer, torch.optim.Optimizer):  # fp32: the working copy is the master
        masters = {id(parameter): parameter for parameter in parameters.values()}
    else:  # fp16 and bf16: FP16_UnfusedOptimizer keeps two lists
        masters = {}
        for working_copies, group_masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for working_copy, master in zip(working_copies, group_masters, strict=True):
                masters[id(working_copy)] = master
    fragments: dict[str, Fragment | None] = {}
    for key, parameter in parameters.items():
        master = masters[id(parameter)]
        fragments[key] = Fragment(master, offset=0, start=0, numel=master.numel())
    return fragments


def _of_stage_one_or_two(optimizer: Any, parameter: Any) -> Fragment | None:
    mapping = parameter._hp_mapping
    if mapping is None:  # all of it lies in other ranks' partitions
        return None
    flats = getattr(optimizer, "single_partition_of_fp32_groups", None)
    if flats is None:  # BF16_Optimizer: stage 1 with fp32 gradient accumulation
        flats = optimizer.fp32_groups_flat_partition
    address = mapping.get_hp_fragment_address()
    flat = flats[mapping.param_group_index]
    return Fragment(flat, address.start, mapping.lp_fragment_address.start, address.numel)


def _of_stage_three(optimizer: Any, parameter: Any, rank: int) -> Fragment | None:
    group, offset, partition = optimizer.grad_position[parameter.ds_id]
    start = min(partition * rank, parameter.ds_numel)
    numel = min(partition, parameter.ds_numel - start)  # the last rank's partition is padded
    if numel == 0:
        return None
    return Fragment(optimizer.fp32_partitioned_groups_flat[group], offset, start, numel)


def forget_order_of_modules(optimizer: Any) -> None:
    """ZeRO-3, before the first step: have DeepSpeed record the order of modules of a training step from scratch.

    By it weights stay gathered from the forward to the backward pass. So far it has seen forward passes alone, and what
    it decided by those it would never decide again: every step would gather the base twice.
    """
    coordinator = optimizer.parameter_offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    decide = type(coordinator)._PartitionedParameterCoordinator__params_to_release
    if not hasattr(decide, "cache_clear"):  # inside a function that only names it for profilers
        decide = inspect.getclosurevars(decide).nonlocals["func"]
    decide.cache_clear()
