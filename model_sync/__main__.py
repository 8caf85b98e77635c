"""`python -m model_sync`: the sync process."""

import sys

from model_sync.controller.app import main

if __name__ == "__main__":
    sys.exit(main())
