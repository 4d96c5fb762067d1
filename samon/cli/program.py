"""How commands end. Exit codes: 0 success, 1 runtime error, 2 usage error, 128 + n stopped by signal n."""

import argparse
import errno
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from samon.errors import RunError, Stopped, UserError, os_error_text

# Errors of the operating system about a path that the user gave.
_PATH_ERRORS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}


def run_script(main: Callable[[], object]) -> NoReturn:
    """Call `main` and exit; expected errors print one line on stderr, without a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # file names that are not UTF-8 keep their bytes
    threading.excepthook = _report_thread_error
    status, message = 0, ""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        status, message = 2, f"error: {error}"
    except RunError as error:
        status, message = 1, f"error: {error}"
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _stdout_closed():
            status = 128 + signal.SIGPIPE  # as in `samon-plan ... | head`
        else:
            status, message = 2 if error.errno in _PATH_ERRORS else 1, f"error: {os_error_text(error)}"
    except Stopped as stop:
        status, message = stop.status, str(stop)
    except KeyboardInterrupt:
        status, message = 128 + signal.SIGINT, f"stopped by signal {signal.SIGINT:d}"
    if message:
        print(" ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(status)


def parse_before_dashes(parser: argparse.ArgumentParser, argv: list[str] | None, other: str) -> argparse.Namespace:
    """Parse the arguments before `--`; those after it are flags of the command `other` and returned as `after`."""
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    args, unknown = parser.parse_known_args(argv[:end])
    if unknown:
        words = " ".join(unknown)
        raise UserError(f"{words}: no flag of {parser.prog}; flags of {other} go after --, as in `... -- {words}`")
    args.after = argv[end + 1 :]
    return args


def _report_thread_error(error: threading.ExceptHookArgs) -> None:
    """One line for OS errors, such as those of TensorBoard's thread, which its next write raises again."""
    if isinstance(error.exc_value, OSError):
        print(f"warning: {os_error_text(error.exc_value)}", file=sys.stderr)
    else:
        threading.__excepthook__(error)


def _stdout_closed() -> bool:
    """Whether the reader of stdout has gone; if so, the remaining output is discarded."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(1, 0)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return closed
