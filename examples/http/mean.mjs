// The mean of each station's hours of rain, some of which are missing: node mean.mjs [http://localhost:8000]
const base = (globalThis.process?.argv[2] ?? "http://localhost:8000").replace(/\/+$/, "");

// safetensors: the length of the header (8 bytes, little-endian), the header, the cells one after the other
function write(tensors) {
  const header = {};
  let at = 0;
  for (const [name, { dtype, shape, cells }] of Object.entries(tensors)) {
    header[name] = { dtype, shape, data_offsets: [at, (at += cells.byteLength)] };
  }
  const text = new TextEncoder().encode(JSON.stringify(header));
  const length = new DataView(new ArrayBuffer(8));
  length.setBigUint64(0, BigInt(text.length), true);
  return new Blob([length, text, ...Object.values(tensors).map(({ cells }) => cells)]);
}

const kinds = {
  F64: Float64Array, F32: Float32Array, F16: globalThis.Float16Array, BOOL: Uint8Array,
  I64: BigInt64Array, I32: Int32Array, I16: Int16Array, I8: Int8Array,
  U64: BigUint64Array, U32: Uint32Array, U16: Uint16Array, U8: Uint8Array,
};

function read(payload) {
  const start = 8 + Number(new DataView(payload).getBigUint64(0, true));
  const { __metadata__, ...header } = JSON.parse(new TextDecoder().decode(payload.slice(8, start)));
  return Object.fromEntries(
    Object.entries(header).map(([name, { dtype, shape, data_offsets: [from, to] }]) => {
      if (!kinds[dtype]) throw new Error(`${name} is ${dtype}, which no typed array here holds: ask for another dtype`);
      return [name, { dtype, shape, cells: new kinds[dtype](payload.slice(start + from, start + to)) }];
    }),
  );
}

async function ask(query, body) {
  const response = await fetch(`${base}/v1/reduce?${query}`, { method: "POST", body, signal: AbortSignal.timeout(30_000) });
  if (response.ok) return read(await response.arrayBuffer());
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

await ask("op=maen&dim=1", question).catch((problem) => console.log(`refused: ${problem.code}: ${problem.message}`));
