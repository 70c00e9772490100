# Sourced by the scripts beside it: `prepare EXTRAS` makes .venv and installs this package in it, once.
# Nothing but a Python >= 3.10 is needed; uv is used where it is present. With WHEELS, a folder, packages come from there
# and not from the network. Not meant to be run by itself.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
VENV="$PWD/.venv"

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python3.14 python3.10 python; do
    [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

make_venv() {
  local python
  if command -v uv >/dev/null 2>&1; then
    uv venv --quiet --allow-existing --python '>=3.10' "$VENV" && return
  fi
  if ! python=$(find_python); then
    echo "No Python >= 3.10 with the venv module was found." >&2
    case "$(uname -s)" in
      Darwin) echo "Install one: brew install python, or from python.org; or install uv." >&2 ;;
      *) echo "Install one: apt-get install python3 python3-venv (or your system's like); or install uv." >&2 ;;
    esac
    exit 1
  fi
  "$python" -m venv "$VENV"
}

# add ARGUMENTS of pip install
add() {
  set -- ${WHEELS:+--no-index} ${WHEELS:+"--find-links=$WHEELS"} "$@"
  if command -v uv >/dev/null 2>&1; then
    uv pip install --quiet --python "$VENV/bin/python" "$@"
  else
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
  fi
}

# remove PACKAGES, also such as are not installed
remove() {
  if command -v uv >/dev/null 2>&1; then
    uv pip uninstall --quiet --python "$VENV/bin/python" "$@"
  else
    "$VENV/bin/python" -m pip uninstall --quiet --yes --disable-pip-version-check "$@"
  fi
}

# prepare [EXTRAS]: such as `prepare test`. Does nothing if the same was installed from the same pyproject.toml.
prepare() {
  local extras="${1:-}" wanted stamp
  stamp="$VENV/.installed-${extras:-plain}"
  wanted=$(cksum < pyproject.toml)
  if [ ! -x "$VENV/bin/python" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Setting up .venv (once; about a minute)" >&2
    [ -x "$VENV/bin/python" ] || make_venv || exit 1
    add -e ".${extras:+[$extras]}" || { echo "The installation failed; see above." >&2; exit 1; }
    echo "$wanted" > "$stamp"
  fi
}
