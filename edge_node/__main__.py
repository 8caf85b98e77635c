"""`python -m edge_node --config FILE`: an edge node without the console script."""

import sys

from edge_node.app import run
from edge_node.config import EdgeConfig
from router.serving_node import load_arguments

if __name__ == "__main__":
    config, token = load_arguments(EdgeConfig, "python -m edge_node")
    sys.exit(run(config, token=token))
