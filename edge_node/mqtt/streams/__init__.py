"""Streams of devices: sensor windows in, model state kept between them, events out."""
