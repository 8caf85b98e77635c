"""The edge node: a model host, a router and an MQTT worker beside the devices."""
