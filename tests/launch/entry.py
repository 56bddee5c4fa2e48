"""The real entries, called in processes of the forkserver: exit code, what they say, what they leave on the disk."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from megallama.checkpoint.format.disk import Disk
from megallama.trainer.hooks.base import Hook
from tests.support.places import ROOT
from tests.support.ranks import run_ranks

ENTRY = ROOT / "launch" / "train.py"
CRASHED = -1
"""Exit code of a call that ended in an exception: what a user sees as a traceback."""


@dataclass(frozen=True)
class Outcome:
    """What a command gave back."""

    code: int
    output: str
    """Standard output and standard error, as they came."""
    had_process_group: bool = False
    """Whether torch.distributed was initialised."""

    @property
    def errors(self) -> list[str]:
        """The lines that begin as our messages do."""
        return [line for line in self.output.splitlines() if line.startswith("error")]

    @property
    def message(self) -> str:
        """The one message, which is all that was said."""
        assert self.output.startswith("error: "), self.output
        assert len(self.errors) == 1, self.output
        return self.output.removeprefix("error: ").removesuffix("\n")


def load_entry() -> ModuleType:
    """launch/train.py as a module; it is no part of the package."""
    spec = importlib.util.spec_from_file_location("launch_train", ENTRY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_command(arguments: Sequence[str]) -> int:
    """`python launch/train.py ARGUMENTS`, in this process."""
    return int(load_entry().main(arguments))


def impatient_train_command(
    arguments: Sequence[str], hooks: Sequence[Hook] = (), disk: Disk | None = None
) -> int:
    """The entry without the pauses in which ranks wait for each other to speak."""
    from megallama import entry, preflight

    entry.GRACE_S = entry.STAGGER_S = preflight.PATIENCE_S = 0.0
    return entry.main(arguments, hooks=hooks, disk=disk)


def megallama_command(arguments: Sequence[str]) -> int:
    """`megallama ARGUMENTS`, in this process."""
    from megallama.cli import main

    return main(arguments)


def call(command: Callable[..., int], *arguments: object) -> Outcome:
    """Run a command in this process with file descriptors 1 and 2 caught, libraries written in C included."""
    import torch.distributed as dist

    started: list[bool] = []
    initialise = dist.init_process_group

    def noted(*args: object, **kwargs: object) -> None:
        started.append(True)
        initialise(*args, **kwargs)

    dist.init_process_group = noted
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 1)
        os.dup2(caught.fileno(), 2)
        # What the forkserver's own streams are is not ours to know.
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        try:
            code = command(*arguments)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else CRASHED
        except BaseException:
            traceback.print_exc()
            code = CRASHED
        sys.stdout.flush()
        sys.stderr.flush()
        caught.seek(0)
        return Outcome(code, caught.read().decode("utf-8", errors="replace"), bool(started))


def _call_as(
    variables: Mapping[str, str], folder: str, command: Callable[..., int], arguments: Sequence[str]
) -> Outcome:
    os.environ.update(variables)
    os.chdir(folder)
    return call(command, arguments)


def run_command(
    command: Callable[..., int],
    arguments: Sequence[str],
    *,
    folder: Path,
    world_size: int = 1,
    rank: int = 0,
) -> Outcome:
    """One process of a job as torchrun would start it in `folder`; the other ranks need not exist."""
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    (outcome,) = run_ranks(1, _call_as, variables, str(folder), command, list(arguments))
    return outcome


def torchrun(arguments: list[str], *, folder: Path) -> subprocess.CompletedProcess[str]:
    """Two ranks under the real launcher, everything they say in `stdout`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--standalone", str(ENTRY), *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,  # of a job that hangs, on a machine however slow
        check=False,
    )


def listing(folder: Path, *, has_folder_times: bool = True) -> dict[str, tuple[str, int, str]]:
    """Everything below `folder`: path -> (kind and permissions, time of change in ns, digest of the content)."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        state = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        changed = state.st_mtime_ns if has_folder_times or not path.is_dir() else 0
        found[str(path.relative_to(folder))] = (oct(state.st_mode), changed, content)
    return found


@contextmanager
def unchanged(folder: Path, *, allows_temporary: bool = False) -> Iterator[None]:
    """Nothing below `folder` is made, altered or removed; where allowed, something may come and go again."""
    before = listing(folder, has_folder_times=not allows_temporary)
    yield
    after = listing(folder, has_folder_times=not allows_temporary)
    assert after == before, {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
