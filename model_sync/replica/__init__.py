"""The life of one model on one node as a pure state machine: events in, frozen instructions out."""
