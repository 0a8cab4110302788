#!/usr/bin/env bash
# A TPU slice from the request to the deletion, over gcloud queued resources:
#   bash launch/tpu.sh up|create|status|setup|ssh|run|logs|stop|delete [options] [-- words for the hosts]
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
  up       create, setup, weights and run in one: whatever of it is done already is left alone, and
           a slice that was taken away (Spot) is asked for anew; --wait stays until the run ends
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
  --type TYPE        TPU_TYPE      up, create: accelerator type, such as v5litepod-16, v6e-8, v5p-16
  --slices N         TPU_SLICES    number of slices that train together (1)
  --runtime VERSION  TPU_RUNTIME   up, create: VM image; follows from the type if not given
  --network NAME     TPU_NETWORK   up, create: VPC network, if not the default one
  --service-account ADDRESS        TPU_SERVICE_ACCOUNT   up, create: whose rights the hosts have
  --labels KEY=VALUE,...           TPU_LABELS            up, create: for the bill
  --data-disk source=DISK,mode=read-only                 TPU_DATA_DISK
                                   up, create: a disk that every host gets
  --spot | --reserved              up, create: a Spot VM, or one of your reservation
  --wait                           create: return when the slice is there; up: when the run ended
  --weights FROM                   up: what to put into models/ on every host, a model of Hugging
                                   Face such as Qwen/Qwen3-VL-4B-Instruct, or a folder gs://...
  --stages A,B,...                 up, run: these stages one after the other, instead of --stage
  --restarts N                     up, run: how often a stage that died is started anew (0)
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
      --service-account) SERVICE_ACCOUNT=$value ;;
      --labels) LABELS=$value ;;
      --data-disk) DATA_DISK=$value ;;
      --weights) WEIGHTS=$value ;;
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
      "up --spot" | "up --reserved" | "up --wait" | "up --weights") ;;
      "run --stages" | "run --restarts" | "run --" | "ssh --" | "ssh --worker") ;;
      "up --stages" | "up --restarts" | "up --") ;;
      "logs --worker" | "logs --lines" | "logs --follow" | "stop --seconds") ;;
      *" --name" | *" --project" | *" --zone" | *" --slices" | *" --dry-run") ;;
      *" --type" | *" --runtime" | *" --network") ;;
      *" --service-account" | *" --labels" | *" --data-disk") ;;
      *) fail "$COMMAND: got $flag, which it has no use for, want what 'bash launch/tpu.sh help' lists for it" ;;
    esac
  done
  want --name TPU_NAME "$NAME"
  want --project TPU_PROJECT "$PROJECT"
  want --zone TPU_ZONE "$ZONE"
  want_word --name "$NAME" '[a-z]([-a-z0-9]{0,61}[a-z0-9])?' 'small letters, digits and hyphens, a letter first'
  want_word --project "$PROJECT" '([a-z0-9.-]+:)?[a-z0-9]([-a-z0-9]*[a-z0-9])?' 'the ID of a project'
  want_word --zone "$ZONE" '[a-z]+(-[a-z0-9]+)+' 'a zone such as us-west4-a'
  want_word --type "$TYPE" '((v|tpu)[0-9][a-z0-9]*-[0-9]+)?' 'an accelerator type such as v5litepod-16'
  want_word --runtime "$RUNTIME" '([a-z0-9][-a-z0-9._]*)?' 'a VM image such as v2-alpha-tpuv6e'
  want_word --network "$NETWORK" '([a-z]([-a-z0-9/.:]*[a-z0-9])?)?' 'the name of a VPC network'
  want_word --service-account "$SERVICE_ACCOUNT" '([a-z0-9][-a-z0-9.]*@[a-z0-9][-a-z0-9.]*)?' 'an address such as trainer@my-project.iam.gserviceaccount.com'
  want_word --labels "$LABELS" '([a-z][-_a-z0-9]*=[-_a-z0-9]*(,[a-z][-_a-z0-9]*=[-_a-z0-9]*)*)?' 'KEY=VALUE pairs with commas between them, in small letters'
  want_word --data-disk "$DATA_DISK" '(source=[a-z0-9][-a-z0-9./:]*(,mode=(read-only|read-write))?)?' 'source=projects/P/zones/Z/disks/DISK,mode=read-only'
  want_word --weights "$WEIGHTS" '(gs://[A-Za-z0-9][-A-Za-z0-9._]*(/[-A-Za-z0-9._]+)+|[A-Za-z0-9][-A-Za-z0-9._]*/[A-Za-z0-9][-A-Za-z0-9._]*)?' 'a model such as Qwen/Qwen3-VL-4B-Instruct, or a folder gs://BUCKET/...'
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
    tpu7x-*) fail "--type: got $1, which Google rents through GKE alone, want docs/pods.md (Kubernetes) for it" ;;
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
  if answer=$(gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" \
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
    perform gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" \
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
  ask_for_slice
  if [ -z "$WAIT" ] || [ -n "$DRY_RUN" ]; then return; fi
  wait_for_slice
}

