#!/usr/bin/env bash
# Packs what a GPU machine without a network lacks, beside a checkout of the project. Run it in the checkout's root, on a
# machine with a network and the project's environment (.venv, or PYTHON=...):
#
#   bash benchmarks/gpu/prepare.sh                         # .whl/: wheels; the kit's weights are made there
#   bash benchmarks/gpu/prepare.sh --model .cache/demo     # and .model/: the demo's model and data (make demo), in parts
#
# Then bring the checkout's files there, with .whl and .model, and run the command that this prints.
# The machine it is for has python 3.12, torch 2.11 (CUDA), transformers, accelerate, numpy, pyarrow, pandas, matplotlib,
# mpi4py, psutil, sacrebleu, pytest and pytest-xdist, and nothing else of the project's needs.
set -euo pipefail
test -f launch/run.py || { echo "run this in the root of the checkout" >&2; exit 2; }
python=${PYTHON:-.venv/bin/python}
demo=
if [ "${1:-}" = --model ]; then
  demo=${2:?the folder of make demo}
fi
most_mib=62 # EDIT: what may travel at once
part_mib=48 # EDIT: of it, what a part of the model may have

# With wheels for python 3.12 on Linux, or pure Python; in the versions that are installed and tested here.
binary="hjson pydantic pydantic_core annotated-types typing-inspection typing_extensions jsonargparse typeshed-client
  docstring-parser gguf peft datasets dill multiprocess nltk defusedxml absl-py"
# Of its libraries the one for that CUDA alone, and the CPU's: 8 MB of 43.
quantization=bitsandbytes
other_libraries=("bitsandbytes/libbitsandbytes_cuda1[12]*" "bitsandbytes/libbitsandbytes_rocm*"
  "bitsandbytes/libbitsandbytes_xpu*")
# Their index has the source alone. No operator of DeepSpeed is compiled: the wheel is pure Python.
source="deepspeed rouge-score"

# NAME... -> NAME==VERSION of each. What is not installed here is taken as new as it comes.
pinned() {
  "$python" - "$@" <<'P'
import importlib.metadata
import sys

for name in sys.argv[1:]:
    try:
        print(f"{name}=={importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        print(name)
P
}

mkdir -p .whl build/wheels
rm -f .whl/*.whl
platforms=()
for platform in manylinux_2_28 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${platform}_x86_64")
done
# shellcheck disable=SC2046,SC2086
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
  -d .whl $(pinned $binary $quantization)
zip -q -d .whl/bitsandbytes-*.whl "${other_libraries[@]}"
# Built once: it takes a minute.
for wanted in $(pinned $source); do
  stem=$(echo "${wanted%%==*}" | tr - _)-${wanted##*==}
  ls build/wheels/"$stem"-*.whl >/dev/null 2>&1 ||
    DS_BUILD_OPS=0 "$python" -m pip wheel -q --no-deps --no-build-isolation -w build/wheels "$wanted"
  cp build/wheels/"$stem"-*.whl .whl/
done

rm -rf .model
if [ -n "$demo" ]; then
  mkdir .model
  gguf=$(ls "$demo"/*.gguf)
  split --bytes "${part_mib}M" --numeric-suffixes --suffix-length 2 "$gguf" .model/part_
  sha256sum "$gguf" >.model/sha256
  cp -r "$demo/federation" .model/federation
fi

bytes_of() { du --bytes --total --summarize "$@" | tail -1 | cut -f1; }
mapfile -d '' tree < <(git ls-files -z --cached --others --exclude-standard)
together=$(($(bytes_of "${tree[@]}") + $(bytes_of .whl)))
if [ -n "$demo" ]; then
  together=$((together + $(bytes_of .model/part_00)))
fi
mib=$((together / 2**20))
echo "the checkout and what travels first with it: $mib of $most_mib MiB"
[ "$mib" -lt "$most_mib" ] || { echo "too large to travel" >&2; exit 1; }

install="python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl"
kit='PYTHONPATH=/tmp/site python3 -m benchmarks.gpu --out "${OUT:-build/bench-gpu}"'
if [ -z "$demo" ]; then
  echo "there, with .whl:"
  echo "  $install && $kit"
  exit
fi
parts=(.model/part_*)
last=$((${#parts[@]} - 1))
echo "there, with .whl and ${parts[0]}, which do not fit beside the other parts:"
echo "  $install && $kit --only facts check --budget 180"
for ((i = 1; i < last; i++)); do
  echo "then, with ${parts[i]} (what was brought before must still be there):"
  echo "  ls .model"
done
echo "then, with ${parts[last]}, .model/sha256 and .model/federation (copy the first results away before):"
echo "  $kit --skip facts check"
