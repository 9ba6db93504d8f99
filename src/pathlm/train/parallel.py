"""Several processes as one: device and precision by Accelerate, the model copied (DDP) or sharded (FSDP2), numbers summed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from pathlm.config import RunConfig
from pathlm.models import rows
from pathlm.train.optim import settled

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def accelerator(config: RunConfig) -> Accelerator:
    """Return the Accelerator of a run: its device, its precision, its place among the processes."""
    # The state is shared by a whole process and would keep the precision of an earlier run. The process group stays.
    AcceleratorState._reset_state()
    ddp = DistributedDataParallelKwargs(find_unused_parameters=config.unused_parameters)
    # Accelerate takes processes without a GPU for separate runs unless it is told that they are meant to be on CPUs.
    cpu = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    return Accelerator(cpu=cpu, mixed_precision="bf16" if config.precision == "bf16" else "no", kwargs_handlers=[ddp])


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a model, by transformers' own declaration of what must not be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def recompute_activations(model: nn.Module) -> None:
    """Keep only the inputs of every block during training and compute its inside again in the backward pass.

    A model that has `set_activation_checkpointing(enabled)` does it itself, since it may not call its blocks as a whole.
    """
    itself: Any = getattr(model, "set_activation_checkpointing", None)
    if itself is not None:
        itself(True)
        return
    found = blocks(model)
    if not found:
        raise ValueError(f"activation_checkpointing=True: {type(model).__name__} names no blocks in _no_split_modules")
    for block in found:
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Any) -> Any:
    def again(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return again


def prepare_model(acc: Accelerator, model: nn.Module, config: RunConfig) -> nn.Module:
    """Put the model on its device and, with several processes, copy or shard it. Returns what the loop calls."""
    if config.activation_checkpointing:
        recompute_activations(model)
    if config.compile:
        model.compile()
    if acc.num_processes > 1 and config.strategy == "fsdp2":
        # Accelerate's own FSDP2 exists for accelerators only; this is the same call, and gloo runs it too.
        mesh = init_device_mesh(acc.device.type, (acc.num_processes,))
        model.to(acc.device)
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)  # in place
        return model
    prepared = acc.prepare_model(model)
    # Precision is the loop's `autocast`. Accelerate's own wrapper would also copy every output to float32, and stay on the model.
    acc.unwrap_model(prepared, keep_fp32_wrapper=False)
    return prepared


@contextmanager
def accumulate(acc: Accelerator, model: nn.Module, *, last: bool) -> Iterator[None]:
    """Exchange gradients between processes in the last micro-batch of a step only; computes in the run's precision."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        with nullcontext(), acc.autocast():
            yield
    else:
        with nullcontext() if last else acc.no_sync(model), acc.autocast():
            yield


def summed(acc: Accelerator, values: Tensor) -> Tensor:
    """Sum a tensor over all processes."""
    if acc.num_processes > 1:
        dist.all_reduce(values)
    return values


def clip(model: nn.Module, limit: float) -> Tensor:
    """Scale all gradients, dense, sparse or outer products, so that their global norm is at most `limit`; return the norm before."""
    given = [p for p in model.parameters() if p.grad is not None]
    slabs = [gradient for p in model.parameters() if (gradient := rows.pending(p)) is not None]
    if slabs or any(p.grad.is_sparse for p in given if p.grad is not None):
        parts = []
        for p in given:
            assert p.grad is not None
            p.grad = settled(p.grad) if p.grad.is_sparse else p.grad
            parts.append(p.grad._values() if p.grad.is_sparse else p.grad)
        norm = nn.utils.get_total_norm([*parts, *(gradient.norm() for gradient in slabs)])
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        if norm.device.type != "cpu" or factor < 1:  # to look would stall an accelerator; to multiply by 1 costs memory traffic
            torch._foreach_mul_(parts, factor)
            for gradient in slabs:
                gradient.multiply(float(factor))
        return norm
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def gathered(acc: Accelerator, value: Any) -> list[Any]:
    """Collect one plain value from every process, in the order of their ranks."""
    if acc.num_processes == 1:
        return [value]
    values: list[Any] = [None] * acc.num_processes
    dist.all_gather_object(values, value)
    return values


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the whole weights and the whole optimizer state, gathered from every process. `model` is the unwrapped one."""
    if isinstance(model, FSDPModule):
        return get_model_state_dict(model, options=WHOLE), get_optimizer_state_dict(model, optimizer, options=WHOLE)
    return model.state_dict(), optimizer.state_dict()


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor], moments: dict[str, Any]) -> None:
    """Give weights and optimizer state back to a model and an optimizer. Raises `ValueError` when names do not match."""
    sharded = isinstance(model, FSDPModule)
    own = model.state_dict()
    complete: dict[str, Any] = dict(weights)
    # Tied tensors are saved under one of their names.
    places = {_place(own[name]): name for name in weights if name in own}
    for name in own.keys() - weights.keys():
        if (source := places.get(_place(own[name]))) is None:
            raise ValueError(f"the checkpoint has no tensor {name}")
        complete[name] = weights[source]
    if unknown := sorted(weights.keys() - own.keys()):
        raise ValueError(f"the checkpoint has tensors the model lacks: {', '.join(unknown[:5])}")
    if sharded:
        set_model_state_dict(model, complete, options=FROM_FIRST)
        set_optimizer_state_dict(model, optimizer, moments, options=FROM_FIRST)
    else:
        model.load_state_dict(complete)
        optimizer.load_state_dict(moments)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.device, local.data_ptr(), tuple(tensor.shape)
