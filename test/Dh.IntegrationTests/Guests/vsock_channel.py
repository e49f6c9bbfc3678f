"""What hosts that come and go say to a runner, and what they must hear.

As a script it runs in a guest: a second runner with an engine of its own, whose hosts come by a listening unix socket, as they
do by vsock; the machine is left to the first runner. test/nested/vsock.py takes the hosts to a machine with a vsock.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback

TIME_LIMIT_S = 60
HELLO = {
    "type": "hello", "protocol": 2, "wall_clock_ns": time.time_ns(), "hostname": "h", "machine_id": "0" * 32,
    "boot_id": "00000000-0000-0000-0000-000000000000",
}


class NoMachine:
    def nothing(self, *_):
        return False

    refresh = correct_clock = kill_run = kill_all_but = ran_out_of_memory = nothing


class Host:
    """One connection; every wait has a limit."""

    def __init__(self, family, address):
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.settimeout(TIME_LIMIT_S)
        self.socket.connect(address)
        self._data = b""

    def say(self, header, body=b""):
        header = json.dumps(header).encode()
        self.socket.sendall(len(header).to_bytes(4, "little") + len(body).to_bytes(4, "little") + header + body)

    def hear(self):
        while True:
            sizes = self._read(8)
            header = json.loads(self._read(int.from_bytes(sizes[:4], "little")))
            body = self._read(int.from_bytes(sizes[4:], "little"))
            if header["type"] != "stdin-credit":  # a filter within the first runner's does not notify: input is wanted at once
                return header, body

    def execute(self, source):
        self.say({
            "type": "exec", "id": 1, "mode": "code", "filename": "<string>", "argv": ["-c"], "env": {}, "wall_clock_ns": time.time_ns(),
            "show_result": True, "show_tables": False,
        }, source)

    def _read(self, size):
        while len(self._data) < size:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError
            self._data += data
        data, self._data = self._data[:size], self._data[size:]
        return data


def check_channel():
    from channel import Channel, Gone

    for end in ("close", "reset", "half-close", "middle of a frame"):
        near, far = socket.socketpair()
        channel = Channel(near.detach(), ends=True)
        channel.send(b"{}")
        assert channel.receive() == ()
        far.sendall(b"\2\0\0\0\0\0\0\0{}")
        assert channel.receive() == [({}, b"")]
        if end == "half-close":
            far.shutdown(socket.SHUT_WR)
        else:
            if end != "reset":
                far.recv(100)
            if end == "middle of a frame":
                far.sendall(b"\2\0\0")
                assert channel.receive() == ()
            far.close()
        try:
            channel.receive()
            raise AssertionError(f"{end}: the host is still there")
        except Gone:
            pass
        if end != "half-close":
            channel.send(b"{}", bytes(100))
            assert channel.unsent == 0, end
        print("channel:", end)


def talk(first, connect):
    """One host after the other; the last one goes while its code runs."""
    assert first.hear()[0]["type"] == "ready"
    second = connect()  # waits until the first has gone
    second.say(HELLO, bytes(64))
    first.say({"type": "exec"})
    assert first.hear()[0] == {"type": "error", "message": "exec before hello"}
    first.say(HELLO, bytes(64))
    assert first.hear()[0]["type"] == "hello"
    first.execute(b"print('one')\n6 * 7")
    assert first.hear() == ({"type": "stdout", "id": 1}, b"one\n")
    assert first.hear()[0]["result_repr"] == "42"
    second.socket.settimeout(0.2)
    try:
        second.hear()
        raise AssertionError("two hosts at once")
    except TimeoutError:
        print("one at a time")
    first.socket.close()
    second.socket.settimeout(TIME_LIMIT_S)
    assert [second.hear()[0]["type"] for _ in range(2)] == ["ready", "hello"]
    second.execute(b"print('two')")
    assert second.hear()[1] == b"two\n"
    assert second.hear()[0]["exit_code"] == 0
    second.socket.shutdown(socket.SHUT_WR)
    third = connect()
    assert third.hear()[0]["type"] == "ready"
    third.execute(b"")
    assert third.hear()[0] == {"type": "error", "message": "exec before hello"}
    print("each greets anew")
    third.say(HELLO, bytes(64))
    assert third.hear()[0]["type"] == "hello"
    third.execute(b"import time; time.sleep(60)")
    third.socket.close()


def main():
    sys.path.insert(0, "/usr/lib/dh")
    import runner as runner_module
    from channel import Channel

    check_channel()
    runner_module.Machine = NoMachine
    engine = runner_module.start_engine("python")
    assert engine.recv(64).startswith(b"ready")
    near, far = socket.socketpair()
    runner = runner_module.Runner(engine, "python", Channel(near.detach()))
    runner_module.rehearse(runner, Channel(far.detach()))
    path = "/run/hosts.sock"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    listener.bind(path)

    def connect():
        return Host(socket.AF_UNIX, path)

    try:
        connect()
        raise AssertionError("a host came before the runner listens")
    except ConnectionRefusedError:
        print("refused before it listens")
    runner.say_ready(listener, "3.11")
    failures = []

    def host():
        try:
            talk(connect(), connect)
        except BaseException:
            failures.append(traceback.format_exc())

    thread = threading.Thread(target=host, daemon=True)
    thread.start()
    try:
        while not failures:
            runner.step()
    except runner_module.Fatal as reason:
        print("fatal:", reason)
    thread.join(TIME_LIMIT_S)
    print(*failures, "end")
    sys.stdout.flush()
    os._exit(len(failures))


if __name__ == "__main__":
    main()
