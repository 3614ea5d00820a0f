#!/usr/bin/env bash
# A JobSet on Kubernetes (GKE), for TPUs or GPUs: fills launch/jobset.yaml and applies it.
#
# launch/gke_jobset.sh --platform (tpu|gpu) --image IMAGE --accelerator NAME --claim CLAIM
#   --config FILE.py [--workdir DIR] [--nodes N] [--per-node C] [--topology T] [--slices S]
#   [--restarts R] [--spot] [--namespace NS] [--plan] [--run-id ID] [--dry-run] [--quiet]
#   [KEY=VALUE ...]
#
# --image       has this repository in its working directory, installed with jax[tpu] or jax[cuda13];
#               Dockerfile makes one
# --accelerator nvidia-h100-80gb, tpu-v5-lite-podslice, ...: the label of the node pool
# --claim       a PersistentVolumeClaim that many may write; it is mounted at /runs, and the
#               workdir is /runs/RUN_ID unless given
# --nodes       hosts, of each slice for TPUs (1); --per-node chips or GPUs of a host (8 GPUs, 4
#               chips); --topology of a TPU slice, such as 4x4; --slices of TPUs (1)
# --plan        applies nothing: compiles the step for one such slice, or such GPUs, and says what it
#               needs
# Restarted up to --restarts (20) times, but not when a process leaves with code 1 or 2.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

FLAG=([spot]='' [plan]='')
OPTION=(
  [platform]='' [image]='' [accelerator]='' [claim]='' [nodes]=1 [per-node]='' [topology]=''
  [slices]=1 [restarts]=20 [namespace]=default
)
parse "$@"
need platform image accelerator claim
case ${OPTION[platform]} in
  tpu)
    need topology
    resource=google.com/tpu
    OPTION[per-node]=${OPTION[per-node]:-4}
    selectors="cloud.google.com/gke-tpu-accelerator: ${OPTION[accelerator]}"
    selectors+=$'\n'"cloud.google.com/gke-tpu-topology: ${OPTION[topology]}"
    ;;
  gpu)
    resource=nvidia.com/gpu
    OPTION[per-node]=${OPTION[per-node]:-8}
    [[ ${OPTION[slices]} == 1 ]] || die '--slices is for TPUs; give --nodes'
    selectors="cloud.google.com/gke-accelerator: ${OPTION[accelerator]}"
    ;;
  *) die "--platform is '${OPTION[platform]}'; give tpu or gpu" ;;
esac
need_number nodes per-node slices restarts
# The forms that Kubernetes gives them; words that YAML takes for something else are none.
need_form namespace '[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?' default
need_form claim '[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?' runs
need_form image '[A-Za-z0-9]([A-Za-z0-9._/:@-]{0,500}[A-Za-z0-9])?' gcr.io/mine/diffusion:1
need_form accelerator '[a-z]([-a-z0-9.]{0,61}[a-z0-9])?' nvidia-h100-80gb
need_form topology '[1-9][0-9]*(x[1-9][0-9]*){1,2}' 4x4
case ${OPTION[accelerator]} in
  true | false | null | yes | no | on | off | y | n) die '--accelerator must be the name of one' ;;
esac
if [[ ${FLAG[plan]} ]]; then
  case ${OPTION[accelerator]} in
    tpu-v5-lite-*) target=v5e:${OPTION[topology]} ;;
    tpu-v5p-*) target=v5p:${OPTION[topology]} ;;
    tpu-v6e-*) target=v6e:${OPTION[topology]} ;;
    nvidia-h100-* | nvidia-a100-*)
      chip=${OPTION[accelerator]#nvidia-}
      target=${chip%%-*}:${OPTION[per-node]}x${OPTION[nodes]}
      ;;
    *) die "--plan knows no ${OPTION[accelerator]}; see python -m diffusion_jax plan --help" ;;
  esac
  plan_for "$target"
fi
if [[ ${FLAG[spot]} ]]; then selectors+=$'\ncloud.google.com/gke-spot: "true"'; fi
if [[ $WORKDIR == "runs/$RUN_ID" ]]; then TRAIN[3]=/runs/$RUN_ID; fi

# JSON strings are YAML strings.
json() {
  "$PYTHON" - "$@" <<'PYTHON' || die 'an argument is not text in UTF-8; write it anew'
import json, sys
try:
  sys.stdout.buffer.write(json.dumps(sys.argv[1:], ensure_ascii=False).encode())
except UnicodeEncodeError:
  sys.exit(1)
PYTHON
}

# indented N TEXT: all lines but the first, so that a placeholder's own indentation holds for all.
indented() { sed "2,\$s/^/$(printf '%*s' "$1" '')/" <<<"$2"; }

render() {
  local rest done='' key command
  command=$(json bash launch/train.sh "${OPTION[platform]}" "${TRAIN[@]}") || exit
  local -A value=(
    [NAME]=$RUN_ID [NAMESPACE]=${OPTION[namespace]} [RESTARTS]=${OPTION[restarts]}
    [SLICES]=${OPTION[slices]} [NODES]=${OPTION[nodes]} [IMAGE]=${OPTION[image]}
    [RESOURCE]=$resource [PER_NODE]=${OPTION[per-node]} [CLAIM]=${OPTION[claim]}
    [SELECTORS]=$(indented 14 "$selectors")
    [COMMAND]=$command
  )
  rest=$(sed '/^ *#/d' "$LAUNCH/jobset.yaml")
  # In one pass: braces in a value are no placeholder.
  while [[ $rest =~ \{\{([A-Z_]+)\}\} ]]; do
    key=${BASH_REMATCH[1]}
    [[ ${value[$key]+set} ]] || die "launch/jobset.yaml has an unknown placeholder: $key"
    done+=${rest%%"{{$key}}"*}${value[$key]}
    rest=${rest#*"{{$key}}"}
  done
  printf '%s\n' "$done$rest"
}

if [[ $DRY_RUN ]]; then
  echo "# kubectl apply -f - reads:"
  render
  echo "# Each pod does:"
  bash "$LAUNCH/train.sh" "${OPTION[platform]}" "${TRAIN[@]}" --dry-run
  exit
fi
text=$(render) || exit
kubectl apply -f - <<<"$text"
