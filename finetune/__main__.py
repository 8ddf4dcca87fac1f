"""Run a command: `finetune COMMAND`, or `python -m finetune COMMAND`.

Each command imports what it needs when it runs.
"""

import argparse
import importlib
import json
import os
import runpy
import signal
import sys

from finetune import failures, places
from finetune.config import note_repeats, paths
from finetune.console import visible
from finetune.errors import EXIT_COMPLETE, EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_USER_ERROR

COMMANDS = {
    "replay": (
        "finetune.replay",
        "repeat a run from its receipt; refuse, and list what differs, if anything changed",
    ),
    "data": (
        "finetune.preparation.programs",
        "prepare rows: clean, remove duplicates, split and more; data --help lists all",
    ),
    "evaluate": (
        "finetune.evaluation.command",
        "compare the base and the tuned model on held-out rows",
    ),
    "compare": (
        "finetune.evaluation.compare_runs",
        "compare runs: settings that differ, losses, scores, time and cost",
    ),
    "votes": (
        "finetune.evaluation.vote_command",
        "rate models by votes of people and judges, and make preference rows of them",
    ),
    "chat": ("finetune.chat", "chat with a model in the terminal"),
    "serve": (
        "finetune.serving.serve",
        "serve base and tuned model with OpenAI's methods, for trying",
    ),
    "moderate": (
        "finetune.moderation",
        "choose the threshold of a classifier for moderation, and measure it",
    ),
    "plan": (
        "finetune.forecast.command",
        "forecast the memory of a run, the topologies it fits on, and what to change",
    ),
    "show": (
        "finetune.show",
        "show rows as the model will see them: what is supervised, masked, cut and packed",
    ),
    "curves": ("finetune.curves", "plot loss, learning rate, gradient norm and speed of runs"),
    "merge": ("finetune.export.merge", "merge an adapter into its base and save full weights"),
    "export": (
        "finetune.export.command",
        "export a model: merged, in shards, as GGUF, for Ollama, combined, or to the Hub",
    ),
}
OTHERS = {
    "train": "train in this process, as train.py does; train --help lists every setting",
    "check": "check everything but the weights, as train --check does",
    "launch": "start train.py as `accelerate launch` does, and pass on signals and exit codes",
    "schema": "JSON schema of the run config, for editors",
}
TAKE_SETTINGS = ("plan", "show")  # --section.field VALUE, as train.py


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Show the defaults of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    if argv is None:
        argv = sys.argv[1:]
        places.note_command(sys.argv[0])
    paths.give_home()
    if argv[:1] == ["launch"]:  # its arguments are those of `accelerate launch`
        return _launch(argv[1:])
    if argv[:1] in (["train"], ["check"]):
        sys.argv = [str(places.TRAIN), *argv[1:], *(["--check"] if argv[0] == "check" else [])]
        runpy.run_path(str(places.TRAIN), run_name="__main__")  # ends the process
    if halves := [word for word in argv if paths.half_characters(word, "it")]:
        what = "holds half a character, or bytes that are not UTF-8"
        print(f"error: {paths.shown(halves[0])}: {what}", file=sys.stderr)
        return EXIT_USER_ERROR
    arguments = _parse(argv)
    try:
        if arguments.command == "schema":
            print(json.dumps(importlib.import_module("finetune.config").json_schema(), indent=2))
            return EXIT_COMPLETE
        command = importlib.import_module(COMMANDS[arguments.command][0])
        return command.main(arguments) or EXIT_COMPLETE
    except BrokenPipeError:  # the reader has left, as `head` does; no more can be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_COMPLETE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as exc:
        error = failures.translate(exc)
        if error is None:
            raise
        print(visible(f"{error.label}: {error}"), file=sys.stderr)
        return error.exit_code


def _launch(argv: list[str]) -> int:
    """Run `launch`; until it sets its own handlers, a signal ends the process with exit code 75."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(EXIT_PREEMPTED))
    return int(importlib.import_module("finetune.survival.launcher").main(argv))


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parse a command and its arguments; import the module of that command alone."""
    parser = argparse.ArgumentParser(prog=places.command(), allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(
            name, help=text, description=text, allow_abbrev=False, formatter_class=_Help
        )
        if argv[:1] == [name]:
            note_repeats(command)
            importlib.import_module(module).add_arguments(command)
    for name, text in OTHERS.items():
        commands.add_parser(name, help=text, description=text)
    arguments, settings = parser.parse_known_args(argv)
    if settings and arguments.command not in TAKE_SETTINGS:
        commands.choices[arguments.command].error(f"unrecognized arguments: {' '.join(settings)}")
    arguments.settings = settings
    return arguments


if __name__ == "__main__":
    sys.exit(main())
