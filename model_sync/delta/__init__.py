"""Deltas between two files of a model: codecs, the search for the smallest, and the index that names them."""
