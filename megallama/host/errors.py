"""Errors that the user can correct: shown as one message without a traceback, with exit code 2."""

from __future__ import annotations

from collections.abc import Sequence

EXIT_USER_ERROR = 2

EXIT_DIFFERENT = 1
"""`megallama verify` found a layout that is not equal to one process."""


class UserError(ValueError):
    """Something outside the program must change. The text says what, with the values and the remedy."""


class ConfigError(UserError):
    """All problems found in one configuration, reported once."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            text = self.problems[0]
        else:
            text = f"{len(self.problems)} problems:\n" + "\n".join(f"  - {p}" for p in self.problems)
        super().__init__(text)


class DamagedError(UserError):
    """A checkpoint is not what its writer left: truncated, altered, incomplete, or not a checkpoint."""


class CheckpointError(RuntimeError):
    """A save or load failed for a reason that is not the user's: a fault of this program or its libraries."""
