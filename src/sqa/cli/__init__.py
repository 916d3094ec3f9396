"""The command line: it parses, calls the library and prints. Bad input is one sentence and exit code 2."""

from __future__ import annotations

import errno
import sys
import traceback
from io import TextIOWrapper
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from sqa._version import __version__
from sqa.cli import bench, comparison, costs, models
from sqa.cli.display import OutputClosed, is_main, output_closed, say_what_is_logged
from sqa.cli.options import FileCommand
from sqa.errors import InputError, MissingExtraError, first_line, shown
from sqa.progress import Interrupted, NonFiniteLoss


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run a command. Typer itself would end with code 1, without a word, when standard output is closed."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise output_closed() from None


app = typer.Typer(
    cls=_Commands,
    help="Sparse Query Attention: fewer query heads, cheaper training and prefill.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for _purpose, _commands in (
    ("Train and compare", comparison.app),
    ("Models", models.app),
    ("What a shape costs", costs.app),
):
    for _command in _commands.registered_commands:
        _command.rich_help_panel, _command.cls = _purpose, FileCommand
    app.add_typer(_commands)
for _command in bench.app.registered_commands:
    _command.cls = FileCommand
app.add_typer(bench.app, name="bench", rich_help_panel="Measure")


def main() -> None:
    """Entry point of the `sqa` command."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a closed pipe is found when it is written to, not at exit
    say_what_is_logged("sqa.native")
    try:
        app()
    except (InputError, MissingExtraError) as error:
        _fail(str(error), 2)
    except (Interrupted, NonFiniteLoss) as error:
        if not is_main():
            sys.exit(1)  # it happened in all processes, and the first one reports it
        _fail(str(error), 141 if isinstance(error, OutputClosed) else 130 if isinstance(error, Interrupted) else 1)
    except MemoryError:
        _fail("out of memory", 1)
    except Exception as error:
        # a full disk without a name is that of standard output: our own files are named
        if isinstance(error, OSError) and (error.filename is not None or error.errno == errno.ENOSPC):
            in_the_way = isinstance(error, FileExistsError)  # from mkdir, where a file has that name
            why = "this is no folder, and a folder is needed here" if in_the_way else error.strerror
            _fail(f"{error.filename or 'standard output'}: {why}", 2)
        if isinstance(error, RuntimeError):
            from torch import OutOfMemoryError

            if isinstance(error, OutOfMemoryError) or "can't allocate memory" in str(error):
                _fail(f"out of memory ({first_line(error)})", 1)
        traceback.print_exc()
        _fail(f"this is a bug in sqa {__version__}; please report it with the lines above", 1)


def _fail(message: str, code: int) -> NoReturn:
    print(f"sqa: {shown(message, 2000)}", file=sys.stderr)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit
