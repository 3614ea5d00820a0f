#!/usr/bin/env bash
# Hosts with GPUs on any cloud, as a managed job of SkyPilot (launch/skypilot.yaml).
#
# launch/skypilot.sh --bucket s3://NAME --config FILE.py [--workdir DIR] [--nodes N] [--gpus H100:8]
#   [--infra CLOUD] [--on-demand] [--run-id ID] [--dry-run] [--quiet] [KEY=VALUE ...]
#
# The bucket is mounted at /runs, and the workdir is /runs/RUN_ID unless given. Spot hosts are used
# unless --on-demand; SkyPilot replaces those that are taken away, and the run goes on from its last
# checkpoint.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

FLAG=([on-demand]='')
OPTION=([bucket]='' [nodes]=1 [gpus]=H100:8 [infra]='')
parse "$@"
need bucket
need_number nodes
need_form bucket '[a-z0-9]+://[A-Za-z0-9][A-Za-z0-9._/-]*' s3://mine
need_form gpus '[A-Za-z0-9][A-Za-z0-9_.-]*(:[1-9][0-9]*)?' H100:8
place='(\*|[A-Za-z0-9][A-Za-z0-9_.@:-]*)'
need_form infra "$place(/$place){0,2}" aws/us-east-1
if [[ $WORKDIR == "runs/$RUN_ID" ]]; then TRAIN[3]=/runs/$RUN_ID; fi

sky=(sky jobs launch --yes --name "$RUN_ID" --num-nodes "${OPTION[nodes]}"
  --gpus "${OPTION[gpus]}")
if [[ ${OPTION[infra]} ]]; then sky+=(--infra "${OPTION[infra]}"); fi
if [[ ! ${FLAG[on-demand]} ]]; then sky+=(--use-spot); fi
sky+=(--env "RUN_ID=$RUN_ID" --env "BUCKET=${OPTION[bucket]}" --env "TRAIN=$(quote "${TRAIN[@]}")"
  "$LAUNCH/skypilot.yaml")

if [[ $DRY_RUN ]]; then
  quote "${sky[@]}"
  echo "# Each host does:"
  bash "$LAUNCH/train.sh" gpu "${TRAIN[@]}" --dry-run
  exit
fi
exec "${sky[@]}"
