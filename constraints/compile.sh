#!/usr/bin/env bash
# Rewrites every lock in this folder. One resolution (all.txt) constrains the others, so that roles never disagree.
set -euo pipefail
cd "$(dirname "$0")/.."
compile() { uv pip compile pyproject.toml "$@" --universal --generate-hashes --no-emit-index-url --no-header --python-version 3.11 --quiet; }
compile --all-extras --group dev -o constraints/all.txt
for role in edge cloud router sync demo; do
    compile --extra "$role" -c constraints/all.txt -o "constraints/$role.txt"
done
compile --extra edge --extra litert -c constraints/all.txt -o constraints/edge-litert.txt
compile --extra demo --group dev -c constraints/all.txt -o constraints/dev.txt
printf 'hatchling>=1.30\neditables>=0.5\n' | uv pip compile - --universal --generate-hashes --no-emit-index-url --no-header --python-version 3.11 --quiet -o constraints/build.txt
uv pip compile --group stubs --universal --generate-hashes --no-emit-index-url --no-header --python-version 3.11 --quiet -o constraints/stubs.txt
uv pip compile --group gmqtt --universal --generate-hashes --no-emit-index-url --no-header --python-version 3.11 --quiet -o constraints/gmqtt.txt
uv pip compile --group s3-server --universal --generate-hashes --no-emit-index-url --no-header --python-version 3.11 --quiet -o constraints/s3-server.txt
for peer in envoy mlserver triton; do
    uv pip compile --group "peers-$peer" --universal --generate-hashes --no-emit-index-url --no-header --python-version 3.11 --quiet -o "constraints/peers-$peer.txt"
done
