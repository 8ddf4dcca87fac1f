"""How busy other processes keep the cores of this machine, before PyTorch is imported."""

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")


def busy(seconds: float = 0.1) -> float:
    """Return how many cores work while this process waits `seconds`; 0.0 where Linux is not."""
    before, began = _worked(), time.monotonic()
    if before is None:
        return 0.0
    time.sleep(seconds)
    return ((_worked() or before) - before) / (time.monotonic() - began)


def _worked() -> float | None:
    """Return the seconds that all cores have worked since the machine started, user and system."""
    try:
        user, nice, system = map(int, STAT.read_text().split()[1:4])
    except (OSError, ValueError):
        return None
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")
