#!/usr/bin/env bash
# A TPU slice from the request to the deletion, over gcloud queued resources:
#   bash launch/tpu.sh create|status|setup|ssh|run|logs|stop|delete [options] [-- words for the hosts]
# `bash launch/tpu.sh help` lists the options. Every command may be given again: what is done
# already is said and left alone. With --dry-run the commands are printed and none is run.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
FOLDER=mgsd_jax # of the code in the home folder of every host
# shellcheck source=launch/check.sh
source "$ROOT/launch/check.sh"

usage() {
  cat <<'HELP'
usage: bash launch/tpu.sh COMMAND [options] [-- words for the hosts]

commands
  create   ask for the slice (or slices); --wait stays until it is there
  status   say in which state the request is
  setup    send this checkout, without what git ignores, to every host and install it
  ssh      run the command that follows -- on every host, in the folder of the code; its Python
           and what was installed with it come first on the PATH
  run      start the program on every host, detached; what follows -- goes to mgsd_jax.main, and
           JAX_* variables of this environment to the environment there
  logs     show the end of every host's log, and whether it still runs
  stop     ask every host's run to save and leave; after --seconds it is killed
  delete   give the slice back, with its disks

settings: flags, or the variables beside them
  --name NAME        TPU_NAME      name of the request; its nodes are NAME, or NAME-0, NAME-1, ...
  --project PROJECT  TPU_PROJECT   Google Cloud project
  --zone ZONE        TPU_ZONE      such as us-west4-a
  --type TYPE        TPU_TYPE      create: accelerator type, such as v5litepod-16, v6e-8, v5p-16
  --slices N         TPU_SLICES    number of slices that train together (1)
  --runtime VERSION  TPU_RUNTIME   create: VM image; follows from the type if not given
  --network NAME     TPU_NETWORK   create: VPC network, if not the default one
  --spot | --reserved              create: a Spot VM, or one of your reservation
  --wait                           create: return when the slice is there
  --stages A,B,...                 run: these stages one after the other, instead of --stage
  --restarts N                     run: how often a stage that died is started anew (0)
  --worker N|all                   logs, ssh: this host of each slice (all)
  --lines N                        logs: how many lines (20)
  --follow                         logs: go on showing what is added, of one host
  --seconds N                      stop: patience before the kill (300)
  --dry-run                        print every command, run none
HELP
}

fail() {
  echo "tpu: $*" >&2
  exit 2
}

# One word of a command line as one would type it.
quote() {
  case $1 in
    '' | *[!A-Za-z0-9_./:=@,+%-]*) printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")" ;;
    *) printf '%s' "$1" ;;
  esac
}

quote_all() {
  local word separator=
  for word in "$@"; do
    printf '%s' "$separator"
    quote "$word"
    separator=' '
  done
}

# Says a command, and runs it unless this is a dry run.
perform() {
  if [ -n "$DRY_RUN" ]; then
    quote_all "$@"
    printf '\n'
  else
    printf '+ %s\n' "$(quote_all "$@")" >&2
    "$@"
  fi
}

parse() {
  local flag value
  while [ $# -gt 0 ]; do
    flag=$1
    shift
    GIVEN+=("${flag%%=*}")
    case $flag in
      --spot | --reserved) CAPACITY+=("$flag") ; continue ;;
      --wait) WAIT=yes ; continue ;;
      --follow) FOLLOW=yes ; continue ;;
      --dry-run) DRY_RUN=yes ; continue ;;
      --)
        ARGUMENTS=("$@")
        break
        ;;
      --*=*)
        value=${flag#*=}
        flag=${flag%%=*}
        ;;
      --*)
        [ $# -gt 0 ] || fail "$flag: a value is required"
        value=$1
        shift
        ;;
      *) fail "got $flag, want an option; arguments of the program go after --" ;;
    esac
    [ -n "$value" ] || fail "$flag: a value is required"
    case $flag in
      --name) NAME=$value ;;
      --project) PROJECT=$value ;;
      --zone) ZONE=$value ;;
      --type) TYPE=$value ;;
      --slices) SLICES=$value ;;
      --runtime) RUNTIME=$value ;;
      --network) NETWORK=$value ;;
      --stages) STAGES=$value ;;
      --restarts) RESTARTS=$value ;;
      --worker) WORKER=$value ;;
      --lines) LINES_SHOWN=$value ;;
      --seconds) SECONDS_TO_STOP=$value ;;
      *) fail "got $flag, want one of the options that 'bash launch/tpu.sh help' lists" ;;
    esac
  done
}

