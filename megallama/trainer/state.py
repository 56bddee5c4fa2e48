"""The state of the loop that a resume needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megallama.host.errors import UserError


@dataclass
class TrainState:
    """Progress of the run. Learning rate, data order and random streams are functions of these numbers."""

    step: int = 0
    """Completed optimizer steps."""
    consumed_samples: int = 0
    """Sequences that were trained on."""
    consumed_tokens: int = 0
    """Tokens of these sequences, masked ones included."""

    def advance(self, *, samples: int, tokens: int) -> None:
        """Count one completed step."""
        self.step += 1
        self.consumed_samples += samples
        self.consumed_tokens += tokens

    def to_json(self) -> dict[str, int]:
        """As it is written into a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, numbers: dict[str, int]) -> TrainState:
        """Inverse of `to_json`.

        Raises:
            UserError: the checkpoint holds other numbers than these.
        """
        names = set(cls.__dataclass_fields__)
        if set(numbers) != names or not all(type(value) is int and value >= 0 for value in numbers.values()):
            raise UserError(
                f"the checkpoint's progress ({numbers}) is not valid in this version of megallama ({sorted(names)}):"
                " resume it with the version that wrote it"
            )
        return cls(**numbers)
