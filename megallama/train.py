"""A training run from start to end, in the order of the data flow. `entry.py` is the command line in front of it."""

from __future__ import annotations

from megallama.config.schema import RunConfig
from megallama.engine.build import build_engine
from megallama.host.launch import LaunchEnvironment, read_launch_environment
from megallama.model.build import build_model
from megallama.preflight import check_job
from megallama.stream.build import build_loader
from megallama.topology.connect import connect
from megallama.trainer.build import build_trainer, open_run_folder
from megallama.trainer.checksum_check import check_checksums


def run(config: RunConfig, *, environment: LaunchEnvironment | None = None, job_index: int = 0) -> bool:
    """Train as `config` says, going on where its run folder stands.

    Args:
        config: The run.
        environment: Ranks and rendezvous; from torchrun's variables if not given.
        job_index: Number of the job in this process (multirun).

    Returns:
        Whether all steps are done; False after a requested stop.

    Raises:
        UserError: something that the user can mend, with what to change.
    """
    environment = environment or read_launch_environment()
    check_job([config], environment=environment, job=str(job_index))
    with (
        connect(config.parallel, environment=environment, job_index=job_index) as topology,
        open_run_folder(config, topology) as folder,
    ):
        check_checksums(config, topology)
        stage = build_model(config, topology)
        engine = build_engine(config, topology, stage)
        loader = build_loader(config, topology)
        trainer = build_trainer(
            config, topology, engine=engine, loader=loader, folder=folder, environment=environment
        )
        return trainer.fit()
