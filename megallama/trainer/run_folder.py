"""The run folder: its paths, and the files written at the start of a run."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megallama.config.names import RUN_FILE
from megallama.host.errors import UserError
from megallama.host.files import write_whole
from megallama.stream.ledger import LEDGER_FILE
from megallama.tokenizers.files import copy_tokenizer, find_tokenizer


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run; nothing is created by naming them."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.path / RUN_FILE

    @property
    def ledger_file(self) -> Path:
        """Which sample every step takes, as far as the run was ever planned."""
        return self.path / LEDGER_FILE

    @property
    def samples_file(self) -> Path:
        """Which samples each step took, where `log.samples` asks for it."""
        return self.path / "samples.jsonl"

    @property
    def logs(self) -> Path:
        """One log file a rank."""
        return self.path / "log"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint."""
        return self.path / "checkpoints"

    @property
    def tokenizer_folder(self) -> Path:
        """The run's own copy of its tokenizer."""
        return self.path / "tokenizer"

    def tokenizer_file(self) -> Path | None:
        """The copied tokenizer, if there is one."""
        return find_tokenizer(self.tokenizer_folder)

    def lock(self) -> BinaryIO:
        """Claim the folder for this run until the returned file is closed or the process ends.

        A launcher that was killed can leave its ranks running; two runs would mix their files.

        Raises:
            UserError: another run holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = open(self.path / ".lock", "a+b")  # noqa: SIM115 - it stays open as long as the run lasts
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace") or "unknown"
            file.close()
            raise UserError(
                f"train.run_dir ({self.path}) is in use by another run ({holder}): wait for it, end it, or"
                " choose another train.run_dir"
            ) from None
        except OSError:
            return file  # a file system without locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        return file

    def write_start(self, *, config_yaml: str, tokenizer: Path | None) -> None:
        """Write the configuration, and copy the tokenizer so that the folder is whole without its sources."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.config_file, config_yaml.encode())
        if tokenizer is not None:
            copy_tokenizer(tokenizer, self.tokenizer_folder)

    def write_ledger(self, ledger: dict[str, Any]) -> None:
        """Write what `megallama data trace` reads.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        try:
            write_whole(self.ledger_file, json.dumps(ledger, ensure_ascii=False, indent=1).encode())
        except OSError as error:
            raise UserError(
                f"{self.ledger_file} cannot be written ({error.strerror}): free some space there"
            ) from error
