#!/usr/bin/env bash
# Everything that only a machine with a GPU can show, in one command: builds, tests, compares bits,
# runs the sanitizers, captures graphs, measures. Offline; alters nothing outside build/ and OUT.
# Stages that are functions run by name, in a shell of their own.
# shellcheck disable=SC2329
set -uo pipefail

usage() {
    cat <<'TEXT'
usage: bench/gpu.sh [options] [OUT]

Writes one log per stage, JSON, pictures and summary.txt into OUT (default:
bench/results/gpu-<name of the GPU>). The exit status is 0 if no stage failed;
a sanitizer that the machine lacks is skipped, and summary.txt says so.

  --quick          about 2 minutes: fewer tensors, no sanitizers, a few benchmarks
  --stages A,B     only these stages; `build` may be left out once it has run
  --seconds N      how long `bench` may start new cases (default 90; quick: 30)
  --dry-run        print the stages, their time limits and commands; run nothing
  --help           this text

Stages, in order: environment build | tests compare-cuda compare-triton memcheck racecheck graphs,
side by side | asynchronous line-search bench compiled coreset | report. On request only: tune-cuda
tune-triton.
PYTHON names the Python that has torch (default: python3).
Options of a tuning sweep: TUNE_CUDA, TUNE_TRITON, as of `python -m pyoptim.bench.gpu.tune --help`.
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
site=$root/build/gpu-site # where this script installs pyoptim
default_stages=environment,build,tests,compare-cuda,compare-triton,memcheck,racecheck,graphs
default_stages+=,asynchronous,line-search,bench,compiled,coreset,report
quick_stages=environment,build,tests,compare-cuda,compare-triton,graphs,asynchronous,bench,report
known_stages=$default_stages,tune-cuda,tune-triton
side_by_side=(tests compare-cuda compare-triton memcheck racecheck graphs)
alone=(asynchronous line-search bench compiled coreset tune-cuda tune-triton report)

not_installed=77 # exit status of a stage whose tool this machine lacks
quick='' stages='' seconds='' dry_run='' out=''
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=1 ;;
        --dry-run) dry_run=1 ;;
        --stages | --seconds)
            [ $# -ge 2 ] || { echo "gpu.sh: $1 needs a value" >&2; exit 2; }
            if [ "$1" = --stages ]; then stages=$2; else seconds=$2; fi
            shift
            ;;
        --help | -h) usage; exit 0 ;;
        -*) echo "gpu.sh: unknown option $1; see bench/gpu.sh --help" >&2; exit 2 ;;
        *)
            [ -z "$out" ] || { echo "gpu.sh: one OUT only, got $out and $1" >&2; exit 2; }
            out=$1
            ;;
    esac
    shift
done
if [ -z "$stages" ]; then
    if [ -n "$quick" ]; then stages=$quick_stages; else stages=$default_stages; fi
fi
for stage in ${stages//,/ }; do
    case ,$known_stages, in
        *,"$stage",*) ;;
        *) echo "gpu.sh: unknown stage '$stage'; known: ${known_stages//,/ }" >&2; exit 2 ;;
    esac
done
case ${seconds:-1} in
    *[!0-9]*) echo "gpu.sh: --seconds $seconds is not a whole number" >&2; exit 2 ;;
esac
if [ -z "$seconds" ]; then
    if [ -n "$quick" ]; then seconds=30; else seconds=90; fi
fi

gpu_query() { nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null | head -n 1; }

arch=$(gpu_query compute_cap | tr -d '. ')
if [ -z "$out" ]; then
    name=$(gpu_query name | tr '[:upper:] ' '[:lower:]-' | tr -cd 'a-z0-9-')
    out=$root/bench/results/gpu-${name:-none}
