"""The rollouts of a run: server, environments, rewards and reference opened, phases logged."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from pathlib import Path

from finetune import files, own_code
from finetune.config.engine_fields import ServerEngine
from finetune.engine.metrics import of_rollouts
from finetune.export import save
from finetune.generation import generate
from finetune.models import scalar_heads
from finetune.models.policy import Policy
from finetune.rollouts.around import Around
from finetune.rollouts.asked import Asked
from finetune.rollouts.episodes import Environments
from finetune.rollouts.phase_facts import left_out
from finetune.rollouts.phases import Group, Rollout
from finetune.rollouts.rollouts import Rollouts
from finetune.rollouts.sampling import why_padded
from finetune.rollouts.served import Served
from finetune.run import Run

MOST_SAMPLES = 8  # completions of a phase that go to samples.jsonl


def opened(run: Run) -> Rollouts:
    """Open what a run samples and scores with, until the run ends. Collective."""
    config, data, topology, model = run.config, run.data, run.topology, run.state.model
    assert isinstance(data.train, Asked)
    assert config.rollouts
    assert data.rewards
    ends, served, bare = _ends(run), None, topology.unwrap(model)
    scores, stop = run.directory.path / "rewards", lambda: run.stop.is_set
    rewards = run.resources.enter_context(data.rewards.opened(scores, stop, topology.rank))
    topology.watchdog.pause("what rewards depend on")
    topology.on_main(rewards.prepare)
    if isinstance(config.rollouts.engine, ServerEngine):
        served = _served(run, config.rollouts.engine, ends)
    elif why := why_padded(bare):
        run.log(f"note: completions are sampled in padded batches, which is slower: {why}")
    around = Around(
        run=run.directory.path, topology=topology, policy=lambda: run.policy(model),
        model=lambda: bare, tokenizer=data.tokenizer, ends=ends, objective=run.objective,
        settings=config.objective, rewards=rewards, of=_depends_on(run), stop=stop, log=run.log,
        storage=run.storage, served=served, environments=_environments(run),
        save=functools.partial(_save_policy, run), reference=_before_training(run),
        teacher=_asked_teacher(run), opened=functools.partial(_note_phase, run),
        together=served is None and _samples_together(run),
    )  # fmt: skip
    return Rollouts(data.train, around)


def _ends(run: Run) -> frozenset[int]:
    """Return the tokens that end a completion: those of the export."""
    template = run.data.template if run.objective.has_turns else None
    bare = run.topology.unwrap(run.state.model)
    given = save.stop_tokens(save.generation(bare, run.data.tokenizer, template))
    return frozenset(given if isinstance(given, list) else [] if given is None else [given])


def _depends_on(run: Run) -> str:
    """Return a hash of what completions depend on besides the weights."""
    config = run.config
    assert config.rollouts
    own = config.rollouts.model_dump(exclude={"engine", "environment"})
    about = {
        **run.identity(), "rollouts": own,
        "seed": config.run.seed, "completions of a step": config.train.global_batch_size,
    }  # fmt: skip
    return files.json_sha256(about)


def _samples_together(run: Run) -> bool:
    """Tell whether each sampled token has to be a pass of all processes; say why. Collective.

    They share the weights, and have no room for whole ones while they sample.
    """
    config, topology = run.config, run.topology
    if not topology.parallel.gathers:
        return False
    from finetune.forecast import choice

    # The process with the least room counts, so that all do the same.
    room = min(topology.processes.gather(choice.room_here(topology.device)))
    about = topology.parallel, topology.device, topology.precision, room
    fits, line = topology.on_main(
        lambda: choice.samples_whole(config, *about, has_moved=run.state.progress.step > 0)
    )
    run.log(line)
    return not fits


def _environments(run: Run) -> Environments | None:
    """Return what answers the model between its turns, if the config names it."""
    rollouts, turns = run.config.rollouts, run.data.turns
    if rollouts is None or turns is None:
        return None
    made = Environments(
        own_code.get(str(rollouts.environment)), turns, rollouts.max_turns, rollouts.turn_seconds,
        lambda: run.stop.is_set,
    )  # fmt: skip
    return run.resources.enter_context(made)


def _served(run: Run, engine: ServerEngine, ends: Set[int]) -> Served:
    """Return the server that samples."""
    assert run.config.rollouts
    made = Served(
        engine, run.directory.path, is_adapter=run.config.adapter.kind != "full",
        temperature=run.config.rollouts.temperature, ends=ends, log=run.log,
    )  # fmt: skip
    return run.resources.enter_context(made)


def _save_policy(run: Run, folder: Path) -> None:
    """Save the weights as they are, for a server. Collective."""
    config, topology, data = run.config, run.topology, run.data
    model, is_adapter = topology.unwrap(run.state.model), config.adapter.kind != "full"
    weights = topology.full_weights(run.state.model, trained_only=is_adapter)
    weights = scalar_heads.without(weights, model)
    topology.on_main(lambda: save.save(model, weights, data.tokenizer, None, folder))


def _before_training(run: Run) -> Callable[[], AbstractContextManager[Policy]] | None:
    """Return what gives the policy as it was before the first step; None: it is not needed."""
    if not run.objective.wants_reference(run.config.objective):
        return None
    if run.start is not None:
        frozen = run.start.policy
        return lambda: contextlib.nullcontext(frozen)
    policy = run.policy(run.state.model)

    @contextlib.contextmanager
    def switched_off() -> Iterator[Policy]:
        with policy.without_adapters():
            yield policy

    return switched_off


def _asked_teacher(run: Run) -> Policy | None:
    """Return the teacher, if the objective asks it about the tokens of completions."""
    asks = run.companion and run.objective.wants_teacher(run.config.objective)
    return run.companion.policy if run.companion and asks else None


def _note_phase(run: Run, phase: int, groups: Sequence[Group], facts: Mapping[str, float]) -> None:
    """Log what a phase is, and some of its completions, unless that was done before."""
    assert isinstance(run.data.train, Asked)
    step, logs = run.data.train.first_step(phase), run.directory.logs
    if not run.topology.is_main or logs.has_rollouts(step):
        return
    run.log(f"phase {phase + 1}: {of_rollouts(facts)}")
    if why := left_out(groups):
        run.log(f"note: phase {phase + 1}: {why}")
    decode = functools.partial(generate.decode, run.data.tokenizer)

    def text_of(rollout: Rollout) -> str:
        return decode(rollout.ids) if rollout.heard else rollout.text

    run.metrics.rollouts(step, [
        {
            "prompt": decode(group.prompt_ids), "completion": text_of(group.rollouts[0]),
            **_rewards(group.rollouts[0]),
        }
        for group in groups[:MOST_SAMPLES] if not group.failed
    ])  # fmt: skip


def _rewards(rollout: Rollout) -> dict[str, float | None]:
    """Return the reward of a completion and its parts; nothing where the run has no rewards."""
    parts = {f"reward_{name}": each for name, each in rollout.parts.items()}
    return {"reward": rollout.reward, **parts} if parts else {}
