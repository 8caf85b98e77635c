"""Finding out what is wrong between a node, its broker and its devices."""
