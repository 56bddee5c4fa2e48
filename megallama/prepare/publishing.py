"""The output folder of a preparation: locked while it is written, and replaced only at the end."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megallama.host.errors import UserError
from megallama.host.files import fsync_folder, write_whole
from megallama.tokens.manifest import REPORT
from megallama.tokens.origins import FILES

WORK_FOLDER = ".preparing"
"""Below the output folder: units that are tokenized, and the finished files before they get their names."""

TOKEN_COUNTS = "token-counts.npy"
DAMAGED = "damaged.jsonl"

_LOCK = "lock"
_UNITS = "units"
_FINISHED = "finished"
_PLAN = "publish.json"
_OURS = re.compile(r"(train|valid)(-\d{5,})?\.(bin|idx|json|origins)")


class WorkFolder:
    """What a preparation keeps until it is done."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output / WORK_FOLDER
        self.units = self.path / _UNITS
        self.finished = self.path / _FINISHED

    def start_finishing(self) -> Path:
        """An empty folder for the finished files."""
        shutil.rmtree(self.finished, ignore_errors=True)
        self.finished.mkdir()
        return self.finished

    def publish(self, job: str) -> None:
        """Give the finished files their names, and remove what stood there before.

        A plan on the disk says which; a preparation that is killed meanwhile is completed by the next one, which
        knows by `job`, a digest of what decides about the files, whether they are those that it would make.
        """
        fsync_folder(self.finished)
        names = sorted(path.name for path in self.finished.iterdir())
        plan = self.path / _PLAN
        write_whole(plan, json.dumps({"job": job, "names": names}).encode())
        fsync_folder(self.path)
        self.complete_publishing()

    def complete_publishing(self) -> str | None:
        """Carry out the plan, where there is one; its job."""
        plan = self.path / _PLAN
        if not plan.exists():
            return None
        content: dict[str, Any] = json.loads(plan.read_text(encoding="utf-8"))
        names: list[str] = content["names"]
        # Manifests last: until then they disagree with the new files, which is noticed.
        for name in sorted(names, key=lambda name: name.endswith(".json")):
            if (self.finished / name).exists():
                os.replace(self.finished / name, self.output / name)
        for path in published_files(self.output):
            if path.name not in names:
                path.unlink()
        fsync_folder(self.output)
        shutil.rmtree(self.units, ignore_errors=True)
        shutil.rmtree(self.finished, ignore_errors=True)
        plan.unlink()
        return str(content["job"])

    def remove(self) -> None:
        """Remove all."""
        shutil.rmtree(self.path, ignore_errors=True)

    @property
    def is_publishing(self) -> bool:
        """Whether a preparation was killed while it gave its files their names."""
        return (self.path / _PLAN).exists()

    @property
    def has_units(self) -> bool:
        """Whether something is tokenized."""
        return any(path.is_file() for path in self.units.rglob("*"))


def published_files(output: Path) -> list[Path]:
    """Files of a preparation in `output`."""
    if not output.is_dir():
        return []
    return sorted(
        path
        for path in output.iterdir()
        if path.name in (REPORT, TOKEN_COUNTS, DAMAGED, FILES) or _OURS.fullmatch(path.name)
    )


def check_output(output: Path, *, overwrite: bool) -> None:
    """That preparing into `output` spoils nothing.

    Raises:
        UserError: it is a file, or holds prepared data and `overwrite` is not set.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file: name a folder")
    existing = [path.name for path in published_files(output) if _OURS.fullmatch(path.name)]
    if existing and not overwrite:
        raise UserError(
            f"output {output} holds prepared data already ({', '.join(existing[:6])}):"
            " choose another folder, or give --overwrite"
        )


@contextmanager
def locked_work(output: Path) -> Iterator[WorkFolder]:
    """The work folder of `output`, for one preparation at a time.

    Where an error comes up it is kept if anything is tokenized, for the next attempt; else nothing is left.

    Raises:
        UserError: another preparation has it.
    """
    made = not output.exists()
    work = WorkFolder(output)
    work.path.mkdir(parents=True, exist_ok=True)
    is_locked = False
    try:
        with open(work.path / _LOCK, "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"output {output} is being written by another preparation: wait for it"
                ) from None
            is_locked = True
            work.units.mkdir(exist_ok=True)
            yield work
            work.remove()
    finally:
        if is_locked and work.path.exists() and not work.has_units and not work.is_publishing:
            work.remove()
        if made and output.is_dir() and not any(output.iterdir()):
            output.rmdir()
