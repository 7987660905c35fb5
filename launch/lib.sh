# Shared by the scripts of this folder; sourced by them.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
DRY_RUN=no

die() {
  echo "error: $*" >&2
  exit 2
}

# Prints its arguments as one line that a shell reads back the same.
quoted() {
  local word line=()
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then line+=("$word"); else line+=("'${word//"'"/"'\''"}'"); fi
  done
  echo "${line[*]}"
}

# Runs a command; with --dry-run prints it instead.
run() {
  if [ "$DRY_RUN" = yes ]; then quoted "$@"; else "$@"; fi
}

# The value that follows option $1, given the arguments that are left.
value() {
  [ $# -ge 2 ] || die "$1 needs a value"
  echo "$2"
}

# Prints the comment at the top of a script as its help.
usage() {
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
  exit "${1:-0}"
}

# Catches what would fail only after machines have been waited for.
check_train_arguments() {
  local config workdir argument previous=
  for argument in "$@"; do
    case $argument in
      --config=*) config="${argument#*=}" ;;
      --workdir=*) workdir="${argument#*=}" ;;
      *) case $previous in --config) config="$argument" ;; --workdir) workdir="$argument" ;; esac ;;
    esac
    previous="$argument"
  done
  [ -n "${config:-}" ] || die "say what to train: --config configs/tiny.py"
  [ -f "$ROOT/${config%%:*}" ] || die "no such config in the repository: ${config%%:*}"
  [ -n "${workdir:-}" ] || die "say where the run's files go: --workdir DIR (a folder that all machines share)"
}
