"""What every service of the shop has: a web server for routes that take and give JSON, its health, its metrics.

A service is a table of routes, (method, pattern of the path, function). What the pattern's groups match are the function's
arguments; those of POST and PUT get the request's JSON, too. A function returns what is to be answered, or raises Refused.
"""

import collections
import http.server
import json
import os
import re
import signal
import socket
import socketserver
import sys
import threading
import time

VERSION = os.environ.get("VERSION", "dev")
PLACE = socket.gethostname()  # in a cluster the pod's name

Answer = collections.namedtuple("Answer", "status type body headers")


class Refused(Exception):
    """The request can't be met, for a reason that whoever asks should know."""

    def __init__(self, status, reason):
        super().__init__(reason)
        self.status = status


# --- metrics, in the text format of Prometheus: https://prometheus.io/docs/instrumenting/exposition_formats/

_counters = collections.Counter()
_lock = threading.Lock()
_gauges = {}


def count(name, amount=1, **labels):
    """Adds to a counter."""
    with _lock:
        _counters[name, tuple(sorted(labels.items()))] += amount


def gauge(name, function):
    """Has a function asked for a value whenever the metrics are."""
    _gauges[name] = function


def metrics():
    with _lock:
        counters = sorted(_counters.items())
    lines, last = ["# TYPE shop_info gauge", f'shop_info{{version="{VERSION}"}} 1'], None
    for (name, labels), value in counters:
        if name != last:
            lines.append(f"# TYPE {name} counter")
            last = name
        inside = ",".join(f'{key}="{text}"' for key, text in labels)
        lines.append(f"{name}{{{inside}}} {value:.6g}")
    for name, function in sorted(_gauges.items()):
        lines += [f"# TYPE {name} gauge", f"{name} {function()}"]
    return "\n".join(lines) + "\n"


# --- requests


def as_json(value, status=200):
    return Answer(status, "application/json", (json.dumps(value) + "\n").encode(), {})


def as_text(text, status=200, kind="text/plain"):
    return Answer(status, kind + "; charset=utf-8", text.encode(), {})


def page():
    """The shop's page."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "index.html"), encoding="utf-8") as file:
        return as_text(file.read(), kind="text/html")


class Service:
    def __init__(self, name, routes, ready=lambda: None):
        """`ready` raises what keeps the service from its work."""
        self.name = name
        self.ready = ready
        # In metrics a route is called by its pattern, with a star for what varies.
        self.routes = [
            (method, re.compile(pattern), re.sub(r"\(.*?\)", "*", pattern), function)
            for method, pattern, function in routes
        ]
        self.leaving = False

    def answer(self, method, path, body=b""):
        """Answers one request."""
        path = path.partition("?")[0]
        if path == "/healthz":  # the process answers: nothing more, or one database's end would restart all that use it
            return as_text("ok\n")
        if path == "/metrics":
            return as_text(metrics())
        started = time.monotonic()
        route, answer = self._answer(method, path, body)
        answer.headers.setdefault("X-Served-By", f"{self.name}/{VERSION} {PLACE}")
        if route != "/readyz":
            count("shop_requests_total", method=method, route=route, status=answer.status)
            count("shop_request_seconds_total", time.monotonic() - started, route=route)
        return answer

    def _answer(self, method, path, body):
        route = "none"
        try:
            if path == "/readyz":
                route = path
                if self.leaving:
                    raise Refused(503, "on its way out")
                self.ready()
                return route, as_text("ready\n")
            route, function, arguments = self.find(method, path)
            if method in ("POST", "PUT"):
                arguments.append(parse(body))
            value = function(*arguments)
            return route, value if isinstance(value, Answer) else as_json(value)
        except Refused as refused:
            return route, as_json({"error": str(refused)}, refused.status)
        except OSError as error:  # a database or another service can't be reached: now, that is, not for ever
            return route, as_json({"error": str(error)}, 503)
        except Exception as error:  # pylint: disable=broad-except
            print(f"{method} {path}: {error!r}", file=sys.stderr)
            return route, as_json({"error": "an error of the service"}, 500)

    def find(self, method, path):
        """The route of a request: its name for the metrics, its function, the function's arguments."""
        other = False
        for wanted, pattern, name, function in self.routes:
            match = pattern.fullmatch(path)
            if match and wanted == method:
                return name, function, list(match.groups())
            other = other or match
        raise Refused(405, f"not to be {method}") if other else Refused(404, "there is nothing here")


def parse(body):
    try:
        value = json.loads(body or b"{}")
    except ValueError as error:
        raise Refused(400, f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refused(400, "not a JSON object")
    return value


def number(body, key, least=0):
    """A whole number out of a request."""
    value = body.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= 1_000_000:
        raise Refused(400, f"{key} has to be a whole number from {least} to 1000000")
    return value


# --- the server


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    request_queue_size = 64

    def server_bind(self):
        # Not HTTPServer's, which asks the DNS for this machine's full name.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]


class Handler(http.server.BaseHTTPRequestHandler):
    timeout = 60  # for whoever connects and says nothing

    def handle_request(self):
        length = self.headers.get("Content-Length") or "0"
        if not length.isdigit() or int(length) > 65536:
            answer = as_json({"error": "too much"}, 413)
        else:
            method = "GET" if self.command == "HEAD" else self.command
            answer = self.server.service.answer(method, self.path, self.rfile.read(int(length)))
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.type)
        self.send_header("Content-Length", str(len(answer.body)))
        for key, value in answer.headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def log_message(self, format, *args):  # pylint: disable=redefined-builtin
        if self.path not in ("/healthz", "/readyz", "/metrics"):
            print(f"{self.client_address[0]} {format % args}", flush=True)


def server(service, port):
    made = Server(("", port), Handler)
    made.service = service
    return made


def serve(service):
    """Serves until SIGTERM, and then some seconds more: until nobody is sent here any longer."""
    port = int(os.environ.get("PORT", "8080"))
    made = server(service, port)

    def leave():
        service.leaving = True
        time.sleep(float(os.environ.get("LINGER", "5")))
        made.shutdown()

    # The first process of a container has no default for SIGTERM: unheard, it would be killed after half a minute.
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=leave).start())
    print(f"{service.name} {VERSION} serves on port {port}", flush=True)
    made.serve_forever()
    made.server_close()  # when what it has begun is answered
