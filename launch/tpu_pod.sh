#!/usr/bin/env bash
# All hosts of a TPU VM that is there, over ssh by gcloud.
#
# launch/tpu_pod.sh --tpu NAME --zone ZONE --config FILE.py --workdir DIR [--project P]
#   [--directory DIR] [--retry] [--detach] [--run-id ID] [--dry-run] [--quiet] [KEY=VALUE ...]
#
# Every host has a copy of this repository, installed with jax[tpu], in --directory
# (diffusion_jax) below the home, and sees the workdir at the same path. --retry puts retry.sh
# before it on each host. --detach lets it run on when the connection ends; output then goes to
# RUN_ID.log beside the repository.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

FLAG=([retry]='' [detach]='')
OPTION=([tpu]='' [zone]='' [project]='' [directory]=diffusion_jax)
parse "$@"
need tpu zone
need_form tpu '[a-z][-a-z0-9]*' pod
need_form zone '[a-z][-a-z0-9]*' us-west4-a
need_form project '[a-z][-a-z0-9.:]*' my-project
need_form directory '[^-].*' diffusion_jax

command=(bash launch/train.sh tpu "${TRAIN[@]}")
if [[ ${FLAG[retry]} ]]; then command=(bash launch/retry.sh "${command[@]}"); fi
remote="cd $(quote "${OPTION[directory]}") && export RUN_ID=$RUN_ID && "
if [[ ${FLAG[detach]} ]]; then
  remote+="nohup $(quote "${command[@]}") > ../$RUN_ID.log 2>&1 < /dev/null &"
else
  remote+="exec $(quote "${command[@]}")"
fi
ssh=(gcloud compute tpus tpu-vm ssh "${OPTION[tpu]}" "--zone=${OPTION[zone]}")
if [[ ${OPTION[project]} ]]; then ssh+=("--project=${OPTION[project]}"); fi
ssh+=(--worker=all "--command=$remote")

run "${ssh[@]}"
if [[ $DRY_RUN ]]; then
  echo "# Each host does:"
  bash "$LAUNCH/train.sh" tpu "${TRAIN[@]}" --dry-run
fi