want() { # flag variable value
  [ -n "$3" ] || fail "$1 is required, or $2 in the environment"
}

# Holds every setting and option against what it has to look like, whatever the command does with
# it, and refuses options that it would do nothing with.
check() {
  local flag
  for flag in ${GIVEN[@]+"${GIVEN[@]}"}; do
    case "$COMMAND $flag" in
      "create --spot" | "create --reserved" | "create --wait") ;;
      "run --stages" | "run --restarts" | "run --" | "ssh --" | "ssh --worker") ;;
      "logs --worker" | "logs --lines" | "logs --follow" | "stop --seconds") ;;
      *" --name" | *" --project" | *" --zone" | *" --slices" | *" --dry-run") ;;
      *" --type" | *" --runtime" | *" --network") ;;
      *) fail "$COMMAND: got $flag, which it has no use for, want what 'bash launch/tpu.sh help' lists for it" ;;
    esac
  done
  want --name TPU_NAME "$NAME"
  want --project TPU_PROJECT "$PROJECT"
  want --zone TPU_ZONE "$ZONE"
  want_word --name "$NAME" '[a-z]([-a-z0-9]{0,61}[a-z0-9])?' 'small letters, digits and hyphens, a letter first'
  want_word --project "$PROJECT" '([a-z0-9.-]+:)?[a-z0-9]([-a-z0-9]*[a-z0-9])?' 'the ID of a project'
  want_word --zone "$ZONE" '[a-z]+(-[a-z0-9]+)+' 'a zone such as us-west4-a'
  want_word --type "$TYPE" '(v[0-9][a-z0-9]*-[0-9]+)?' 'an accelerator type such as v5litepod-16'
  want_word --runtime "$RUNTIME" '([a-z0-9][-a-z0-9._]*)?' 'a VM image such as v2-alpha-tpuv6e'
  want_word --network "$NETWORK" '([a-z]([-a-z0-9/.:]*[a-z0-9])?)?' 'the name of a VPC network'
  want_word --worker "$WORKER" 'all|0|[1-9][0-9]{0,8}' "'all' or the number of a host, from 0"
  [ -z "$STAGES" ] || want_stages "$STAGES"
  want_number --slices "$SLICES" 1
  want_number --restarts "$RESTARTS"
  want_number --lines "$LINES_SHOWN"
  want_number --seconds "$SECONDS_TO_STOP"
  want_number TPU_POLL_SECONDS "$POLL_SECONDS"
}

runtime_of() { # accelerator type
  case $1 in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "--runtime is required, the VM image of type $1 (known: v2- to v4-, v5litepod-, v5p-, v6e-)" ;;
  esac
}

nodes() {
  local i
  if [ "$SLICES" -eq 1 ]; then
    echo "$NAME"
  else
    for ((i = 0; i < SLICES; i++)); do echo "$NAME-$i"; done
  fi
}

# The state of the request, such as ACTIVE; ABSENT where there is none.
state() {
  local answer errors
  errors=$(mktemp)
  if answer=$(gcloud alpha compute tpus queued-resources describe "$NAME" "${PLACE[@]}" \
    '--format=value(state.state)' 2>"$errors"); then
    rm -f "$errors"
    echo "${answer:-UNKNOWN}"
  elif grep -q -E '^ERROR: \(gcloud[^)]*\) NOT_FOUND:' "$errors"; then # the status, not the words
    rm -f "$errors"
    echo ABSENT
  else
    cat "$errors" >&2
    rm -f "$errors"
    return 1
  fi
}

# Sets FOUND to the state; a dry run prints the question and takes $1 for the answer.
ask_state() {
  if [ -n "$DRY_RUN" ]; then
    perform gcloud alpha compute tpus queued-resources describe "$NAME" "${PLACE[@]}" \
      '--format=value(state.state)'
    FOUND=$1
  else
    FOUND=$(state) || fail "gcloud could not say in which state $NAME is, see above"
  fi
}