ask_for_slice() {
  want --type TPU_TYPE "$TYPE"
  [ ${#CAPACITY[@]} -le 1 ] || fail "got --spot and --reserved, want at most one of them"
  RUNTIME=${RUNTIME:-$(runtime_of "$TYPE")}
  ask_state ABSENT
  case $FOUND in
    ABSENT)
      local shape=(--node-id "$NAME")
      [ "$SLICES" -eq 1 ] || shape=(--node-count "$SLICES" --node-prefix "$NAME")
      perform gcloud compute tpus queued-resources create "$NAME" "${PLACE[@]}" \
        "${shape[@]}" --accelerator-type "$TYPE" --runtime-version "$RUNTIME" \
        ${CAPACITY[@]+"${CAPACITY[@]}"} ${NETWORK:+--network "$NETWORK"} \
        ${SERVICE_ACCOUNT:+--service-account "$SERVICE_ACCOUNT"} ${LABELS:+--labels "$LABELS"} \
        ${DATA_DISK:+--data-disk "$DATA_DISK"}
      ;;
    FAILED | SUSPENDED | SUSPENDING)
      fail "$NAME: got state $FOUND, want a new request; run 'bash launch/tpu.sh delete' first"
      ;;
    *) echo "tpu: $NAME is there already, state $FOUND" ;;
  esac
}

wait_for_slice() {
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

# Refuses arguments of the program that lack what every run needs.
check_program() {
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
  [ -n "$has_stage" ] || fail "$COMMAND: --stage after --, or --stages, is required"
  [ -n "$has_config" ] || fail "$COMMAND: --config is required after --"
  [ -n "$has_workdir" ] || fail "$COMMAND: --workdir is required after -- (gs://... on several hosts)"
}

start() {
  check_program
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

# Puts the weights into models/ of every host; files that are there already are not loaded again.
fetch_weights() {
  local folder=models/${WEIGHTS##*/} path="export PATH=\"\${VENV:-\$PWD/.venv}/bin:\$PATH\""
  case $WEIGHTS in
    gs://*) on_hosts all "cd $FOLDER && mkdir -p $folder && gcloud storage rsync -r $WEIGHTS $folder" ;;
    *) on_hosts all "cd $FOLDER && $path && hf download $WEIGHTS --local-dir $folder" ;;
  esac
}

# Sets FOUND to what the runs of the hosts are at, a line a host; fails where no host can say.
ask_runs() {
  FOUND=$(on_hosts all "cd $FOLDER 2>/dev/null && bash launch/host.sh logs --lines=0 || echo '== nothing here'") || return 1
  FOUND=$(grep '^== ' <<<"$FOUND") || return 1
}

# The slice and the run on it, from whatever state they are in; a dry run prints all of it.
bring_up() {
  ask_state ABSENT
  case $FOUND in
    FAILED | SUSPENDED)
      echo "tpu: $NAME is $FOUND, asking for it anew"
      delete
      ;;
    SUSPENDING) fail "$NAME: got state SUSPENDING, want it gone; the same command in a minute goes on" ;;
  esac
  ask_for_slice
  [ -n "$DRY_RUN" ] || wait_for_slice
  if [ -z "$DRY_RUN" ] && ask_runs && ! grep -q -v ': running, log' <<<"$FOUND"; then
    echo "tpu: $NAME runs already"
    return
  fi
  setup
  [ -z "$WEIGHTS" ] || fetch_weights
  start
}

up() {
  want --type TPU_TYPE "$TYPE"
  check_program
  while true; do
    bring_up
    if [ -z "$WAIT" ] || [ -n "$DRY_RUN" ]; then return; fi
    while sleep "$POLL_SECONDS" && ask_state ACTIVE && [ "$FOUND" = ACTIVE ]; do
      ask_runs || continue # it may be taken away at this moment
      if ! grep -q -v ': ended with code 0, log' <<<"$FOUND"; then
        echo "tpu: the run of $NAME has ended"
        return
      elif grep -q 'ended with code [0-9]*, as asked' <<<"$FOUND"; then
        echo "tpu: the run of $NAME was stopped; the same command goes on from there"
        return
      elif grep -E ': ended with code (1|2|3|74), log' <<<"$FOUND"; then
        fail "$NAME: the run has failed, see 'bash launch/tpu.sh logs'"
      elif ! grep -q -E ': running, log' <<<"$FOUND"; then
        break # killed everywhere: it goes on from its last checkpoint
      fi
    done
    echo "tpu: $NAME: $(head -n 1 <<<"$FOUND"); bringing it up again"
  done
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
  perform gcloud compute tpus queued-resources delete "$NAME" "${PLACE[@]}" --force --quiet
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
SERVICE_ACCOUNT=${TPU_SERVICE_ACCOUNT:-}
LABELS=${TPU_LABELS:-}
DATA_DISK=${TPU_DATA_DISK:-}
WEIGHTS=''
POLL_SECONDS=${TPU_POLL_SECONDS:-30}
STAGES='' RESTARTS=0 WORKER=all LINES_SHOWN=20 SECONDS_TO_STOP=300 WAIT='' FOLLOW='' DRY_RUN=''
CAPACITY=() ARGUMENTS=() GIVEN=() FOUND='' HANDED=''

case $COMMAND in
  help | --help | -h)
    usage
    exit 0
    ;;
  up | create | status | setup | ssh | run | logs | stop | delete) ;;
  *) fail "got command '$COMMAND', want up, create, status, setup, ssh, run, logs, stop or delete" ;;
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
