#!/usr/bin/env bash
# Everything that wants a GPU, in parts of at most nine minutes that resume, on a machine without a network.
#
#   scripts/gpu_campaign.sh           what to run next
#   scripts/gpu_campaign.sh status    every part and how it went
#   scripts/gpu_campaign.sh PART      run one part; again to resume it
#   scripts/gpu_campaign.sh all       run what is next until the limit
#
#   scripts/gpu_campaign.sh restore FILE...   go on from what an earlier machine handed over
#
# Settings: LIMIT, seconds of one call [540]; SHARE, of those for one part of "all" [240]; OUT, a folder that all
# results are handed over to wherever a part ended: status.txt, the part's log, and gpu.tar.gz in pieces of 15 MB;
# PYTHON [python3]. On the machine itself all that is kept lies in runs/gpu.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

GPU=runs/gpu
LIMIT=${LIMIT:-540}
SHARE=${SHARE:-240}
PYTHON=${PYTHON:-python3}
VENV=$GPU/venv
PY=$VENV/bin/python
SPARE=15       # seconds that a part is given to end by itself
SHOWN=60       # lines of a part's log
ATTEMPTS=3     # after so many failures a part is left
MOST_MB=${MOST_MB:-60} # of what pack makes
export DKS_CACHE=${DKS_CACHE:-$PWD/$GPU/cache}
export TRITON_CACHE_DIR=$PWD/$GPU/cache/triton TORCHINDUCTOR_CACHE_DIR=$PWD/$GPU/cache/inductor

SWEEPS=(gpu-smoke h200-gemm h200-llama3-8b h200-rows h200-attention h200-llama3-70b)
BENCHES=(launch views gemm llama heldout rows attention)
PARTS=(doctor tests build sweep-gpu-smoke codegen-gpu-smoke bench-launch bench-views)
for config in "${SWEEPS[@]:1}"; do PARTS+=("sweep-$config" "codegen-$config"); done
for bench in "${BENCHES[@]:2}"; do PARTS+=("bench-$bench"); done
PARTS+=(pack)

# --- state: a file a part, "RESULT ATTEMPTS"; done, unfinished or failed -------------------------------------

result() {
  local found="" _
  # What was compiled, and a look at the machine, hold for this one alone.
  case $1 in doctor | build) [ -d "$DKS_CACHE" ] || return 0 ;; esac
  [ -f "$GPU/state/$1" ] && read -r found _ <"$GPU/state/$1"
  echo "$found"
}
attempts() { local found=0 _; [ -f "$GPU/state/$1" ] && read -r _ found <"$GPU/state/$1"; echo "${found:-0}"; }
note() { echo "$2 $(($(attempts "$1") + 1))" >"$GPU/state/$1.partial" && mv "$GPU/state/$1.partial" "$GPU/state/$1"; }

# A part that another one must come before, if it has something to give.
needs() {
  case $1 in
    codegen-*) [ -d "$GPU/run/${1#codegen-}" ] ;;
    bench-views) [ -d "$GPU/out/gpu_smoke" ] ;;
    bench-gemm) [ -d "$GPU/out/h200_gemm" ] ;;
    bench-llama | bench-heldout) [ -d "$GPU/out/h200_llama3_8b" ] || [ -d "$GPU/out/h200_llama3_70b" ] ;;
    bench-rows | bench-attention) [ -d "$GPU/out/h200_${1#bench-}" ] ;;
    *) true ;;
  esac
}

# The first of those that were tried the fewest times, so that a long sweep does not keep the others waiting.
next() {
  local part best="" least=999 tried
  for part in "${PARTS[@]}"; do
    tried=$(attempts "$part")
    case $(result "$part") in
      done) continue ;;
      failed) [ "$tried" -ge "$ATTEMPTS" ] && continue ;;
    esac
    [ "$part" = pack ] && [ -n "$best" ] && continue
    needs "$part" || continue
    [ "$tried" -lt "$least" ] && best=$part least=$tried
  done
  echo "$best"
}

status() {
  local part found
  for part in "${PARTS[@]}"; do
    found=$(result "$part")
    printf '%-26s %-10s %s\n' "$part" "${found:--}" "$([ -n "$found" ] && echo "$(attempts "$part") runs")"
  done
}

# --- the parts: each within $1 seconds; 0 done, 3 unfinished, anything else failed ----------------------------

