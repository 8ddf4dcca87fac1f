"""Make conversations of what several people wrote: one asks, the others answer."""

from collections.abc import Iterable
from typing import Any, NamedTuple


class Post(NamedTuple):
    """One message of a thread."""

    is_answer: bool
    text: str


def conversation(posts: Iterable[Post]) -> list[dict[str, Any]]:
    """Return messages that begin with the user and end with the assistant, in turn; perhaps none.

    Posts of one side in a row become one message; what stands before the first question and after
    the last answer is left out.
    """
    turns: list[dict[str, Any]] = []
    for post in posts:
        role = "assistant" if post.is_answer else "user"
        if not post.text.strip() or (not turns and role == "assistant"):
            continue
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{post.text.strip()}"
        else:
            turns.append({"role": role, "content": post.text.strip()})
    return turns[:-1] if turns and turns[-1]["role"] == "user" else turns
