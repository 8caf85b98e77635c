"""MQTT 5 for both ends: a node that answers and a device that asks."""
