// A request that is answered later, by a service with jobs: node job.mjs [http://localhost:8000]
const base = (process.argv[2] ?? 'http://localhost:8000').replace(/\/$/, '');

async function ask(path, options = {}) {
  const response = await fetch(base + path, options);
  if (!response.ok) throw new Error((await response.json()).detail);
  return response;
}

const taken = await ask('/v1/reduce?op=mean&dim=1', {
  method: 'POST',
  headers: {
    'Prefer': 'respond-async',
    'Idempotency-Key': crypto.randomUUID(), // kept, and sent again where the answer was lost
    'Content-Type': 'application/json',
  },
  body: JSON.stringify({ rain: [[0.5, 1.5, null, 4.0], [2.0, null, null, 0.0]] }),
});
const { links } = await taken.json();

let job;
do {
  job = await (await ask(`${links.self}?wait=30`)).json();
} while (!job.ended);
console.log(`job: ${job.status}`);
console.log((await (await ask(links.result)).text()).trim());
await ask(links.self, { method: 'DELETE' });