want_active() {
  ask_state ACTIVE
  [ "$FOUND" = ACTIVE ] ||
    fail "$NAME: got state $FOUND, want ACTIVE; see 'bash launch/tpu.sh create --wait'"
}

# Runs a command on the given worker of every slice, the slices at once; names those that fail.
on_hosts() { # worker command
  local node bad=() started=() i=0
  for node in $(nodes); do
    set -- "$1" "$2" compute tpus tpu-vm ssh "$node" "${PLACE[@]}" "--worker=$1" "--command=$2"
    if [ -n "$DRY_RUN" ]; then
      perform gcloud "${@:3}"
    else
      perform gcloud "${@:3}" &
      started+=("$!")
    fi
  done
  [ -z "$DRY_RUN" ] || return 0
  for node in $(nodes); do
    wait "${started[i]}" || bad+=("$node")
    i=$((i + 1))
  done
  [ ${#bad[@]} -eq 0 ] || fail "the command failed on ${bad[*]}; what the hosts said is above"
}

create() {
  want --type TPU_TYPE "$TYPE"
  [ ${#CAPACITY[@]} -le 1 ] || fail "got --spot and --reserved, want at most one of them"
  RUNTIME=${RUNTIME:-$(runtime_of "$TYPE")}
  ask_state ABSENT
  case $FOUND in
    ABSENT)
      local shape=(--node-id "$NAME")
      [ "$SLICES" -eq 1 ] || shape=(--node-count "$SLICES" --node-prefix "$NAME")
      perform gcloud alpha compute tpus queued-resources create "$NAME" "${PLACE[@]}" \
        "${shape[@]}" --accelerator-type "$TYPE" --runtime-version "$RUNTIME" \
        ${CAPACITY[@]+"${CAPACITY[@]}"} ${NETWORK:+--network "$NETWORK"}
      ;;
    FAILED | SUSPENDED | SUSPENDING)
      fail "$NAME: got state $FOUND, want a new request; run 'bash launch/tpu.sh delete' first"
      ;;
    *) echo "tpu: $NAME is there already, state $FOUND" ;;
  esac
  if [ -z "$WAIT" ] || [ -n "$DRY_RUN" ]; then return; fi
  until ask_state ACTIVE && [ "$FOUND" = ACTIVE ]; do
    case $FOUND in
      FAILED | SUSPENDED | SUSPENDING | ABSENT) fail "$NAME: got state $FOUND, want ACTIVE" ;;
    esac
    echo "tpu: $NAME is $FOUND, asking again in ${POLL_SECONDS} s"
    sleep "$POLL_SECONDS"
  done
  echo "tpu: $NAME is ACTIVE"
}

setup() {
  local archive=${TMPDIR:-/tmp}/mgsd_jax-$NAME.tgz node
  want_active
  git -C "$ROOT" rev-parse HEAD >/dev/null || fail "$ROOT is not a git checkout"
  # The files as they are, changes and all; what git ignores stays here, and so do deleted ones.
  perform bash -c "cd $(quote "$ROOT") && git ls-files -z -co --exclude-standard | \
while IFS= read -r -d '' file; do [ ! -e \"\$file\" ] || printf '%s\\0' \"\$file\"; done | \
tar --null -czf $(quote "$archive") -T -"
  for node in $(nodes); do
    perform gcloud compute tpus tpu-vm scp "$archive" "$node:$FOLDER.tgz" "${PLACE[@]}" --worker=all
  done
  # Files of an earlier setup go first; results that lie beside them stay.
  on_hosts all "set -e; mkdir -p $FOLDER; cd $FOLDER; \
if [ -f launch/host.sh ]; then bash launch/host.sh idle; fi; \
if [ -f .sent ]; then xargs -d '\\n' rm -f < .sent; fi; \
tar -xzf ../$FOLDER.tgz; tar -tzf ../$FOLDER.tgz > .sent; bash launch/host.sh install tpu,gcs"
  [ -n "$DRY_RUN" ] || rm -f "$archive"
  [ -n "$DRY_RUN" ] || echo "tpu: $NAME is set up"
}

