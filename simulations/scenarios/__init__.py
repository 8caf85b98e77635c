"""One file per question. Each module offers `run(seed) -> Result`; its docstring's first line is the question."""
