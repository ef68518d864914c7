"""The event bus: NATS, by its own protocol, or one inside the process with the same two operations.

    https://docs.nats.io/reference/reference-protocols/nats-protocol

`subscribe` has a function called with each event of a subject. Subscribers are told alike; those that name the same group
are one: an event goes to any one of them. `publish` says whether a subscriber has confirmed the event, which one does
whose function returns True. NATS keeps nothing: what nobody confirms has to be published again.
"""

import collections
import itertools
import json
import os
import socket
import sys
import threading
import time


class LocalBus:
    """For one process."""

    connected = True

    def __init__(self):
        self.subscribers = []

    def subscribe(self, subject, function, group=""):
        self.subscribers.append((subject, function, group))

    def publish(self, subject, event):
        confirmed, told = False, set()
        for wanted, function, group in self.subscribers:
            if wanted == subject and group not in told:
                told.update([group] if group else [])
                confirmed = call(function, event) or confirmed
        return confirmed


class Nats:
    """A connection to a NATS server, which is made again whenever it is lost."""

    def __init__(self, address, name):
        host, _, port = address.partition(":")
        self.address, self.name = (host, int(port or 4222)), name
        self.inbox = "_INBOX." + os.urandom(8).hex()
        self.functions = {}  # of each subscription: subject, group, function
        self.waiting = {}  # for whom a confirmation is: by the last word of its subject
        self.numbers = itertools.count(1)
        self.lock = threading.Lock()
        self.socket = None
        self.subscribe(self.inbox + ".*", None)
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def connected(self):
        return self.socket is not None

    def subscribe(self, subject, function, group=""):
        with self.lock:
            number = str(len(self.functions) + 1)
            self.functions[number] = (subject, group, function)
            if self.socket:
                self.socket.sendall(f"SUB {subject} {group} {number}\r\n".encode())

    def publish(self, subject, event, timeout=10):
        token, confirmed = str(next(self.numbers)), threading.Event()
        self.waiting[token] = confirmed
        try:
            self._send(subject, f"{self.inbox}.{token}", json.dumps(event).encode())
            return confirmed.wait(timeout)
        except OSError:
            return False
        finally:
            del self.waiting[token]

    def _send(self, subject, reply, data):
        with self.lock:
            if not self.socket:
                raise ConnectionError("no connection to NATS")
            self.socket.sendall(f"PUB {subject} {reply} {len(data)}\r\n".encode() + data + b"\r\n")

    def _run(self):
        while True:
            try:
                self._serve()
            except (OSError, ValueError) as error:
                print(f"NATS at {self.address[0]}: {error}", file=sys.stderr, flush=True)
            with self.lock:
                self.socket = None
            time.sleep(2)

    def _serve(self):
        connection = socket.create_connection(self.address, timeout=30)
        # One whose other end is gone without a word is noticed after a minute.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 60000)):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        with connection, connection.makefile("rb") as lines:
            lines.readline()  # INFO
            options = {"verbose": False, "pedantic": False, "name": self.name, "lang": "python", "version": "1"}
            with self.lock:
                connection.sendall(f"CONNECT {json.dumps(options)}\r\n".encode())
                for number, (subject, group, _) in self.functions.items():
                    connection.sendall(f"SUB {subject} {group} {number}\r\n".encode())
                connection.settimeout(None)
                self.socket = connection
            for line in iter(lines.readline, b""):
                words = line.split()
                if words[0] == b"PING":
                    with self.lock:
                        connection.sendall(b"PONG\r\n")
                elif words[0] == b"MSG":  # subject, number, reply if one is wanted, length
                    data = lines.read(int(words[-1]) + 2)[:-2]
                    self._message(words[1].decode(), words[2].decode(), words[3].decode() if len(words) == 5 else "", data)
                elif words[0] == b"-ERR":
                    raise ConnectionError(line.decode().strip())
        raise ConnectionError("the connection is closed")

    def _message(self, subject, number, reply, data):
        function = self.functions[number][2]
        if function is None:
            confirmed = self.waiting.get(subject.rpartition(".")[2])
            if confirmed:
                confirmed.set()
        elif call(lambda text: function(json.loads(text)), data) and reply:
            self._send(reply, "", b"")


def call(function, event):
    """Hands an event over; whether it is confirmed. A subscriber that fails is not one that has confirmed."""
    try:
        return function(event) is True
    except Exception as error:  # pylint: disable=broad-except
        print(f"an event was not handled: {error!r}", file=sys.stderr, flush=True)
        return False


def connect(name):
    """The bus of this service: that of the address in NATS, or without one its own."""
    address = os.environ.get("NATS")
    return Nats(address, name) if address else LocalBus()


class Recent:
    """A subscriber that remembers the last events, for whoever wants to see them."""

    def __init__(self, bus, subject):
        self.events = collections.deque(maxlen=20)
        bus.subscribe(subject, self.note)

    def note(self, event):
        if event not in self.events:  # one that was not confirmed is published again
            self.events.append(event)

    def routes(self):
        return [("GET", "/api/events", lambda: list(self.events))]


if __name__ == "__main__":  # python3 bus.py SUBJECT: shows events as they come
    connect("watch").subscribe(sys.argv[1] if len(sys.argv) > 1 else "order.>", lambda event: print(event, flush=True))
    print("waiting for events; Ctrl-C ends it", flush=True)
    threading.Event().wait()
