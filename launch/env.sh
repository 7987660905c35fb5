# Makes .venv at the repository's root and activates it. Source it:
#   REFUSION_EXTRAS=test source launch/env.sh
# REFUSION_EXTRAS: comma-separated extras of setup.py, e.g. "tpu", "cuda,hf". Default: none.
# REFUSION_PYTHON: the Python to use (3.11 or newer). Default: the newest one found.
# What is installed already (same setup.py, extras included) is kept, so a second run starts at once.

_refusion_env() {
  local root stamp wanted have python candidate extra extras="${REFUSION_EXTRAS:-}" missing=()
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || return 1
  stamp="$root/.venv/refusion-installed"

  if [ ! -x "$root/.venv/bin/python" ]; then
    for candidate in ${REFUSION_PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
      if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python="$candidate"
        break
      fi
    done
    if [ -z "${python:-}" ]; then
      echo "error: no Python 3.11 or newer with venv found (tried: ${REFUSION_PYTHON:-python3.13 python3.12 python3.11 python3 python});" \
        "install one (Debian: apt-get install python3-venv) or name it: REFUSION_PYTHON=/path/to/python" >&2
      return 1
    fi
    echo "making .venv with $("$python" --version)"
    "$python" -m venv "$root/.venv" || { rm -rf "$root/.venv"; return 1; }
  fi

  # The stamp holds the checksum of setup.py and the extras installed since.
  wanted="$(cksum < "$root/setup.py") $root"
  have="$(head -n 1 "$stamp" 2>/dev/null)"
  [ "$have" = "$wanted" ] || rm -f "$stamp"
  [ -f "$stamp" ] || missing+=(".")
  for extra in ${extras//,/ }; do
    grep -qxF "$extra" "$stamp" 2>/dev/null || missing+=("$extra")
  done
  if [ "${#missing[@]}" -gt 0 ]; then
    echo "installing refusion_jax${extras:+[$extras]} into .venv (once; a minute or two)"
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$root${extras:+[$extras]}" || return 1
    [ -f "$stamp" ] || echo "$wanted" > "$stamp"
    printf '%s\n' ${extras//,/ } >> "$stamp"
  fi
  source "$root/.venv/bin/activate"
}

_refusion_env || { unset -f _refusion_env; return 1 2>/dev/null || exit 1; }
unset -f _refusion_env
