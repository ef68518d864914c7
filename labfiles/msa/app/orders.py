"""Orders: what was bought. SQLite on a volume: a file of one writer, kept as long as the law wants it.

That an order was placed is an event, for whoever wants to know. It is written into the outbox in the order's own
transaction, and stays there until it is confirmed: so it reaches the catalog even if that, or the bus, is away now.
"""

import json
import os
import threading

import bus
import db
import rest
import web

SCHEMA = """
CREATE TABLE IF NOT EXISTS orders (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, content TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS outbox (id TEXT PRIMARY KEY, content TEXT NOT NULL);
"""


class Orders:
    def __init__(self, database, events, cart, clear_cart):
        """`cart` tells a customer's cart, `clear_cart` empties it."""
        self.database, self.events = database, events
        self.cart, self.clear_cart = cart, clear_cart
        self.wake = threading.Event()

    def place(self, body):
        customer = body.get("customer")
        if not isinstance(customer, str) or not customer:
            raise web.Refused(400, "customer is missing")
        cart = self.cart(customer)
        if not cart["lines"]:
            raise web.Refused(409, "the cart is empty")
        order = {"id": os.urandom(6).hex(), **cart}
        content = json.dumps(order)
        with self.database.transaction() as run:
            run("INSERT INTO orders (id, content) VALUES (?, ?)", order["id"], content)
            run("INSERT INTO outbox (id, content) VALUES (?, ?)", order["id"], content)
        self.wake.set()
        try:
            self.clear_cart(customer)
        except OSError as error:  # it is bought: a cart that is still full is no reason to say that it is not
            print(f"the cart of {customer} stays: {error}", flush=True)
        return web.as_json(order, 201)

    def orders(self):
        """The latest first."""
        with self.database.transaction() as run:
            return [json.loads(row[0]) for row in run("SELECT content FROM orders ORDER BY number DESC LIMIT 50")]

    def order(self, name):
        with self.database.transaction() as run:
            rows = run("SELECT content FROM orders WHERE id = ?", name)
        if not rows:
            raise web.Refused(404, "there is no such order")
        return json.loads(rows[0][0])

    def waiting(self):
        with self.database.transaction() as run:
            return [json.loads(row[0]) for row in run("SELECT content FROM outbox ORDER BY rowid")]

    def deliver(self):
        """Publishes what is in the outbox. What is not confirmed stays."""
        for order in self.waiting():
            if not self.events.publish("order.placed", order):
                web.count("shop_events_unconfirmed_total", subject="order.placed")
                return
            with self.database.transaction() as run:
                run("DELETE FROM outbox WHERE id = ?", order["id"])
            web.count("shop_events_published_total", subject="order.placed")

    def deliver_always(self):
        def run():
            while True:
                self.wake.wait(5)
                self.wake.clear()
                try:
                    self.deliver()
                except Exception as error:  # pylint: disable=broad-except
                    print(f"the outbox waits: {error!r}", flush=True)

        web.gauge("shop_outbox_events", lambda: len(self.waiting()))
        threading.Thread(target=run, daemon=True).start()

    def routes(self):
        return [
            ("GET", "/api/orders", self.orders),
            ("POST", "/api/orders", self.place),
            ("GET", "/api/orders/([0-9a-f]{12})", self.order),
        ]


def main():
    database = db.connect(SCHEMA)
    orders = Orders(
        database,
        bus.connect("orders"),
        lambda customer: rest.ask("cart", "GET", f"/api/carts/{customer}"),
        lambda customer: rest.ask("cart", "DELETE", f"/api/carts/{customer}"),
    )
    orders.deliver_always()
    web.serve(web.Service("orders", orders.routes(), lambda: db.is_there(database)))


if __name__ == "__main__":
    main()
