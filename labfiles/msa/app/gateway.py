"""The gateway: the one address of the shop. It knows which service has which part, the page, and the latest events."""

import json

import bus
import rest
import web

SERVICES = {"products": "catalog", "carts": "cart", "orders": "orders"}


class Gateway(web.Service):
    def find(self, method, path):
        parts = path.split("/")  # /api/orders/…
        service = SERVICES.get(parts[2]) if len(parts) > 2 and parts[1] == "api" else None
        if not service:
            return super().find(method, path)
        return f"/api/{parts[2]}", self.forward, [service, method, path]

    def forward(self, service, method, path, body=None):
        return rest.send(service, method, path, json.dumps(body).encode() if body is not None else b"")


def main():
    # No group: each copy of the gateway sees all events.
    recent = bus.Recent(bus.connect("gateway"), "order.placed")
    web.serve(Gateway("gateway", [("GET", "/", web.page), *recent.routes()]))


if __name__ == "__main__":
    main()
