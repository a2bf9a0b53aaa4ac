#!/usr/bin/env bash
# Builds the wheel, installs it in an environment of its own and runs the simulated pipeline from an empty folder.
# Dependencies are borrowed from the environment this is called in; nascompile itself must come from the wheel.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python -m build --wheel --outdir "$work/dist" "$checkout" >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
python -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-deps "$work"/dist/*.whl
# after the install, or pip would find the editable one; a path in a .pth file does not read the .pth files of that path
borrowed=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$borrowed" >"$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"

mkdir "$work/empty"
cd "$work/empty"
export XDG_DATA_HOME="$work/data"
"$work/venv/bin/python" - "$work/venv" "$checkout" <<'PY'
import sys
from pathlib import Path

import nascompile

package, checkout = Path(nascompile.__file__).parent, Path(sys.argv[2]) / "nascompile"
assert package.is_relative_to(Path(sys.argv[1]).resolve()), package
for kind in ("demo", "latency_tables", "mcu/kernels", "mcu/firmware"):
    data = {p.relative_to(checkout): p.stat().st_size for p in (checkout / kind).rglob("*") if p.is_file()}
    there = {p.relative_to(package): p.stat().st_size for p in (package / kind).rglob("*") if p.is_file()}
    assert data == there, (kind, data.keys() ^ there.keys())
    print(f"wheel: {len(data)} files of {kind}")
PY
"$work/venv/bin/nascompile" run --device fake --json >result.json
"$work/venv/bin/python" - <<'PY'
import json
from pathlib import Path

result = json.loads(Path("result.json").read_text())
task = result["tasks"][0]
assert task["baseline"]["p50_ms"] > 0 and task["chosen"]["accuracy"] > 0, task
assert Path(result["engine"], "manifest.json").is_file(), result["engine"]
print(f"wheel: the simulated pipeline chose {Path(result['engine']).name}")
PY
"$work/venv/bin/nascompile" verify "$("$work/venv/bin/python" -c 'import json; print(json.load(open("result.json"))["engine"])')"
