#!/bin/bash
# apptainer into a folder of its own, for tests/slurm/test_containers.py: `tests/slurm/get_apptainer.sh TARGET`, as root.
# Debian has it in sid only: its package and the libraries that it is linked with are unpacked, nothing is installed.
set -euo pipefail
target=$(realpath -m "$1")
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; chmod 755 "$work"
install() { apt-get install -qq -y --no-install-recommends patchelf squashfs-tools >/dev/null; }
command -v patchelf >/dev/null || install || { apt-get -qq update && install; }
mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | grep -m1 debian.org/debian)
key=/usr/share/keyrings/debian-archive-keyring.gpg
mkdir -p "$work"/{lists/partial,cache/archives/partial,unpacked}
echo "deb [signed-by=$key] $mirror sid main" > "$work/sources.list"
apt=(-o APT::Sandbox::User=root -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache" -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=-)
apt-get "${apt[@]}" -qq update
(cd "$work" && apt-get "${apt[@]}" -qq download apptainer libc6 libseccomp2 libsqlite3-0)
for package in "$work"/*.deb; do dpkg-deb -x "$package" "$work/unpacked"; done
libraries=$(dirname "$(find "$work/unpacked" -name libseccomp.so.2)")
rm -rf "$target"; mkdir -p "$target/lib/var/lib/apptainer/mnt/session" "$target/sid"
cp -a "$work/unpacked/etc" "$target/etc"
cp -a "$work/unpacked/usr/bin" "$target/bin"
lib="$target/lib/$(basename "$libraries")"; mkdir "$lib"
cp -a "$libraries/apptainer" "$lib/apptainer"
cp -a "$libraries"/{ld-linux*,libc.so*,libm.so*,libseccomp.so*,libsqlite3.so*} "$target/sid/"
for program in "$target/bin/apptainer" "$lib/apptainer/bin/starter"; do
  patchelf --set-interpreter "$(ls "$target"/sid/ld-linux*)" --force-rpath --set-rpath "$target/sid" "$program"
done
"$target/bin/apptainer" --version
