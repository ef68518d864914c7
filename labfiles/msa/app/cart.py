"""Carts: what a customer is about to buy. Redis: small, in memory, gone after a day, and no great loss if it is lost."""

import json
import os
import socket
import threading

import rest
import web

SCHEMA = "CREATE TABLE IF NOT EXISTS cart (customer TEXT, product INTEGER, line TEXT, PRIMARY KEY (customer, product));"
CUSTOMER = "([a-z0-9-]{1,30})"


class RedisStore:
    """A hash for each cart, by Redis' own protocol: https://redis.io/docs/latest/develop/reference/protocol-spec/"""

    def __init__(self, address):
        host, _, port = address.partition(":")
        self.address = (host, int(port or 6379))
        self.lock = threading.Lock()
        self.connection = None

    def get(self, customer):
        flat = self._ask("HGETALL", "cart:" + customer)
        return {int(product): json.loads(line) for product, line in zip(flat[::2], flat[1::2])}

    def put(self, customer, product, line):
        self._ask("HSET", "cart:" + customer, str(product), json.dumps(line))
        self._ask("EXPIRE", "cart:" + customer, "86400")

    def remove(self, customer, product):
        self._ask("HDEL", "cart:" + customer, str(product))

    def clear(self, customer):
        self._ask("DEL", "cart:" + customer)

    def ping(self):
        self._ask("PING")

    def _ask(self, *words):
        parts = [word.encode() for word in words]
        asked = b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
        with self.lock:
            # A connection that was lost since the last time is made anew; one that is lost again is an error. All that is
            # asked here may be asked twice.
            for again in (True, False):
                try:
                    if not self.connection:
                        self.connection = socket.create_connection(self.address, timeout=20).makefile("rwb")
                    self.connection.write(asked)
                    self.connection.flush()
                    return self._reply()
                except OSError:
                    self.connection = None
                    if not again:
                        raise

    def _reply(self):
        line = self.connection.readline()
        kind, rest = line[:1], line[1:-2]
        if kind == b"$":
            return self.connection.read(int(rest) + 2)[:-2].decode() if rest != b"-1" else None
        if kind == b"*":
            return [self._reply() for _ in range(int(rest))]
        if kind in (b"+", b":"):
            return rest.decode()
        raise ConnectionError(f"Redis says {line.decode().strip() or 'nothing more'}")


class SqlStore:
    """The same in a table."""

    def __init__(self, database):
        self.database = database

    def get(self, customer):
        with self.database.transaction() as run:
            rows = run("SELECT product, line FROM cart WHERE customer = ?", customer)
        return {product: json.loads(line) for product, line in rows}

    def put(self, customer, product, line):
        with self.database.transaction() as run:
            run("INSERT INTO cart (customer, product, line) VALUES (?, ?, ?) "
                "ON CONFLICT (customer, product) DO UPDATE SET line = excluded.line", customer, product, json.dumps(line))

    def remove(self, customer, product):
        with self.database.transaction() as run:
            run("DELETE FROM cart WHERE customer = ? AND product = ?", customer, product)

    def clear(self, customer):
        with self.database.transaction() as run:
            run("DELETE FROM cart WHERE customer = ?", customer)


class Carts:
    def __init__(self, store, product):
        """`product` tells of a product by its number, as the catalog does."""
        self.store, self.product = store, product

    def cart(self, customer):
        lines = [line for _, line in sorted(self.store.get(customer).items())]
        return {"customer": customer, "lines": lines, "total": sum(line["cents"] * line["count"] for line in lines)}

    def put(self, customer, number, body):
        """Says how many of a product are in the cart. Name and price are those of now, even if the catalog's change."""
        count = web.number(body, "count")
        if count:
            product = self.product(int(number))
            if product["stock"] < count:
                raise web.Refused(409, f"only {max(product['stock'], 0)} of {product['name']} left")
            line = {"product": product["id"], "name": product["name"], "cents": product["cents"], "count": count}
            self.store.put(customer, product["id"], line)
        else:
            self.store.remove(customer, int(number))
        return self.cart(customer)

    def clear(self, customer):
        self.store.clear(customer)
        return self.cart(customer)

    def routes(self):
        return [
            ("GET", f"/api/carts/{CUSTOMER}", self.cart),
            ("DELETE", f"/api/carts/{CUSTOMER}", self.clear),
            ("PUT", rf"/api/carts/{CUSTOMER}/(\d{{1,6}})", self.put),
        ]


def main():
    store = RedisStore(os.environ.get("REDIS", "127.0.0.1:6379"))
    carts = Carts(store, lambda number: rest.ask("catalog", "GET", f"/api/products/{number}"))
    web.serve(web.Service("cart", carts.routes(), store.ping))


if __name__ == "__main__":
    main()
