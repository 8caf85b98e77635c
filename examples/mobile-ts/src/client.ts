// One request: the first send, its copy, its retries (rules 5, 6, 7, 9, 10).
import grpc from "@grpc/grpc-js";
import { Leases, pause } from "./leases.js";
import { choose, Target, Targets } from "./targets.js";
import type { InferRequest, InferResponse, Lease, Wire } from "./wire.js";

const SEQUENCES_MAX = 10_000;
const SLOW_SHARE_MAX = 0.2;
const SLOW_WEIGHT = 0.03;
const FREE = new Set(["MODEL_NOT_FOUND", "VERSION_MISMATCH"]);
const COSTS_A_TOKEN = new Set(["OVERLOADED", "UNAVAILABLE", "INTERNAL"]);
const NAMES: Record<number, string> = { 5: "MODEL_NOT_FOUND", 9: "VERSION_MISMATCH", 8: "OVERLOADED", 14: "UNAVAILABLE", 13: "INTERNAL" };

class Tokens {
  private left: number | undefined;
  private at = performance.now();

  earn(share: number, burst: number): void {
    this.left = Math.min(burst, (this.left ?? burst) + share);
  }

  spend(burst: number, perS = 0): boolean {
    const now = performance.now();
    this.left = Math.min(burst, (this.left ?? burst) + (perS * (now - this.at)) / 1000);
    this.at = now;
    if (this.left < 1) return false;
    this.left -= 1;
    return true;
  }
}

export interface Answer {
  response: InferResponse;
  servedBy: string;
}

interface Ended {
  target: Target;
  answer?: Answer;
  error?: grpc.ServiceError;
  code: string;
  wasSent: boolean;
  retryAfterMs: number | undefined;
}

interface Send {
  ended: Promise<Ended>;
  cancel: () => void;
}

export interface Options {
  deadlineMs: number;
  mayRunTwice?: boolean;
}

export class MeshClient {
  readonly counts = { hedges: 0, retries: 0, routed: 0 };
  private readonly leases: Leases;
  private readonly targets: Targets;
  private readonly hedgeTokens = new Tokens();
  private readonly retryTokens = new Tokens();
  private readonly sequences = new Map<string, Target>();
  private slowShare = 0;

  constructor(wire: Wire, routerAddress: string) {
    this.leases = new Leases(wire, routerAddress);
    this.targets = new Targets(wire, routerAddress);
  }

  get leasesGranted(): number {
    return this.leases.granted;
  }

  close(): void {
    this.leases.close();
    this.targets.close();
  }

  async infer(request: InferRequest, { deadlineMs, mayRunTwice = true }: Options): Promise<Answer> {
    const endsAt = performance.now() + deadlineMs;
    const sizeBytes = request.raw_input_contents.reduce((sum, raw) => sum + raw.length, 128);
    const lease = await this.leases.get(request.model_name, sizeBytes, deadlineMs);
    const left = () => endsAt - performance.now();
    if (lease === undefined || lease.targets.length === 0) {
      this.counts.routed += 1;
      return this.unwrap(await this.send(this.targets.front, request, left()).ended);
    }
    this.hedgeTokens.earn(lease.hedge_share, lease.hedge_burst);
    this.retryTokens.earn(lease.retry_share, lease.retry_burst);
    const sequence = lease.stateful ? request.parameters?.sequence_id?.string_param : undefined;
    if (sequence !== undefined) return this.inferInSequence(sequence, request, lease, sizeBytes, left());
    const tried: Target[] = [];
    for (;;) {
      const target = this.next(lease, tried, sizeBytes, left());
      const ended = await this.race(target, request, lease, tried, sizeBytes, left, mayRunTwice && !lease.stateful);
      if (ended.answer !== undefined) return ended.answer;
      if (!this.mayRetry(ended, lease, tried.length, left(), mayRunTwice)) return this.unwrap(ended);
      this.counts.retries += 1;
      // Away from a lost connection at once; else not all at the same moment.
      if (ended.code !== "UNAVAILABLE" || tried.length > 1) await pause(Math.min(Math.random() * 10 * 2 ** (tried.length - 1), left() / 4));
    }
  }

  /** All of one sequence to one target, never twice. */
  private async inferInSequence(sequence: string, request: InferRequest, lease: Lease, sizeBytes: number, leftMs: number): Promise<Answer> {
    let target = this.sequences.get(sequence);
    if (target === undefined) {
      target = this.next(lease, [], sizeBytes, leftMs);
      if (this.sequences.size >= SEQUENCES_MAX) this.sequences.delete(this.sequences.keys().next().value!);
      this.sequences.set(sequence, target);
    }
    return this.unwrap(await this.send(target, request, leftMs).ended);
  }

  private open(lease: Lease, tried: Target[]): Target[] {
    const now = performance.now();
    return this.targets.of(lease).filter((target) => target.isOpen(now) && !tried.includes(target));
  }

