"""The trace that the calling program is in, if it has one."""

from __future__ import annotations

import sys


def current_trace() -> str:
    """`traceparent` of the span around the caller; "" outside of any.

    A program that does not use OpenTelemetry has not imported it, and pays for a look into a table.
    """
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        return ""
    span = api.get_current_span().get_span_context()
    if not span.is_valid:
        return ""
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{int(span.trace_flags):02x}"
