"""What a node has accepted, and what it still owes, in one SQLite file."""