set_up() {
  [ -f "$GPU/venv.ready" ] && "$PY" -c "import torch, click, pydantic" 2>/dev/null && return 0
  rm -rf "$VENV" "$GPU/venv.ready"
  # Without pip: that of the machine is seen from inside, and Debian's Python can't make one.
  "$PYTHON" -m venv --without-pip --system-site-packages "$VENV" || return 2
  # Where the machine's Python is itself one of such an environment, its packages are not "the system's".
  "$PYTHON" - "$VENV" <<'LINK' || return 2
import pathlib, site, sys
folder = next(pathlib.Path(sys.argv[1]).glob("lib/python*/site-packages"))
(folder / "machine.pth").write_text("\n".join(site.getsitepackages()) + "\n")
LINK
  local wheels
  wheels=$("$PY" -m bench.gpu_campaign missing) || return 2
  if [ -n "$wheels" ]; then
    echo "installing $(echo "$wheels" | wc -l) wheels"
    # Without dependencies: what is there is there, and nvidia-cutlass names some that nothing here imports.
    echo "$wheels" | tr '\n' '\0' | xargs -0 "$PY" -m pip install --quiet --disable-pip-version-check --no-index --no-deps || return 2
  fi
  commands || return 2
  touch "$GPU/venv.ready"
}

# Ourselves: a link to src and the two commands, which is all that an editable installation would be.
commands() {
  local name site
  site=$(echo "$VENV"/lib/python*/site-packages)
  echo "$PWD/src" >"$site/dks.pth"
  for name in profile codegen; do
    local module=profiler
    [ "$name" = codegen ] && module=codegen
    # Read by the shell and by Python: a first line that names an interpreter can't have spaces in it.
    cat >"$VENV/bin/dks-$name" <<COMMAND
#!/bin/sh
'''exec' "$PWD/$PY" "\$0" "\$@"
' '''
import sys
from dks.$module.cli import main
sys.exit(main())
COMMAND
    chmod +x "$VENV/bin/dks-$name"
  done
}

doctor() {
  {
    uname -a
    nproc
    free -g
    df -h .
    "$PYTHON" --version
    gcc --version
    nvcc --version
    nvidia-smi -q
    "$PY" -m pip list --disable-pip-version-check
  } >"$GPU/doctor.txt" 2>&1
  "$PY" -m bench.gpu_campaign manifest "$GPU/manifest.json" && "$VENV/bin/dks-profile" doctor
}

tests() { "$PY" -m pytest -q -ra tests/gpu/on_device; }

build() {
  local config paths=()
  for config in "${SWEEPS[@]}"; do paths+=("configs/$config.yaml"); done
  "$PY" -m bench.gpu_campaign build "${paths[@]}"
}

sweep() {
  local config=$1 log
  log=$GPU/logs/sweep-$config.last
  "$VENV/bin/dks-profile" run "configs/$config.yaml" -o "$GPU/run/$config" --budget "$(($2 - 2 * SPARE))s" 2>&1 | tee "$log"
  local code=${PIPESTATUS[0]}
  [ "$code" -le 1 ] || return "$code"
  grep -q ", 0 unfinished in" "$log" || return 3
}

codegen() {
  local name=${1//-/_}
  "$VENV/bin/dks-codegen" build "$GPU/run/$1" -o "$GPU/out" --name "$name" &&
    "$PY" -m bench.gpu_campaign luts "$GPU/run/$1" "$GPU/out/$name/lut.json" "$GPU/luts"
}

bench() {
  local name=$1 log
  log=$GPU/logs/bench-$name.last
  if [ "$name" = heldout ]; then
    "$PY" -m bench.gpu_heldout
  else
    "$PY" -m "bench.gpu_$name" --seconds $(($2 - 4 * SPARE)) 2>&1 | tee "$log"
    local code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || return "$code"
    ! grep -q "run it again to go on" "$log" || return 3
  fi
}

# Everything but caches and the environment, as one file. Says what is too large, and leaves nothing then.
archive() {
  local packed=$GPU/pack.tar.gz kept=() each mb
  for each in manifest.json doctor.txt logs state run out luts cells; do [ -e "$GPU/$each" ] && kept+=("$GPU/$each"); done
  for each in runs/gpu-*/result.json; do [ -e "$each" ] && kept+=("$each"); done
  rm -f "$packed"
  tar -czf "$packed.partial" --exclude='_lock' "${kept[@]}" || return 2
  mb=$((($(wc -c <"$packed.partial") + 1048575) / 1048576))
  if [ "$mb" -gt "$MOST_MB" ]; then
    echo "pack: found $mb MB, expected at most $MOST_MB; the largest, in KB:"
    du -k -d 2 "$GPU/run" "$GPU/out" "$GPU/luts" "$GPU/cells" "$GPU/logs" 2>/dev/null | sort -rn | head -5
    rm -f "$packed.partial"
    return 2
  fi
  mv "$packed.partial" "$packed"
  echo "packed: $packed, $mb MB"
}

pack() { "$PY" -m bench.gpu_campaign manifest "$GPU/manifest.json" && archive; }

run_part() {
  case $1 in
    doctor | tests | build | pack) "$1" "$2" ;;
    sweep-*) sweep "${1#sweep-}" "$2" ;;
    codegen-*) codegen "${1#codegen-}" "$2" ;;
    bench-*) bench "${1#bench-}" "$2" ;;
  esac
}