  private next(lease: Lease, tried: Target[], sizeBytes: number, leftMs: number): Target {
    const open = this.open(lease, tried);
    const chosen = choose(open, lease, sizeBytes, leftMs);
    if (chosen !== undefined) return chosen;
    if (open.length > 0) throw new Error("DEADLINE: no target can answer in time.");
    this.counts.routed += 1;
    return this.targets.front;
  }

  /** A send and perhaps its copy; the first answer wins and the other call is cancelled. */
  private async race(
    target: Target, request: InferRequest, lease: Lease, tried: Target[], sizeBytes: number, left: () => number, mayCopy: boolean,
  ): Promise<Ended> {
    tried.push(target);
    const first = this.send(target, request, left());
    if (!mayCopy || !(lease.hedge_after_ms > 0)) return first.ended;
    let timer: NodeJS.Timeout | undefined;
    const delay = new Promise<undefined>((resolve) => (timer = setTimeout(() => resolve(undefined), lease.hedge_after_ms)));
    const early = await Promise.race([first.ended, delay]);
    clearTimeout(timer);
    this.slowShare += SLOW_WEIGHT * ((early === undefined ? 1 : 0) - this.slowShare);
    if (early !== undefined) return early;
    target.outlasted(performance.now());
    const open = this.open(lease, tried);
    const away = open.filter((other) => other.said!.domain !== target.said?.domain);
    const other = choose(away.length > 0 ? away : open, lease, sizeBytes, left(), true);
    if (other === undefined || tried.length >= lease.attempts_max) return first.ended;
    if (this.slowShare > SLOW_SHARE_MAX || !this.hedgeTokens.spend(lease.hedge_burst)) return first.ended;
    this.counts.hedges += 1;
    tried.push(other);
    const copy = this.send(other, request, left());
    const winner = await Promise.race([first.ended, copy.ended]);
    const [loser, last] = winner.target === target ? [copy, copy.ended] : [first, first.ended];
    if (winner.answer === undefined) return last;
    loser.cancel();
    return winner;
  }

  private mayRetry(ended: Ended, lease: Lease, sends: number, leftMs: number, mayRunTwice: boolean): boolean {
    if (sends >= lease.attempts_max || leftMs <= 0 || (ended.retryAfterMs ?? 0) < 0) return false;
    if (FREE.has(ended.code) || !ended.wasSent) return true;
    if (!COSTS_A_TOKEN.has(ended.code) || lease.stateful || !mayRunTwice) return false;
    return this.retryTokens.spend(lease.retry_burst, lease.retry_per_s);
  }

  private send(target: Target, request: InferRequest, leftMs: number): Send {
    const began = performance.now();
    let answer: InferResponse | undefined;
    let error: grpc.ServiceError | null = null;
    target.mine += 1;
    const call = target.stub.ModelInfer(request, { deadline: Date.now() + Math.max(1, leftMs) }, (problem, response) => {
      error = problem;
      answer = response;
    });
    const ended = new Promise<Ended>((resolve) => {
      const giveUp = () => {
        resolve({ target, code: "UNAVAILABLE", wasSent: true, retryAfterMs: undefined });
        call.cancel();
      };
      target.giveUps.add(giveUp);
      call.on("status", (status: grpc.StatusObject) => {
        target.mine -= 1;
        target.giveUps.delete(giveUp);
        resolve(read(target, status, answer, error, performance.now() - began));
      });
    });
    return { ended, cancel: () => call.cancel() };
  }

  private unwrap(ended: Ended): Answer {
    if (ended.answer !== undefined) return ended.answer;
    throw ended.error ?? new Error(ended.code);
  }
}

/** What a call's end says, to us and about its target. */
function read(target: Target, status: grpc.StatusObject, response: InferResponse | undefined, error: grpc.ServiceError | null, tookMs: number): Ended {
  const said = (name: string) => status.metadata.get(name)[0]?.toString();
  const now = performance.now();
  const code = said("nc-code") ?? NAMES[status.code] ?? String(status.code);
  const wait = said("nc-retry-after-ms");
  const retryAfterMs = wait === undefined ? undefined : Number(wait);
  if (status.code === grpc.status.OK && response !== undefined) {
    const inside = (Number(said("nc-queue-us") ?? 0) + Number(said("nc-compute-us") ?? 0)) / 1000;
    target.answered(Math.max(0, tookMs - inside));
    return { target, answer: { response, servedBy: said("nc-served-by") ?? "" }, code: "", wasSent: true, retryAfterMs };
  }
  // A status without our code comes from the channel: the connection is refused, or lost under way.
  const isLost = status.code === grpc.status.UNAVAILABLE && said("nc-code") === undefined;
  if (isLost) target.lost(now);
  if (retryAfterMs !== undefined) target.pushBack(now, retryAfterMs);
  const wasSent = !(isLost && /No connection established|ECONNREFUSED|Name resolution/.test(status.details));
  return { target, error: error ?? undefined, code, wasSent, retryAfterMs };
}
