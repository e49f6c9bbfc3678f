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


class Malformed(Exception):
    """The stream cannot be followed any further."""


class Channel:
    def __init__(self, descriptor):
        self.descriptor = descriptor
        os.set_blocking(descriptor, False)
        self.unsent = 0  # bytes
        self._urgent = collections.deque()
        self._in_order = collections.deque()
        self._in_hand = memoryview(b"")  # what is left of the frame that is being sent: nothing may come before it
        self._received = bytearray()

    def start_anew(self):
        """The host has gone: the next one starts with a whole frame in both directions."""
        self._received.clear()
        if len(self._in_hand) < len(self._in_hand.obj):
            self.unsent -= len(self._in_hand)
            self._in_hand = memoryview(b"")

    def receive(self):
        """Reads once. Returns the frames that are complete now, as (header, body)."""
        received = self._received
        try:
            received += os.read(self.descriptor, READ_SIZE)
        except BlockingIOError:
            return ()
        frames = []
        while len(received) >= LENGTHS.size:
            header_size, body_size = LENGTHS.unpack_from(received)
            if not 2 <= header_size <= MAX_HEADER or body_size > MAX_BODY:
                raise Malformed(f"a frame of {header_size} and {body_size} bytes")
            body_start = LENGTHS.size + header_size
            end = body_start + body_size
            if len(received) < end:
                break
            try:
                header = json.loads(received[LENGTHS.size : body_start])
            except ValueError as error:
                raise Malformed(f"a frame's header: {error}") from None
            if not isinstance(header, dict):
                raise Malformed("a frame's header is not an object")
            frames.append((header, bytes(received[body_start:end])))
            del received[:end]
        return frames

    def send(self, header, body=b"", urgent=False):
        """Sends a frame, at once or as soon as the host takes it. An urgent one overtakes the others."""
        frame = LENGTHS.pack(len(header), len(body)) + header + body
        (self._urgent if urgent else self._in_order).append(frame)
        self.unsent += len(frame)
        self.flush()

    def flush(self):
        """Sends what the host takes now."""
        while self.unsent:
            if not self._in_hand:
                self._in_hand = memoryview((self._urgent or self._in_order).popleft())
            try:
                sent = os.write(self.descriptor, self._in_hand)
            except BlockingIOError:
                return
            self._in_hand = self._in_hand[sent:]
            self.unsent -= sent
