// The targets of all leases, what we know of each ourselves, and which one a request goes to (rules 3, 4, 8).
import type { InferenceStub, Lease, LeaseTarget, Wire } from "./wire.js";

const LOST_MS = 250;
const LOST_MAX_MS = 5000;
const PUSHBACK_MAX_MS = 1000;
const OVERDUE_MAX = 3;
const OVERDUE_MS = 50;
const TARGETS_MAX = 128;

export class Target {
  mine = 0;
  /** Ends the calls that are out, each as if its connection had broken. */
  readonly giveUps = new Set<() => void>();
  private overdue = 0;
  private overdueSince = 0;
  private rttMs: number | undefined;
  private lostMs = LOST_MS;
  private awayUntil = 0;
  private isTrying = false;

  constructor(readonly address: string, readonly stub: InferenceStub, public said: LeaseTarget | undefined) {}

  get name(): string {
    return this.said?.name ?? this.address;
  }

  /** Whether a request may go there; after a loss one at a time tries. */
  isOpen(now: number): boolean {
    return now >= this.awayUntil && !(this.isTrying && this.mine > 0);
  }

  answered(rttMs: number): void {
    this.rttMs = this.rttMs === undefined ? rttMs : this.rttMs + 0.2 * (rttMs - this.rttMs);
    this.lostMs = LOST_MS;
    this.isTrying = false;
    this.overdue = 0;
  }

  /** A call has outlasted its hedge delay: perhaps the node hangs. */
  outlasted(now: number): void {
    if (this.overdue === 0) this.overdueSince = now;
    this.overdue += 1;
    const isLost = this.isTrying || (this.overdue >= OVERDUE_MAX && now - this.overdueSince >= OVERDUE_MS);
    if (!isLost) return;
    this.overdue = 0;
    this.lost(now);
    for (const giveUp of [...this.giveUps]) giveUp();
  }

  lost(now: number): void {
    if (now < this.awayUntil) return;
    this.awayUntil = now + this.lostMs;
    this.lostMs = Math.min(2 * this.lostMs, LOST_MAX_MS);
    this.isTrying = true;
  }

  pushBack(now: number, ms: number): void {
    this.awayUntil = Math.max(this.awayUntil, now + Math.min(ms, PUSHBACK_MAX_MS));
  }

  /** When half, and 19 of 20, of the answers to a request of this size would be here, sent now. */
  times(sizeBytes: number, lease: Lease): [number, number] {
    const said = this.said!;
    const extra = said.bytes_per_ms > 0 ? Math.max(0, sizeBytes - lease.size_bytes) / said.bytes_per_ms : 0;
    const queue = Math.max(0, said.load + this.mine + 1 - said.slots);
    const wait = (queue * (said.t50_ms - said.rtt_ms)) / said.slots;
    const own = (this.rttMs ?? said.rtt_ms) - said.rtt_ms + extra + wait;
    return [said.t50_ms + own, said.t95_ms + own];
  }
}

export class Targets {
  readonly front: Target;
  private readonly known = new Map<string, Target>();

  constructor(private readonly wire: Wire, private readonly routerAddress: string) {
    this.front = new Target(routerAddress, wire.inference(routerAddress), undefined);
  }

  /** The lease's targets that we may call, in its order. */
  of(lease: Lease): Target[] {
    const found: Target[] = [];
    for (const said of lease.targets) {
      const address = said.address || this.routerAddress;
      if (said.address && said.tls !== this.wire.isSecured) continue;
      let target = this.known.get(address);
      if (target !== undefined) {
        target.said = said;
        this.known.delete(address); // and in again: the map is ordered by last use
      } else {
        target = new Target(address, this.wire.inference(address, said.server_name || undefined), said);
      }
      this.known.set(address, target);
      found.push(target);
    }
    for (const target of this.known.values()) {
      if (this.known.size <= TARGETS_MAX) break;
      if (target.mine === 0) this.drop(target);
    }
    return found;
  }

  close(): void {
    for (const target of [this.front, ...this.known.values()]) target.stub.close();
  }

  private drop(target: Target): void {
    this.known.delete(target.address);
    target.stub.close();
  }
}

/** Where a request goes; undefined = nowhere in time. `mustFit`: at the 95th percentile, as for a copy. */
export function choose(candidates: Target[], lease: Lease, sizeBytes: number, remainingMs: number, mustFit = false): Target | undefined {
  const limit = remainingMs - lease.reserve_ms;
  const judged = candidates.map((target) => ({ target, times: target.times(sizeBytes, lease) }));
  const feasible = judged.find(({ times }) => times[1] <= limit);
  if (feasible !== undefined || mustFit) return feasible?.target;
  const late = judged.filter(({ times }) => times[0] <= limit).sort((a, b) => a.times[0] - b.times[0]);
  return late[0]?.target;
}
