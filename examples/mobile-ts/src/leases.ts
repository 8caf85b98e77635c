// Leases: asked for, renewed in the background, kept when the router is away (rules 1, 2, 11).
import grpc from "@grpc/grpc-js";
import type { Lease, RoutingStub, Wire } from "./wire.js";

const ASK_TIMEOUT_MS = 1000;
const RETRY_MS = 100;
const RETRY_MAX_MS = 5000;
const IDLE_MS = 30_000;
const PASSING = new Set([grpc.status.UNAVAILABLE, grpc.status.DEADLINE_EXCEEDED, grpc.status.RESOURCE_EXHAUSTED, grpc.status.INTERNAL]);

class Held {
  lease: Lease | undefined;
  failures = 0;
  usedAt = performance.now();
  timer: NodeJS.Timeout | undefined;
  readonly first: Promise<void>;
  settle!: () => void;

  constructor(readonly question: { model: string; size_bytes: number; deadline_ms: number }) {
    this.first = new Promise((resolve) => (this.settle = resolve));
  }
}

export class Leases {
  granted = 0;
  private readonly router: RoutingStub;
  private readonly held = new Map<string, Held>();

  constructor(wire: Wire, address: string) {
    this.router = wire.routing(address);
  }

  /** The lease of a model; undefined while there is none: the router itself then gets the request. */
  async get(model: string, sizeBytes: number, deadlineMs: number): Promise<Lease | undefined> {
    let held = this.held.get(model);
    if (held === undefined) {
      held = new Held({ model, size_bytes: sizeBytes, deadline_ms: Math.floor(deadlineMs) });
      this.held.set(model, held);
      void this.renew(held);
    } else if (held.timer === undefined && performance.now() - held.usedAt > IDLE_MS) {
      void this.renew(held);
    }
    held.usedAt = performance.now();
    if (held.lease === undefined) await Promise.race([held.first, pause(deadlineMs / 2)]);
    return held.lease;
  }

  close(): void {
    for (const held of this.held.values()) clearTimeout(held.timer);
    this.router.close();
  }

  private async renew(held: Held): Promise<void> {
    const began = performance.now();
    let nextMs: number;
    try {
      const lease = await this.ask(held);
      // `unchanged` leaves all but the id and the times as they were.
      if (!lease.unchanged) held.lease = lease;
      held.failures = 0;
      this.granted += 1;
      nextMs = lease.refresh_after_ms * (0.9 + 0.2 * Math.random()) - (performance.now() - began);
    } catch (problem) {
      const error = problem as grpc.ServiceError;
      nextMs = Math.min(RETRY_MAX_MS, RETRY_MS * 2 ** held.failures) * (0.5 + 0.5 * Math.random());
      held.failures += 1;
      if (!PASSING.has(error.code)) {
        // No leases here, or none for us: everything goes through the router.
        held.lease = undefined;
        nextMs = RETRY_MAX_MS;
      }
    }
    held.settle();
    const isIdle = performance.now() - held.usedAt > IDLE_MS;
    held.timer = isIdle ? undefined : setTimeout(() => void this.renew(held), Math.max(0, nextMs)).unref();
  }

  private ask(held: Held): Promise<Lease> {
    const { lease_id = "", etag = "" } = held.lease ?? {};
    return new Promise((resolve, reject) => {
      this.router.Lease({ ...held.question, lease_id, etag }, { deadline: Date.now() + ASK_TIMEOUT_MS }, (error, lease) =>
        error ? reject(error) : resolve(lease!),
      );
    });
  }
}

export function pause(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, Math.max(0, ms)));
}
