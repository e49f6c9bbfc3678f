"""Boots an image under KVM with a vsock, and has hosts come and go by it.

    vsock.py IMAGE_DIRECTORY
"""

import os
import socket
import subprocess
import sys
import tempfile
import time

from vsock_channel import Host, talk

CID, PORT = 3, 25_704
BOOT_LIMIT_S, END_LIMIT_S = 300, 60
KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 reboot=t mitigations=off init_on_free=1 8250.nr_uarts=1 dh.channel=vsock"


def start(image, console):
    return subprocess.Popen([
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-nic", "none", "-display", "none", "-no-reboot",
        "-machine", "microvm,x-option-roms=off", "-accel", "kvm", "-cpu", "host,svm=off", "-smp", "1", "-m", "512",
        "-kernel", f"{image}/kernel", "-initrd", f"{image}/initrd", "-append", KERNEL_ARGUMENTS, "-serial", f"file:{console}",
        "-drive", f"if=none,id=root,file={image}/root.img,format=raw,read-only=on", "-device", "virtio-blk-device,drive=root",
        "-device", f"vhost-vsock-device,guest-cid={CID}",
    ])


def connect():
    return Host(socket.AF_VSOCK, (CID, PORT))


def connect_when_it_listens(machine):
    """The first host comes while the machine still boots, and is refused until the runner listens."""
    refusals, deadline = set(), time.monotonic() + BOOT_LIMIT_S
    while True:
        try:
            host = connect()
            print("refused before it listened by", *sorted(refusals))
            return host
        except OSError as refusal:
            refusals.add(type(refusal).__name__ + str(refusal.errno or ""))
            if machine.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def main():
    with tempfile.NamedTemporaryFile() as console:
        machine = start(sys.argv[1].rstrip("/"), console.name)
        try:
            talk(connect_when_it_listens(machine), connect)
            machine.wait(END_LIMIT_S)  # the last host has gone while its code ran
            words = console.read().decode(errors="replace")
            assert "the host has gone while its code ran" in words, words
        except BaseException:
            print(os.pread(console.fileno(), 1 << 20, 0).decode(errors="replace")[-4000:])
            raise
        finally:
            machine.kill()
            machine.wait()


main()
