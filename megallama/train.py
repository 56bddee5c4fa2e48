"""A training run from start to end, in the order of the data flow. `entry.py` is the command line in front of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megallama.batches.dataset import OwnData, own_loader
from megallama.batches.loader import Loader
from megallama.checkpoint.format.disk import LOCAL_DISK, Disk
from megallama.config.schema import RunConfig
from megallama.engine.adam import OptimizerFactory
from megallama.engine.build import ScheduleFunction, build_run_engine
from megallama.engine.loss import LogitsLoss, Loss, TokenLoss
from megallama.host.errors import UserError
from megallama.host.launch import LaunchEnvironment, read_launch_environment
from megallama.preflight import check_job
from megallama.stream.build import build_loader
from megallama.topology.connect import connect
from megallama.topology.groups import Topology
from megallama.trainer.build import build_loop, open_run_folder
from megallama.trainer.checksum_check import check_checksums
from megallama.trainer.hooks.base import Hook


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A run that has not begun. Nothing is opened, and no process group made, before `fit`."""

    config: RunConfig
    environment: LaunchEnvironment
    hooks: tuple[Hook, ...]
    loss: Loss | None
    optimizer: OptimizerFactory | None
    schedule: ScheduleFunction | None
    data: OwnData | None
    disk: Disk
    job_index: int

    @classmethod
    def from_config(
        cls,
        config: RunConfig,
        *,
        hooks: Sequence[Hook] = (),
        loss: Loss | None = None,
        optimizer: OptimizerFactory | None = None,
        schedule: ScheduleFunction | None = None,
        data: OwnData | None = None,
        disk: Disk | None = None,
        environment: LaunchEnvironment | None = None,
        job_index: int = 0,
    ) -> Trainer:
        """The run that `config` describes, with parts of one's own in the place of the configured ones.

        Every rank makes its own, from equal arguments.

        Args:
            config: The run.
            hooks: Called after each step, in this order, before it is recorded and saved.
            loss: What is minimised: a `TokenLoss` or a `LogitsLoss`; None: cross-entropy.
            optimizer: (parameter groups, `config.optim`) -> optimizer with Adam's state; None: AdamW.
            schedule: (step from 0, steps of the run) -> learning rate; None: as `config.optim` says.
            data: A dataset, or (topology of this rank) -> `Loader`; None: the token files of `config.data`.
            disk: Writes the checkpoints; None: as the operating system does.
            environment: Ranks and rendezvous; from torchrun's variables if not given.
            job_index: Number of the job in this process (multirun).

        Raises:
            UserError: something is given that cannot be used, with what to give.
        """
        for hook in hooks:
            if not isinstance(hook, Hook):
                raise UserError(
                    f"hooks ({hook!r}) must be objects derived from megallama.Hook: derive its class"
                )
        if loss is not None and not isinstance(loss, TokenLoss | LogitsLoss):
            raise UserError(
                f"loss ({loss!r}) must say what it takes: derive its class from megallama.TokenLoss or"
                " megallama.LogitsLoss, and give an object of it"
            )
        if data is not None:
            _check_data(data, config)
        return cls(
            config=config,
            environment=environment or read_launch_environment(),
            hooks=tuple(hooks),
            loss=loss,
            optimizer=optimizer,
            schedule=schedule,
            data=data,
            disk=disk or LOCAL_DISK,
            job_index=job_index,
        )

    def fit(self) -> bool:
        """Connect, train on from where the run folder stands, and take everything down.

        Returns:
            Whether all steps are done; False after a requested stop.

        Raises:
            UserError: something that the user can mend, with what to change.
        """
        config = self.config
        check_job(
            [config],
            environment=self.environment,
            job=str(self.job_index),
            is_data_given=self.data is not None,
        )
        with (
            connect(config.parallel, environment=self.environment, job_index=self.job_index) as topology,
            open_run_folder(config, topology) as folder,
        ):
            check_checksums(config.data, topology)
            engine = build_run_engine(
                config, topology, loss=self.loss, optimizer=self.optimizer, schedule=self.schedule
            )
            loop = build_loop(
                config,
                topology=topology,
                engine=engine,
                loader=self._loader(topology),
                folder=folder,
                hooks=self.hooks,
                disk=self.disk,
            )
            return loop.fit()

    def _loader(self, topology: Topology) -> Loader:
        config = self.config
        if self.data is None:
            return build_loader(
                config.data,
                topology=topology,
                train=config.train,
                evaluation=config.eval,
                vocab_size=config.model.vocab_size,
            )
        return own_loader(
            self.data,
            topology=topology,
            train=config.train,
            vocab_size=config.model.vocab_size,
            reset_positions=config.data.reset_positions,
        )


def _check_data(data: OwnData, config: RunConfig) -> None:
    if not hasattr(data, "__getitem__") and not callable(data):
        raise UserError(
            f"data ({data!r}) gives no samples: give an object whose data[number] is a sequence of token ids, or a"
            " function from a rank's topology to its loader"
        )
    named = [source.path for source in config.data.all_sources()]
    if named:
        raise UserError(
            f"data was given as an argument, and the configuration names token files too ({', '.join(named)}):"
            " leave out the argument, or data.sources, data.schedule and data.validation"
        )
    if config.log.samples:
        raise UserError(
            "log.samples (true) records places in token files, and data was given as an argument: set"
            " log.samples=false, and record what you need in a hook"
        )