fi
case $out in
    /*) ;;
    *) out=$PWD/$out ;;
esac

# ---- the stages: a limit in seconds, and a command that runs in OUT ----

# Together under nine minutes, those side by side counted once.
limit() {
    case $1 in
        environment) echo 15 ;;
        build) echo 110 ;;
        asynchronous) echo 35 ;;
        line-search) echo 25 ;;
        bench) echo $((seconds + 25)) ;; # a case that has begun is finished
        compiled) echo 50 ;;
        coreset) echo 60 ;;
        tune-*) echo 240 ;;
        report) echo 20 ;;
        *) echo 110 ;;
    esac
}

compare() { # BACKEND REQUIRE JOBS
    local small=''
    [ -z "$quick" ] || small='--small --steps 3'
    echo "$python -m pyoptim.bench.gpu.compare --backend $1 --require $2 --jobs $3 $small" \
        "--out compare-$1.json"
}

sanitize() { # TOOL
    # Without torch's cache every tensor is an allocation, and a step beside it is seen.
    echo "command -v compute-sanitizer || exit $not_installed;" \
        "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $1 --error-exitcode 9" \
        "$python -m pyoptim.bench.gpu.compare --backend cuda --small --steps 2" \
        "--dtypes float32,bfloat16+float32 --optimizers AdamW"
}

bench="$python -m pyoptim bench"
command_of() {
    case $1 in
        environment) echo report_environment ;;
        build)
            echo "rm -rf '$site' && cd '$root' && PYOPTIM_CUDA=1 PYOPTIM_CUDA_ARCHS=$arch" \
                "$python -m pip install --no-build-isolation --no-deps --no-index" \
                "--disable-pip-version-check --quiet --target '$site' . &&" \
                "cd '$out' && $python -m pyoptim info"
            ;;
        tests) echo run_tests ;;
        compare-cuda) compare cuda equal 4 ;;
        compare-triton) compare triton close 8 ;; # its processes compile kernels
        memcheck | racecheck) sanitize "$1" ;;
        graphs) echo "$python -m pyoptim.bench.gpu.graphs --out graphs.json" ;;
        asynchronous) echo "$python -m pyoptim.bench.gpu.asynchronous --out asynchronous.json" ;;
        line-search) echo "$python -m pyoptim.bench.gpu.line_search --out line-search.json" ;;
        bench)
            echo "$bench --device cuda ${quick:+--quick} --reps 9 --seconds $seconds" \
                "--out bench.json"
            ;;
        compiled)
            echo "$bench --device cuda --optimizers adamw --workloads 1x200000000,transformer" \
                "--implementations torch-compiled,torch-fused,pyoptim-cuda,pyoptim-triton" \
                "--reps 5 --seconds 30 --out compiled.json"
            ;;
        coreset) echo "$python -m pyoptim.bench.gpu.coreset --out coreset.json" ;;
        tune-cuda)
            echo "$python -m pyoptim.bench.gpu.tune --backend cuda --out tune-cuda.json" \
                "${TUNE_CUDA:-}"
            ;;
        tune-triton)
            echo "$python -m pyoptim.bench.gpu.tune --backend triton --out tune-triton.json" \
                "${TUNE_TRITON:-}"
            ;;
        report) echo make_report ;;
    esac
}

report_environment() {
    date -u +%FT%TZ
    uname -srm
    nproc
    head -n 3 /proc/meminfo
    nvidia-smi || return 1
    # The link to the memory and the clocks as found; nothing is set.
    nvidia-smi -q -d CLOCK,POWER,MEMORY
    command -v nvcc && nvcc --version
    command -v compute-sanitizer || echo "no compute-sanitizer"
    git -C "$root" rev-parse HEAD 2>/dev/null || echo "no git"
    $python -c 'import sys, torch; print(sys.version); print(torch.__version__, torch.version.cuda)
print(torch.cuda.get_device_properties(0))'
    $python -m pip list --disable-pip-version-check 2>/dev/null |
        grep -iE '^(torch|triton|numpy|pytest|hypothesis|pybind11|ninja|setuptools|matplotlib)'
}

run_tests() {
    # -p no:cacheprovider: nothing is written into the source.
    $python -m pytest "$root"/tests/{gpu,test_norms.py,test_clip_grad_norm.py} -q \
        -p no:cacheprovider --rootdir "$root"
}

make_report() {
    local found=()
    for file in bench.json compiled.json; do
        [ ! -f "$file" ] || found+=("$file")
    done
    if [ ${#found[@]} = 0 ]; then
        echo "no benchmark has written a result"
        return 1
    fi
    $bench --table "${found[@]}" >table.md && $bench --goals "${found[@]}" >goals.md || return 1
    cat goals.md table.md
    if $python -c 'import matplotlib' 2>/dev/null; then
        $bench --plot "${found[@]}"
    else
        echo "no pictures: matplotlib is not installed"
    fi
}

# ---- running them ----

is_wanted() { case ,$stages, in *,"$1",*) ;; *) return 1 ;; esac; }

run_stage() { # NAME; leaves its status and seconds in NAME.status
    local started=$SECONDS status log=$out/$1.log
    if [ "$1" != environment ] && [ "$1" != build ] && [ ! -d "$site/pyoptim" ]; then
        echo "pyoptim is not built: run the stage 'build' first" >"$log"
        echo "failed 0" >"$out/$1.status"
        return
    fi
    command_of "$1" >"$log"
    (cd "$out" && timeout --kill-after=10 "$(limit "$1")" bash -c "$(command_of "$1")") \
        >>"$log" 2>&1 </dev/null
    status=$?
    case $status in
        0) status=passed ;;
        "$not_installed")
            status=skipped
            echo "skipped: this machine does not have the tool" >>"$log"
            ;;
        124 | 137) status="timed-out" ;;
        *) status=failed ;;
    esac
    echo "$status $((SECONDS - started))" >"$out/$1.status"
    echo "$1: $status, $((SECONDS - started)) s"
}

if [ -n "$dry_run" ]; then
    echo "OUT: $out"
    for stage in ${stages//,/ }; do
        printf '%s (at most %s s): %s\n' "$stage" "$(limit "$stage")" "$(command_of "$stage")"
    done
    exit 0
fi

mkdir -p "$out"
rm -f "$out"/*.status
# The source folder must not be imported in place of what was built.
export PYTHONSAFEPATH=1 PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export PYTHONDONTWRITEBYTECODE=1 PIP_ROOT_USER_ACTION=ignore
export root python out site bench
export -f report_environment run_tests make_report

for stage in environment build; do
    if is_wanted "$stage"; then run_stage "$stage"; fi
done
running=()
for stage in "${side_by_side[@]}"; do
    if is_wanted "$stage"; then
        # Half a dozen processes and more share the cores.
        OMP_NUM_THREADS=2 run_stage "$stage" &
        running+=($!)
    fi
done
[ ${#running[@]} = 0 ] || wait "${running[@]}"
for stage in "${alone[@]}"; do
    if is_wanted "$stage"; then run_stage "$stage"; fi
done

failed=0
{
    for stage in ${known_stages//,/ }; do
        is_wanted "$stage" || continue
        read -r status took <"$out/$stage.status"
        printf '%-16s %-10s %4s s   %s.log\n' "$stage" "$status" "$took" "$stage"
        case $status in passed | skipped) ;; *) failed=1 ;; esac
    done
} >"$out/summary.txt"
rm -f "$out"/*.status
echo
cat "$out/summary.txt"
exit $failed
