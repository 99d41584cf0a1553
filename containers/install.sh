#!/bin/sh
# The steps of both containers, which are tried without one (tests/launch/test_containers.py, make containers):
#   install.sh system                                  a C compiler, Python with venv, and ssh for deepspeed --hostfile
#   install.sh wheel SOURCE WHEELS                     build the wheel of the package
#   install.sh package WHEELS TORCH TORCH_INDEX EXTRAS make the environment $PREFIX (/opt/dpa_ds), torch first
set -eu
PREFIX=${PREFIX:-/opt/dpa_ds}
PYTHON=${PYTHON:-python3.11}

case $1 in
system)
  export DEBIAN_FRONTEND=noninteractive
  apt-get update
  packages="gcc g++ openssh-client pdsh"
  command -v "$PYTHON" || packages="$packages python3.11 python3.11-dev python3.11-venv"
  # shellcheck disable=SC2086  # words
  apt-get install --yes --no-install-recommends $packages
  rm -rf /var/lib/apt/lists/*
  ;;
wheel)
  "$PYTHON" -m venv "$3/build"
  "$3/build/bin/python" -m pip install --quiet "setuptools>=77"
  "$3/build/bin/python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$3" "$2"
  rm -rf "$3/build"
  ;;
package)
  "$PYTHON" -m venv "$PREFIX"
  pip="$PREFIX/bin/python -m pip install --no-cache-dir --quiet"
  # torch and these first: DeepSpeed needs them at build time.
  $pip "$3" --index-url "$4"
  $pip "setuptools>=77" wheel ninja py-cpuinfo numpy packaging psutil
  wheel=$(ls "$2"/dpa_ds-*.whl)
  DS_BUILD_OPS=0 $pip --no-build-isolation "$wheel[$5]"
  ;;
*)
  echo "usage: install.sh system | wheel SOURCE WHEELS | package WHEELS TORCH TORCH_INDEX EXTRAS" >&2
  exit 2
  ;;
esac
