"""Files with the mode that any other program would have given them."""

from pathlib import Path


def follow_umask(*paths: Path) -> None:
    """Give files that a library has made for their owner alone (safetensors, tempfile) the mode that the umask says.

    An empty file shows it: asking the umask itself means to change it, for every thread of the process.
    """
    modes: dict[Path, int] = {}
    for path in paths:
        if path.parent not in modes:
            probe = path.with_name(f".mode-{path.name}")
            probe.unlink(missing_ok=True)
            probe.touch()
            modes[path.parent] = probe.stat().st_mode & 0o777
            probe.unlink()
        path.chmod(modes[path.parent])
