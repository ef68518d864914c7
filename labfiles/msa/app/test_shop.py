"""The shop's tests, which need nothing but Python: python3 -m unittest

The stores are SQLite's in memory, what stands for a Redis or a NATS server is a few lines that speak its protocol.
"""

import json
import os
import socket
import tempfile
import threading
import time
import unittest

import bus
import cart
import catalog
import db
import gateway
import monolith
import orders
import rest
import web


def wait(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def listen():
    listener = socket.create_server(("127.0.0.1", 0))
    return listener, "127.0.0.1:%d" % listener.getsockname()[1]


class Client:
    """Asks a service, without a network in between."""

    def __init__(self, service):
        self.service = service

    def __call__(self, method, path, body=None):
        answer = self.service.answer(method, path, json.dumps(body).encode() if body is not None else b"")
        return answer.status, json.loads(answer.body)


class Shop(unittest.TestCase):
    def setUp(self):
        routes, self.orders = monolith.build(db.Sqlite(":memory:", catalog.SCHEMA + cart.SCHEMA + orders.SCHEMA))
        self.ask = Client(web.Service("monolith", routes))

    def stock(self, product):
        return self.ask("GET", f"/api/products/{product}")[1]["stock"]

    def test_an_order_lowers_the_stock(self):
        self.assertEqual(self.ask("PUT", "/api/carts/ann/1", {"count": 2})[1]["total"], 4800)
        self.ask("PUT", "/api/carts/ann/2", {"count": 1})
        status, order = self.ask("POST", "/api/orders", {"customer": "ann"})
        self.assertEqual((status, order["total"], len(order["lines"])), (201, 5450, 2))
        self.assertEqual(self.stock(1), 20)
        self.orders.deliver()
        self.assertEqual((self.stock(1), self.stock(2)), (18, 99))
        self.assertEqual(self.orders.waiting(), [])
        self.assertEqual(self.ask("GET", "/api/carts/ann")[1]["lines"], [])
        self.assertEqual(self.ask("GET", "/api/orders")[1], [order])
        self.assertEqual(self.ask("GET", "/api/orders/" + order["id"])[1], order)
        self.assertEqual(self.ask("GET", "/api/events")[1], [order])

    def test_an_event_that_comes_twice_counts_once(self):
        products = catalog.Catalog(db.Sqlite(":memory:", catalog.SCHEMA))
        for _ in range(2):
            self.assertTrue(products.sell({"id": "1", "lines": [{"product": 4, "count": 3}]}))
        self.assertEqual(products.product(4)["stock"], 27)

    def test_what_nobody_confirms_stays_in_the_outbox(self):
        class Deaf:
            def publish(self, subject, event):
                return False

        self.ask("PUT", "/api/carts/ann/1", {"count": 1})
        hears, self.orders.events = self.orders.events, Deaf()
        self.ask("POST", "/api/orders", {"customer": "ann"})
        self.orders.deliver()
        self.assertEqual((len(self.orders.waiting()), self.stock(1)), (1, 20))
        self.orders.events = hears
        self.orders.deliver()
        self.assertEqual((len(self.orders.waiting()), self.stock(1)), (0, 19))

    def test_what_is_refused(self):
        for status, method, path, body in [
            (404, "GET", "/", 0), (404, "GET", "/api/products/99", 0), (404, "GET", "/api/orders/000000000000", 0),
            (404, "PUT", "/api/carts/ann/99", {"count": 1}), (409, "PUT", "/api/carts/ann/1", {"count": 21}),
            (400, "PUT", "/api/carts/ann/1", {"count": -1}), (400, "PUT", "/api/carts/ann/1", {"count": True}),
            (400, "PUT", "/api/carts/ann/1", []), (400, "POST", "/api/orders", {}),
            (409, "POST", "/api/orders", {"customer": "ann"}), (405, "DELETE", "/api/products", 0),
            (404, "GET", "/api/carts/Ann%20B", 0),
        ]:
            with self.subTest(method=method, path=path, body=body):
                if path != "/":
                    answer = self.ask(method, path, body)
                    self.assertEqual(answer[0], status, answer)
                    self.assertIn("error", answer[1])
        self.assertEqual(self.ask.service.answer("POST", "/api/orders", b"{").status, 400)

    def test_an_order_is_placed_even_if_the_cart_stays(self):
        def gone(_):
            raise ConnectionError("gone")

        self.ask("PUT", "/api/carts/ann/1", {"count": 1})
        self.orders.clear_cart = gone
        self.assertEqual(self.ask("POST", "/api/orders", {"customer": "ann"})[0], 201)

    def test_page_health_and_metrics(self):
        service = self.ask.service
        self.assertIn(b"A small shop", service.answer("GET", "/").body)
        self.assertEqual(service.answer("GET", "/healthz").status, 200)
        self.assertEqual(service.answer("GET", "/readyz").status, 200)
        self.ask("GET", "/api/carts/metric?x=1")
        said = service.answer("GET", "/metrics").body.decode()
        self.assertRegex(said, r'shop_requests_total{method="GET",route="/api/carts/\*",status="200"} [1-9]')
        service.leaving = True
        self.assertEqual(service.answer("GET", "/readyz").status, 503)

    def test_a_database_that_is_away_is_no_reason_to_end(self):
        def away():
            raise ConnectionError("away")

        service = web.Service("test", [("GET", "/x", away)], away)
        self.assertEqual([service.answer("GET", path).status for path in ("/healthz", "/readyz", "/x")], [200, 503, 503])


class Files(unittest.TestCase):
    def test_orders_outlive_their_process(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "shop.db")
            for count in (1, 2):
                database = db.Sqlite(path, orders.SCHEMA)
                lines = [{"product": 1, "name": "x", "cents": 1, "count": 1}]
                placed = orders.Orders(database, bus.LocalBus(), lambda _: {"lines": lines}, lambda _: None)
                placed.place({"customer": "ann"})
                self.assertEqual((len(placed.orders()), len(placed.waiting())), (count, count))
                database.connection.close()


class Network(unittest.TestCase):
    """Each service with a server of its own: what goes over the network between them."""

    def start(self, service, name):
        server = web.server(service, 0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        os.environ[name] = "127.0.0.1:%d" % server.server_port
        self.addCleanup(os.environ.pop, name)

    def test_the_services_together(self):
        events = bus.LocalBus()
        products = catalog.Catalog(db.Sqlite(":memory:", catalog.SCHEMA))
        events.subscribe("order.placed", products.sell, group="catalog")
        carts = cart.Carts(
            cart.SqlStore(db.Sqlite(":memory:", cart.SCHEMA)),
            lambda number: rest.ask("catalog", "GET", f"/api/products/{number}"),
        )
        placed = orders.Orders(
            db.Sqlite(":memory:", orders.SCHEMA), events,
            lambda customer: rest.ask("cart", "GET", f"/api/carts/{customer}"),
            lambda customer: rest.ask("cart", "DELETE", f"/api/carts/{customer}"),
        )
        self.start(web.Service("catalog", products.routes()), "CATALOG")
        self.start(web.Service("cart", carts.routes()), "CART")
        self.start(web.Service("orders", placed.routes()), "ORDERS")
        shop = gateway.Gateway("gateway", [("GET", "/", web.page)])
        ask = Client(shop)
        # The very answers of the monolith.
        routes, whole = monolith.build(db.Sqlite(":memory:", catalog.SCHEMA + cart.SCHEMA + orders.SCHEMA))
        one = Client(web.Service("monolith", routes))
        for method, path, body in [
            ("GET", "/api/products", None), ("PUT", "/api/carts/bob/3", {"count": 2}),
            ("PUT", "/api/carts/bob/99", {"count": 2}), ("PUT", "/api/carts/bob/1", {"count": 999}),
            ("GET", "/api/carts/bob", None), ("POST", "/api/orders", {"customer": "bob"}),
            ("POST", "/api/orders", {"customer": "bob"}), ("GET", "/api/nothing", None), ("GET", "/api/orders/x", None),
        ]:
            with self.subTest(method=method, path=path):
                here, there = ask(method, path, body), one(method, path, body)
                here[1].pop("id", 0) if isinstance(here[1], dict) else 0
                there[1].pop("id", 0) if isinstance(there[1], dict) else 0
                self.assertEqual(here, there)
        placed.deliver()
        whole.deliver()
        self.assertEqual(ask("GET", "/api/products"), one("GET", "/api/products"))
        self.assertEqual(ask("GET", "/api/products/3")[1]["stock"], 48)
        self.assertTrue(shop.answer("GET", "/api/products").headers["X-Served-By"].startswith("catalog/"))
        os.environ["CATALOG"] = "127.0.0.1:1"
        self.assertEqual(ask("GET", "/api/products")[0], 503)
        self.assertEqual(ask("PUT", "/api/carts/bob/1", {"count": 1})[0], 503)


class Protocols(unittest.TestCase):
    def test_nats(self):
        """A subscriber and a publisher at a server of a few lines, which hands on, and loses them all once."""
        listener, address = listen()
        lock, subscriptions, everyone = threading.Lock(), {}, []

        def talk(connection):
            connection.sendall(b"INFO {}\r\n")
            lines = connection.makefile("rb")
            for line in lines:
                words = line.decode().split()
                if words[0] == "SUB":
                    with lock:
                        subscriptions[connection, words[-1]] = words[1].rstrip("*")
                elif words[0] == "PUB":
                    data = lines.read(int(words[-1]) + 2)
                    with lock:
                        for (other, number), subject in subscriptions.items():
                            if words[1].startswith(subject):
                                reply = words[2] + " " if len(words) == 4 else ""
                                other.sendall(f"MSG {words[1]} {number} {reply}{words[-1]}\r\n".encode() + data)

        def accept():
            while True:
                connection = listener.accept()[0]
                everyone.append(connection)
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        one, two, got = bus.Nats(address, "one"), bus.Nats(address, "two"), []
        one.subscribe("order.placed", lambda event: got.append(event) or event["good"], group="catalog")
        wait(lambda: one.connected and two.connected and "order.placed" in subscriptions.values())
        self.assertTrue(two.publish("order.placed", {"good": True}))
        self.assertFalse(two.publish("order.placed", {"good": False}, timeout=0.2))
        self.assertFalse(two.publish("order.lost", {}, timeout=0.2))
        self.assertEqual(got, [{"good": True}, {"good": False}])
        with lock:
            subscriptions.clear()
        for connection in everyone[:2]:
            connection.shutdown(socket.SHUT_RDWR)
        wait(lambda: "order.placed" in subscriptions.values() and len(subscriptions) == 3 and two.connected)
        self.assertTrue(two.publish("order.placed", {"good": True}))

    def test_redis(self):
        listener, address = listen()
        replies = [b"*2\r\n$1\r\n7\r\n$11\r\n{\"count\":1}\r\n", None, b":1\r\n", b"-ERR no\r\n", b"-ERR no\r\n"]
        asked = []

        def talk():
            while replies:
                connection = listener.accept()[0]
                lines = connection.makefile("rb")
                for line in lines:
                    words = [lines.read(int(lines.readline()[1:]) + 2)[:-2].decode() for _ in range(int(line[1:]))]
                    asked.append(words)
                    reply = replies.pop(0)
                    if reply is None:
                        connection.shutdown(socket.SHUT_RDWR)  # and has to be asked again
                        break
                    connection.sendall(reply)
                    if not replies:
                        break

        threading.Thread(target=talk, daemon=True).start()
        store = cart.RedisStore(address)
        self.assertEqual(store.get("ann"), {7: {"count": 1}})
        store.clear("ann")
        with self.assertRaises(ConnectionError):
            store.ping()
        self.assertEqual(asked[:3], [["HGETALL", "cart:ann"], ["DEL", "cart:ann"], ["DEL", "cart:ann"]])


if __name__ == "__main__":
    unittest.main()
