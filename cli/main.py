"""The `foldkernels` command: one file a sub-command beside this one, nothing heavy imported before one is chosen."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from . import accelerate, bench, convert, explain, sample, train, tune, verify
from .doctor import command as doctor

HELP = """Fast attention kernels for protein models, with the numbers of the model's own code.

Exit codes: 0 done, 1 a check failed, 2 bad input or a required kernel that cannot run, 130 stopped by Ctrl-C.
"""

# Plain text throughout: the same on a terminal, in a log and in a bug report, and rich is not imported for `--help`.
app = typer.Typer(
    name="foldkernels",
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (sample, train, convert, explain, accelerate, doctor, verify, bench, tune):
    app.command(
        command.NAME,
        short_help=command.SUMMARY,
        epilog=command.EXAMPLES,
        no_args_is_help=command.NAME not in ("doctor", "verify", "bench", "tune"),  # they need no argument
    )(command.run)


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        print(f"foldkernels {__version__}")
        raise typer.Exit(0)


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


#: Base of what typer raises for a word that it cannot read: click's, of which newer versions of typer hold a copy.
_USAGE_ERROR: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "UsageError")


def _usage(error: Any) -> str:
    """An error of the command line itself, in the style of all others, and where the help is."""
    if type(error).__name__ == "NoArgsIsHelpError":  # no error: the help is what was asked for
        return error.ctx.get_help()
    text = error.format_message().strip()
    text = text[:1].lower() + text[1:] if not text[:2].isupper() else text
    lines = [f"error: {text.rstrip('.')}"]
    if error.ctx is not None:
        lines.append(f"  Fix: {error.ctx.command_path} --help shows what there is")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The words after `foldkernels`; the process's own when None.

    Returns:
        The exit code.
    """
    try:
        done = app(args=None if arguments is None else list(arguments), prog_name="foldkernels", standalone_mode=False)
    except _USAGE_ERROR as error:
        print(_usage(error), file=sys.stderr)
        return 2
    except typer.Abort:
        return 130
    except KeyboardInterrupt:  # before or after the sub-command, which sees to its own
        return 130
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return int(stop.code or 0)
    return done if isinstance(done, int) else 0
