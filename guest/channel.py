"""The guest channel's end in the guest: frames over a byte stream, without ever waiting for the host.

The frames' form and limits are those of docs/guest-protocol.md.
"""

import collections
import json
import os
import struct

LENGTHS = struct.Struct("<II")
MAX_HEADER = 1_048_576
MAX_BODY = 16_777_216
READ_SIZE = 65_536

_scan = json.JSONDecoder().scan_once  # json.loads looks for white space as well, with regular expressions


class Malformed(Exception):
    """The stream cannot be followed any further."""


class Gone(Exception):
    """The host has gone, and this channel with it."""


class Channel:
    def __init__(self, descriptor, ends=False):
        """`ends` is what a connection does, and a port does not, when the host goes."""
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor
        self._ends = ends
        self.unsent = 0  # bytes
        self._urgent = collections.deque()
        self._in_order = collections.deque()
        self._in_hand = b""  # the frame that is being sent: nothing may come before the rest of it
        self._in_hand_sent = 0
        self._received = []
        self._received_size = 0
        self._needed = LENGTHS.size  # bytes, before there can be another frame

    def start_anew(self):
        """The host has gone: the next one starts with a whole frame in both directions."""
        self._received, self._received_size, self._needed = [], 0, LENGTHS.size
        if self._in_hand_sent:
            self.unsent -= len(self._in_hand) - self._in_hand_sent
            self._in_hand, self._in_hand_sent = b"", 0

    def receive(self):
        """Reads once. Returns the frames that are complete now, as (header, body)."""
        try:
            data = os.read(self.descriptor, READ_SIZE)
        except BlockingIOError:
            return ()
        except OSError:  # reset
            if not self._ends:
                raise
            raise Gone from None
        if not data and self._ends:  # closed, or closed in one direction: nobody asks for anything any more
            raise Gone
        self._received.append(data)
        self._received_size += len(data)
        if self._received_size < self._needed:
            return ()
        data = b"".join(self._received)
        frames, start = [], 0
        while True:
            body_start = start + LENGTHS.size
            if len(data) < body_start:
                self._needed = LENGTHS.size
                break
            header_size, body_size = LENGTHS.unpack_from(data, start)
            if not 2 <= header_size <= MAX_HEADER or body_size > MAX_BODY:
                raise Malformed(f"a frame of {header_size} and {body_size} bytes")
            body_start += header_size
            end = body_start + body_size
            if len(data) < end:
                self._needed = end - start
                break
            frames.append((_parse(data[body_start - header_size : body_start]), data[body_start:end]))
            start = end
        self._received = [data[start:]]
        self._received_size = len(data) - start
        return frames

    def send(self, header, body=b"", urgent=False):
        """Sends a frame, at once or as soon as the host takes it. An urgent one overtakes the others."""
        frame = LENGTHS.pack(len(header), len(body)) + header + body
        if not self.unsent:
            self._in_hand, self._in_hand_sent = frame, 0
        elif urgent:
            self._urgent.append(frame)
        else:
            self._in_order.append(frame)
        self.unsent += len(frame)
        self.flush()

    def flush(self):
        """Sends what the host takes now."""
        while self.unsent:
            if self._in_hand_sent == len(self._in_hand):
                self._in_hand, self._in_hand_sent = (self._urgent or self._in_order).popleft(), 0
            rest = memoryview(self._in_hand)[self._in_hand_sent :] if self._in_hand_sent else self._in_hand
            try:
                sent = os.write(self.descriptor, rest)
            except BlockingIOError:
                return
            except OSError:
                if not self._ends:
                    raise
                self._discard()  # receiving tells the rest
                return
            self._in_hand_sent += sent
            self.unsent -= sent

    def _discard(self):
        self._urgent.clear()
        self._in_order.clear()
        self._in_hand, self._in_hand_sent, self.unsent = b"", 0, 0


def _parse(header):
    try:
        value, _ = _scan(header.decode(), 0)
    except (ValueError, StopIteration) as error:
        raise Malformed(f"a frame's header: {error}") from None
    if type(value) is not dict:
        raise Malformed("a frame's header is not an object")
    return value
