"""finetune, or python -m finetune: train | launch | replay | plan | evaluate | chat | curves |
export | merge | schema. Each imports what it needs when it runs.
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
from finetune.errors import EXIT_COMPLETE, EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_USER_ERROR

COMMANDS = {
    "replay": (
        "finetune.replay",
        "repeat a run from its receipt; refuse, and list what differs, if anything changed",
    ),
    "evaluate": (
        "finetune.evaluation.compare",
        "compare the base and the tuned model on held-out rows",
    ),
    "chat": ("finetune.chat", "chat with a model in the terminal"),
    "plan": (
        "finetune.forecast.command",
        "forecast the memory of a run, the topologies it fits on, and what to change",
    ),
    "curves": ("finetune.curves", "plot loss, learning rate, gradient norm and speed of runs"),
    "export": ("finetune.export.merge", "merge an adapter into its base and save full weights"),
}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def main(argv: list[str] | None = None) -> int:
    if argv is None:
        argv = sys.argv[1:]
        places.note_command(sys.argv[0])
    paths.give_home()
    if argv[:1] == ["launch"]:  # its arguments are those of `accelerate launch`
        for number in (
            signal.SIGTERM,
            signal.SIGHUP,
        ):  # nothing has begun; `launch` sets its own handlers
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: os._exit(EXIT_PREEMPTED))
        return int(importlib.import_module("finetune.survival.launcher").main(argv[1:]))
    if argv[:1] == ["train"]:
        sys.argv = [str(places.TRAIN), *argv[1:]]
        runpy.run_path(str(places.TRAIN), run_name="__main__")  # ends the process
    if argv[:1] == ["merge"]:
        models = ["--model"] if argv[1:2] and not argv[1].startswith("-") else []
        argv = ["export", "--merge", *models, *argv[1:]]
    if halves := [word for word in argv if paths.half_characters(word, "it")]:
        print(
            f"error: {paths.shown(halves[0])}: holds half a character, or bytes that are not UTF-8",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR
    parser = argparse.ArgumentParser(prog=places.command(), allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            allow_abbrev=False,
            formatter_class=_Help,
        )
        if argv[:1] == [name]:
            note_repeats(command)
            importlib.import_module(module).add_arguments(command)
    commands.add_parser(
        "merge", help="merge RUN --output FOLDER: the same as export --merge --model RUN"
    )
    commands.add_parser(
        "train", help="train in this process, as train.py does; train --help lists every setting"
    )
    commands.add_parser(
        "launch",
        help="start train.py as `accelerate launch` does, and pass on signals and exit codes",
    )
    commands.add_parser("schema", help="JSON schema of the run config, for editors")
    arguments, settings = parser.parse_known_args(argv)
    if settings and arguments.command != "plan":
        commands.choices[arguments.command].error(f"unrecognized arguments: {' '.join(settings)}")
    arguments.settings = settings  # --section.field VALUE, as train.py has them
    try:
        if arguments.command == "schema":
            print(json.dumps(importlib.import_module("finetune.config").json_schema(), indent=2))
        else:
            return (
                importlib.import_module(COMMANDS[arguments.command][0]).main(arguments)
                or EXIT_COMPLETE
            )
        return EXIT_COMPLETE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as exc:
        error = failures.translate(exc)
        if error is None:
            raise
        print(f"{error.label}: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
