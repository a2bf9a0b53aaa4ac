#!/usr/bin/env bash
# Prints the interpreter of an environment with optimum, made under .cache the first time.
# optimum-onnx wants transformers 4, this project transformers 5: they cannot share one.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
venv=$checkout/.cache/optimum-venv
# runtime and torch as this project is tested with: another runtime may round integers another way
requirements="optimum-onnx==0.1.0 optimum~=2.1.0 transformers<4.58 $(grep -E '^(onnxruntime|torch)==' "$checkout/constraints.txt" | xargs)"

mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock"
flock 9 # two callers at once make one environment
if [ "$(cat "$venv/made-of" 2>/dev/null)" != "$requirements" ]; then
  echo "making the environment $venv" >&2
  "${PYTHON:-python3}" -m venv --clear "$venv"
  # shellcheck disable=SC2086 # one requirement a word
  "$venv/bin/pip" install -q $requirements >"$venv/install.log" 2>&1 || { cat "$venv/install.log" >&2; exit 1; }
  echo "$requirements" >"$venv/made-of"
fi
flock -u 9
echo "$venv/bin/python"
