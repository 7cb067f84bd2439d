#!/bin/sh
# A request that is answered later, by a service with jobs: sh job.sh [http://localhost:8000]
set -eu
base=${1:-http://localhost:8000}
base=${base%/}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# who loses the answer sends the same again: the same key is the same job
curl -sS -f -D "$work/headers" -o /dev/null \
  -H 'Prefer: respond-async' -H "Idempotency-Key: rain of $(date +%F) $$" -H 'Content-Type: application/json' \
  -d '{"rain": [[0.5, 1.5, null, 4.0], [2.0, null, null, 0.0]]}' "$base/v1/reduce?op=mean&dim=1"
job=$(sed -n 's/^location: *\([^ ]*\).*/\1/Ip' "$work/headers" | tr -d '\r')

status=queued
while [ "$status" = queued ] || [ "$status" = running ]; do
  curl -sS -f "$base$job?wait=30" -o "$work/job"
  status=$(sed -E 's/.*"status": *"([a-z]*)".*/\1/' "$work/job")
done
echo "job: $status"
curl -sS -f "$base$job/result"
curl -sS -f -X DELETE "$base$job"
