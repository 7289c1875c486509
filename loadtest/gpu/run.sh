#!/usr/bin/env bash
# Everything a GPU machine is asked, in one call that ends inside ten minutes. Run from the repository root:
#
#   bash loadtest/gpu/run.sh [--smoke] [tests] [decode] [prefill] [vision] [profile] [peer] [kernels] [serve]
#
# Without parts: all but serve, in this order, the most wanted first. Results go to $OUT, or to gpu-results/: at most
# 10 files. A bare machine needs torch with CUDA and Triton; other packages are taken from wheels in .whl/ if that
# folder is there. --smoke proves on a CPU that the scripts run (interpreted kernels, tiny shapes); its figures
# mean nothing.
set -u -o pipefail
cd "$(dirname "$0")/../.."

out="${OUT:-gpu-results}"
mkdir -p "$out"
smoke=""
parts=()
for argument in "$@"; do
  case "$argument" in
    --smoke) smoke="--smoke" ;;
    tests | kernels | decode | prefill | vision | profile | peer | serve) parts+=("$argument") ;;
    *) echo "unknown part '$argument': tests decode prefill vision profile peer kernels serve, or --smoke" >&2; exit 2 ;;
  esac
done
[ ${#parts[@]} -gt 0 ] || parts=(tests decode prefill vision profile peer kernels)

python="${PYTHON:-python3}"
if [ -z "${PYTHON:-}" ] && [ -n "$smoke" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if compgen -G '.whl/*.whl' >/dev/null; then
  site="$(mktemp -d)/site"
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl || exit 1
  # Behind what the machine has: its own torch and numpy fit its driver.
  export PYTHONPATH="$PYTHONPATH:$site"
fi
if [ -n "$smoke" ]; then export TRITON_INTERPRET=1; fi

deadline=$((SECONDS + ${GPU_RUN_S:-570}))
failed=0
summary="$out/summary.txt"
: >"$summary"

# run NAME SECONDS LINES COMMAND…: with a timeout that never reaches past the deadline; its last LINES are repeated at the end.
run() {
  local name="$1" limit="$2" lines="$3" began=$SECONDS status
  shift 3
  local left=$((deadline - SECONDS))
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 10 ]; then
    echo "== $name: no time left" | tee -a "$summary"; failed=1; return
  fi
  echo "== $name (at most $limit s)"
  timeout --signal=TERM --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  status=${PIPESTATUS[0]}
  { echo "== $name: exit $status after $((SECONDS - began)) s"; tail -n "$lines" "$out/$name.log"; } >>"$summary"
  [ "$status" -eq 0 ] || failed=1
}

# Every picture is new to the server: nothing is kept of those that come again. 700 by 500 pixels are 7 crops.
serve() {
  local model=pocket port=18080 seconds=3 side=128 height=91 server
  export DEGAS_WORKER_PREFIX_CACHE=false DEGAS_WORKER_FEATURE_BYTES=0
  if [ -z "$smoke" ]; then
    seconds=20 side=700 height=500 model="$(mktemp -d)/moondream2"
    "$python" -m loadtest.gpu.random_models moondream2 "$model" || return 1
  fi
  "$python" -m degas serve --model "$model" --port "$port" --grpc-port -1 --max-rows 64 &
  server=$!
  local status=0
  for tokens in 3 30; do
    "$python" -m degas loadtest short --url "http://127.0.0.1:$port" --warmup --in-flight 64 \
      --seconds "$seconds" --min-tokens "$tokens" --max-tokens "$tokens" --pictures 64 \
      --picture-px "$side" --picture-height-px "$height" \
      --json "$out/serve-$tokens.json" || { status=1; break; }
  done
  kill "$server"; wait "$server"
  [ -n "$smoke" ] || rm -rf "$(dirname "$model")"
  return "$status"
}
export -f serve; export python smoke out

began=$SECONDS
for part in "${parts[@]}"; do
  case "$part" in
    tests)
      folders=(tests/gpu)
      [ -n "$smoke" ] && folders=(-k "gpu or moondream or vision" tests/gpu tests/unit/worker/kernels/test_fused_forward.py)
      run tests 150 6 "$python" -m pytest -q -p no:cacheprovider -o addopts= --strict-markers "${folders[@]}" ;;
    kernels) run kernels 130 90 "$python" -m loadtest.gpu.kernels --out "$out" $smoke ;;
    decode) run decode 200 70 "$python" -m loadtest.gpu.decode --out "$out" $smoke ;;
    prefill) run prefill 90 20 "$python" -m loadtest.gpu.prefill --out "$out" $smoke ;;
    serve) run serve 200 40 bash -c serve ;;
    profile)
      read -r -a pairs <<<"${PROFILE:-moondream2:1}"
      run profile 60 45 "$python" -m loadtest.gpu.profile "${pairs[@]}" --out "$out" $smoke ;;
    vision) run vision 60 16 "$python" -m loadtest.gpu.vision --out "$out" $smoke ;;
    peer) run peer 90 6 "$python" -m loadtest.gpu.peer --rows "${PEER_ROWS:-1,32}" --out "$out" $smoke ;;
  esac
done
rm -f "$out"/{kernels,decode,prefill,vision,peer}.log  # their figures are in the JSON, their tables in the summary
echo; echo "==== summary (all of it in $summary; $((SECONDS - began)) s)"
cat "$summary"
exit "$failed"
