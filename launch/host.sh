#!/usr/bin/env bash
# One host's part of a run, for launch/tpu.sh; it serves any machine that is reached over ssh:
#   bash launch/host.sh install [EXTRAS]
#   bash launch/host.sh run [--stages=A,B] [--restarts=N] -- ARGUMENTS OF mgsd_jax.main
#   bash launch/host.sh logs [--lines=N] [--follow] | stop [--seconds=N] | idle
# A run is detached and holds a lock, so that there is one a host. Its log is
# WORKDIR/logs/HOST.log; for a workdir in a bucket it is copied there every minute and at the end.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck source=launch/check.sh
source "$ROOT/launch/check.sh"

STATE=$HOME/.mgsd_jax # lock, pid, command, log, code of the last run
VENV=${VENV:-$ROOT/.venv}
COPY_SECONDS=60

fail() {
  echo "host $(hostname): $*" >&2
  exit 2
}

say() {
  echo "host $(hostname): $*"
}

# Opens the lock as descriptor 9; true where no run holds it. Children inherit it, so it stays
# taken until the last process of a run has ended.
take_lock() {
  mkdir -p "$STATE"
  exec 9>>"$STATE/lock"
  flock -n 9
}

install() {
  [ $# -le 1 ] || fail "install: got $# arguments, want the extras with commas between them"
  want_word install "${1:-}" '([a-z]+(,[a-z]+)*)?' 'extras such as tpu,gcs'
  # TPU images may have an older Python than we need: uv fetches one without root.
  if ! (find_python) >/dev/null 2>&1; then
    python3 -m pip install --quiet --user uv
    # shellcheck disable=SC2034 # find_python of setup.sh reads it
    PYTHON=$(python3 -m uv python install --quiet 3.12 && python3 -m uv python find 3.12)
  fi
  install_package "${1:-}"
  say "installed"
}

# The value of a flag among the arguments of the program, given as --flag=value or --flag value.
value_of() { # flag arguments...
  local flag=$1 previous='' argument
  shift
  for argument in "$@"; do
    case $argument in
      "$flag="*) echo "${argument#*=}" ;;
      *) [ "$previous" != "$flag" ] || echo "$argument" ;;
    esac
    previous=$argument
  done | tail -n 1
}

run() {
  local stages='' restarts=0 workdir folder log copy_to='' command variable
  while [ $# -gt 0 ]; do
    case $1 in
      --stages=*) stages=${1#*=} ;;
      --restarts=*) restarts=${1#*=} ;;
      --)
        shift
        break
        ;;
      *) fail "run: got $1, want --stages=, --restarts= and the program's arguments after --" ;;
    esac
    shift
  done
  [ -z "$stages" ] || want_stages "$stages"
  want_number --restarts "$restarts"
  want_number RESTART_SECONDS "${RESTART_SECONDS:-10}"
  [ -x "$VENV/bin/python" ] || fail "$VENV/bin/python not found, run setup first"
  workdir=$(value_of --workdir "$@")
  [ -n "$workdir" ] || fail "run: --workdir is required"
  command="stages=$stages restarts=$restarts $*"
  for variable in "${!JAX_@}"; do command+=" $variable=${!variable}"; done
  if ! take_lock; then
    [ "$(cat "$STATE/command")" != "$command" ] ||
      { say "runs already, log $(cat "$STATE/log")"; return; }
    fail "got a run of '$(cat "$STATE/command")' under way, want it stopped before '$command'"
  fi
  folder=$workdir/logs
  case $workdir in
    *://*)
      copy_to=$folder/$(hostname).log
      folder=$STATE/logs/$(printf '%s' "$workdir" | tr -c 'A-Za-z0-9._-' '_')
      ;;
  esac
  mkdir -p "$folder"
  log=$(cd "$folder" && pwd)/$(hostname).log
  echo "$command" >"$STATE/command"
  echo "$log" >"$STATE/log"
  rm -f "$STATE/code" "$STATE/asked"
  setsid bash "$ROOT/launch/host.sh" loop "$stages" "$restarts" "$copy_to" "$@" \
    >>"$log" 2>&1 </dev/null &
  echo "$!" >"$STATE/pid"
  say "started, log $log"
}

