"""Errors that are the user's to mend: one paragraph, never a traceback."""

import sys
import textwrap
from collections.abc import Callable


class UserError(ValueError):
    """Bad input. The message names the value, the place and the fix."""


def run_main(main: Callable[[], None]) -> None:
    """Runs a command's `main`; a `UserError` becomes one paragraph on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(
            textwrap.fill(f"error: {error}", width=100, break_long_words=False, break_on_hyphens=False), file=sys.stderr
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
