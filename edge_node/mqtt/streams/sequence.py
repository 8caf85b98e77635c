"""Whether a message of a stream came before, and how many went missing in front of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Position:
    """The last message taken of a stream: the device's boot, and its number within that boot."""

    boot: str
    seq: int


@dataclass(frozen=True, slots=True)
class Judgement:
    """`lost`: how many numbers the device used that never arrived."""

    is_duplicate: bool = False
    lost: int = 0


def judge(last: Position | None, boot: str, seq: int | None) -> Judgement:
    """Judge the next message of a stream by the last one.

    A device numbers from 1 within each of its boots. What an unknown stream has sent before is not known, so nothing
    of it counts as lost. Without a boot or a number a message is taken as it comes.
    """
    if not boot or seq is None or last is None:
        return Judgement()
    if boot != last.boot:
        return Judgement(lost=max(0, seq - 1))
    if seq <= last.seq:
        return Judgement(is_duplicate=True)
    return Judgement(lost=seq - last.seq - 1)
