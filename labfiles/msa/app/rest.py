"""Requests to the other services, which are found by their names in the cluster's DNS."""

import http.client
import json
import os

import web

# Patience for processors that are emulated. Whoever asks is waiting, too: each service gives up before the one in front.
TIMEOUT = float(os.environ.get("TIMEOUT", "40"))


def send(service, method, path, body=b""):
    """Asks a service; its answer, whatever that is. A connection for each request, so that each finds any copy of it."""
    address = os.environ.get(service.upper(), service + ":8080")
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT)
    try:
        connection.request(method, path, body or None)
        response = connection.getresponse()
        served = {"X-Served-By": response.getheader("X-Served-By", service)}
        return web.Answer(response.status, response.getheader("Content-Type"), response.read(), served)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"{service} does not answer: {error}") from error
    finally:
        connection.close()


def ask(service, method, path):
    """What a service says, if it says yes. Its no is passed on."""
    answer = send(service, method, path)
    value = json.loads(answer.body)
    if answer.status >= 500:
        raise ConnectionError(f"{service}: {value.get('error')}")
    if answer.status >= 400:
        raise web.Refused(answer.status, value.get("error"))
    return value
