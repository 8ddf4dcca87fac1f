"""Output streams that may lose their reader, and text that a terminal must not obey."""

import contextlib
import os
from typing import Any

# Rows, answers and files of others may hold control characters, with which they could move the
# cursor or change what stands there. They become the symbols that Unicode has for them; line ends
# and tabs stay.
CONTROLS: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
}


def visible(text: str) -> str:
    """Return text with symbols in place of control characters."""
    return text.translate(CONTROLS)


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
