"""How much memory this process may use."""

from __future__ import annotations

import os
from pathlib import Path

_GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_bytes() -> int:
    """Memory of the machine, or what a container or batch job is given of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for place in _GROUP_LIMITS:
        try:
            limits.append(int(Path(place).read_text()))
        except (OSError, ValueError):  # another version of control groups, or "max"
            continue
    return min(limits)
