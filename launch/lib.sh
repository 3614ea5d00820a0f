# shellcheck shell=bash
# Functions of the launchers: reading arguments, saying what is done, flags of XLA.
# A launcher names its own options and flags before it calls `parse "$@"`:
#   OPTION=([zone]='')  # --zone VALUE or --zone=VALUE
#   FLAG=([spot]='')    # --spot

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "$0: needs bash 4.4 or newer; this is $BASH_VERSION" >&2
  exit 2
fi
LAUNCH=$(dirname "${BASH_SOURCE[0]}")
PYTHON=${PYTHON:-python}
declare -A OPTION=() FLAG=()

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }

# Ends with code 2, as the package does when a person has made a mistake.
die() {
  say "$*"
  exit 2
}

# plain NAME TEXT: dies where a text holds a line break or another control character, in ASCII or,
# as YAML knows them, beyond it. No option needs one, and what is written below could end with it.
plain() {
  local LC_ALL=C
  case $2 in
    *[[:cntrl:]]* | *$'\xc2'[$'\x80'-$'\x9f']* | *$'\xe2\x80'[$'\xa8\xa9']*)
      die "$1 is ${2@Q}, with a line break or another control character; leave it out"
      ;;
  esac
}

# All words that the launcher was given, and the variables that it reads.
for given in "$@"; do plain 'an argument' "$given"; done
for given in PYTHON RUN_ID "${!RETRY_@}"; do plain "$given" "${!given:-}"; done

# The comment at the head of the script.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# Words as a shell reads them, quoted only where they must be.
quote() {
  local word line=''
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then word=${word@Q}; fi
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Runs a command, or prints it in a dry run.
run() {
  if [[ $DRY_RUN ]]; then quote "$@"; else "$@"; fi
}

# parse ARGUMENTS...: fills CONFIG, WORKDIR, RUN_ID, DRY_RUN, OPTION, FLAG and TRAIN, the arguments
# of train.
parse() {
  CONFIG='' WORKDIR='' DRY_RUN='' TRAIN=()
  RUN_ID=${RUN_ID:-}
  local more=() name
  while (($#)); do
    if [[ $1 == --*=* && $1 != --config.* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    name=${1#--}
    case $1 in
      -h | --help) usage && exit 0 ;;
      --dry-run) DRY_RUN=yes ;;
      --quiet) more+=(--quiet) ;;
      --config.*=*) _key "${1#--config.}" && more+=("$1") ;;
      --*)
        if [[ ${FLAG[$name]+set} ]]; then
          FLAG[$name]=yes
        else
          (($# > 1)) || die "$1 needs a value, or is unknown; see $0 --help"
          _option "$name" "$2"
          shift
        fi
        ;;
      *=*)
        _key "$1" && more+=("--config.$1")
        ;;
      *) die "'$1' is neither an option nor KEY=VALUE; see $0 --help" ;;
    esac
    shift
  done
  [[ $CONFIG ]] || die 'give --config FILE.py'
  [[ $CONFIG != -* ]] || die "--config is '$CONFIG'; give a file whose name begins with no -"
  [[ $WORKDIR != -* ]] || die "--workdir is '$WORKDIR'; give a folder whose name begins with no -"
  _name_the_run
  # shellcheck disable=SC2034  # for the launchers
  TRAIN=(--config "$CONFIG" --workdir "$WORKDIR" "${more[@]}")
}

_key() {
  local LC_ALL=C
  [[ $1 =~ ^[A-Za-z_][A-Za-z0-9_.]*= ]] || die "'$1' is not KEY=VALUE with a key of the config"
}

_option() {
  case $1 in
    config) CONFIG=$2 ;;
    workdir) WORKDIR=$2 ;;
    run-id) RUN_ID=$2 ;;
    *)
      [[ ${OPTION[$1]+set} ]] || die "there is no option --$1; see $0 --help"
      OPTION[$1]=$2
      ;;
  esac
}

# One name for all: the workdir's, so that a second start of the same run has the same name.
_name_the_run() {
  local name LC_ALL=C
  if [[ ! $RUN_ID && $WORKDIR ]]; then
    name=$(basename "$WORKDIR")
  else
    name=${RUN_ID:-$(basename "$CONFIG" .py)-$(date -u +%Y%m%d-%H%M%S)}
  fi
  if [[ ! $RUN_ID ]]; then
    name=${name,,}
    name=${name//[^a-z0-9-]/-}
  fi
  RUN_ID=$name
  # Clouds and Kubernetes take no other names.
  [[ $RUN_ID =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "'$RUN_ID' cannot name a run; give --run-id of at most 40 of a-z, 0-9 and -, a letter first"
  WORKDIR=${WORKDIR:-runs/$RUN_ID}
  export RUN_ID
}

# need NAME...: these options must be there.
need() {
  local name
  for name in "$@"; do [[ ${OPTION[$name]} ]] || die "give --$name; see $0 --help"; done
}

# need_form NAME PATTERN EXAMPLE: this option, where it is given, must match. It becomes a part of
# YAML, of a batch script or of a command on another machine, where anything else would be read as
# something else.
need_form() {
  local value=${OPTION[$1]} LC_ALL=C
  [[ ! $value || $value =~ ^($2)$ ]] || die "--$1 is '$value'; give one such as $3"
}

# need_number NAME...: these options must be whole numbers above 0.
need_number() {
  local name LC_ALL=C
  for name in "$@"; do
    [[ ${OPTION[$name]} =~ ^[1-9][0-9]*$ ]] || die "--$name is '${OPTION[$name]}'; give a number"
  done
}

# flags_of PLATFORM: the flags in flags/PLATFORM.txt in one line, without comments.
flags_of() {
  [[ -f $LAUNCH/flags/$1.txt ]] || die "there is no platform '$1'; give tpu, gpu or cpu"
  sed -e 's/#.*//' "$LAUNCH/flags/$1.txt" | xargs
}

# plan_for TARGET: compiles the step for what would be asked for, with its flags, asks for nothing,
# and ends.
plan_for() {
  local word flags keys=()
  for word in "${TRAIN[@]:4}"; do
    if [[ $word == --config.* ]]; then keys+=("$word"); fi
  done
  if [[ $1 == v[0-9]* ]]; then
    flags=$(flags_of tpu)
    export "LIBTPU_INIT_ARGS=$flags${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
    if [[ $DRY_RUN ]]; then quote export "LIBTPU_INIT_ARGS=$LIBTPU_INIT_ARGS"; fi
  fi
  run "$PYTHON" -m diffusion_jax plan --config "$CONFIG" --target "$1" "${keys[@]}"
  exit
}
