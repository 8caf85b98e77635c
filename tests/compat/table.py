"""Results of several servers as one Markdown page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.compat.registry import ABSENT, CHECKS, EXTENSION, FAIL, GRPC, MUST, PASS, RECOMMENDED, REST, Check, Result

LEVELS = {MUST: "must", EXTENSION: "Triton extension", RECOMMENDED: "recommended"}
MARKS = {PASS: "✓", FAIL: "✗", ABSENT: "·", "": ""}


HEAD = """# How servers keep the Open Inference Protocol

`make compat` runs the {count} checks of `tests/compat` on each server and writes this page. `tests/compat/README.md`
says what a server must hold to be checked, and how to check another one.

✓ passes, ✗ fails, · is an extension that the server does not announce; empty: no check of this transport. *must*: the
text of the specification; *Triton extension*: documented by Triton; *recommended*: what a client may hope for.
nearcast's gRPC is both of its gRPC servers: a check passes if it does on both.

MLServer leaves the checking of shapes and datatypes to its runtimes; the contract's runtime adds none but the names of
tensors. Triton is its core with the Python backend, as the wheel `nvidia-pytriton` carries them.
"""


@dataclass(frozen=True)
class Server:
    """One server's results. Where one transport was run twice (two implementations), both must pass."""

    name: str
    results: Sequence[Result]

    def status(self, check: str, transport: str) -> str:
        """The worst status of a check over one transport; "" if it does not apply."""
        found = {r.status for r in self.results if (r.check, r.transport) == (check, transport)}
        return next((status for status in (FAIL, ABSENT, PASS) if status in found), "")

    def counts(self, level: str, transport: str) -> tuple[int, int, int]:
        """How many checks of a level passed, failed, and are of extensions that the server does not announce."""
        found = [self.status(each.id, transport) for each in CHECKS.values() if each.level == level]
        return found.count(PASS), found.count(FAIL), found.count(ABSENT)


def write_page(servers: Sequence[Server]) -> str:
    """The page: a summary, every check, and what the failures were."""
    return "\n".join([*_head(), *_summary(servers), "", *_checks(servers), "", *_reasons(servers), ""])


def _head() -> list[str]:
    return [HEAD.format(count=len(CHECKS))]


def _summary(servers: Sequence[Server]) -> list[str]:
    lines = ["| passed | " + " | ".join(f"{s.name}, gRPC | {s.name}, REST" for s in servers) + " |"]
    lines.append("|---|" + "---|" * (2 * len(servers)))
    for level, title in LEVELS.items():
        cells = []
        for server in servers:
            for transport in (GRPC, REST):
                passed, failed, absent = server.counts(level, transport)
                cells.append(f"{passed} of {passed + failed + absent}" + (f" ({absent} not offered)" if absent else ""))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def _checks(servers: Sequence[Server]) -> list[str]:
    lines = ["## Every check", ""]
    titles = [f"{s.name}, gRPC | REST" for s in servers]
    lines.append("| check | level | " + " | ".join(titles) + " |")
    lines.append("|---|---|" + "---|" * (2 * len(servers)))
    for each in CHECKS.values():
        marks = [MARKS[server.status(each.id, over)] for server in servers for over in (GRPC, REST)]
        lines.append(f"| `{each.id}` {_text(each)} | {LEVELS[each.level]} | " + " | ".join(marks) + " |")
    return lines


def _reasons(servers: Sequence[Server]) -> list[str]:
    lines = ["## What failed", ""]
    for server in servers:
        failed = [result for result in server.results if result.status == FAIL]
        lines += [f"### {server.name}", ""]
        lines += [f"- `{r.check}` ({r.transport}): {_escape(r.detail)}" for r in failed] or ["- nothing"]
        lines.append("")
    return lines


def _text(check: Check) -> str:
    return _escape(check.text)


def _escape(text: str) -> str:
    return text[:200].replace("|", "\\|").replace("<", "&lt;").replace("_", "\\_").replace("*", "\\*")
