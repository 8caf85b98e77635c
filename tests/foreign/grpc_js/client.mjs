// Calls a nearcast server as any application on Node.js would, and prints what came back as JSON for the test to judge.
// Arguments: address, file with the FileDescriptorSet that the server's reflection gave, file with its authority or "".
import { readFileSync } from "node:fs";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [address, descriptors, ca] = process.argv.slice(2);
const loaded = protoLoader.loadFileDescriptorSetFromBuffer(readFileSync(descriptors), { keepCase: true, longs: Number });
const { inference } = grpc.loadPackageDefinition(loaded);
const credentials = ca ? grpc.credentials.createSsl(readFileSync(ca)) : grpc.credentials.createInsecure();
const options = { "grpc.ssl_target_name_override": "localhost" };
const client = new inference.GRPCInferenceService(address, credentials, options);
const gzip = new inference.GRPCInferenceService(address, credentials, { ...options, "grpc.default_compression_algorithm": 2 });
const raw = new grpc.Client(address, credentials, options);
const same = (value) => value;
const printed = {};

const floats = (...values) => Buffer.from(new Float32Array(values).buffer);
const read = (buffer) => Array.from(new Float32Array(new Uint8Array(buffer).buffer));
const add = (id, model = "add") => ({
  model_name: model,
  id,
  inputs: ["a", "b"].map((name) => ({ name, datatype: "FP32", shape: [1, 2] })),
  raw_input_contents: [floats(1, 2), floats(0.5, 4)],
});
const failed = (error) => ({ code: error.code, details: error.details, said: error.metadata?.get("nc-code")[0] });

function unary(stub, request, callOptions = {}) {
  const metadata = new grpc.Metadata();
  metadata.set("nc-priority", "3");
  metadata.set("blob-bin", Buffer.from([0, 255, 10]));
  return new Promise((resolve) => {
    let status;
    const call = stub.ModelInfer(request, metadata, callOptions, (error, answer) => {
      setImmediate(() => resolve(error ? failed(error) : { sum: read(answer.raw_output_contents[0]), id: answer.id, by: status?.metadata.get("nc-served-by")[0] }));
    });
    call.on("status", (value) => (status = value));
    if (callOptions.cancelAfterMs) setTimeout(() => call.cancel(), callOptions.cancelAfterMs);
  });
}

function streamInfer(requests) {
  const call = client.ModelStreamInfer();
  const heard = [];
  return new Promise((resolve, reject) => {
    call.on("data", (answer) => {
      heard.push(answer.error_message || [answer.infer_response.id, ...read(answer.infer_response.raw_output_contents[0])]);
      // Ping-pong: the next request goes out when the answer to the one before is here.
      if (heard.length < requests.length) call.write(requests[heard.length]);
      else call.end();
    });
    call.on("error", reject);
    call.on("end", () => resolve(heard));
    call.write(requests[0]);
  });
}

const collected = (call) =>
  new Promise((resolve) => {
    const heard = [];
    call.on("data", (data) => heard.push(data.toString()));
    call.on("error", (error) => resolve({ heard: heard.length, ...failed(error) }));
    call.on("end", () => resolve(heard));
  });

const clientStream = (path, messages) =>
  new Promise((resolve, reject) => {
    const call = raw.makeClientStreamRequest(path, same, same, (error, answer) => (error ? reject(error) : resolve(answer.toString())));
    for (const message of messages) call.write(Buffer.from(message));
    call.end();
  });

printed.unary = await unary(client, add("u1"));
printed.gzip = await unary(gzip, { ...add("u2"), id: "z".repeat(4000) });
printed.error = await unary(client, add("u3", "größer als 100 %"));
printed.stream = await streamInfer([add("1"), add("2", "none"), add("3")]);
printed.serverStream = await collected(raw.makeServerStreamRequest("/t.T/count", same, same, Buffer.from("200")));
printed.clientStream = await clientStream("/t.T/collect", ["a", "", "c"]);
printed.deadline = await unary(client, add("u4", "slow"), { deadline: Date.now() + 150 });
printed.cancelled = await unary(client, add("u5", "slow"), { cancelAfterMs: 100 });
const endless = raw.makeServerStreamRequest("/t.T/count", same, same, Buffer.from("100000000"));
endless.once("data", () => endless.cancel());
printed.cancelledStream = await collected(endless);
printed.many = (await Promise.all(Array.from({ length: 100 }, (_, index) => unary(client, add(`m${index}`))))).filter(
  (answer, index) => answer.id === `m${index}`,
).length;
for (const stub of [client, gzip, raw]) stub.close();
console.log(JSON.stringify(printed));
