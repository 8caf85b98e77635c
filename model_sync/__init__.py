"""Signed model distribution: repository and controller, rollouts, and the agent beside each node."""