# The detached part: every stage in turn, anew while it dies and restarts are left.
loop() { # stages restarts copy_to arguments...
  local stages=$1 restarts=$2 copy_to=$3 log code=0 left stage copier=''
  shift 3
  log=$(cat "$STATE/log")
  STOPPING=''
  trap 'STOPPING=yes' TERM INT
  say "begins at $(date -u +%FT%TZ)"
  if [ -n "$copy_to" ]; then
    # Without the lock: it may outlive the run by a moment.
    (trap - TERM INT; while sleep "$COPY_SECONDS"; do copy "$log" "$copy_to"; done) 9>&- &
    copier=$!
  fi
  for stage in $(echo "${stages:-as-given}" | tr ',' ' '); do
    left=$restarts
    while true; do
      # Asked to stop before the program was there to hear it: as if it had, and left.
      [ -z "$STOPPING" ] || { code=75; break; }
      code=0
      if [ "$stage" = as-given ]; then
        "$VENV/bin/python" -m mgsd_jax.main "$@" || code=$?
      else
        "$VENV/bin/python" -m mgsd_jax.main --stage="$stage" "$@" || code=$?
      fi
      # 2 is bad input and 3 numbers that are not finite: another try would end alike.
      case $code in 0 | 2 | 3) break ;; esac
      if [ -n "$STOPPING" ] || [ "$left" -eq 0 ]; then break; fi
      left=$((left - 1))
      say "ended with code $code, starts anew in 10 s, $left more restarts left"
      sleep "${RESTART_SECONDS:-10}" || true
      [ -z "$STOPPING" ] || break
    done
    [ "$code" -eq 0 ] && [ -z "$STOPPING" ] || break
  done
  say "ended with code $code at $(date -u +%FT%TZ)"
  echo "$code" >"$STATE/code"
  if [ -n "$copier" ]; then
    kill "$copier" 2>/dev/null || true
    copy "$log" "$copy_to"
  fi
}

copy() { # log copy_to
  gcloud storage cp --quiet "$1" "$2" >/dev/null 2>&1 || say "could not copy the log to $2"
}

logs() {
  local lines=20 follow='' log status
  while [ $# -gt 0 ]; do
    case $1 in
      --lines=*) lines=${1#*=} ;;
      --follow) follow=yes ;;
      *) fail "logs: got $1, want --lines= or --follow" ;;
    esac
    shift
  done
  want_number --lines "$lines"
  [ -f "$STATE/log" ] || { say "no run has been started here"; return; }
  log=$(cat "$STATE/log")
  if ! take_lock; then
    status=running
  elif [ -f "$STATE/code" ]; then
    status="ended with code $(cat "$STATE/code")$([ ! -f "$STATE/asked" ] || echo ', as asked')"
  else
    status="killed"
  fi
  exec 9>&-
  echo "== host $(hostname): $status, log $log"
  tail -n "$lines" ${follow:+-F} "$log"
}

stop() {
  local seconds=300 pid waited=0
  while [ $# -gt 0 ]; do
    case $1 in
      --seconds=*) seconds=${1#*=} ;;
      *) fail "stop: got $1, want --seconds=" ;;
    esac
    shift
  done
  want_number --seconds "$seconds"
  if take_lock; then
    say "nothing runs"
    return
  fi
  pid=$(cat "$STATE/pid")
  touch "$STATE/asked"
  kill -TERM -- "-$pid" 2>/dev/null || true
  until flock -n 9; do
    if [ "$waited" -ge "$seconds" ]; then
      say "did not leave within $seconds s, killed"
      kill -KILL -- "-$pid" 2>/dev/null || true
      flock -w 10 9 || fail "process group $pid: got it alive after a kill, want it gone"
      return
    fi
    sleep 1
    waited=$((waited + 1))
  done
  say "stopped after $waited s"
}

idle() {
  [ $# -eq 0 ] || fail "idle: got $*, want nothing after it"
  take_lock || fail "got a run under way, want it stopped first (bash launch/tpu.sh stop)"
}

case ${1:-} in
  install | run | loop | logs | stop | idle) "$@" ;;
  *) fail "got command '${1:-}', want install, run, logs, stop or idle" ;;
esac
