#!/usr/bin/env bash
# A job of SLURM on several hosts with GPUs: writes the batch script and gives it to sbatch.
#
# launch/slurm.sh --config FILE.py --workdir DIR [--nodes N] [--gpus-per-node G]
#   [--tasks-per-node T] [--cpus-per-task C] [--time HH:MM:SS] [--partition P] [--account A]
#   [--log FILE] [--run-id ID] [--dry-run] [--quiet] [KEY=VALUE ...]
#
# The workdir must be on a disk that all hosts see. One task a host (--tasks-per-node 1) takes all
# of its GPUs; with more they are divided. 300 seconds before the time is up the tasks get SIGTERM,
# save and leave; the batch script queues the job again under the same number.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

OPTION=(
  [nodes]=1 [gpus-per-node]=8 [tasks-per-node]=1 [cpus-per-task]='' [time]=24:00:00
  [partition]='' [account]='' [log]=slurm-%j.log
)
parse "$@"
need_number nodes gpus-per-node tasks-per-node
if [[ ${OPTION[cpus-per-task]} ]]; then need_number cpus-per-task; fi
need_form time '[0-9]+(-[0-9]+)?(:[0-9]+){0,2}|UNLIMITED|INFINITE' '1-12:00:00'
need_form partition '[A-Za-z0-9_][A-Za-z0-9_.,+-]*' gpu
need_form account '[A-Za-z0-9_][A-Za-z0-9_.+-]*' vision
need_form log '[A-Za-z0-9_./%][A-Za-z0-9_./%@:,+=-]*' 'logs/%j.log'

batch_script() {
  local name
  echo '#!/usr/bin/env bash'
  echo "#SBATCH --job-name=$RUN_ID"
  echo "#SBATCH --nodes=${OPTION[nodes]}"
  echo "#SBATCH --gpus-per-node=${OPTION[gpus-per-node]}"
  echo "#SBATCH --ntasks-per-node=${OPTION[tasks-per-node]}"
  for name in cpus-per-task time partition account; do
    if [[ ${OPTION[$name]} ]]; then echo "#SBATCH --$name=${OPTION[$name]}"; fi
  done
  echo "#SBATCH --output=${OPTION[log]}"
  echo '#SBATCH --open-mode=append'
  echo '#SBATCH --requeue'
  echo '# Without "B:", so that the tasks get the signal and not this script.'
  echo '#SBATCH --signal=TERM@300'
  echo 'set -euo pipefail'
  quote export "RUN_ID=$RUN_ID"
  # shellcheck disable=SC2016
  echo 'export RETRY_INTERRUPTED="scontrol requeue $SLURM_JOB_ID"'
  echo '# A task that leaves first must not end those that still write; after 600 s it may.'
  local srun=(srun --kill-on-bad-exit=0 --wait=600)
  # srun no longer takes it over from sbatch.
  if [[ ${OPTION[cpus-per-task]} ]]; then srun+=("--cpus-per-task=${OPTION[cpus-per-task]}"); fi
  quote exec bash "$LAUNCH/retry.sh" "${srun[@]}" bash "$LAUNCH/train.sh" gpu "${TRAIN[@]}"
}

if [[ $DRY_RUN ]]; then
  echo "# sbatch reads:"
  batch_script
  echo "# Each task does:"
  bash "$LAUNCH/train.sh" gpu "${TRAIN[@]}" --dry-run
  exit
fi
batch_script | sbatch
