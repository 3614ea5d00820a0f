#!/usr/bin/env bash
# Runs a launcher again after a preemption, not after a bug. The two are told apart by the status
# file that train keeps in its workdir.
#
# launch/retry.sh [--dry-run] COMMAND ... --workdir DIR ...
#
# such as: launch/retry.sh launch/local.sh 2 --config configs/toy/edm.py --workdir runs/edm
#
# Again:     the file says "retry": true (training, interrupted, peer_lost, stalled, unsaved).
# Not again: it says false (failed, diverged), the code is 2 (a mistake in what was given), or the
#            attempt has not touched the file (a bug before the start), unless it was killed
#            by SIGKILL or SIGTERM before it could. Finished is code 0.
# SIGTERM and SIGINT are passed on to the command, which is then not tried again.
#
# Environment:
#   RETRY_SECONDS (10)  pause before the second attempt; it grows by as much with each, up to 600
#   RETRY_LIMIT (20)    attempts in all
#   RETRY_STUCK (3)     attempts in a row that may end without the step getting further
#   RETRY_STATUS        the status file, where the command has no --workdir
#   RETRY_INTERRUPTED   a command to run in place of another attempt when the state is interrupted,
#                       such as the scheduler's own way to queue the job again
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

DRY_RUN=''
case ${1:-} in
  -h | --help) usage && exit 0 ;;
  --dry-run) DRY_RUN=yes && shift ;;
esac
(($#)) || die "give a command; see $0 --help"

seconds=${RETRY_SECONDS:-10} limit=${RETRY_LIMIT:-20} most_stuck=${RETRY_STUCK:-3}
for value in "$seconds" "$limit" "$most_stuck"; do
  [[ $value =~ ^[0-9]+$ ]] || die "'$value' is not a number; see RETRY_SECONDS, RETRY_LIMIT, RETRY_STUCK"
done

status=${RETRY_STATUS:-}
arguments=("$@")
for ((i = 0; i < $#; i++)); do
  case ${arguments[i]} in
    --workdir) status=${status:-${arguments[i + 1]:-}/status.json} ;;
    --workdir=*) status=${status:-${arguments[i]#*=}/status.json} ;;
  esac
done
[[ $status ]] || die 'give the command a --workdir, or set RETRY_STATUS to the status file'

if [[ $DRY_RUN ]]; then
  echo "# Until $status says that there is nothing to retry, at most $limit times:"
  quote "$@"
  exit
fi

# Changes with every write: the file holds the time and the process.
fingerprint() { cksum 2>/dev/null <"$status" || echo none; }

# "STATE RETRY STEP" of the status file, or nothing.
read_status() {
  "$PYTHON" - "$status" 2>/dev/null <<'PYTHON' || true
import json, sys
values = json.load(open(sys.argv[1]))
print(values['state'], str(values['retry']).lower(), int(values['step']))
PYTHON
}

child='' stopped=''
# shellcheck disable=SC2329  # called by trap
stop() {
  stopped=$1
  if [[ $child ]]; then kill -s "$1" "$child" 2>/dev/null || true; fi
}
trap 'stop TERM' TERM
trap 'stop INT' INT
# The command's own group: Ctrl-C reaches this script alone, which passes it on once.
set -m

# Runs a command to its end, whatever signals come meanwhile; fills `code`.
to_the_end() {
  "$@" &
  child=$!
  while :; do
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  # The wait that a signal cut short may have been the last.
  if [[ $stopped ]]; then
    local last=0
    wait "$child" 2>/dev/null || last=$?
    if ((last != 127)); then code=$last; fi
  fi
  child=''
}

code=0 stuck=0
read -r _ _ step <<<"$(read_status)" || true
step=${step:-0}
for ((attempt = 1; ; attempt++)); do
  before=$(fingerprint)
  to_the_end "$@"
  seen="attempt $attempt left with code $code"
  read -r state retry now <<<"$(read_status)" || true
  if [[ $stopped ]]; then
    say "$seen after SIG$stopped; not again"
    exit "$code"
  elif ((code == 0)); then
    say "$seen; done"
    exit 0
  elif ((code == 2)); then
    say "$seen: a mistake in what was given; not again"
    exit 2
  elif [[ $(fingerprint) == "$before" ]] && ((code != 137 && code != 143)); then
    say "$seen and has not touched $status: a bug before the start; not again"
    exit "$code"
  elif [[ ! ${state:-} && -e $status ]]; then
    say "$seen; $status cannot be read; not again"
    exit "$code"
  elif [[ ! ${state:-} ]]; then  # Killed before it could write one.
    state=nothing retry=true now=0
  elif [[ $(fingerprint) == "$before" ]]; then  # What it says is of the attempt before.
    retry=true
  fi
  seen+=", $state at step $now"
  if [[ $state == finished ]]; then
    say "$seen; done"
    exit 0
  elif [[ $retry != true ]]; then
    say "$seen; not again: another attempt would end the same way"
    exit "$code"
  elif [[ $state == interrupted && ${RETRY_INTERRUPTED:-} ]]; then
    say "$seen; in place of another attempt: $RETRY_INTERRUPTED"
    bash -c "$RETRY_INTERRUPTED"
    exit "$code"
  fi
  if ((now > step)); then stuck=0; else stuck=$((stuck + 1)); fi
  step=$now
  if ((stuck >= most_stuck)); then
    say "$seen; not again: $stuck attempts have not got beyond that step"
    exit "$code"
  elif ((attempt >= limit)); then
    say "$seen; not again: that was the last of $limit attempts"
    exit "$code"
  fi
  pause=$((seconds * attempt < 600 ? seconds * attempt : 600))
  say "$seen; again in $pause s"
  last=$code
  to_the_end sleep "$pause"
  if [[ $stopped ]]; then
    say "SIG$stopped while waiting; not again"
    exit "$last"
  fi
done
