// Sends requests at a steady pace and prints, as JSON lines, who answers; the last line counts everything.
// Arguments: router's address, folder of the .proto files, how many, milliseconds between two, authority file or nothing.
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { MeshClient } from "./client.js";
import { pause } from "./leases.js";
import { Wire } from "./wire.js";

const [router = "127.0.0.1:8001", protos = "proto", count = "100", paceMs = "10", authority] = process.argv.slice(2);
const example = join(dirname(fileURLToPath(import.meta.url)), "..");
const client = new MeshClient(new Wire([protos, example], authority), router);
const served: Record<string, number> = {};
const failures: string[] = [];
let answered = 0;

async function ask(number: number): Promise<void> {
  const request = {
    model_name: "digits",
    inputs: [{ name: "x", datatype: "FP32", shape: [1] }],
    raw_input_contents: [Buffer.from(new Float32Array([number]).buffer)],
  };
  try {
    const { response, servedBy } = await client.infer(request, { deadlineMs: 3000 });
    const raw = response.raw_output_contents[0]!;
    const doubled = raw.readFloatLE(0);
    if (doubled !== 2 * number) throw new Error(`${number} doubled is not ${doubled}`);
    answered += 1;
    served[servedBy] = (served[servedBy] ?? 0) + 1;
    if (answered % 25 === 0) console.log(JSON.stringify({ answered, servedBy }));
  } catch (error) {
    failures.push(String(error));
  }
}

const asked: Promise<void>[] = [];
for (let number = 0; number < Number(count); number += 1) {
  asked.push(ask(number));
  await pause(Number(paceMs));
}
await Promise.all(asked);
console.log(JSON.stringify({ asked: asked.length, answered, failures, served, leases: client.leasesGranted, ...client.counts }));
client.close();
