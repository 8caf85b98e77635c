"""Routing: where an inference request goes. `router.policy` decides, the rest carries it out."""
