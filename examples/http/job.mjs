// A request that is answered later, by a service with jobs: node job.mjs [http://localhost:8000]
// Where the service has keys: MASKSERVE_KEY=... node job.mjs
import { setTimeout as sleep } from 'node:timers/promises';

const base = (process.argv[2] ?? 'http://localhost:8000').replace(/\/$/, '');
const secret = process.env.MASKSERVE_KEY;

// A service that starts, ends or is busy is asked again, with the same words, after its Retry-After.
async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(secret && { Authorization: `Bearer ${secret}` }) };
  for (let tries = 1; ; tries++) {
    const response = await fetch(base + path, { ...options, headers }).catch((error) => {
      if (tries > 5) stop(`${base}: ${error.cause?.message ?? error.message}`); // no connection, or the answer was lost
    });
    if (response?.ok) return response;
    if (response && (response.status !== 503 || tries > 5)) await refuse(response);
    await sleep(1000 * Number(response?.headers.get('Retry-After') ?? 2 ** (tries - 1)));
  }
}

async function refuse(response) {
  const isProblem = response.headers.get('Content-Type') === 'application/problem+json';
  stop(`refused: ${isProblem ? (await response.json()).detail : response.status}`); // a proxy's refusal is no problem
}

function stop(why) {
  console.error(why);
  process.exit(1);
}

const taken = await ask('/v1/reduce?op=mean&dim=1', {
  method: 'POST',
  headers: {
    'Prefer': 'respond-async',
    'Idempotency-Key': crypto.randomUUID(), // made once, sent with each try: the same key is the same job
    'Content-Type': 'application/json',
  },
  body: JSON.stringify({ rain: [[0.5, 1.5, null, 4.0], [2.0, null, null, 0.0]] }),
});
if (taken.status !== 202) stop('this service takes no jobs: start it with --jobs');
const { links } = await taken.json();

let job;
do {
  job = await (await ask(`${links.self}?wait=30`)).json();
} while (!job.ended);
console.log(`job: ${job.status}`);
console.log((await (await ask(links.result)).text()).trim());
await ask(links.self, { method: 'DELETE' });
