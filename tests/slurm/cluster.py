"""A real Slurm cluster of two nodes on one machine, for the length of a `with` block.

Two slurmd with a name and a port each, one slurmctld and one munged with a key of its own, all out of one
temporary folder: a Slurm that the machine may already have is neither used nor touched. Debian and Ubuntu
build slurmd so that several can share a host. Nodes are named 127.0.0.2 and 127.0.0.3, because the name of
a node must resolve and these do on every Linux, without an entry in /etc/hosts.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NODES = ("127.0.0.2", "127.0.0.3")
GPU_FILES = ("/dev/null", "/dev/zero")
"""The GPUs of a node as Slurm believes: it counts and binds these devices, nothing opens them."""
PROGRAMS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0

SLURM_CONF = """\
ClusterName=megallama_test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# No cgroups: they would need a systemd or a delegated hierarchy.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
GresTypes=gpu
# The nodes may claim cores that this machine does not have.
SlurmdParameters=config_overrides
NodeName={nodes[0]} NodeAddr={nodes[0]} NodeHostname={host} Port={ports[0]} CPUs={cpus} Gres=gpu:{gpus}
NodeName={nodes[1]} NodeAddr={nodes[1]} NodeHostname={host} Port={ports[1]} CPUs={cpus} Gres=gpu:{gpus}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    folder: Path
    """Configuration and daemon logs."""

    def environment(self) -> dict[str, str]:
        """Environment of a shell on this cluster: this process's, outside any job of another Slurm."""
        outer = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))
        }
        return {**outer, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path,
        timeout_s: float,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a client command such as sbatch; output is captured, the caller judges the exit status."""
        return subprocess.run(
            [str(word) for word in command],
            cwd=cwd,
            env={**self.environment(), **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def logs(self) -> str:
        """The ends of all daemon logs, for a failure message."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(encoding='utf-8', errors='replace')[-3000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )


def missing_packages() -> list[str]:
    """Debian packages of Slurm that this machine lacks; `make slurm` installs them."""
    return sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})


@contextmanager
def two_nodes() -> Iterator[Cluster]:
    """Start the cluster, yield it when both nodes are idle, stop all of it at the end.

    Raises:
        RuntimeError: a daemon ended early or a node did not come up; with the daemons' logs.
    """
    # Not pytest's tmp_path: the path of a Unix socket may have 107 bytes only.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    cluster = Cluster(folder)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        _write_files(folder)
        for command in _daemon_commands(folder):
            # One at a time: slurmctld and slurmd ask munged when they start.
            daemons.append(subprocess.Popen(command, env=cluster.environment(), stderr=subprocess.DEVNULL))
            if command[0].endswith("munged"):
                _wait_until((folder / "munge.socket").exists, daemons, cluster)
        _wait_until(lambda: _num_idle(cluster) == len(NODES), daemons, cluster)
        yield cluster
    finally:
        _stop(cluster, daemons)
        shutil.rmtree(folder, ignore_errors=True)


def _write_files(folder: Path) -> None:
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    (folder / "state").mkdir()
    for node in NODES:
        (folder / f"spool-{node}").mkdir()
    ports = _free_ports(1 + len(NODES))
    text = SLURM_CONF.format(
        host=socket.gethostname().split(".")[0],
        controller_port=ports[0],
        ports=ports[1:],
        user=getpass.getuser(),
        folder=folder,
        nodes=NODES,
        cpus=os.cpu_count(),
        gpus=len(GPU_FILES),
    )
    (folder / "slurm.conf").write_text(text, encoding="utf-8")
    (folder / "gres.conf").write_text(
        "".join(f"Name=gpu File={file}\n" for file in GPU_FILES), encoding="utf-8"
    )
    # slurmd loads a cgroup plugin even if nothing uses it. v1 needs no systemd; "disabled" came with 23.02.
    plugin = "disabled" if _slurm_version() >= (23, 2) else "cgroup/v1"
    (folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n", encoding="utf-8")


def _slurm_version() -> tuple[int, int]:
    shown = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=True).stdout
    major, minor = shown.split()[-1].split(".")[:2]  # "slurm-wlm 22.05.8"
    return int(major), int(minor)


def _daemon_commands(folder: Path) -> list[list[str]]:
    munged = ["munged", "--foreground", "--force"]
    for option, name in (("key-file", "munge.key"), ("socket", "munge.socket"), ("pid-file", "munged.pid")):
        munged.append(f"--{option}={folder / name}")
    munged += [f"--log-file={folder / 'munged.log'}", f"--seed-file={folder / 'munged.seed'}"]
    configuration = str(folder / "slurm.conf")
    commands = [munged, ["slurmctld", "-D", "-f", configuration]]
    commands += [["slurmd", "-D", "-N", node, "-f", configuration] for node in NODES]
    return commands


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all probed at once, so they differ."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _num_idle(cluster: Cluster) -> int:
    shown = cluster.run(["sinfo", "--noheader", "--Node", "--format=%T"], cwd=cluster.folder, timeout_s=20)
    return shown.stdout.split().count("idle")


def _wait_until(
    is_ready: Callable[[], bool], daemons: Sequence[subprocess.Popen[bytes]], cluster: Cluster
) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_ready():
        ended = [f"{daemon.args!r} ({daemon.poll()})" for daemon in daemons if daemon.poll() is not None]
        if ended or time.monotonic() > deadline:
            what = f"ended early: {', '.join(ended)}" if ended else f"not ready after {START_TIMEOUT_S:.0f} s"
            raise RuntimeError(f"the test cluster did not start ({what}):\n{cluster.logs()}")
        time.sleep(0.1)


def _stop(cluster: Cluster, daemons: Sequence[subprocess.Popen[bytes]]) -> None:
    """Cancel what still runs (a job outlives its slurmd), then end the daemons."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    if len(daemons) > 1:
        cluster.run(["scancel", "--partition=all"], cwd=cluster.folder, timeout_s=20)
        while time.monotonic() < deadline:
            if not cluster.run(["squeue", "--noheader"], cwd=cluster.folder, timeout_s=20).stdout.strip():
                break
            time.sleep(0.2)
    for daemon in reversed(daemons):
        daemon.terminate()
    for daemon in reversed(daemons):
        try:
            daemon.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
