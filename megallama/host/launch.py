"""What the launcher passes to this process. The only reader of `os.environ` in the package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megallama.host.errors import UserError

_LAUNCHED_BY = "start the ranks with torchrun, which sets it"

# Launchers that start many copies of a command without telling torch: variable with their number, name.
_OTHER_LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}


@dataclass(frozen=True)
class LaunchEnvironment:
    """Place of this process in the job."""

    rank: int = 0
    """Number of this process in the job, from 0."""
    world_size: int = 1
    """Number of processes of the job."""
    local_rank: int = 0
    """Number of this process on its node; also its accelerator's."""
    local_world_size: int = 1
    """Number of processes on this node."""
    master_addr: str = "127.0.0.1"
    """Host of the rendezvous."""
    master_port: int = 29500
    """TCP port of the rendezvous."""


def is_under_torchrun() -> bool:
    """Whether torchrun started this process. Pods set RANK and WORLD_SIZE too, torchrun's own variables nobody else."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def refuse_several(command: str) -> None:
    """That a command which is one process was not started several times; WORLD_SIZE alone may be that of a pod.

    Raises:
        UserError: torchrun started several of them.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if is_under_torchrun() and size != "1":
        raise UserError(
            f"{command} runs in one process, and torchrun started {size}: start it without torchrun"
        )


def read_launch_environment(variables: Mapping[str, str] | None = None) -> LaunchEnvironment:
    """torchrun's variables; one rank where there are none.

    Args:
        variables: Instead of this process's environment.

    Raises:
        UserError: variables that are missing, no numbers, or contradict each other.
    """
    env = os.environ if variables is None else variables
    if "RANK" not in env and "WORLD_SIZE" not in env:
        refuse_copies(env)
        return LaunchEnvironment()
    world_size = _number(env, "WORLD_SIZE")
    rank = _number(env, "RANK")
    # A launcher that sets only the global pair is taken to mean one node.
    local_world_size = _number(env, "LOCAL_WORLD_SIZE", default=world_size)
    local_rank = _number(env, "LOCAL_RANK", default=rank)
    if world_size < 1:
        raise UserError(f"WORLD_SIZE ({world_size}) must be at least 1: {_LAUNCHED_BY}")
    if not 1 <= local_world_size <= world_size:
        raise UserError(
            f"LOCAL_WORLD_SIZE ({local_world_size}) must be between 1 and WORLD_SIZE ({world_size}):"
            f" {_LAUNCHED_BY}"
        )
    for name, value, size_name, size in (
        ("RANK", rank, "WORLD_SIZE", world_size),
        ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world_size),
    ):
        if not 0 <= value < size:
            raise UserError(
                f"{name} ({value}) must be between 0 and {size_name} - 1 ({size - 1}): {_LAUNCHED_BY}"
            )
    has_address = "MASTER_ADDR" in env and "MASTER_PORT" in env
    if world_size > 1 and not has_address:
        raise UserError(
            f"MASTER_ADDR and MASTER_PORT must be set for WORLD_SIZE ({world_size}) > 1: {_LAUNCHED_BY}"
        )
    master_port = _number(env, "MASTER_PORT", default=LaunchEnvironment.master_port)
    if not 0 < master_port < 65536:
        raise UserError(f"MASTER_PORT ({master_port}) must be between 1 and 65535: choose a free port")
    return LaunchEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr=env.get("MASTER_ADDR", LaunchEnvironment.master_addr),
        master_port=master_port,
    )


def _number(env: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    text = env.get(name)
    if text is None:
        if default is None:
            set_ones = " and ".join(
                f"{other} ({env[other]})" for other in ("RANK", "WORLD_SIZE") if other in env
            )
            raise UserError(
                f"{name} is not set though {set_ones} is, which a pod may have set: {_LAUNCHED_BY}, or unset"
                " RANK and WORLD_SIZE for a run of one process"
            )
        return default
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} ({text!r}) must be an integer: {_LAUNCHED_BY}") from None


def refuse_copies(variables: Mapping[str, str] | None = None) -> None:
    """Many copies that each believe to be alone would write into one run folder.

    Raises:
        UserError: srun, mpirun or mpiexec started this process more than once, without RANK and WORLD_SIZE.
    """
    env = os.environ if variables is None else variables
    if "RANK" in env or "WORLD_SIZE" in env:
        return
    for name, launcher in _OTHER_LAUNCHERS.items():
        count = env.get(name, "1")
        if count.isdecimal() and int(count) > 1:
            raise UserError(
                f"{launcher} started {count} copies of this process ({name}={count}) without RANK and"
                " WORLD_SIZE: let it start torchrun once on each node, as slurm/pretrain_7b.sh does"
            )


def tell_libraries(environment: LaunchEnvironment, *, is_in_launch_order: bool = False) -> None:
    """Set the variables that libraries read and no launcher has set; before CUDA is used first.

    LOCAL_RANK: DeepSpeed refuses to start without it, also for one process. With `is_in_launch_order` the GPU starts
    kernels in the order in which they were launched: megatron-core launches the communication of tensor parallel
    first and counts on it running beside the product that follows.
    """
    os.environ.setdefault("LOCAL_RANK", str(environment.local_rank))
    if is_in_launch_order:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
