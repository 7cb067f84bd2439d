"""`python -m maskserve_cli`, the same as `maskserve`."""

import sys

from maskserve_cli.app import main

if __name__ == "__main__":
    sys.exit(main())
