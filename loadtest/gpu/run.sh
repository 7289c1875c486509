#!/usr/bin/env bash
# Everything a GPU machine is asked, in two calls that end inside ten minutes each. Run from the repository root:
#
#   bash loadtest/gpu/run.sh [--smoke] first     tests pocket decode switches products vision
#   bash loadtest/gpu/run.sh [--smoke] second    serve prefill kernels peer profile
#   bash loadtest/gpu/run.sh [--smoke] decode quantised    int8 and int4 weights beside bf16
#   bash loadtest/gpu/run.sh --wheels            where there is a network: fetch into .whl/ what such a machine lacks
#
# or parts by name. Results go to $OUT, or to gpu-results/: at most 8 files, figures all in results.json, the short table
# last. A bare machine needs torch with CUDA and Triton; other packages (loadtest/gpu/wheels.txt) are taken from .whl/,
# behind what the machine has. --smoke proves on a CPU that the scripts run (interpreted kernels, tiny shapes); its
# figures mean nothing.
set -u -o pipefail
cd "$(dirname "$0")/../.."

out="${OUT:-gpu-results}"
smoke=""
parts=()
for argument in "$@"; do
  case "$argument" in
    --smoke) smoke="--smoke" ;;
    --wheels) parts+=(wheels) ;;
    first) parts+=(tests pocket decode switches products vision) ;;
    second) parts+=(serve prefill kernels peer profile) ;;
    tests | pocket | decode | switches | products | vision | serve | prefill | kernels | quantised | peer | profile) parts+=("$argument") ;;
    *)
      echo "unknown part '$argument': first, second, --wheels, --smoke, or some of tests pocket decode switches products vision" \
        "serve prefill kernels quantised peer profile" >&2
      exit 2
      ;;
  esac
done
[ ${#parts[@]} -gt 0 ] || { echo "say what to run: first, second, or parts by name (see the top of this file)" >&2; exit 2; }

python="${PYTHON:-python3}"
if [ -z "${PYTHON:-}" ] && [ -n "$smoke" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
if [ "${parts[*]}" = wheels ]; then
  # pip matches a platform's name exactly, so each that these wheels may carry is named.
  exec "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp -d .whl \
    $(printf -- '--platform %s ' manylinux_2_31_x86_64 manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_26_x86_64 \
      manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux_2_5_x86_64 manylinux1_x86_64) -r loadtest/gpu/wheels.txt
fi
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -z "$smoke" ] && compgen -G '.whl/*.whl' >/dev/null; then
  # Behind what the machine has, whose torch and numpy fit its driver: PYTHONPATH comes first on the path, a .pth file's
  # lines last.
  site="$(mktemp -d)"
  links="$("$python" -c 'import os, site
folders = [*site.getsitepackages(), site.getusersitepackages()]
print(next((f for f in folders if os.path.isdir(f) and os.access(f, os.W_OK)), folders[-1]))')/degas-wheels.pth"
  mkdir -p "$(dirname "$links")"
  trap 'rm -rf "$links" "$site"' EXIT
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl || exit 1
  echo "$site" >"$links"
fi

# In its first second, so that nothing is begun that would end at an import.
wanted="torch triton numpy msgspec structlog llguidance tokenizers safetensors typer"
case " ${parts[*]} " in *" tests "*) wanted="$wanted pytest" ;; esac
case " ${parts[*]} " in
  *" serve "* | *" pocket "*)
    wanted="$wanted zmq pydantic pydantic_core annotated_types typing_inspection hdrh pbr aiohttp uvloop jinja2"
    wanted="$wanted prometheus_client PIL rich"
    ;;
esac
"$python" -c '
import sys
from importlib.util import find_spec

missing = [name for name in sys.argv[1:] if find_spec(name) is None]
if missing:
    sys.exit("missing here: " + ", ".join(missing) + ". run.sh --wheels fetches what loadtest/gpu/wheels.txt names")
' $wanted || exit 1

if [ -n "$smoke" ]; then export TRITON_INTERPRET=1; fi
deadline=$((SECONDS + ${GPU_RUN_S:-570}))
failed=0
summary="$out/summary.txt"
: >"$summary"

