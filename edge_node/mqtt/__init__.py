"""The MQTT worker: devices ask over a broker, accepted requests survive a crash, each is answered once."""
