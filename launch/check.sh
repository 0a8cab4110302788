# shellcheck shell=bash
# Sourced by tpu.sh and host.sh: arguments held against what they have to look like. `fail` of the
# script that sources it says the line and exits with 2.

# The value on one line, for an error.
shown() {
  printf '%s' "'${1//[[:cntrl:]]/?}'"
}

# A number as one writes it: 08 would be octal to bash, and a longer one overflows.
want_number() { # flag value [least]
  [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] ||
    fail "$1: got $(shown "$2"), want a whole number of at most 9 digits, the first not 0"
  [ "$2" -ge "${3:-0}" ] || fail "$1: got $2, want at least $3"
}

# A word that matches a regex as a whole. Ranges such as a-z are those of ASCII.
want_word() { # flag value regex example
  local LC_ALL=C
  [[ $2 =~ ^($3)$ ]] || fail "$1: got $(shown "$2"), want $4"
}

want_stages() { # value
  want_word --stages "$1" '[a-z]+(,[a-z]+)*' 'stages with commas between them, such as grounding,export'
}
