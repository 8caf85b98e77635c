"""The agent: the process beside a node that fetches, checks, installs and reverses model versions."""
