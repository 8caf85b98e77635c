"""Where a request goes: a deterministic state machine without loop, clock, socket or file.

`Policy` is driven by events (`on_report`, `on_sent`, `on_reply`, ...) and asked with `decide`. The live router, the SDK
and the simulator drive the same object.
"""

from router.policy.config import PolicyConfig
from router.policy.events import Attempt, Outcome
from router.policy.facts import Decision, Reject, RequestFacts, Send, Terms
from router.policy.policy import Policy
from router.policy.split import assign, sticky_key

__all__ = [
    "Attempt",
    "Decision",
    "Outcome",
    "Policy",
    "PolicyConfig",
    "Reject",
    "RequestFacts",
    "Send",
    "Terms",
    "assign",
    "sticky_key",
]
