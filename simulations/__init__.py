"""Virtual time for the live routing code: `router.policy` driven by an event heap instead of sockets."""