# run NAME SECONDS LINES COMMAND…: with a timeout that never reaches past the deadline; its last LINES go to the summary.
run() {
  local name="$1" limit="$2" lines="$3" began=$SECONDS status
  shift 3
  local left=$((deadline - SECONDS))
  [ -n "$smoke" ] && limit=$left
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

# Every picture is new to the server: nothing is kept of those that come again. 700 by 500 pixels are 9 crops: 2 by 4 tiles
# and the global one.
serve() {
  local port seconds=3 side=128 height=91 model=pocket server status=0
  port="$("$python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')" || return 1
  export DEGAS_WORKER_PREFIX_CACHE=false DEGAS_WORKER_FEATURE_BYTES=0
  if [ -z "$smoke" ]; then
    seconds=${SERVE_S:-12} side=700 height=500 model="$(mktemp -d)/moondream2"
    "$python" -m loadtest.gpu.random_models moondream2 "$model" || return 1
  fi
  one() { # one NAME TOKENS
    "$python" -m degas loadtest short --url "http://127.0.0.1:$port" --warmup --ready-s 5 --in-flight 64 \
      --seconds "$seconds" --min-tokens "$2" --max-tokens "$2" --pictures 64 \
      --picture-px "$side" --picture-height-px "$height" --json "$out/serve-$1.json"
  }
  begin() { # fails as soon as the server has gone
    "$python" -m degas serve --model "$model" --port "$port" --grpc-port -1 --max-rows 64 & server=$!
    local i
    for i in $(seq 240); do
      kill -0 "$server" 2>/dev/null || { echo "the server has ended before it was ready"; return 1; }
      "$python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1])' "http://127.0.0.1:$port/readyz" \
        2>/dev/null && return 0
      sleep 0.5
    done
  }
  end() { # a server that has gone was not the one that answered
    kill "$server" || status=1
    wait "$server"
  }
  begin && one 3 3 && one 30 30 || status=1
  end
  if [ -z "$smoke" ] && [ "$status" -eq 0 ] && [ -z "${SERVE_ONCE:-}" ]; then # without the switches that no replay shows
    export DEGAS_WORKER_GPU_WITHOUT=upload_aside,early_copy,vision_stream
    begin && one 30-plain 30 || status=1
    end
  fi
  [ -n "$smoke" ] || rm -rf "$(dirname "$model")"
  return "$status"
}
export -f serve; export python smoke out

began=$SECONDS
for part in "${parts[@]}"; do
  case "$part" in
    tests)
      folders=(tests/gpu)
      [ -n "$smoke" ] && folders=(-k "gpu or one_launch or smallest_bucket" tests/gpu tests/unit/worker/kernels/test_choices.py)
      # Nothing is timed here, and most of it is compiling: side by side, where the machine has the means.
      side=()
      if [ -z "$smoke" ] && "$python" -c 'import xdist' 2>/dev/null; then side=(-n "${GPU_TESTS_PROCESSES:-8}" --dist worksteal); fi
      run tests 160 30 "$python" -m pytest -q -p no:cacheprovider -o addopts= --strict-markers --tb=short --durations=6 "${side[@]}" "${folders[@]}" ;;
    pocket) # a trained model: what it answers is right or wrong
      where=cuda
      [ -n "$smoke" ] && where=cpu
      run pocket 70 12 "$python" -m degas bench pocket --device "$where" --scenes "${POCKET_SCENES:-100}" ;;
    decode) run decode 120 30 "$python" -m loadtest.gpu.decode --out "$out" $smoke ;;
    switches) run switches 90 60 "$python" -m loadtest.gpu.switches ${SWITCHES:+--shapes "$SWITCHES"} --out "$out" $smoke ;;
    products) run products 70 62 "$python" -m loadtest.gpu.products --out "$out" $smoke ;;
    vision) run vision 60 24 "$python" -m loadtest.gpu.vision --out "$out" $smoke ;;
    serve) run serve 230 60 bash -c serve ;;
    prefill) run prefill 70 20 "$python" -m loadtest.gpu.prefill --out "$out" $smoke ;;
    kernels) run kernels 130 120 "$python" -m loadtest.gpu.kernels --only "${KERNELS:-}" --out "$out" $smoke ;;
    quantised)
      run quantised 120 14 "$python" -m loadtest.gpu.decode --shapes "${QUANTISED:-qwen3-0.6b:int4,qwen3-0.6b:int8,moondream2:int4}" \
        --depths 2 --sampled-rows "" --steps 60 --name quantised --out "$out" $smoke ;;
    peer) run peer 80 6 "$python" -m loadtest.gpu.peer --rows "${PEER_ROWS:-1,32}" --out "$out" $smoke ;;
    profile)
      read -r -a pairs <<<"${PROFILE:-moondream2:1}"
      run profile 50 45 "$python" -m loadtest.gpu.profile "${pairs[@]}" --out "$out" $smoke ;;
  esac
done
# Figures are in results.json and tables in the summary: of the logs those stay that tell what failed.
for part in "${parts[@]}"; do
  case "$part" in tests | serve) ;; *) rm -f "$out/$part.log" ;; esac
done
table="$("$python" -m loadtest.gpu.results "$out" $smoke)" || failed=1
cat "$summary"
echo
echo "==== short table: $((SECONDS - began)) s of work; the rest is in $summary and $out/results.json"
echo "$table" | tee -a "$summary"
exit "$failed"
