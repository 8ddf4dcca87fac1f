"""Push an exported folder to the Hub: private unless asked, resumed after a break, compared.

The token comes from HF_TOKEN or `hf auth login`, and no message shows it.
"""

import hashlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune import failures
from finetune.config.base import decides_what_opens
from finetune.errors import ExportError, FinetuneError, Outage, UserError

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
TRIES = 3  # of an upload whose connection breaks
WAIT = 2.0  # seconds before the second try; each wait doubles
CARD = "README.md"
NO_TOKEN = "log in with `hf auth login`, or export HF_TOKEN, with a token that may write"


def require_name(name: str) -> None:
    """Raise UserError for anything but OWNER/NAME, and without a token."""
    import huggingface_hub

    if not NAME.fullmatch(name) or len(name) > 96:
        raise UserError(f"--push: should be OWNER/NAME, as on the Hub, got {name!r}")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError("--push: HF_HUB_OFFLINE is set; unset it to push")
    if not huggingface_hub.get_token():
        raise UserError(f"--push: no token for the Hub; {NO_TOKEN}")


def push(folder: Path, name: str, card: str, is_public: bool, log: Callable[[str], None]) -> str:
    """Upload a folder and its card, and return the URL.

    Run it again after an Outage: what the Hub has is not sent again. Raises UserError for a
    repository that is public or holds another model, ExportError if the Hub lists other files
    afterwards.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _without_token(name):
        url = str(api.create_repo(name, private=not is_public, exist_ok=True))
        _require_fitting(api, folder, name, is_public)
    with tempfile.TemporaryDirectory() as place:
        staged = Path(place)
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not _is_hidden(path.relative_to(folder)):
                link = staged / path.relative_to(folder)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.absolute())
        (staged / CARD).unlink(missing_ok=True)
        (staged / CARD).write_text(card)
        _upload(api, staged, name, log)
        with _without_token(name):
            _require_same(api, staged, name)
    return url


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _upload(api: Any, staged: Path, name: str, log: Callable[[str], None]) -> None:
    """Upload all files, trying again after broken connections."""
    for number in range(1, TRIES + 1):
        try:
            with _without_token(name):
                api.upload_folder(
                    repo_id=name, folder_path=staged, commit_message="Upload by finetune export"
                )
            return
        except Outage as exc:
            if number == TRIES:
                raise
            log(f"note: {exc}; trying again")
            time.sleep(WAIT * 2 ** (number - 1))


def _require_fitting(api: Any, folder: Path, name: str, is_public: bool) -> None:
    """Raise UserError for a public repository without --public, or one of another model."""
    info = api.repo_info(name)
    if not info.private and not is_public:
        raise UserError(
            f"--push: {name} exists and is public; add --public to push there, or choose another "
            "name"
        )
    own = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    held = [each.rfilename for each in info.siblings or []]
    others = [each for each in held if decides_what_opens(each) and each not in own]
    if others:
        listed = ", ".join(others[:5])
        raise UserError(
            f"--push: {name} holds files of another model ({listed}), which would change what "
            "opens; delete them there, or choose another name"
        )


def _require_same(api: Any, staged: Path, name: str) -> None:
    """Raise ExportError unless the Hub lists every file with its size and hash."""
    held = {each.path: each for each in api.list_repo_tree(name, recursive=True)}
    for path in sorted(each for each in staged.rglob("*") if each.is_file()):
        file = path.relative_to(staged).as_posix()
        found = held.get(file)
        if found is None or found.size != path.stat().st_size:
            what = "lacks" if found is None else f"has {found.size:,} bytes of"
            raise ExportError(f"{name} {what} {file} after the upload; run the same command again")
        sha256 = found.lfs.sha256 if found.lfs else None
        with path.open("rb") as handle:
            if sha256 and hashlib.file_digest(handle, "sha256").hexdigest() != sha256:
                raise ExportError(f"{name} holds other bytes of {file}; run the same command again")


@contextmanager
def _without_token(name: str) -> Iterator[None]:
    """Raise errors of the Hub as ours, in words without the token."""
    from huggingface_hub import get_token

    try:
        yield
    except FinetuneError:
        raise
    except Exception as exc:
        secret = get_token() or "\0"
        what = " ".join(str(exc).split()).replace(secret, "***")[: failures.MOST_LETTERS]
        status = getattr(getattr(exc, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(
                f"--push: the Hub refuses {name} ({status}: {what}); {NO_TOKEN}"
            ) from None
        if status is not None and 400 <= status < 500 and status not in (408, 409, 429):
            raise UserError(f"--push: the Hub refuses {name} ({status}: {what})") from None
        again = "run the same command again; what the Hub has is not sent again"
        raise Outage(f"--push: {name}: {what or type(exc).__name__}; {again}") from None
