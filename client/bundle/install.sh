#!/bin/sh
# Installs Silotune from this folder alone; nothing is fetched, and every file has to have its hash.
#   sh install.sh [FOLDER]      by default /opt/silotune; PYTHON=python3.12 takes another Python
set -eu
target=${1:-/opt/silotune}
case $target in /*) ;; *) target=$PWD/$target ;; esac
CDPATH= cd -- "$(dirname -- "$0")"
"${PYTHON:-@PYTHON@}" -I verify.py
"${PYTHON:-@PYTHON@}" -m venv "$target"
install() {
    "$target/bin/python" -I -m pip --isolated --disable-pip-version-check install --quiet \
        --no-index --find-links wheels --require-hashes --no-deps "$@"
}
install -r locks/build.txt
install --no-build-isolation --use-pep517 -r locks/requirements.txt
install -r locks/torch.txt
install -r locks/silotune.txt
"$target/bin/silotune" --version
