"""Objectives and formats of the user's own: their sections, and which code a config names."""

import functools
import inspect
import sys
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args

from pydantic import BaseModel, Field

from finetune import own_code
from finetune.config.choices import REFERENCE, LossOn
from finetune.config.kinds import Kind, Section
from finetune.errors import ConfigError
from finetune.own_code import OwnCode

if TYPE_CHECKING:
    from finetune.config.fields import Config

OwnName = Annotated[str, Field(pattern=own_code.FORM, title=own_code.EXPECTED)]


class OwnObjective(Kind):
    """An objective of your own; its class defines its other settings (docs/objectives.md)."""

    kind: OwnName
    """The subclass of finetune.objectives.Objective with this NAME, or such an object."""
    code: ClassVar[OwnCode]
    """The file that defines it."""
    objective: ClassVar[Any]
    """The Objective itself."""


ENVIRONMENT = "objective.rollouts.environment"
HEADS = {"scores", "values"}  # what an objective may need
OWN_NAMES = tuple(OwnObjective.__class_vars__)


@functools.cache
def _own_section(code: OwnCode) -> type[OwnObjective]:
    """Return the section of a user's objective. Raises ConfigError if it is not an objective."""
    module = sys.modules.get("finetune.objectives.base")  # missing: nothing derives from it
    base, is_class = getattr(module, "Objective", None), isinstance(code.value, type)
    cls = code.value if is_class else type(code.value)
    if base is None or not issubclass(cls, base):
        kind = f"the class {cls.__name__}" if is_class else f"of type {cls.__name__}"
        derive = "derive it from finetune.objectives.Objective"
        raise ConfigError(f"{code} is {kind}, not an objective; {derive}")
    settings = cls.Settings
    if not (isinstance(settings, type) and issubclass(settings, BaseModel)):
        raise ConfigError(f"{code}: Settings should be a pydantic.BaseModel, got {settings!r}")
    uses = {"kind": "names objectives", **dict.fromkeys(OWN_NAMES, "the trainer uses itself")}
    if taken := [name for name in uses if name in settings.model_fields]:
        name = taken[0]
        raise ConfigError(f"{code}: Settings has a field {name}, which {uses[name]}; rename it")
    try:
        objective = code.value() if is_class else code.value
        if (part := objective.supervises("completion")) not in get_args(LossOn):
            listed = ", ".join(get_args(LossOn))
            raise ConfigError(f"{code}: supervises should return one of {listed}, got {part!r}")
        if not isinstance(needs := objective.needs, set | frozenset | list | tuple):
            raise ConfigError(f"{code}: needs should be a set, as {{'scores'}}, got {needs!r}")
        if unknown := set(map(str, needs)) - HEADS - {REFERENCE}:
            listed, heads = ", ".join(sorted(unknown)), ", ".join(sorted(HEADS))
            raise ConfigError(f"{code}: needs names {listed}; a policy can get heads for {heads}")
        if problem := _sampling_problem(objective, settings):
            raise ConfigError(f"{code}: {problem} (docs/objectives.md)")
        own = {"model_config": Section.model_config, "code": code, "objective": objective}
        bases = (OwnObjective,) if issubclass(OwnObjective, settings) else (settings, OwnObjective)
        return type("Own", bases, {**own, "__module__": __name__, "__doc__": OwnObjective.__doc__})
    except ConfigError:
        raise
    except (Exception, SystemExit) as exc:
        raise ConfigError(code.blame(exc)) from exc


def _sampling_problem(objective: Any, settings: type[BaseModel]) -> str:
    """Return what an objective that samples lacks, or one that does not has too much; or ""."""
    has = {name: name in settings.model_fields for name in ("rollouts", "rewards")}
    if objective.samples and not has["rollouts"]:
        return "samples is True, so Settings needs a field `rollouts: Rollouts`"
    if objective.samples and objective.learns_rewards and not has["rewards"]:
        return (
            "it learns from rewards, so Settings needs a field `rewards: RewardList`; or set "
            "learns_rewards to False"
        )
    if has["rollouts"] and not objective.samples:
        return "Settings has a field rollouts, so set samples to True, or rename it"
    return ""


