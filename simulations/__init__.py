"""Virtual time for the live routing code: the same `router.policy` objects, driven by an event heap instead of sockets."""
