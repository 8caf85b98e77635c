"""Chunks to and from the other nodes of the mesh."""
