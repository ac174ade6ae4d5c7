"""A checkpoint of W processes continued by another number: the optimiser's partitions are joined and dealt anew.

DeepSpeed refuses this for ZeRO 1 and 2 ("automatic adjustment ... not currently supported"), so the partitions that
every process wrote (deepspeed/runtime/zero/stage_1_and_2.py, state_dict) are read here. ZeRO 0 keeps its states whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils import distributed
from utils.ds import deepspeed
from utils.errors import CheckpointError


def load_repartitioned(engine: deepspeed.DeepSpeedEngine, folder: Path, tag: str, written: int) -> None:
    """Weights, optimiser and schedule of a checkpoint that `written` processes made; all processes call it.

    Raises:
        CheckpointError: ZeRO-3, whose partitions of weights are not joined here, or files of a process are missing.
    """
    zero = engine.zero_optimization_stage()
    if zero == 3:
        raise CheckpointError(
            f"{folder}: was written by {written} processes under ZeRO-3, this run has {distributed.world_size()}. "
            f"Remedy: start {written} processes, or start anew from its weights with init_from."
        )
    if zero == 0:
        engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
        return
    engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False, load_module_only=True)
    whole = _read(folder / tag / "mp_rank_00_model_states.pt")
    engine.lr_scheduler.load_state_dict(whole["lr_scheduler"])
    engine.global_steps, engine.global_samples = whole["global_steps"], whole["global_samples"]
    pattern = "*zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    found = [sorted((folder / tag).glob(pattern.format(rank))) for rank in range(written)]
    if not all(found):
        raise CheckpointError(
            f"{folder}: the optimiser states of process {found.index([])} are missing. Remedy: use another checkpoint."
        )
    _deal(engine.optimizer, [_read(paths[0])["optimizer_state_dict"] for paths in found])


def _deal(optimizer: Any, states: list[dict[str, Any]]) -> None:
    """Give this process its part of the float32 master weights and of AdamW's moments."""
    base = optimizer.optimizer
    for number, group in enumerate(base.param_groups):
        # the schedule changes the rate after a step only, so the rate of the next one comes from here
        saved = states[0]["base_optimizer_state"]["param_groups"][number]
        group.update({name: value for name, value in saved.items() if name != "params"})
        masters = [state["single_partition_of_fp32_groups"][number] for state in states]
        moments = [state["base_optimizer_state"]["state"][number] for state in states]
        own = optimizer.single_partition_of_fp32_groups[number]
        own.data.copy_(_part(optimizer, masters, number))
        kept: dict[str, Tensor] = {}
        for name, value in moments[0].items():
            if isinstance(value, Tensor) and value.dim():
                # a moment is written with its padding, the masters without: the masters tell the true length
                pieces = [m[name][: len(master)] for m, master in zip(moments, masters, strict=True)]
                kept[name] = _part(optimizer, pieces, number).to(own.device, copy=True)
            else:
                kept[name] = value
        base.state[group["params"][0]] = kept


def _part(optimizer: Any, pieces: list[Tensor], group: int) -> Tensor:
    """This process's share of a group whose parts lie one after the other in `pieces`."""
    processes = optimizer.real_dp_process_group[group]
    world = torch.distributed.get_world_size(processes)
    aligned = optimizer.nccl_start_alignment_factor * world
    flat = optimizer.flatten_dense_tensors_aligned([piece.reshape(-1) for piece in pieces], aligned)
    return optimizer.get_data_parallel_partitions(flat, group)[torch.distributed.get_rank(processes)]


def _read(path: Path) -> dict[str, Any]:
    # DeepSpeed's own files, whose hashes the manifest has just confirmed; they hold its settings beside tensors
    return torch.load(path, map_location="cpu", weights_only=False)
