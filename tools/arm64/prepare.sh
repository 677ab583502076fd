#!/usr/bin/env bash
# An arm64 Debian with Python, ONNX Runtime and TVM in a folder, and the emulator that runs it: no root, nothing installed.
#
#     tools/arm64/prepare.sh [FOLDER]        default: ~/.cache/graphopt/arm64, about 900 MB
#
# Afterwards FOLDER/python is a Python 3.11 for arm64: tests run the runners of bundles with it. On an arm64 machine it
# runs without an emulator. Packages come by apt-get with lists, sources and status of its own (it resolves dependencies,
# as debootstrap does, and needs no root, which debootstrap does), wheels by pip, in the versions of tools/constraints.txt.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
constraints="$here/../constraints.txt"
mkdir -p "${1:-$HOME/.cache/graphopt/arm64}"
folder="$(cd "${1:-$HOME/.cache/graphopt/arm64}" && pwd)"
pip="${PIP:-python3 -m pip}"
mirror="${DEBIAN_MIRROR:-http://deb.debian.org/debian}"
stamp="$folder/ready"
wanted="$(cat "$here/prepare.sh" "$constraints" | sha256sum)"

if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
  echo "$folder/python is ready"
  exit 0
fi
for tool in apt-get dpkg-deb unzip; do
  command -v "$tool" > /dev/null || { echo "prepare.sh: needs $tool (Debian or Ubuntu: apt install $tool)" >&2; exit 6; }
done

# apt-get as if on an empty machine of architecture $1, told $2...
foreign_apt() {
  local state="$folder/apt-$1" architecture="$1"
  shift
  mkdir -p "$state/lists/partial" "$state/archives/partial"
  touch "$state/status"
  cat > "$state/sources.list" << END
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bookworm main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bookworm-backports main
END
  cat > "$state/apt.conf" << END
Dir::State::status "$state/status";
Dir::State::Lists "$state/lists";
Dir::Cache "$state";
Dir::Etc::SourceList "$state/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Parts "/dev/null";
APT::Architecture "$architecture";
APT::Architectures { "$architecture"; };
APT::Install-Recommends "false";
APT::Sandbox::User "";
END
  (cd "$state/archives" && APT_CONFIG="$state/apt.conf" apt-get -qq "$@")
}

pin() { grep -i "^$1==" "$constraints"; }

rm -rf "$folder/root" "$folder/packages" "$folder/emulator" "$folder/apt-"*
rm -f "$stamp"

echo "system: Debian 12 for arm64"
foreign_apt arm64 update
foreign_apt arm64 install --yes --download-only python3 libgomp1 libstdc++6 > /dev/null
mkdir -p "$folder/root"
for package in "$folder"/apt-arm64/archives/*.deb; do
  dpkg-deb -x "$package" "$folder/root"
done

echo "packages: onnxruntime, apache-tvm and what they import"
$pip download --quiet --disable-pip-version-check --only-binary=:all: --python-version 3.11 --implementation cp \
  --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_26_aarch64 \
  --platform manylinux_2_24_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
  --dest "$folder/wheels" -c "$constraints" \
  "$(pin onnxruntime)" "$(pin apache-tvm)" "$(pin apache-tvm-ffi)" "$(pin numpy)" "$(pin ml_dtypes)"
for wheel in "$folder"/wheels/*.whl; do
  unzip -qo "$wheel" -d "$folder/packages"
done

# Debian 12's own emulator, 7.2, dies of a segmentation fault on `import onnxruntime`; that of its backports does not.
emulator=""
if [[ "$(uname -m)" != aarch64 ]]; then
  echo "emulator: qemu-user 10"
  machine="$(dpkg --print-architecture)"
  foreign_apt "$machine" update
  foreign_apt "$machine" download -t bookworm-backports qemu-user
  mkdir -p "$folder/emulator"
  dpkg-deb -x "$folder/apt-$machine"/archives/qemu-user_*.deb "$folder/emulator"
  emulator="$folder/emulator/usr/bin/qemu-aarch64 -L $folder/root"
fi

cat > "$folder/run" << END
#!/bin/sh
# Runs an arm64 program of this folder's system: run PROGRAM ARGUMENT...
exec $emulator "\$@"
END
cat > "$folder/python" << END
#!/bin/sh
PYTHONPATH="$folder/packages\${PYTHONPATH:+:\$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 exec "$folder/run" "$folder/root/usr/bin/python3.11" "\$@"
END
chmod +x "$folder/run" "$folder/python"
rm -rf "$folder/wheels" "$folder/apt-"*
"$folder/python" -c 'import platform, numpy, onnxruntime; print("ready:", platform.machine(), "Python", platform.python_version(), "numpy", numpy.__version__, "onnxruntime", onnxruntime.__version__)'
printf '%s' "$wanted" > "$stamp"
