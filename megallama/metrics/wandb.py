"""The Weights & Biases sink, which never stops, slows or prompts a run."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megallama.host.log import stderr_in

log = logging.getLogger(__name__)

RUN_ID_FILE = "wandb_run_id"
CORE_LOG = Path("log", "wandb-core.log")
PROJECT = "megallama"
"""Where neither the configuration nor W&B's own settings name one."""
INIT_TIMEOUT_S = 30
FINISH_TIMEOUT_S = 60
AXIS = "progress/step"
"""The x axis of every chart. W&B's own step must rise: it drops what is logged again after a resume."""


class WandbSink:
    """One W&B run for one run folder, over all resumes. The first failure ends it with one warning."""

    def __init__(
        self, run_dir: Path, *, project: str | None, mode: str, settings: Mapping[str, Any], first_step: int
    ) -> None:
        """Begin or continue the W&B run of `run_dir`.

        What the user gave here goes first, then W&B's own settings: its environment variables (WANDB_PROJECT,
        WANDB_NAME, WANDB_DIR, ...) and files, then our defaults.

        Args:
            run_dir: Holds the id of the run and, unless WANDB_DIR is set, W&B's files (`wandb sync` uploads those of
                an offline run).
            project: W&B project; None: not given.
            mode: "auto" (not given), "online", "offline" or "disabled".
            settings: Shown as the run's configuration.
            first_step: Completed steps at the start.
        """
        self._run: Any = None
        self._is_by_step = True
        if mode == "disabled":
            return
        attempts = [mode]
        while attempts:
            attempt = attempts.pop(0)
            try:
                said = _open_library(run_dir, mode=None if attempt == "auto" else attempt)
                attempt = _mode(said)
                if attempt == "disabled":
                    return
                self._run = _begin(
                    run_dir, said, project=project, mode=attempt, first_step=first_step, config=settings
                )
                self._run.define_metric(AXIS)
                self._run.define_metric("*", step_metric=AXIS)
                self._is_by_step = self._run.starting_step <= first_step + 1
            except Exception as error:
                attempts = [] if attempt == "offline" else ["offline"]
                consequence = "writing an offline run" if attempts else "the run goes on without it"
                log.warning("Weights & Biases: no %s run (%s); %s", attempt, error, consequence)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log one step."""
        if self._run is None:
            return
        try:
            self._run.log({**numbers, AXIS: step}, step=step if self._is_by_step else None)
        except Exception as error:
            self._run = None
            log.warning("Weights & Biases: logging failed (%s); the run goes on without it", error)

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


def _open_library(run_dir: Path, *, mode: str | None) -> Any:
    """W&B's own settings, from its environment variables and files; `mode` goes before them."""
    # Imported here: it takes about a second, and a run may do without.
    import wandb

    # An attempt that failed holds the id until its service ends.
    wandb.teardown()
    typed = {} if mode is None else {"mode": mode}
    # Its own process writes its log among the steps where W&B's cache folder cannot be written, as in some pods.
    with stderr_in(run_dir / CORE_LOG):
        # Silent: the console is the live line's.
        return wandb.setup(wandb.Settings(silent=True, **typed)).settings  # type: ignore[arg-type]


def _mode(said: Any) -> str:
    """What W&B would choose, without asking for a key: its own settings, else online if it has a key."""
    import wandb

    mode = said.mode if "mode" in said.model_fields_set else None
    mode = {"dryrun": "offline", "run": "online"}.get(str(mode), mode)
    if mode in ("offline", "disabled"):
        return str(mode)
    # The key of `wandb login` (netrc), of WANDB_API_KEY, or of W&B's settings file; an identity token.
    if wandb.login(prompt=False, verify=False):
        return mode or "online"
    if mode is not None:
        log.warning(
            "log.wandb=%s, but there is no key (`wandb login`, WANDB_API_KEY): writing an offline run", mode
        )
    else:
        log.info("log.wandb: auto is offline (no key from `wandb login` or WANDB_API_KEY)")
    return "offline"


def _begin(
    run_dir: Path, said: Any, *, project: str | None, mode: str, first_step: int, config: Mapping[str, Any]
) -> Any:
    import wandb

    defaults = {
        "project": PROJECT,
        "run_name": run_dir.name,
        "root_dir": str(run_dir),
        "console": "off",
        "init_timeout": INIT_TIMEOUT_S,
        "disable_git": True,
        "save_code": False,
    }
    ours: dict[str, Any] = {k: v for k, v in defaults.items() if k not in said.model_fields_set}
    if project is not None:
        ours["project"] = project
    id_file = run_dir / RUN_ID_FILE
    is_known = id_file.exists()
    if not is_known:
        id_file.write_text(said.run_id or secrets.token_hex(4), encoding="utf-8")
    ours |= {"run_id": said.run_id or id_file.read_text(encoding="utf-8").strip(), "mode": mode}

    def init(**more: Any) -> Any:
        return wandb.init(config=dict(config), settings=wandb.Settings(silent=True, **ours, **more))

    # An offline run cannot ask the server for its earlier part: each part is a file of its own.
    if mode == "offline" or "resume" in said.model_fields_set:
        return init()
    if is_known and first_step > 0:
        try:
            return init(resume_from=f"{ours['run_id']}?_step={first_step}")
        except Exception as error:
            # Not every server can rewind a run: then both lines of the steps that are done again stay.
            log.info("Weights & Biases: the run is not rewound to step %d (%s)", first_step, error)
            _open_library(run_dir, mode=mode)
    return init(resume="allow")
