#!/bin/bash
# Restores a snapshot of dh in a QEMU that is started by hand: what `dh exec` does, in the open. A page server must listen on the socket
# (docs/page-server.md).
#
#   qemu-restore.sh SNAPSHOT_DIRECTORY PAGE_SERVER_SOCKET PRELOAD_LIBRARY [CHANNEL_SOCKET]
#
# When the machine runs, QMP commands may follow on stdin, one per line; end of file ends the machine. The guest channel (docs/guest-protocol.md)
# is a unix socket at CHANNEL_SOCKET. The machine must be the one that `dh vm prepare` booted: the arguments are those of src/Dh/Vmm/Qemu.
set -euo pipefail
snapshot=$1 socket=$2 preload=$3 channel=${4:-}

value() { sed -n "s/^ *\"$1\": *\"\{0,1\}\([^\",]*\).*/\1/p" "$snapshot/manifest.json"; }
memory=$(value memory_mib) cpus=$(value cpus)
[[ $(value accelerator) == Tcg ]] || { echo "qemu-restore.sh: this script knows snapshots of TCG machines only" >&2; exit 1; }

backend=null
[[ -z $channel ]] || backend=socket,path=$channel,server=on,wait=off

coproc QEMU { LD_PRELOAD=$preload DH_RAM_SIZE=$((memory << 20)) DH_UFFD_SOCKET=$socket exec qemu-system-x86_64 \
    -nodefaults -no-user-config -nic none -display none -no-reboot -S \
    -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny \
    -object "memory-backend-ram,id=ram0,size=${memory}M" \
    -machine microvm,memory-backend=ram0,dump-guest-core=off,mem-merge=off,x-option-roms=off,usb=off,pcie=off \
    -global apic-common.vapic=off -accel tcg,thread=multi,tb-size=32 -cpu Nehalem,spec-ctrl=off,arat=on -smp "$cpus" -m "${memory}M" \
    -chardev stdio,id=qmp,signal=off -mon chardev=qmp,mode=control \
    -chardev null,id=console -serial chardev:console \
    -chardev "$backend,id=channel" \
    -device virtio-serial-device,max_ports=2 -device virtserialport,chardev=channel,name=dh.channel \
    -drive "if=none,id=root,file=$snapshot/root.img,format=raw,read-only=on,file.locking=off" -device virtio-blk-device,drive=root \
    -incoming defer 9<"$snapshot/state"; }
exec 3<&"${QEMU[0]}" 4>&"${QEMU[1]}"

ask() { # COMMAND PATTERN: asks until the answer has the pattern in it
    local answer
    echo "$1" >&4
    while read -r -t 30 answer <&3; do
        case $answer in
            *"$2"*) return ;;
            *'"error"'*) break ;;
            *'"return"'*) sleep 0.01; echo "$1" >&4 ;;
        esac
    done
    echo "qemu-restore.sh: $1 failed: $answer" >&2
    exit 1
}
ask '{"execute":"qmp_capabilities"}' '"return"'
ask '{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"x-ignore-shared","state":true}]}}' '"return"'
ask '{"execute":"migrate-incoming","arguments":{"uri":"fd:9"}}' '"return"'
ask '{"execute":"query-status"}' '"status": "paused"' # the device state is in place, and so are the pages that it needs
ask '{"execute":"cont"}' '"return"'

cat <&3 &
cat >&4
echo '{"execute":"quit"}' >&4
wait "$QEMU_PID"
wait
