#!/bin/sh
# A request that is answered later, by a service with jobs: sh job.sh [http://localhost:8000]
# Where the service has keys: MASKSERVE_KEY=... sh job.sh
set -eu
base=${1:-http://localhost:8000}
base=${base%/}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# in a file, since every user of a machine may read the words of a command
printf '%s' "${MASKSERVE_KEY:+Authorization: Bearer $MASKSERVE_KEY}" > "$work/key"

# The body of an answer in $work/body, and its status; a refusal says why, and ends this.
# A service that starts, ends or is busy is asked again, with the same words, after its Retry-After.
ask() {
  curl -sS --fail-with-body --retry 5 --retry-connrefused -H "@$work/key" -D "$work/headers" -o "$work/body" \
    -w '%{http_code}' "$@" > "$work/status" || {
    code=$?
    # 22: there is an answer, though none to go on with
    [ "$code" != 22 ] || echo "refused: $(sed -E 's/.*"detail": *"(([^"\\]|\\.)*)".*/\1/' "$work/body")" >&2
    exit "$code"
  }
}

# made once, before the first try: the same key is the same job, however often it is sent
key="rain of $(date +%F) $$"
ask -H 'Prefer: respond-async' -H "Idempotency-Key: $key" -H 'Content-Type: application/json' \
  -d '{"rain": [[0.5, 1.5, null, 4.0], [2.0, null, null, 0.0]]}' "$base/v1/reduce?op=mean&dim=1"
if [ "$(cat "$work/status")" != 202 ]; then
  echo 'this service takes no jobs: start it with --jobs' >&2
  exit 1
fi
job=$(sed -n 's/^location: *\([^ ]*\).*/\1/Ip' "$work/headers" | tr -d '\r' | tail -n 1)

status=queued
while [ "$status" = queued ] || [ "$status" = running ]; do
  ask "$base$job?wait=30"
  status=$(sed -E 's/.*"status": *"([a-z]*)".*/\1/' "$work/body")
done
echo "job: $status"
ask "$base$job/result"
cat "$work/body"
ask -X DELETE "$base$job"
