#!/usr/bin/env bash
# N processes on this machine, joined over loopback: as on a cluster, without one.
#
# launch/local.sh N --config FILE.py [--workdir DIR] [--platform (cpu|gpu)] [--port P]
#   [--grace SECONDS] [--run-id ID] [--dry-run] [--quiet] [KEY=VALUE ...]
#
# Each line of output begins with its process's number. SIGTERM and SIGINT (Ctrl-C) are passed on
# to all, once. When one fails, the others are told to leave and killed after --grace (60) seconds.
# The exit code is the first that is not 0. With --platform gpu each process takes one GPU.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1:-} in -h | --help) usage && exit 0 ;; esac
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || die "give the number of processes first; see $0 --help"
count=$1
shift
OPTION=([platform]=cpu [port]='' [grace]=60)
parse "$@"
need_number grace
if [[ ${OPTION[port]} ]]; then need_number port; fi
[[ ${OPTION[platform]} =~ ^(cpu|gpu)$ ]] || die "--platform is '${OPTION[platform]}'; give cpu or gpu"

port=${OPTION[port]}
if [[ ! $port && $DRY_RUN ]]; then
  echo '# PORT is a free port, found at the start.'
  port=PORT
elif [[ ! $port ]]; then
  port=$("$PYTHON" -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')
fi

# command_of INDEX: fills COMMAND.
command_of() {
  COMMAND=(env "COORDINATOR_ADDRESS=127.0.0.1:$port" "PROCESS_COUNT=$count" "PROCESS_INDEX=$1")
  if [[ ${OPTION[platform]} == gpu ]]; then COMMAND+=("CUDA_VISIBLE_DEVICES=$1"); fi
  COMMAND+=("RUN_ID=$RUN_ID" bash "$LAUNCH/train.sh" "${OPTION[platform]}" "${TRAIN[@]}")
}

if [[ $DRY_RUN ]]; then
  for ((i = 0; i < count; i++)); do
    command_of "$i"
    echo "$(quote "${COMMAND[@]}") &"
  done
  echo "# Each of them does:"
  bash "$LAUNCH/train.sh" "${OPTION[platform]}" "${TRAIN[@]}" --dry-run
  exit
fi

children=() printers=() told='' interrupted=''
# The children's own groups: Ctrl-C reaches this script alone, which passes it on once. A second
# signal would make train leave without saving.
set -m

# shellcheck disable=SC2329  # called by trap
pass_on() {
  interrupted=yes
  if [[ ! $told ]]; then
    told=yes
    say "passing SIG$1 on to all"
    kill -s "$1" "${children[@]}" 2>/dev/null || true
  fi
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

for ((i = 0; i < count; i++)); do
  exec {out}> >(trap '' INT TERM && exec sed -u "s/^/[$i] /")
  printers+=("$!")
  command_of "$i"
  "${COMMAND[@]}" >&"$out" 2>&1 </dev/null &
  children+=("$!")
  exec {out}>&-
done

first=0 alive=("${children[@]}") killer=''
while ((${#alive[@]})); do
  interrupted='' code=0
  wait -n "${alive[@]}" || code=$?
  if [[ $interrupted ]]; then continue; fi
  still=()
  for child in "${alive[@]}"; do
    if kill -0 "$child" 2>/dev/null; then still+=("$child"); fi
  done
  alive=("${still[@]}")
  if ((code == 0)); then continue; fi
  if ((first == 0)); then first=$code; fi
  if [[ ! $told ]] && ((${#alive[@]})); then
    told=yes
    say "a process left with code $code; telling the others to leave"
    kill -s TERM "${alive[@]}" 2>/dev/null || true
    # A process that was stopped by a signal has saved with the others, who may still be writing.
    if ((code != 143 && code != 130)); then
      { sleep "${OPTION[grace]}" && kill -s KILL "${alive[@]}"; } 2>/dev/null &
      killer=$!
    fi
  fi
done
if [[ $killer ]]; then kill -- "-$killer" 2>/dev/null || true; fi
wait "${printers[@]}" 2>/dev/null || true
exit "$first"
