#!/bin/sh
# Writes requirements.lock (what the image runs) and tools.lock (what builds it) anew: the newest versions that pyproject.toml and tools.in allow,
# each file by its hash, for every Python from 3.11. It changes no environment. Usage: lock.sh [PYTHON]
set -eu
cd "$(dirname "$0")/../.."
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"${1:-python3}" -m venv "$tools"
"$tools/bin/pip" install -q --disable-pip-version-check uv==0.13.9

lock() {
    "$tools/bin/uv" pip compile -q --no-config --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate \
        --custom-compile-command deploy/image/lock.sh "$@"
}
lock --extra kubernetes --extra otel --extra xet pyproject.toml -o deploy/image/requirements.lock
lock deploy/image/tools.in -o deploy/image/tools.lock