# --- running them ----------------------------------------------------------------------------------------------

# A handful of files, none of them large: whatever carries them may have limits.
hand_over() {
  [ -n "${OUT:-}" ] || return 0
  mkdir -p "$OUT"
  status >"$OUT/status.txt"
  [ -n "${part:-}" ] && [ -f "$GPU/logs/$part.log" ] && cp "$GPU/logs/$part.log" "$OUT/last.log"
  rm -f "$OUT"/gpu.tar.gz.*
  archive >>"$OUT/status.txt" && split -b 15M "$GPU/pack.tar.gz" "$OUT/gpu.tar.gz."
}

attempt() {
  local part=$1 seconds=$2 code
  mkdir -p "$GPU/logs" "$GPU/state" "$GPU/run" "$GPU/out" "$DKS_CACHE"
  echo "== $part, at most $seconds s"
  # A process of its own, which timeout can end with all that it started; no pipe, which an orphan could keep open.
  timeout --kill-after=$SPARE "$seconds" bash scripts/gpu_campaign.sh --inside "$part" "$seconds" \
    >>"$GPU/logs/$part.log" 2>&1
  code=$?
  tail -n "$SHOWN" "$GPU/logs/$part.log"
  # What is made from a part's results is made again.
  case $part in
    sweep-*) rm -f "$GPU/state/codegen-${part#sweep-}" ;;
    codegen-*-rows | codegen-*-attention | codegen-*-gemm) rm -f "$GPU/state/bench-${part##*-}" ;;
    codegen-*-llama*) rm -f "$GPU/state/bench-llama" "$GPU/state/bench-heldout" ;;
    codegen-gpu-smoke) rm -f "$GPU/state/bench-views" ;;
  esac
  case $code in
    0) note "$part" "done" ;;
    3 | 124) note "$part" unfinished ;;
    *) note "$part" failed ;;
  esac
  echo "== $part: $(result "$part") ($code)" | tee -a "$GPU/logs/$part.log"
  return "$code"
}

known() { local part; for part in "${PARTS[@]}"; do [ "$part" = "$1" ] && return 0; done; return 1; }

case ${1:-} in
  "")
    part=$(next)
    if [ -n "$part" ]; then echo "next: scripts/gpu_campaign.sh $part"; else echo "all done or given up; see status"; fi
    ;;
  status) status ;;
  restore)
    shift
    cat "$@" | tar -xz || exit 2
    status
    ;;
  --inside)
    echo "-- $(date -u +%FT%TZ) $2"
    set_up || exit 2
    run_part "$2" $(($3 - SPARE))
    ;;
  all)
    trap hand_over EXIT
    while later=$(next) && [ -n "$later" ] && [ $((LIMIT - SECONDS)) -ge $((4 * SPARE)) ]; do
      part=$later left=$((LIMIT - SECONDS - SPARE))
      attempt "$part" $((left < SHARE ? left : SHARE))
    done
    status
    ;;
  *)
    known "$1" || { echo "part: found $1, expected one of: ${PARTS[*]}" >&2; exit 2; }
    part=$1
    trap hand_over EXIT
    attempt "$part" "$LIMIT"
    code=$?
    [ "$code" -eq 124 ] || [ "$code" -eq 3 ] && exit 0
    exit "$code"
    ;;
esac
