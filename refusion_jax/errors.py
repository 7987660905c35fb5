"""Errors that are the user's to fix: one paragraph, never a traceback."""

import sys
import textwrap
import traceback
from collections.abc import Callable


class UserError(ValueError):
    """Bad input. The message names the value, the place and the fix."""


def run_main(main: Callable[[], None]) -> None:
    """Runs a command's `main`; a `UserError` becomes one paragraph on stderr and exit code 2."""
    try:
        main()
    except (UserError, KeyboardInterrupt) as error:
        sys.exit(report(error))


def report(error: BaseException, where: str = "") -> int:
    """Prints an error on stderr, a `UserError` as one paragraph and others with their traceback.

    Args:
      where: the process that it befell, if there are several.

    Returns:
      The exit code: 2 for a `UserError`, 130 after Ctrl-C, otherwise 1.
    """
    if isinstance(error, KeyboardInterrupt):
        return 130
    message, code = str(error), 2
    if not isinstance(error, UserError):
        traceback.print_exception(error)
        message, code = traceback.format_exception_only(error)[-1].strip(), 1
    text = f"error: {where}: {message}" if where else f"error: {message}"
    print(textwrap.fill(text, width=100, break_long_words=False, break_on_hyphens=False), file=sys.stderr)
    return code
