#!/bin/bash
# Checks and times gklx on a GPU, in one command of at most eight minutes: docs/devices.md says how to prepare it.
#
#     WHEELS=wheels OUT=found bash benches/gpu.sh       # all parts
#     PARTS="a d" OUT=found bash benches/gpu.sh         # some of them
#     DRY=1 OUT=found bash benches/gpu.sh               # on the CPU: small sizes, tests are only collected
#
# The parts run one after the other. Each has its own time limits, and a failure does not stop the others:
#   a  versions; the kernels compared with NumPy and the definition, also under compute-sanitizer
#   b  the tests of CuPy, PyTorch and JAX on the GPU, side by side, and `gklx verify`
#   c  `gklx score` by each library, compared with NumPy's results
#   d  the time of each kernel, and the benchmark
# compute-sanitizer and `gklx verify` take longest: they run beside b and c and are awaited before d, which runs alone.
# The output goes to files in $OUT, and a summary to standard output. The exit status is 1 if a part failed.
#
# WHEELS: a folder of wheels to install without a network; by default gklx's sources and the installed packages serve.
# PYTHON: the interpreter (python3). SCALE: multiplies the time limits (1).

set -u
cd "$(dirname "$0")/.." || exit 2
OUT=${OUT:-gpu-results} PYTHON=${PYTHON:-python3} PARTS=${PARTS:-a b c d} SCALE=${SCALE:-1} DRY=${DRY:-}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
summary=$OUT/summary.txt
: >"$summary"
failed=0

say() { echo "$(date +%T) $*" | tee -a "$summary"; }

# limited SECONDS FILE COMMAND...: appends the output to the file. An interrupt comes first, so that pytest can report.
limited() {
  local seconds=$(($1 * SCALE)) file=$OUT/$2
  shift 2
  echo "\$ $*" >>"$file"
  timeout --signal=INT --kill-after=8 "$seconds" "$@" >>"$file" 2>&1 </dev/null
  local status=$?
  [ $status = 124 ] && echo "stopped after $seconds s" >>"$file"
  return $status
}

# part NAME STATUS FILE [LINES]: adds a line to the summary, and the last lines of the file.
part() {
  case $2 in
    0) say "$1: ok" ;;
    5) say "$1: nothing was run" ;; # pytest's status where no test was selected
    77) say "$1: skipped" ;;
    124 | 137) say "$1: stopped by its time limit" ;;
    *) say "$1: failed, status $2" ;;
  esac
  [[ $2 =~ ^(0|5|77)$ ]] || failed=1
  tail -n "${4:-3}" "$OUT/$3" | cut -c 1-200 | sed 's/^/    /' | tee -a "$summary"
}

# beside NAME LINES SECONDS FILE COMMAND...: starts it as `limited` runs it; `await_others` adds its part to the summary.
others=()
beside() {
  local name=$1 lines=$2
  shift 2
  limited "$@" &
  others+=("$! $lines $2 $name")
}

await_others() {
  local pid lines file name
  for other in "${others[@]}"; do
    read -r pid lines file name <<<"$other"
    wait "$pid"
    part "$name" $? "$file" "$lines"
  done
}

selected() { [[ " $PARTS " == *" $1 "* ]]; }

# --- the parts --------------------------------------------------------------------------------------------------------

