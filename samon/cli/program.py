"""How commands end. Exit codes: 0 success, 1 runtime error, 2 usage error, 128 + n stopped by signal n."""

import errno
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from samon.errors import RunError, Stopped, UserError, os_error_text

# Of the operating system's errors, those of a path that cannot be used as it was given.
_PATH_MISTAKES = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}


def run_script(main: Callable[[], Any]) -> NoReturn:
    """Call `main` and exit; user errors and those of the operating system print one `error:` line, no traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files that are not UTF-8 keep their bytes
    threading.excepthook = _thread_error
    try:
        main()
        sys.stdout.flush()
        status = 0
    except UserError as error:
        status = _print_error(str(error), 2)
    except RunError as error:
        status = _print_error(str(error), 1)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _stdout_closed():
            status = 128 + signal.SIGPIPE  # `| head` has seen enough
        else:
            status = _print_error(os_error_text(error), 2 if error.errno in _PATH_MISTAKES else 1)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        status = stop.status
    except KeyboardInterrupt:
        print(f"stopped by signal {signal.SIGINT:d}", file=sys.stderr)
        status = 128 + signal.SIGINT
    sys.stderr.flush()
    sys.exit(status)


def _thread_error(error: threading.ExceptHookArgs) -> None:
    """A line for errors of the operating system, such as those of TensorBoard's thread, which the next write raises."""
    if isinstance(error.exc_value, OSError):
        print(f"warning: {os_error_text(error.exc_value)}", file=sys.stderr)
    else:
        threading.__excepthook__(error)


def _stdout_closed() -> bool:
    """Whether nothing reads standard output any more; if so, what is left of it goes nowhere."""
    poll = select.poll()
    poll.register(1, 0)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return closed


def _print_error(text: str, status: int) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return status
