// What travels, loaded from the .proto files at run time.
import { readFileSync } from "node:fs";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

export interface LeaseTarget {
  name: string;
  domain: string;
  address: string;
  tls: boolean;
  server_name: string;
  t50_ms: number;
  t95_ms: number;
  rtt_ms: number;
  bytes_per_ms: number;
  load: number;
  slots: number;
}

export interface Lease {
  lease_id: string;
  etag: string;
  unchanged: boolean;
  ttl_ms: number;
  refresh_after_ms: number;
  targets: LeaseTarget[];
  stateful: boolean;
  size_bytes: number;
  reserve_ms: number;
  hedge_after_ms: number;
  hedge_share: number;
  hedge_burst: number;
  retry_share: number;
  retry_burst: number;
  retry_per_s: number;
  attempts_max: number;
}

export interface Tensor {
  name: string;
  datatype: string;
  shape: number[];
}

export interface InferRequest {
  model_name: string;
  id?: string;
  inputs: Tensor[];
  raw_input_contents: Buffer[];
  parameters?: Record<string, { string_param: string }>;
}

export interface InferResponse {
  model_version: string;
  outputs: Tensor[];
  raw_output_contents: Buffer[];
}

type Unary<Q, A> = (request: Q, options: grpc.CallOptions, callback: (error: grpc.ServiceError | null, answer?: A) => void) => grpc.ClientUnaryCall;

export type InferenceStub = grpc.Client & { ModelInfer: Unary<InferRequest, InferResponse> };
export type RoutingStub = grpc.Client & { Lease: Unary<object, Lease> };

/** Makes channels; one authority for all of them, or none. */
export class Wire {
  private readonly packages: any;
  private readonly authority: Buffer | undefined;

  constructor(protoFolders: string[], authorityFile?: string) {
    const options = { includeDirs: protoFolders, keepCase: true, longs: Number, defaults: true };
    this.packages = grpc.loadPackageDefinition(protoLoader.loadSync(["inference.proto", "nearcast/wire/v1/lease.proto"], options));
    this.authority = authorityFile ? readFileSync(authorityFile) : undefined;
  }

  get isSecured(): boolean {
    return this.authority !== undefined;
  }

  inference(address: string, serverName = "localhost"): InferenceStub {
    return this.make(this.packages.inference.GRPCInferenceService, address, serverName);
  }

  routing(address: string): RoutingStub {
    return this.make(this.packages.nearcast.wire.v1.Routing, address, "localhost");
  }

  private make(service: any, address: string, serverName: string): any {
    const credentials = this.authority ? grpc.credentials.createSsl(this.authority) : grpc.credentials.createInsecure();
    // Retries are ours to decide, and a lost target is ours to leave out: the channel itself tries again soon.
    return new service(address, credentials, {
      ...(this.authority ? { "grpc.ssl_target_name_override": serverName } : {}),
      "grpc.enable_retries": 0,
      "grpc.initial_reconnect_backoff_ms": 100,
      "grpc.max_reconnect_backoff_ms": 1000,
      "grpc.max_receive_message_length": -1,
    });
  }
}
