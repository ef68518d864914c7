"""The catalog: what there is to buy, and how much of it. PostgreSQL: many read, some write, and stock has to be right."""

import bus
import db
import web

SCHEMA = """
CREATE TABLE IF NOT EXISTS product
    (id INTEGER PRIMARY KEY, name TEXT NOT NULL, cents INTEGER NOT NULL, stock INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS sold (order_id TEXT PRIMARY KEY);
INSERT INTO product (id, name, cents, stock) VALUES
    (1, 'teapot', 2400, 20), (2, 'cup', 650, 100), (3, 'green tea, 100 g', 980, 50), (4, 'honey', 720, 30)
    ON CONFLICT (id) DO NOTHING;
"""
COLUMNS = "id, name, cents, stock"


def as_product(row):
    return dict(zip(COLUMNS.split(", "), row))


class Catalog:
    def __init__(self, database):
        self.database = database

    def products(self):
        with self.database.transaction() as run:
            return [as_product(row) for row in run(f"SELECT {COLUMNS} FROM product ORDER BY id")]

    def product(self, number):
        with self.database.transaction() as run:
            rows = run(f"SELECT {COLUMNS} FROM product WHERE id = ?", int(number))
        if not rows:
            raise web.Refused(404, "there is no such product")
        return as_product(rows[0])

    def restock(self, number, body):
        """Says how much there is of a product."""
        with self.database.transaction() as run:
            run("UPDATE product SET stock = ? WHERE id = ?", web.number(body, "stock"), int(number))
        return self.product(number)

    def sell(self, order):
        """An order was placed: the stock is lower. That it was noted and what it changes are one transaction, so an event
        that comes twice counts once. The stock may fall below zero: an order does not wait for the catalog, and what is
        sold too much has to be bought."""
        with self.database.transaction() as run:
            if not run("INSERT INTO sold (order_id) VALUES (?) ON CONFLICT DO NOTHING RETURNING 1", order["id"]):
                return True
            for line in order["lines"]:
                run("UPDATE product SET stock = stock - ? WHERE id = ?", line["count"], line["product"])
        web.count("shop_events_handled_total", subject="order.placed")
        return True

    def routes(self):
        return [
            ("GET", "/api/products", self.products),
            ("GET", r"/api/products/(\d{1,6})", self.product),
            ("PUT", r"/api/products/(\d{1,6})", self.restock),
        ]


def main():
    database = db.connect(SCHEMA)
    catalog = Catalog(database)
    # All copies of this service are one subscriber: an order lowers the stock once.
    bus.connect("catalog").subscribe("order.placed", catalog.sell, group="catalog")
    web.serve(web.Service("catalog", catalog.routes(), lambda: db.is_there(database)))


if __name__ == "__main__":
    main()
