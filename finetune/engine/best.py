"""Track the best evaluation: which checkpoint has its weights, and when to stop early."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from finetune.config import fields
from finetune.engine.checkpoint import resume
from finetune.engine.rundir import RunDirectory
from finetune.engine.state import TrainState
from finetune.engine.topology import Topology

if TYPE_CHECKING:
    from finetune.engine.checkpoint.storage import Storage


class BestCheckpoint:
    """Every process has one, and all call the same methods after the same steps."""

    def __init__(
        self,
        settings: fields.Evaluation,
        directory: RunDirectory,
        topology: Topology,
        under_way: Callable[[], set[int]] = set,
        runs_away: Callable[[Mapping[str, Any]], str] = lambda terms: "",
    ) -> None:
        """`under_way` returns the steps whose checkpoints are being written now, `runs_away` why a
        step with these terms is the last.
        """
        self.settings, self.directory, self.topology = settings, directory, topology
        self.under_way, self.runs_away = under_way, runs_away
        self.step: int | None = None
        """The step of the best evaluation, if its weights are to be exported."""
        self.stalled: str | None = None
        """Why the run stops early: evaluations improve nothing, or training runs away."""

    def fetch(self, storage: "Storage | None") -> None:
        """Fetch the checkpoint of the best evaluation from the store, if this disk lacks it."""
        if self.settings.export_best:
            best = self.topology.on_main(self.directory.logs.best_step)
            self.topology.on_main(lambda: resume.bring(self.directory.checkpoints, best, storage))

    def update(self, step: int) -> None:
        """Find the best of the evaluations up to `step`, the run's last, whose weights are kept."""

        def find() -> tuple[int | None, str | None]:
            saved = resume.kept(self.directory.checkpoints) | self.under_way() | {step}
            logs = self.directory.logs
            why = logs.why_stalled(self.settings.patience)
            return logs.best_step(saved), why or self.runs_away(logs.line_of(step)) or None

        best, self.stalled = self.topology.on_main(find)
        self.step = best if self.settings.export_best else None

    def watch(self, terms: Mapping[str, float]) -> None:
        """Note whether training runs away in a step; its terms are the same on all processes."""
        self.stalled = self.stalled or self.runs_away(terms) or None

    def restore(self, state: TrainState, log: Callable[[str], None]) -> tuple[int, str]:
        """Load the weights of the best evaluation, if they are exported.

        Return the step of the weights that are there now, and which those are, in words.
        """
        here = state.progress.step
        if not self.settings.export_best:
            return here, "last weights"

        def find() -> tuple[int | None, int | None]:
            kept = resume.kept(self.directory.checkpoints) | {here}
            return self.directory.logs.best_step(kept), self.directory.logs.best_step()

        best, lowest = self.topology.on_main(find)
        if lowest is None:
            log("note: no evaluation loss was finite, so none is best; exporting the last weights")
            return here, "last weights"
        if best != lowest:
            log(
                f"note: the evaluation of step {lowest} was better, but its checkpoint was not kept"
            )
        if best is None:
            return here, "last weights"
        if best != here:
            resume.put_back_best(self.directory.checkpoints, best, self.topology, state)
        return best, "weights of the best evaluation"
