// The mean of each station's hours of rain, some of which are missing: node mean.mjs [http://localhost:8000]
const base = process.argv[2] ?? "http://localhost:8000";

// safetensors: the length of the header (8 bytes, little-endian), the header, the cells one after the other
function write(tensors) {
  const header = {};
  let at = 0;
  for (const [name, { dtype, shape, cells }] of Object.entries(tensors)) {
    header[name] = { dtype, shape, data_offsets: [at, (at += cells.byteLength)] };
  }
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  const bytes = Object.values(tensors).map(({ cells }) => Buffer.from(cells.buffer, cells.byteOffset, cells.byteLength));
  return Buffer.concat([length, text, ...bytes]);
}

function read(payload) {
  const start = 8 + Number(payload.readBigUInt64LE(0));
  const { __metadata__, ...header } = JSON.parse(payload.subarray(8, start));
  const kinds = { F32: Float32Array, F64: Float64Array, I32: Int32Array, I64: BigInt64Array, BOOL: Uint8Array };
  return Object.fromEntries(
    Object.entries(header).map(([name, { dtype, shape, data_offsets: [from, to] }]) => {
      const copy = Uint8Array.from(payload.subarray(start + from, start + to)); // starts where any type may
      return [name, { dtype, shape, cells: new kinds[dtype](copy.buffer) }];
    }),
  );
}

async function ask(query, body) {
  const response = await fetch(`${base}/v1/reduce?${query}`, { method: "POST", body, signal: AbortSignal.timeout(30_000) });
  if (response.ok) return read(Buffer.from(await response.arrayBuffer()));
  const problem = await response.json(); // `code` is stable, `detail` is for people
  throw Object.assign(new Error(problem.detail), problem);
}

const rain = Float32Array.of(0.5, 1.5, 0, 4, 2, 0, 0, 0, 0, 0, 0, 0); // what lies under a mask does not matter
const valid = Uint8Array.of(1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0);
const question = write({
  rain: { dtype: "F32", shape: [3, 4], cells: rain },
  "rain.mask": { dtype: "BOOL", shape: [3, 4], cells: valid },
});

const answer = await ask("op=mean&dim=1", question);
answer.rain.cells.forEach((mean, i) => {
  console.log(`station ${i + 1}: ${answer["rain.mask"].cells[i] ? mean : "no data"}`);
});

await ask("op=maen&dim=1", question).catch((problem) => console.log(`refused: ${problem.code}`));
