#!/bin/bash
# image.sh OUTDIR SUITE: builds what a laboratory host boots (Xen, dom0 kernel,
# root file system with stock libvirt) and the guest's kernel and initrd. Root.
#
# The result depends only on this file, host/, guest/, counter/ and Debian's
# archive; `lab` rebuilds it when one of the first four changes.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=$1 suite=$2

case $suite in
trixie) xen=4.20 ;;
bookworm) xen=4.17 ;;
*) echo "lab: no recipe for Debian suite '$suite' (known: trixie, bookworm)" >&2; exit 2 ;;
esac

say() { printf 'lab:   %s\n' "$*" >&2; }
work=$out/work
rm -rf "$work"
mkdir -p "$work/rootfs" "$work/guest"
R=$work/rootfs

# qemu-system-xen is the device model of HVM guests.
say "fetching Debian $suite with Xen $xen and libvirt (about 90 s)"
mmdebstrap --quiet --variant=minbase --include="systemd-sysv,udev,kmod,dbus,iproute2,procps,linux-image-amd64,xen-hypervisor-$xen-amd64,xen-utils-$xen,xen-utils-common,qemu-system-xen,libvirt-daemon-system,libvirt-daemon-driver-xen,libvirt-clients,openssh-server,bridge-utils,ethtool,iputils-ping,tcpdump,strace,python3-libvirt,openvswitch-switch" \
	"$suite" "$work/rootfs.tar" >&2
tar xf "$work/rootfs.tar" -C "$R" --exclude="./dev/*"
rm "$work/rootfs.tar"

say "setting the hosts up"
[ -f "$out/id" ] || ssh-keygen -q -t ed25519 -N '' -C kemari-lab -f "$out/id"
install -d -m 700 "$R/root/.ssh"
install -m 600 "$out/id.pub" "$R/root/.ssh/authorized_keys"
install -m 600 "$out/id" "$R/root/.ssh/id_ed25519"
printf 'Host xen1 xen2 10.99.0.*\n\tStrictHostKeyChecking accept-new\n' >"$R/root/.ssh/config"
install -m 755 "$here/host/lab-net" "$R/usr/local/sbin/lab-net"
install -m 644 "$here/host/lab-net.service" "$R/etc/systemd/system/lab-net.service"
echo '/dev/sda / ext4 defaults,noatime 0 1' >"$R/etc/fstab"
printf '127.0.0.1 localhost\n10.99.0.1 xen1\n10.99.0.2 xen2\n' >"$R/etc/hosts"
# Both hosts answer with one host key, so that either may be reached as xen1 or
# xen2 without a prompt; this is a laboratory.
for h in xen1 xen2 10.99.0.1 10.99.0.2; do
	printf '%s %s\n' "$h" "$(cut -d' ' -f1,2 "$R/etc/ssh/ssh_host_ed25519_key.pub")"
done >"$R/root/.ssh/known_hosts"
# systemd wants to see /proc, and says so in every line without it.
in_root() { unshare -m sh -c 'mount -t proc proc "$0/proc" && exec chroot "$0" "$@"' "$R" "$@"; }
in_root systemctl -q enable lab-net ssh libvirtd
# Without this a login starts root's own systemd, in trixie with an ssh-agent as
# well. That takes an emulated host 20 s, longer than peers wait for an answer.
sed -i /pam_systemd/d "$R/etc/pam.d/common-session"
# Timers would wake up in the middle of a measurement.
in_root systemctl -q mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer systemd-tmpfiles-clean.timer libvirt-guests.service
# Open vSwitch is there for who wants it.
in_root systemctl -q disable openvswitch-switch
# An emulated AMD processor under Xen shows neither sep nor vme, and libvirt
# knows no processor model without both.
sed -i "/name='sep'/d;/name='vme'/d" "$R"/usr/share/libvirt/cpu_map/x86_{kvm64,qemu64,kvm32,486,pentium}.xml

cp "$R"/boot/vmlinuz-* "$out/vmlinuz"
cp "$R"/boot/initrd.img-* "$out/initrd.img"
zcat "$R/boot/xen-$xen-amd64.gz" >"$out/xen"

say "building the guest"
G=$work/guest
mkdir -p "$G"/{bin,proc,sys,dev,mod}
cp "$(command -v busybox)" "$G/bin/busybox"
find "$R/lib/modules" -name 'xen-netfront.ko*' -o -name 'xen-blkfront.ko*' | while read -r f; do
	case $f in
	*.xz) xz -dc "$f" >"$G/mod/$(basename "$f" .xz)" ;; # since trixie
	*) cp "$f" "$G/mod/" ;;
	esac
done
cp "$out/counter" "$G/bin/counter"
install -m 755 "$here/guest/init" "$G/init"
(cd "$G" && find . | LC_ALL=C sort | cpio --quiet -o -H newc | gzip -9) >"$out/guest.img"
mkdir -p "$R/var/lib/kemari-lab"
cp "$out/vmlinuz" "$out/guest.img" "$R/var/lib/kemari-lab/"
cp "$here"/guest/*.xml "$R/var/lib/kemari-lab/"

say "writing the disk image"
rm -f "$out/base.img"
truncate -s 4G "$out/base.img"
mke2fs -q -t ext4 -d "$R" "$out/base.img"
rm -rf "$work"
