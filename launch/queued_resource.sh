#!/usr/bin/env bash
# Asks for a TPU, waits until it is there, trains, and asks again when it was taken away.
#
# launch/queued_resource.sh --type v5litepod-16 --runtime v2-alpha-tpuv5-lite --zone ZONE
#   --config FILE.py --workdir DIR [--project P] [--spot] [--setup COMMAND] [--directory DIR]
#   [--poll SECONDS] [--retry] [--plan] [--run-id ID] [--dry-run] [--quiet] [KEY=VALUE ...]
#
# --plan asks for nothing: it compiles the step for that TPU here and says what it needs.
# The queued resource and its TPU VM are both named RUN_ID; started again with the same RUN_ID it
# goes on with what is there. --setup runs on every host of a new TPU before training: it must put
# this repository, installed with jax[tpu], into --directory (diffusion_jax) and mount the workdir.
# The TPU is kept at the end; the last line says how to delete it.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

FLAG=([spot]='' [retry]='' [plan]='')
OPTION=(
  [type]='' [runtime]='' [zone]='' [project]='' [setup]='' [directory]=diffusion_jax [poll]=60
)
parse "$@"
need type runtime zone
need_number poll
need_form type '[a-z][-a-z0-9]*' v5litepod-16
need_form runtime '[a-z][-a-z0-9._]*' v2-alpha-tpuv5-lite
need_form zone '[a-z][-a-z0-9]*' us-west4-a
need_form project '[a-z][-a-z0-9.:]*' my-project
need_form directory '[^-].*' diffusion_jax
if [[ ${FLAG[plan]} ]]; then plan_for "${OPTION[type]}"; fi

where=("--zone=${OPTION[zone]}")
if [[ ${OPTION[project]} ]]; then where+=("--project=${OPTION[project]}"); fi
queue=(gcloud compute tpus queued-resources)
create=("${queue[@]}" create "$RUN_ID" "--node-id=$RUN_ID" "${where[@]}"
  "--accelerator-type=${OPTION[type]}" "--runtime-version=${OPTION[runtime]}")
if [[ ${FLAG[spot]} ]]; then create+=(--spot); fi
describe=("${queue[@]}" describe "$RUN_ID" "${where[@]}" '--format=value(state.state)')
delete=("${queue[@]}" delete "$RUN_ID" "${where[@]}" --force --quiet)
setup=(gcloud compute tpus tpu-vm ssh "$RUN_ID" "${where[@]}" --worker=all
  "--command=${OPTION[setup]}")
train=(bash "$LAUNCH/tpu_pod.sh" --tpu "$RUN_ID" "${where[@]}" --directory "${OPTION[directory]}")
if [[ ${FLAG[retry]} ]]; then train+=(--retry); fi
train+=("${TRAIN[@]}")

if [[ $DRY_RUN ]]; then
  echo "# Unless there is one already:"
  quote "${create[@]}"
  echo "# Every ${OPTION[poll]} s until it says ACTIVE; SUSPENDED is deleted and asked for again:"
  quote "${describe[@]}"
  if [[ ${OPTION[setup]} ]]; then quote "${setup[@]}"; fi
  quote "${train[@]}"
  echo "# which does:"
  bash "${train[@]:1}" --dry-run
  exit
fi

# Waits for the TPU; `fresh` says whether it is a new one.
fresh=''
wait_until_active() {
  local state last=-
  fresh=''
  while :; do
    state=$("${describe[@]}" 2>/dev/null) || state=''
    if [[ $state != "$last" ]]; then say "the queued resource $RUN_ID is ${state:-not there}"; fi
    last=$state
    case $state in
      ACTIVE) return ;;
      FAILED) die "the request has failed; see $(quote "${describe[@]:0:6}" "${where[@]}")" ;;
      SUSPENDED) "${delete[@]}" ;;
      '') "${create[@]}" ;;
    esac
    fresh=yes
    if [[ $state ]]; then sleep "${OPTION[poll]}"; fi
  done
}

while :; do
  wait_until_active
  if [[ $fresh && ${OPTION[setup]} ]]; then
    say 'setting up all hosts'
    "${setup[@]}"
  fi
  code=0
  "${train[@]}" || code=$?
  if ((code == 0)); then break; fi
  sleep "${OPTION[poll]}" # A preemption shows in the state a little later than on the hosts.
  state=$("${describe[@]}" 2>/dev/null) || state=''
  if [[ $state == ACTIVE ]]; then
    say "train left with code $code and the TPU is still there: not a preemption; not again"
    break
  fi
  say "train left with code $code and the TPU is ${state:-gone}: a preemption; asking again"
done
say "the TPU is kept; delete it by: $(quote "${delete[@]}")"
exit "$code"