start() {
  local argument has_stage=$STAGES has_config='' has_workdir=''
  for argument in ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}; do
    case $argument in
      --stage | --stage=*)
        [ -z "$STAGES" ] || fail "got --stages and --stage, want one of them"
        has_stage=yes
        ;;
      --config | --config=*) has_config=yes ;;
      --workdir | --workdir=*) has_workdir=yes ;;
    esac
  done
  [ -n "$has_stage" ] || fail "run: --stage after --, or --stages, is required"
  [ -n "$has_config" ] || fail "run: --config is required after --"
  [ -n "$has_workdir" ] || fail "run: --workdir is required after -- (gs://... on several hosts)"
  hand_over
  want_active
  on_hosts all "cd $FOLDER && ${HANDED}bash launch/host.sh run --restarts=$RESTARTS$(
    [ -z "$STAGES" ] || printf ' --stages=%s' "$(quote "$STAGES")"
  ) -- $(quote_all "${ARGUMENTS[@]}")"
}

# Sets HANDED to the JAX_* variables of this environment, as words before a command of the hosts.
hand_over() {
  local name words=()
  for name in "${!JAX_@}"; do
    case $name=${!name} in
      JAX_PROCESS_ID=*)
        fail "$name: got ${!name} in the environment, want it unset: every host gets the same variables"
        ;;
      JAX_PLATFORMS=*tpu* | JAX_PLATFORMS=) ;;
      JAX_PLATFORMS=*)
        fail "$name: got $(shown "${!name}") in the environment, want it unset or tpu: the hosts get it"
        ;;
    esac
    words+=("$name=${!name}")
  done
  if [ ${#words[@]} -gt 0 ]; then HANDED="$(quote_all env "${words[@]}") "; fi
}

on_every_host() {
  [ ${#ARGUMENTS[@]} -gt 0 ] || fail "ssh: a command for the hosts is required after --"
  want_active
  on_hosts "$WORKER" "cd $FOLDER && export PATH=\"\${VENV:-\$PWD/.venv}/bin:\$PATH\" && \
$(quote_all "${ARGUMENTS[@]}")"
}

logs() {
  if [ -n "$FOLLOW" ] && [ "$WORKER" = all ]; then WORKER=0; fi
  want_active
  on_hosts "$WORKER" "cd $FOLDER && bash launch/host.sh logs --lines=$LINES_SHOWN${FOLLOW:+ --follow}"
}

stop() {
  want_active
  on_hosts all "cd $FOLDER && bash launch/host.sh stop --seconds=$SECONDS_TO_STOP"
}

delete() {
  ask_state ACTIVE
  if [ "$FOUND" = ABSENT ]; then
    echo "tpu: $NAME is not there, nothing to delete"
    return
  fi
  perform gcloud alpha compute tpus queued-resources delete "$NAME" "${PLACE[@]}" --force --quiet
}

COMMAND=${1:-help}
[ $# -eq 0 ] || shift
NAME=${TPU_NAME:-}
PROJECT=${TPU_PROJECT:-}
ZONE=${TPU_ZONE:-}
TYPE=${TPU_TYPE:-}
SLICES=${TPU_SLICES:-1}
RUNTIME=${TPU_RUNTIME:-}
NETWORK=${TPU_NETWORK:-}
POLL_SECONDS=${TPU_POLL_SECONDS:-30}
STAGES='' RESTARTS=0 WORKER=all LINES_SHOWN=20 SECONDS_TO_STOP=300 WAIT='' FOLLOW='' DRY_RUN=''
CAPACITY=() ARGUMENTS=() GIVEN=() FOUND='' HANDED=''

case $COMMAND in
  help | --help | -h)
    usage
    exit 0
    ;;
  create | status | setup | ssh | run | logs | stop | delete) ;;
  *) fail "got command '$COMMAND', want create, status, setup, ssh, run, logs, stop or delete" ;;
esac
parse "$@"
check
PLACE=("--project=$PROJECT" "--zone=$ZONE")
if [ -z "$DRY_RUN" ] && ! command -v gcloud >/dev/null; then
  fail "gcloud not found, want the Google Cloud CLI (https://cloud.google.com/sdk/docs/install)"
fi

case $COMMAND in
  run) start ;;
  ssh) on_every_host ;;
  status)
    ask_state UNKNOWN
    [ -n "$DRY_RUN" ] || echo "tpu: $NAME is $FOUND"
    ;;
  *) "$COMMAND" ;;
esac
