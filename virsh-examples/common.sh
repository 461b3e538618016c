# shellcheck shell=bash
# What the stories share; sourced by them. They run on the machine the laboratory
# runs on, and need nothing of it that `lab help` does not tell.
set -euo pipefail
examples=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
lab=$examples/lab/lab
tmp=$(mktemp -d)
started=()
trap 'status=$?; for p in "${started[@]}"; do kill "$p" 2>/dev/null || true; done; rm -rf "$tmp"; exit $status' EXIT

# A line per step, with the seconds since the beginning.
SECONDS=0
step() { printf '\n[%3d s] %s\n' "$SECONDS" "$*"; }
# Shows a command as an operator on that host would type it, and runs it there.
on() {
	local n=$1
	shift
	printf 'xen%s# %s\n' "$n" "$*"
	"$lab" ssh "$n" "$@"
}
fail() {
	printf 'FAILED: %s\n' "$*" >&2
	exit 1
}
ok() {
	printf '\nOK\n'
	exit 0
}
# word KEY LINE: the value of KEY in words key=value
word() { sed -n "s/.*\b$1=\([^ ]*\).*/\1/p" <<<"$2"; }
# field KEY: the number of "KEY" in the JSON on stdin
field() { sed -n "s/.*\"$1\": \([0-9]*\).*/\1/p" | head -n 1; }

# The client that counts: `count_start`, `count_mark` at a power cut, `count_stop`
# shows what it saw. It runs on this machine, outside both hosts.
guest=10.99.0.100
count_start() {
	mkfifo "$tmp/count.in"
	"$lab" exec "$examples/../bin/count" --every "${EVERY:-250ms}" "$guest:7" <"$tmp/count.in" >"$tmp/count.out" 2>&1 &
	count_pid=$!
	started+=("$count_pid")
	exec 8>"$tmp/count.in"
}
count_mark() { echo mark >&8; }
count_stop() { # sets $seen; not for a subshell, which could not close our end
	echo end >&8
	exec 8>&-
	wait "$count_pid" || true
	seen=$(cat "$tmp/count.out")
	echo "$seen"
}
# Waits until the guest answers, at most $1 seconds.
guest_answers() {
	local end=$((SECONDS + $1))
	until "$lab" exec timeout 2 socat -t1 - "TCP:$guest:7,connect-timeout=1" <<<GET >/dev/null 2>&1; do
		[ $SECONDS -lt $end ] || return 1
		sleep 0.5
	done
}
# The guest of the stories, with stock libvirt on xen1, unless it runs there already.
guest_runs() {
	step 'Start a guest on xen1, with stock libvirt. It serves a counter over TCP.'
	"$lab" ssh 1 virsh -q -c xen:///system domstate g1 2>/dev/null | grep -qx running ||
		on 1 virsh -c xen:///system create /var/lib/kemari-lab/g1.xml
	guest_answers 300 || fail "the guest does not answer on $guest"
}
# Protects it, unless a story before has.
protect() {
	"$lab" ssh 1 kemari status | grep -qE '^g1 +primary +protected ' || on 1 virsh migrate --kemari --live --kemari-timeout "${TIMEOUT_MS:-1500}" g1 kemari+ssh://xen2/system
}
# Libvirt's own lifecycle events on host $1, one a line, into $tmp/events.
events_start() {
	"$lab" ssh "$1" 'virsh -q -c xen:///system event --event lifecycle --loop' >"$tmp/events" 2>&1 &
	started+=($!)
	sleep 2
}
# The events of domain $1 as STARTED/RESTORED,RESUMED/MIGRATED.
events() {
	sed -n "s/^event 'lifecycle' for domain '$1': \([^ ]*\) \(.*\)/\1\/\2/p" "$tmp/events" |
		tr '[:lower:] ' '[:upper:]_' | paste -sd, -
}
