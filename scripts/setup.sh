#!/bin/sh
# Make $VENV with DKS installed editable and the extras of $1 (comma-separated), from constraints.txt, unless it is
# up to date.
set -eu
extras="$1"
stamp="$VENV/.installed-$extras"
if [ -f "$stamp" ] && [ -z "$(find pyproject.toml constraints.txt scripts/setup.sh -newer "$stamp")" ]; then
  exit 0
fi

"$PYTHON" - <<'CHECK' || exit 2
import sys
if sys.version_info < (3, 10):
    sys.exit(f"python: found {sys.version.split()[0]}, expected 3.10 or newer; set PYTHON=python3.12 or similar")
CHECK
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"

index=""
if "$VENV/bin/python" -c "import sys, urllib.request as r; r.urlopen(sys.argv[1] + '/torch/', timeout=5)" \
    "$TORCH_INDEX" 2>/dev/null; then
  index="--extra-index-url $TORCH_INDEX"
fi
echo "setting up $VENV with dks[$extras] (a few minutes the first time)"
# shellcheck disable=SC2086 - $index is two words or none
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check $index \
  -c constraints.txt -e ".[$extras]"
touch "$stamp"
