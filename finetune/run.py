"""Everything one run needs: config, directories, topology, data, stop flag, state and metrics."""

import contextlib
import functools
import shlex
from dataclasses import dataclass, field
from typing import Any

from finetune import config as configs
from finetune import places
from finetune.config import Config
from finetune.config.choices import REFERENCE
from finetune.data import held_out
from finetune.data.prefetch import Prefetch
from finetune.engine import companion, receipt, reference
from finetune.engine.best import BestCheckpoint
from finetune.engine.checkpoint import resume
from finetune.engine.checkpoint.saver import Saver
from finetune.engine.checkpoint.storage import Storage
from finetune.engine.companion import Companion
from finetune.engine.gpu import with_compilation
from finetune.engine.metrics import Metrics, log
from finetune.engine.passes import evaluate
from finetune.engine.reference import Reference
from finetune.engine.rundir import HELD_OUT, RunDirectory
from finetune.engine.state import TrainState
from finetune.engine.topology import Topology
from finetune.engine.trackers import Trackers
from finetune.errors import ExportError
from finetune.export.publish import Writing
from finetune.export.save import Base
from finetune.export.verify import probe_logits
from finetune.generation import generate
from finetune.models import (
    adapters,
    base_identity,
    document_scores,
    families,
    parameters,
    scalar_heads,
)
from finetune.models.policy import Policy
from finetune.objectives import Objective, chosen
from finetune.preflight import Data
from finetune.rollouts.asked import Asked
from finetune.rollouts.rollouts import Rollouts
from finetune.survival.preemption import StopFlag

SCORED = 2  # documents at most, one pair, that an export scores
EXPORT = "the export"  # where the run is after the last step
LATER: Any = None  # the value of a field until `loop` has come so far


