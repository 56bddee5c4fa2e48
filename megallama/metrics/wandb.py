"""The Weights & Biases sink, which never stops, slows or prompts a run."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

RUN_ID_FILE = "wandb_run_id"
INIT_TIMEOUT_S = 30
FINISH_TIMEOUT_S = 60

_CONSEQUENCE = {"online": "writing an offline run", "offline": "the run goes on without it"}


class WandbSink:
    """One W&B run for one run folder, over all resumes. The first failure ends it with one warning."""

    def __init__(self, run_dir: Path, *, project: str, mode: str, settings: Mapping[str, Any]) -> None:
        """Begin or continue the W&B run of `run_dir`.

        Args:
            run_dir: Holds the files of an offline run (`wandb sync` uploads them) and the id of the run.
            project: W&B project.
            mode: "online" or "offline".
            settings: Shown as the run's configuration.
        """
        self._run: Any = None
        for attempt in dict.fromkeys([mode, "offline"]):
            try:
                self._run = _begin(run_dir, project=project, mode=attempt, settings=settings)
                return
            except Exception as error:
                log.warning("Weights & Biases: no %s run (%s); %s", attempt, error, _CONSEQUENCE[attempt])

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log one step."""
        if self._run is None:
            return
        try:
            self._run.log(dict(numbers), step=step)
        except Exception as error:
            self._run = None
            log.warning("Weights & Biases: logging failed (%s); %s", error, _CONSEQUENCE["offline"])

    def close(self) -> None:
        """Finish the W&B run; an upload that hangs is left behind after `FINISH_TIMEOUT_S`."""
        if self._run is None:
            return
        finish = threading.Thread(target=_finish, args=(self._run,), daemon=True)
        self._run = None
        finish.start()
        finish.join(FINISH_TIMEOUT_S)
        if finish.is_alive():
            log.warning(
                "Weights & Biases: the upload is not done after %d s; it is left behind", FINISH_TIMEOUT_S
            )


def _finish(run: Any) -> None:
    try:
        run.finish()
    except Exception as error:
        log.warning("Weights & Biases: finish failed (%s)", error)


def _begin(run_dir: Path, *, project: str, mode: str, settings: Mapping[str, Any]) -> Any:
    # Imported here: it takes about a second, and a run may do without.
    import wandb

    # An attempt that failed holds the id until its service ends. Silent: the console is the live line's.
    wandb.teardown()
    wandb.setup(wandb.Settings(silent=True))
    id_file = run_dir / RUN_ID_FILE
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4), encoding="utf-8")
    return wandb.init(
        project=project,
        id=id_file.read_text(encoding="utf-8").strip(),
        # An offline run cannot ask the server for its earlier part: each part is a file of its own.
        resume="allow" if mode == "online" else None,
        name=run_dir.name,
        dir=run_dir,
        mode=mode,  # type: ignore[arg-type]
        config=dict(settings),
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_TIMEOUT_S,
            x_disable_stats=True,  # a further process that polls the machine
            disable_git=True,
            save_code=False,
        ),
    )
