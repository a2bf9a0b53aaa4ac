#!/usr/bin/env bash
# Runs a kit under aarch64 emulation: shows that it loads and runs on such a processor. Its times are emulated and labelled so.
#
#   tools/kit_on_aarch64.sh KIT WORK     # KIT: a folder by `nascompile kit export --processor arm`; WORK: kept, so that it goes on
#
# On x86-64 Debian with mmdebstrap and qemu-user-static. ONNXRUNTIME and MIRROR choose a version and a Debian mirror.
set -euo pipefail
kit=$(realpath "$1")
mkdir -p "$2"
work=$(realpath "$2")
root=$work/root packages=$work/packages
for needed in mmdebstrap qemu-aarch64-static; do
  command -v "$needed" >/dev/null || { echo "error: no $needed here; apt install mmdebstrap qemu-user-static" >&2; exit 1; }
done

if [ ! -x "$root/usr/bin/python3.11" ]; then
  libraries=libstdc++6,libgomp1,zlib1g,libbz2-1.0,liblzma5,libffi8,libssl3,libexpat1,libc6,libgcc-s1,libuuid1
  mmdebstrap --quiet --arch=arm64 --variant=extract --skip=check/qemu \
    --include="python3-minimal,libpython3-stdlib,python3.11,$libraries" bookworm "$root" ${MIRROR:+"$MIRROR"}
fi
if [ ! -d "$packages/onnxruntime" ]; then
  platforms=(--platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64)
  python3 -m pip install --quiet --target "$packages" --only-binary=:all: "${platforms[@]}" --python-version 3.11 \
    --implementation cp --abi cp311 --abi abi3 --abi none "onnxruntime==${ONNXRUNTIME:-1.22.1}" numpy
fi
# the emulator looks into the root first, so that the script and the runtime see the processor that is emulated, not this one;
# as many of them as there are, because the runtime counts them elsewhere
mkdir -p "$root/proc"
for ((i = 0; i < $(nproc --all); i++)); do
  printf '%s\n' "processor : $i" 'BogoMIPS : 108.00' 'Features : fp asimd evtstrm crc32 cpuid' 'CPU implementer : 0x41' \
    'CPU architecture: 8' 'CPU variant : 0x0' 'CPU part : 0xd08' 'CPU revision : 3' ''
done >"$root/proc/cpuinfo"
qemu-aarch64-static -cpu cortex-a72 -L "$root" -E PYTHONHOME="$root/usr" -E PYTHONPATH="$packages" -E OMP_NUM_THREADS=1 \
  "$root/usr/bin/python3.11" -s "$kit/run_kit.py" --emulated "${@:3}"
