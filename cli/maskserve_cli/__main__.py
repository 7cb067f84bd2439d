"""Where the process begins, as `maskserve` and as `python -m maskserve_cli`: SIGTERM ends it from the first moment on.

The first process of a container gets no signal that it does not handle, and the imports behind `app` take 0.2 s: a SIGTERM
in that time would be lost, and the scheduler would wait for its whole grace.
"""

import os
import signal
import sys
from typing import NoReturn

TERMINATED = 143
"""As in `exits`, which is not imported yet."""


def main() -> int:
    """The exit code of the process's words."""
    signal.signal(signal.SIGTERM, end)
    from maskserve_cli import app

    return app.main()


def end(*_: object) -> NoReturn:
    """Ends the process as SIGTERM does later on; so early there is nothing to put in order."""
    os.write(2, b"maskserve: terminated\n")
    os._exit(TERMINATED)


if __name__ == "__main__":
    sys.exit(main())
