"""A module that answers some names itself: what a patched library sees in the place of torch."""

from __future__ import annotations

import types
from typing import Any


class ModuleView(types.ModuleType):
    """A module that answers some names itself and passes the others on."""

    def __init__(self, behind: types.ModuleType, **answers: Any) -> None:
        super().__init__(behind.__name__)
        self.__dict__.update(answers)
        self.__dict__["_behind"] = behind

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_behind"], name)
