"""The settings of what samples completions, a class for each `kind`. No torch."""

from typing import Annotated, Literal

from pydantic import Field

from finetune.config.kinds import Kind, by_kind
from finetune.config.paths import PathString


class LocalEngine(Kind):
    """The processes of the run."""

    kind: Literal["local"] = "local"
    """Sample in the processes of the run."""


class ServerEngine(Kind):
    """A vLLM server."""

    kind: Literal["server"]
    """Sample at a vLLM server, which gets the policy's weights before each phase."""
    url: Annotated[str, Field(min_length=1)]
    """Its URL, such as http://localhost:8000/v1."""
    model: Annotated[str, Field(min_length=1)]
    """The name under which it serves the base."""
    key_variable: str | None = None
    """Environment variable that holds the server's key."""
    sleep: bool = False
    """Let it sleep while the run trains, where both share a GPU."""
    folder: PathString | None = None
    """Folder in which weights pass, which run and server see under the same path.
    null: the run directory.
    """
    at_once: Annotated[int, Field(gt=0, le=1_024)] = 32
    """Prompts that each process asks at once."""
    seconds: Annotated[float, Field(gt=0, le=86_400)] = 300.0
    """Time limit for the completions of a prompt, in seconds."""
    probe_tolerance: Annotated[float, Field(gt=0, le=1)] = 0.02
    """How far, in nats, log-probabilities of server and policy may differ, on average over the
    tokens of a probe before each phase.
    """


Engine = Annotated[LocalEngine | ServerEngine, by_kind(LocalEngine, ServerEngine)]


def settings_of(kind: str) -> list[str]:
    """Return the settings of a kind of engine."""
    return list((ServerEngine if kind == "server" else LocalEngine).model_fields)
