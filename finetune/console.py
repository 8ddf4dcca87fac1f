"""Output streams that may lose their reader."""

import contextlib
import os
from typing import Any


class BrokenPipeProof:
    """Ignore write errors of a stream: closing a terminal must not end a run."""

    def __init__(self, stream: Any) -> None:
        """`stream`: None where it was closed before the program began."""
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()
