#!/bin/sh
# A fleet on this machine: SuperLink behind the front that edges call, a host, two edges with the whole base and one without, three rounds.
# Then the same run.toml in one process: both adapters are the same file, byte for byte.
# Usage: examples/fleet/run.sh [DIR]     (DIR is made; ports 7440 and 7441 of 127.0.0.1, or PORT and PORT + 1)
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-fleet-demo}
port=${PORT:-7440}
link=127.0.0.1:$port
host=127.0.0.1:$((port + 1))
mkdir "$out"
pids=""
trap 'kill $pids 2>/dev/null || true' EXIT

atoll fleet init "$here/run.toml" --out "$out/fleet" --address "$link" --host "big=$host"

(cd "$out/fleet/hosts/big" && exec $(cat start.txt)) > "$out/host.log" 2>&1 &
pids="$pids $!"
for name in north south west; do
    atoll fleet join "$out/fleet/edges/$name" > "$out/$name.log" 2>&1 &
    pids="$pids $!"
done
atoll train "$out/fleet/coordinator/run.toml" --engine flower --fleet "$out/fleet/coordinator" --out "$out/flower"

atoll train "$here/run.toml" --out "$out/here"

cd "$out"
sha256sum flower/adapter/adapter_model.safetensors here/adapter/adapter_model.safetensors
cmp flower/adapter/adapter_model.safetensors here/adapter/adapter_model.safetensors
echo "the fleet's adapter equals that of one process"