def own_codes(config: "Config") -> dict[str, OwnCode]:
    """Return setting -> the user's own code that it names."""
    found, objective, format = {}, config.objective, config.data.format
    if isinstance(objective, OwnObjective):
        found["objective.kind"] = objective.code
    if own_code.is_own(format):
        found["data.format"] = own_code.get(format)
    for place, reward in enumerate(getattr(objective, "rewards", None) or ()):
        if own_code.is_own(reward.kind):
            found[f"objective.rewards.{place}"] = own_code.get(reward.kind)
    rollouts = getattr(objective, "rollouts", None)
    if name := getattr(rollouts, "environment", None):
        found[ENVIRONMENT] = own_code.get(name)
    return found


def code_identity(config: "Config") -> dict[str, str]:
    """Return the hash of each by setting and file; to resume or replay a run they must be equal."""
    return {own_code.label(key, code.name): code.sha256 for key, code in own_codes(config).items()}


def own_format(name: str) -> OwnCode:
    """Return a user's function that formats rows. Raises ConfigError."""
    code = own_code.read(name)
    if not callable(code.value):
        raise ConfigError(f"{code} is of type {type(code.value).__name__}, not a function of a row")
    return code


def own_objective(name: str) -> type[OwnObjective]:
    """Return the section of a user's objective; read it if it was not yet. Raises ConfigError."""
    return _own_section(own_code.read(name))


def rewards_in(objective: Any) -> dict[str, Any]:
    """Return `objective.rewards.N` -> what a config gives there, of those that are mappings."""
    given = objective.get("rewards") if isinstance(objective, dict) else None
    listed = given if isinstance(given, list) else []
    return {
        f"objective.rewards.{place}": each
        for place, each in enumerate(listed)
        if isinstance(each, dict)
    }


def environment_in(objective: Any) -> str | None:
    """Return the code that a config names as objective.rollouts.environment, if it does."""
    rollouts = objective.get("rollouts") if isinstance(objective, dict) else None
    name = rollouts.get("environment") if isinstance(rollouts, dict) else None
    return name if own_code.is_own(name) else None


def own_environment(name: str) -> OwnCode:
    """Return a user's class with `reset` and `step`. Raises ConfigError."""
    code = own_code.read(name)
    if not isinstance(code.value, type):
        kind = type(code.value).__name__
        raise ConfigError(f"{code} is of type {kind}, not a class with reset and step")
    for method, takes in (("reset", "row"), ("step", "text")):
        found = getattr(code.value, method, None)
        if not callable(found):
            raise ConfigError(f"{code} has no method {method}(self, {takes})")
        _require_call(code, f"{method}(self, {takes})", found, None, "")
    _require_call(code, "__init__(self)", code.value)
    return code


def _require_call(code: OwnCode, wanted: str, called: Any, *arguments: Any) -> None:
    try:
        inspect.signature(called).bind(*arguments)
    except TypeError as exc:
        raise ConfigError(f"{code}: {wanted} is what is called: {exc}") from exc
    except ValueError:  # it has no signature
        return


def own_reward(name: str) -> OwnCode:
    """Return a user's reward of answers. Raises ConfigError."""
    return _function(own_code.read(name), "a function of (text, reference, row)")


def own_score(name: str) -> OwnCode:
    """Return a user's score of answers. Raises ConfigError."""
    return _function(own_code.read(name), "a function of a completion")


def _function(code: OwnCode, wanted: str) -> OwnCode:
    if not callable(code.value) or isinstance(code.value, type):
        kind = "a class" if isinstance(code.value, type) else f"of type {type(code.value).__name__}"
        raise ConfigError(f"{code} is {kind}, not {wanted}")
    return code
