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

# The last value of flag $1 among the arguments that follow it, given as --flag VALUE or --flag=VALUE.
flag() {
  local name="$1" argument found='' previous=''
  shift
  for argument in "$@"; do
    [ "$previous" != "$name" ] || found="$argument"
    [ "${argument#"$name="}" = "$argument" ] || found="${argument#"$name="}"
    previous="$argument"
  done
  echo "$found"
}

# Catches what would fail only after machines have been waited for.
check_train_arguments() {
  check_config train "$@"
  [ -n "$(flag --workdir "$@")" ] || die "say where the run's files go: --workdir DIR (a folder that all machines share, or gs://..)"
}

check_prepare_arguments() {
  check_config prepare "$@"
  [ -n "$(flag --out "$@")" ] || die "say where the tokenised data go: --out DIR (a folder that all machines share, or gs://..)"
}

check_config() {
  local what="$1" config
  shift
  config="$(flag --config "$@")"
  [ -n "$config" ] || die "say what to $what: --config configs/tiny.py"
  [ -f "$ROOT/${config%%:*}" ] || die "no such config in the repository: ${config%%:*}"
}
