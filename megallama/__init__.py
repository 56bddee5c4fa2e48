"""Pretraining of LLaMA-family models with 4D parallelism. docs/library.md is the guide to these names.

Each is imported when it is first asked for, so `import megallama` itself loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megallama.batches.dataset import Dataset as Dataset
    from megallama.batches.dataset import Sample as Sample
    from megallama.batches.loader import Loader as Loader
    from megallama.batches.micro_batch import MicroBatch as MicroBatch
    from megallama.batches.micro_batch import rank_part as rank_part
    from megallama.checkpoint.distributed.store import load_checkpoint as load_checkpoint
    from megallama.checkpoint.format.boxes import build_boxes as build_boxes
    from megallama.checkpoint.format.disk import Disk as Disk
    from megallama.checkpoint.format.model_identity import model_identity as model_identity
    from megallama.config.load import load_config as load_config
    from megallama.config.schema import CheckpointConfig as CheckpointConfig
    from megallama.config.schema import DataConfig as DataConfig
    from megallama.config.schema import EvalConfig as EvalConfig
    from megallama.config.schema import KernelConfig as KernelConfig
    from megallama.config.schema import LogConfig as LogConfig
    from megallama.config.schema import MixConfig as MixConfig
    from megallama.config.schema import ModelConfig as ModelConfig
    from megallama.config.schema import OptimConfig as OptimConfig
    from megallama.config.schema import ParallelConfig as ParallelConfig
    from megallama.config.schema import PrecisionConfig as PrecisionConfig
    from megallama.config.schema import RunConfig as RunConfig
    from megallama.config.schema import SourceConfig as SourceConfig
    from megallama.config.schema import TrainConfig as TrainConfig
    from megallama.config.schema import ZeroConfig as ZeroConfig
    from megallama.engine.build import build_engine as build_engine
    from megallama.engine.loss import LogitsLoss as LogitsLoss
    from megallama.engine.loss import TokenLoss as TokenLoss
    from megallama.host.errors import UserError as UserError
    from megallama.model.build import build_model as build_model
    from megallama.stream.build import build_loader as build_loader
    from megallama.topology.connect import connect as connect
    from megallama.train import Trainer as Trainer
    from megallama.trainer.hooks.base import Hook as Hook
    from megallama.trainer.hooks.base import ParameterPart as ParameterPart
    from megallama.trainer.hooks.base import RunView as RunView
    from megallama.trainer.hooks.base import StepReport as StepReport
    from megallama.trainer.hooks.base import StopTraining as StopTraining
    from megallama.trainer.state import TrainState as TrainState
    from megallama.verification.verify import verify as verify

_PLACES = {
    "batches.dataset": ("Dataset", "Sample"),
    "batches.loader": ("Loader",),
    "batches.micro_batch": ("MicroBatch", "rank_part"),
    "checkpoint.distributed.store": ("load_checkpoint",),
    "checkpoint.format.boxes": ("build_boxes",),
    "checkpoint.format.disk": ("Disk",),
    "checkpoint.format.model_identity": ("model_identity",),
    "config.load": ("load_config",),
    "config.schema": (
        *(
            "CheckpointConfig",
            "DataConfig",
            "EvalConfig",
            "KernelConfig",
            "LogConfig",
            "MixConfig",
            "ModelConfig",
        ),
        *("OptimConfig", "ParallelConfig", "PrecisionConfig", "RunConfig", "SourceConfig", "TrainConfig"),
        "ZeroConfig",
    ),
    "engine.build": ("build_engine",),
    "engine.loss": ("LogitsLoss", "TokenLoss"),
    "host.errors": ("UserError",),
    "model.build": ("build_model",),
    "stream.build": ("build_loader",),
    "topology.connect": ("connect",),
    "train": ("Trainer",),
    "trainer.hooks.base": ("Hook", "ParameterPart", "RunView", "StepReport", "StopTraining"),
    "trainer.state": ("TrainState",),
    "verification.verify": ("verify",),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = sorted(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
