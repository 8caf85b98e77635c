"""`python -m cloud_core --config FILE`: a cloud core without the console script."""

import sys

from cloud_core.app import run
from cloud_core.config import CloudConfig
from router.serving_node import load_arguments

if __name__ == "__main__":
    config, token = load_arguments(CloudConfig, "python -m cloud_core")
    sys.exit(run(config, token=token))
