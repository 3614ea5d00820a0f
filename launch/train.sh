#!/usr/bin/env bash
# Starts the one process of this host (or of this task): flags of the platform, then train.
# All other launchers end here.
#
# launch/train.sh (tpu|gpu|cpu) --config FILE.py [--workdir DIR] [--run-id ID] [--dry-run] [--quiet]
#   [KEY=VALUE ...]
#
# KEY=VALUE is --config.KEY=VALUE of train. Without --workdir the run goes to runs/RUN_ID.
# Environment: XLA_FLAGS and LIBTPU_INIT_ARGS are put after the flags of flags/PLATFORM.txt, so
# that they win; JAX_PLATFORMS replaces the platform's own; PYTHON is the interpreter.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1:-} in
  tpu) platforms=tpu,cpu ;;
  gpu) platforms=cuda,cpu ;;
  cpu) platforms=cpu ;;
  -h | --help) usage && exit 0 ;;
  *) die "give the platform first: tpu, gpu or cpu; see $0 --help" ;;
esac
platform=$1
shift
parse "$@"

# Named, so that a missing driver is an error and not a run on the CPU.
export JAX_PLATFORMS=${JAX_PLATFORMS:-$platforms}
flags=$(flags_of "$platform")
# Any other place than LIBTPU_INIT_ARGS ends the process for a flag of TPUs.
variable=XLA_FLAGS
if [[ $platform == tpu ]]; then variable=LIBTPU_INIT_ARGS; fi
given=${!variable:-}
export "$variable=$flags${given:+ $given}"
# Huge pages for the C library, where the kernel gives them to who asks (diffusion_jax/backend/host_memory.py).
if [[ ${DIFFUSION_JAX_HUGE_PAGES:-} != 0 && ${GLIBC_TUNABLES:-} != *glibc.malloc.hugetlb=* ]]; then
  export GLIBC_TUNABLES=${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}glibc.malloc.hugetlb=1
fi

if [[ $DRY_RUN ]]; then
  quote export "RUN_ID=$RUN_ID" "JAX_PLATFORMS=$JAX_PLATFORMS"
  quote export "$variable=${!variable}"
  if [[ ${GLIBC_TUNABLES:-} ]]; then quote export "GLIBC_TUNABLES=$GLIBC_TUNABLES"; fi
  quote exec "$PYTHON" -u -m diffusion_jax train "${TRAIN[@]}"
  exit
fi
exec "$PYTHON" -u -m diffusion_jax train "${TRAIN[@]}"
