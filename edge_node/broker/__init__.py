"""The node's own brokers: one for anonymous devices on this machine, one for each tenant with certificates."""

from edge_node.broker.configuration import BrokerLimits
from edge_node.broker.process import INSTALL_HINT, Broker, Kind, find_broker
from edge_node.broker.supervision import keep_alive

__all__ = ["INSTALL_HINT", "Broker", "BrokerLimits", "Kind", "find_broker", "keep_alive"]