rm -f "$OUT"/{a,a-memcheck,a-racecheck,b-cupy,b-torch,b-jax,b-verify,c,d,d-kernels}.txt
if [ -n "${WHEELS:-}" ]; then
  SITE=$(mktemp -d)
  trap 'rm -rf "$SITE"' EXIT
  $PYTHON -m pip install -q --no-index --no-deps --no-cache-dir --target "$SITE" "$WHEELS"/*.whl >>"$OUT/a.txt" 2>&1 ||
    say "the wheels of $WHEELS cannot be installed: see a.txt"
else
  SITE=$PWD/src
fi
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=3
{ nvidia-smi || echo "nvidia-smi was not found: no NVIDIA GPU"; } >>"$OUT/a.txt" 2>&1
say "gklx is $($PYTHON -c 'import gklx; print(gklx.__version__, gklx.__file__)' 2>&1 | tail -n 1)"
say "its kernel on the CPU: $($PYTHON -c 'import gklx; print(gklx.show_config("dicts")["kernel"])' 2>&1 | tail -n 1)"
say "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo 'no NVIDIA GPU')"

if selected a; then
  limited 90 a.txt "$PYTHON" benches/gpu_check.py values --library torch cupy ${DRY:+--device cpu}
  part "a, kernels" $? a.txt 4
  grep -E "FAILED|Error" "$OUT/a.txt" | sort | uniq -c | cut -c 1-200 | sed 's/^/    /' | tee -a "$summary"
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
      beside "a, $tool" 2 220 "a-$tool.txt" compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
        "$PYTHON" benches/gpu_check.py memory --library cupy
    done
  else
    say "a, compute-sanitizer: skipped, it is not on the path"
  fi
fi

if selected b; then
  # Only `tests` is on pytest's path, so that the tests import the gklx of PYTHONPATH. Other plugins are not loaded: their
  # warnings would be errors.
  export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
  tests=(-m pytest tests -o pythonpath=tests -p xdist -p no:cacheprovider -v --tb=short --maxfail=60 --no-header
    -m "not library_independent and not evidence and not side_by_side" ${DRY:+--collect-only -q -q})
  beside "b, verify" 2 230 b-verify.txt "$PYTHON" -m gklx verify ${DRY:+--backend numpy}
  begin=$SECONDS pids=()
  GKLX_DEVICE=cuda GKLX_BACKENDS=cupy limited 145 b-cupy.txt "$PYTHON" "${tests[@]}" -n 3 -k "cupy and not torch" & pids+=($!)
  # One thread, or each worker would start a process for every core to compile the programs of four tests.
  GKLX_DEVICE=cuda GKLX_BACKENDS=torch TORCHINDUCTOR_COMPILE_THREADS=1 limited 145 b-torch.txt "$PYTHON" "${tests[@]}" -n 6 \
    -k "torch-cuda or (on_a_gpu and not of_jax)" & pids+=($!)
  GKLX_DEVICE=cuda GKLX_BACKENDS=jax limited 145 b-jax.txt "$PYTHON" "${tests[@]}" -n 6 -k "jax-gpu or jax-jit-gpu or jax_moves_nothing or of_jax_on_a_gpu" & pids+=($!)
  for name in cupy torch jax; do
    wait "${pids[0]}"
    part "b, $name" $? "b-$name.txt" 2
    pids=("${pids[@]:1}")
    # The lines of xdist, since a run that is stopped has no list at its end.
    grep -oE "(FAILED|ERROR) tests/[^ ]+.*" "$OUT/b-$name.txt" | sort -u | head -n 30 | cut -c 1-200 | sed 's/^/    /' | tee -a "$summary"
  done
  say "b took $((SECONDS - begin)) s"
fi

if selected c; then
  # The dumps are kept in memory if there is room: on a slow disk the last backend would run out of time.
  folder=${TMPDIR:-/tmp}
  [ "$(df --output=avail -k /dev/shm 2>/dev/null | tail -n 1)" -gt 8000000 ] 2>/dev/null && folder=/dev/shm
  limited 85 c.txt env TMPDIR="$folder" "$PYTHON" benches/gpu_check.py score --backend cupy torch jax ${DRY:+--device cpu --gigabytes 0.01 --classes 100}
  part "c, gklx score" $? c.txt 12
fi

await_others

if selected d; then
  limited 42 d-kernels.txt "$PYTHON" benches/gpu_kernels.py
  part "d, kernels" $? d-kernels.txt 38
  limited 118 d.txt "$PYTHON" benches/gpu_bench.py --seconds 100 ${DRY:+--device cpu --quick}
  part "d, benchmark" $? d.txt 1
  sed -n '/^# The losses/,$p' "$OUT/d.txt" | grep -E "reaches|^\|.*(gklx kl|a copy|F\.|Liger|optax)" | cut -c 1-160 | tee -a "$summary"
fi

say "all of it took $SECONDS s"
exit $failed