@dataclass
class Run:
    """Everything one run needs, in two stages: opened, and with a model and an open directory."""

    config: Config
    directory: RunDirectory
    storage: Storage | None
    """The run directory's mirror in an object store."""
    topology: Topology
    data: Data
    stop: StopFlag
    reserved: int | None = None
    """Bytes to keep free for optimizer state when trying micro-batches; None: size is given."""
    state: TrainState = LATER
    """Set by `build`."""
    companion: Companion | None = None
    """The objective's teacher; set by `load_companions`."""
    start: Companion | None = None
    """A frozen copy of the weights before the first step; set by `load_companions`."""
    reference: Reference | None = None
    """What the objective compares with; set by `take_reference`."""
    reference_is_new: bool = False
    """Whether it was computed, so that it has to be written."""
    metrics: Metrics = LATER
    """This and the next two are set by `open_directory`."""
    saver: Saver = LATER
    best: BestCheckpoint = LATER
    batches: Prefetch | Rollouts = LATER
    """What steps learn from; set by `run`."""
    resources: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """What is open until the run ends."""

    def log(self, message: str) -> None:
        """Print one line, from the main process only."""
        if self.topology.is_main:
            log(message)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per process and step."""
        return configs.accumulation_steps(self.config, self.topology.num_data)

    @property
    def step(self) -> int | None:
        """The last finished step; None before the model is built."""
        return self.state.progress.step if self.state else None

    def settle_compilation(self, num_parameters: int) -> None:
        """Replace train.compile: auto in the config."""
        data, size = self.data, self.config.train.global_batch_size
        sequences = data.train.sequences
        num_tokens = data.num_steps * size * sequences.num_tokens / sequences.num_known
        self.config, line = with_compilation(self.config, self.topology, num_parameters, num_tokens)
        if line:
            self.log(line)

    def is_complete(self) -> bool:
        """Return whether the run completed before and its model is unchanged; log it.

        Raises RunDirectoryError if the directory holds another run, or would be overwritten.
        """
        directory, topology, identity = self.directory, self.topology, self.data.identity
        usual = base_identity.usual(self.data.model_config)
        is_complete, note = topology.on_main(lambda: directory.completion(identity, usual))
        if is_complete:
            self.log(f"{directory.path} is complete; its model is in {directory.model}")
            return True
        if note:
            self.log(note)
        topology.on_main(directory.require_writable)
        if last := topology.on_main(lambda: resume.newest(directory.checkpoints)):
            resume.require_same_run(last, self.config, self.known_identity(), usual)
        return False

    def known_identity(self) -> dict[str, Any]:
        """Return the part of `identity` that is known before loading weights."""
        return {**self.data.identity, "train.precision": self.topology.precision}

    def identity(self) -> dict[str, Any]:
        """Return fingerprints of data, weights and code; a resuming run must find the same."""
        facts = self.state.facts
        weights = {"frozen weights": facts.frozen, "code of the model": facts.code}
        # Fresh adapters are left out: a GPU computes the start of some, not the same twice.
        if self.config.adapter.kind == "full" or self.config.adapter.path:
            weights["weights before the first step"] = facts.start
        if self.companion is not None:
            weights["weights of the teacher"] = self.companion.sha256
        if self.reference is not None:
            weights["reference log-probabilities"] = self.reference.sha256
        return {**self.known_identity(), **weights}

    def load_companions(self) -> None:
        """Load the objective's teacher, and the weights before the first step once more, where the
        objective needs them. Collective.
        """
        data, topology = self.data, self.topology
        if (teacher := data.teacher) is not None:
            self.companion = companion.load(
                teacher.config, topology, model_config=teacher.model_config,
                tokenizer=teacher.tokenizer, attention=teacher.attention,
            )  # fmt: skip
            if why := self.companion.why_all_logits:
                self.log(
                    f"note: all logits of the teacher are held in memory at once, because {why}"
                )
        if data.start is not None:
            self.log("loading the weights before the first step once more, to compare with them")
            self.start = companion.load(
                data.start, topology, model_config=data.model_config, tokenizer=data.tokenizer,
                attention=data.attention, new_token_ids=data.new_token_ids,
            )  # fmt: skip

    def take_reference(self) -> None:
        """Read or compute what the objective compares with, before a resume changes the weights."""
        if REFERENCE not in self.objective.needs:
            return
        data, path, topology = self.data, self.directory.path / reference.FILE, self.topology
        found = reference.Reference(data.train, data.eval, data.num_steps, self.identity())
        known = topology.on_main(lambda: found.values if found.read(path) else None)
        if known is None:
            self.log("computing the log-probabilities of the weights before the first step")
            found.make(topology, self.policy(self.state.model), lambda: self.stop.is_set)
        else:
            found.values = known
        found.attach()
        self.reference, self.reference_is_new = found, known is None

    def lock(self) -> None:
        """Lock the directory against other processes, and claim the store from other machines."""
        self.topology.on_main(lambda: self.directory.lock(self.config.checkpoint.grace_seconds))
        if self.storage:
            self.topology.on_main(self.storage.claim)

    def open_directory(self, resumed_from: int | None) -> None:
        """Write config and receipt into the run directory, and open logs and saver."""
        self.topology.on_main(self._begin)
        self.metrics = self._metrics()
        self.saver = self._saver(resumed_from)
        self.best = BestCheckpoint(
            self.config.evaluation, self.directory, self.topology, lambda: self.saver.under_way,
            lambda terms: self.objective.runs_away(terms, self.config.objective),
        )  # fmt: skip

    def prefetch(self) -> Prefetch:
        """Return the batches of a run that reads all it learns from."""
        topology = self.topology
        return Prefetch(
            self.data.train, self.data.num_steps, part=topology.part, device=topology.device,
            heartbeat=topology.watchdog.heartbeat,
        )  # fmt: skip

    def save_unless_saved(self) -> None:
        """Save the state where a request to stop came before a step, unless that was done."""
        step, stop = self.state.progress.step, self.stop
        self.saver.settle()
        if step and self.saver.last_step != step:
            self.saver.save(self.state, self.best.step, stop.save_seconds())

    def _begin(self) -> None:
        config, data, step = self.config, self.data, self.state.progress.step
        made = self._receipt()
        self.directory.require_same_receipt(made)
        if self.directory.outcome().get("state") == "running":  # we hold the lock: none runs here
            self.log(
                "note: the previous attempt left no outcome: it was killed, or its machine was lost"
            )
        self.directory.create(config)
        of_both = (data.train, data.eval) if data.eval else (data.train,)
        rejects = [path for each in of_both for path in each.sequences.examples.reject_files]
        self.directory.write_rejects(list(dict.fromkeys(rejects)))
        self._write_held_out()
        if self.reference and self.reference_is_new:
            self.reference.write(self.directory.path / reference.FILE)
        wanted = config.evaluation.every_steps if data.eval else None
        for note in (
            *self.directory.logs.rewind(step),
            *self.directory.logs.missing(step, config.tracking.log_every_steps, wanted),
        ):
            self.log(note)
        self.directory.write_outcome("running", step, "started, or started again")
        if changed := self.directory.write_receipt(made, step):
            self.log(changed)
        if self.storage:
            self.storage.upload_notes(self.directory.path)

    def _write_held_out(self) -> None:
        """Write the rows that data.eval_fraction holds out; the same at each start of a run.

        Resuming proves that the rows are the same, so a file that is there stays.
        """
        path, data = self.directory.path / HELD_OUT, self.data
        if data.eval is None or not self.config.data.eval_fraction:
            return
        if self.state.progress.step == 0 or not path.exists():
            held_out.write(path, data.eval.sequences.examples, self.config.data.text_unit)

    def _receipt(self) -> dict[str, Any]:
        config, topology, data, facts = self.config, self.topology, self.data, self.state.facts
        parameters = {
            "trainable": facts.num_trainable, "total": facts.num_parameters,
            "trained_in_products": facts.products[0], "frozen_in_products": facts.products[1],
        }  # fmt: skip
        return receipt.compose(
            seed=config.run.seed, parameters=parameters, num_processes=topology.num_processes,
            topology=topology.name, precision=topology.precision, device=topology.device.type,
            attention=data.attention, num_steps=data.num_steps, start_weights=facts.start,
            template_date=data.template.date, identity=data.identity,
            train_data=data.train.sequences.examples.receipt(),
            eval_data=data.eval.sequences.examples.receipt() if data.eval else None,
            launch=topology.launched,
        )  # fmt: skip

    def close(self) -> None:
        """Close batches, trackers and lock, after the outcome: trackers may upload for long."""
        if self.batches:
            self.batches.close()
        self.resources.close()
        if self.metrics:
            self.metrics.close()
        if self.topology.is_main:
            self.directory.unlock()

    @functools.cached_property
    def objective(self) -> Objective:
        """One for the whole run: it compares the terms of all steps."""
        return chosen(self.config)

    def policy(self, model: Any) -> Policy:
        """Return the model as objectives see it."""
        return Policy(model, self.topology.unwrap, self.companion)

    def fingerprints(self) -> dict[str, float | str]:
        """Return a fingerprint of what this process holds of each weight, by name."""
        model = self.topology.unwrap(self.state.model)
        return parameters.fingerprints(model, self.topology.sharing.local_shard)

    def require_changed(self, untrained: dict[str, float | str]) -> None:
        """Raise ExportError if training changed no weight; log those that did not change.

        `untrained`: fingerprints of the weights before the first step.
        """
        model = self.topology.unwrap(self.state.model)
        step, adapter = self.state.progress.step, self.config.adapter
        now = self.fingerprints()
        changed = self.topology.union({name for name in now if now[name] != untrained[name]})
        unchanged, num_trained = parameters.unchanged(model, changed)
        if len(unchanged) == num_trained:
            why = "is optimizer.lr too small for model.dtype?"
            if self.objective.samples:
                why = (
                    "did completions of a prompt ever differ in reward (no_signal_share in "
                    "metrics.jsonl)? is optimizer.lr too small for model.dtype?"
                )
            raise ExportError(f"no weight changed in {step} steps; {why}")
        if step == 1 and adapter.kind != "full" and adapters.starts_at_zero(adapter):
            unchanged = [name for name in unchanged if not adapters.waits_for_other_factor(name)]
        if unchanged:
            self.log(
                f"note: {len(unchanged)} of {num_trained} weight tensors did not change, "
                f"such as {unchanged[0]}"
            )

    def save_export(self) -> Writing:
        """Save the model next to its final place in the run directory. Collective."""
        config, topology, template = self.config, self.topology, self.data.template
        model, is_adapter = topology.unwrap(self.state.model), config.adapter.kind != "full"
        if is_adapter:
            adapters.round_to_base(model)
        weights = topology.full_weights(self.state.model, trained_only=is_adapter)
        if is_adapter:
            weights = adapters.in_base_dtype(model, weights)
        weights = scalar_heads.without(weights, model)
        logits = topology.on_every(lambda: probe_logits(model, topology.device))
        scored = topology.on_every(self._scored)
        has_turns = self.objective.has_turns  # rows of plain text have no turns, so no template
        writing = Writing(
            self.directory.model, template if has_turns else None,
            config.data.system_prompt if has_turns else None,
            Base(config.model.path, config.model.revision, config.model.trust_remote_code),
        )  # fmt: skip
        topology.on_main(lambda: writing.save(
            model, weights, logits, self.data.tokenizer, precision=topology.precision,
            device=topology.device, probe_dtype=topology.probe_dtype, scored=scored,
        ))  # fmt: skip
        return writing

    def _scored(self) -> document_scores.Scored | None:
        """Score a few documents, to compare the export of a reward model with. Collective."""
        if families.of(self.config) != families.SCORES:
            return None
        examples = self.data.train.in_memory.examples
        number = min(SCORED, len(examples.input.ends))
        documents = [examples.input.ids[examples.input.span(n)] for n in range(number)]
        model = self.topology.unwrap(self.state.model)
        return document_scores.trained(model, documents, self.topology.device)

    def complete(self, export: Writing, step: int, reason: str, exported: int) -> None:
        """Verify and publish the model, here and in the store, and record that the run is complete.

        `exported`: the step of its weights.
        """

        def publish() -> None:
            names = export.publish()
            if self.storage:
                self.storage.upload_model(self.directory.model)
            self.stop.close()  # ignore signals: only the outcome remains to be written
            self.directory.write_outcome("complete", step, reason, names, exported_step=exported)
            if self.storage:
                self.storage.upload_notes(self.directory.path)

        self.topology.on_main(publish)
        self.log(f"complete at step {step}: {reason}: {self.directory.model}")
        self.log(f"next:\n{self.what_next()}")

    def what_next(self) -> str:
        """Return the commands that use the exported model, one per line."""
        command, path, base = places.command(), self.directory.path, self.config.model.path
        lines = [f"  draw        {command} curves {path}"]
        if families.of(self.config) == families.SCORES:
            lines.insert(0, f"  evaluate    {command} evaluate {self.to_compare()}")
        elif self.objective.has_turns:
            if base is not None:
                lines.insert(0, f"  compare     {command} evaluate {self.to_compare()}")
            lines.insert(0, f"  chat        {command} chat {path}")
        if self.config.adapter.kind != "full":
            lines.append(f"  merge       {command} merge {path} --output {path}/merged")
        return "\n".join(lines)

    def to_compare(self) -> str:
        """Return the run, and where it held out no rows, a place for rows, for a command line."""
        run, data = shlex.quote(str(self.directory.path)), self.config.data
        return run if data.eval_fraction or data.eval else f"{run} --data HELD_OUT_ROWS"

    def _metrics(self) -> Metrics:
        config, directory, topology = self.config, self.directory, self.topology
        settings, progress, trackers = config.tracking, self.state.progress, None
        if topology.is_main and settings.trackers:
            trackers = Trackers(
                settings, run_name=config.run.name, run_id=progress.run_id,
                directory=directory.path, first_step=progress.step + 1,
                about={"config": config.model_dump(), "receipt": directory.receipt()},
                history=directory.logs.history(), log=log,
            )  # fmt: skip
        lengths = self.data.train.sequences.examples.document_lengths()
        attention = parameters.attention_per_token(self.data.model_config, lengths)
        flops = parameters.flops_per_token(*self.state.facts.products, attention)
        return Metrics(
            directory, num_steps=self.data.num_steps, start=progress.step, is_main=topology.is_main,
            num_processes=topology.num_processes, every=settings.log_every_steps,
            flops_per_token=None if self.objective.shares_beginnings else flops,
            trackers=trackers, remark=self.objective.remark(),
        )  # fmt: skip

    def _saver(self, resumed_from: int | None) -> Saver:
        return Saver(
            self.directory.checkpoints, self.topology, self.storage, self.config.checkpoint,
            about={"config": self.config.model_dump(), "identity": self.identity()},
            resumed_from=resumed_from, log=self.log, record=self.metrics.saved,
            before=self.metrics.sync,
        )  # fmt: skip

    def evaluate(self) -> dict[str, float] | None:
        """Evaluate the held-out rows; return None if a request to stop ended it. Collective."""
        rows = self.data.eval
        assert rows is not None
        if isinstance(rows, Asked):
            assert isinstance(self.batches, Rollouts)
            return self.batches.evaluate(rows)
        return evaluate(
            self.topology, self.policy(self.state.model), self.objective, self.config.objective,
            rows.epoch(), rows.all_totals(), lambda: self.stop.is_set,
        )  # fmt: skip

    def sample(self) -> None:
        """Sample answers to evaluation.sample_prompts. Collective: each may hold a shard."""
        settings, data, step = self.config.evaluation, self.data, self.state.progress.step
        self.topology.watchdog.pause(f"the samples after step {step}")
        template = data.template if self.objective.has_turns else None
        prefix = getattr(self.config.objective, "source_prefix", "")
        with self.state.averaged(), self.topology.arithmetic():
            answers = generate.while_training(
                self.topology.unwrap(self.state.model), data.tokenizer, template,
                [prefix + prompt for prompt in settings.sample_prompts],
                system_prompt=self.config.data.system_prompt,
                max_new_tokens=settings.sample_max_new_tokens,
                together=self.topology.parallel.generates_together, log=self.log,
            )  # fmt: skip
        self.metrics.sampled(step, settings.sample_prompts, answers)
