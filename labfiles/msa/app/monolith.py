"""The same shop as one process with one database: the same modules, and a call where the others have a network."""

import bus
import cart
import catalog
import db
import orders
import web


def build(database):
    """The whole application on one database; its routes, and the orders, whose outbox has to be looked after."""
    events = bus.LocalBus()
    products = catalog.Catalog(database)
    carts = cart.Carts(cart.SqlStore(database), products.product)
    placed = orders.Orders(database, events, carts.cart, carts.clear)
    events.subscribe("order.placed", products.sell, group="catalog")
    recent = bus.Recent(events, "order.placed")
    routes = [("GET", "/", web.page), *recent.routes(), *products.routes(), *carts.routes(), *placed.routes()]
    return routes, placed


def main():
    database = db.connect(catalog.SCHEMA + cart.SCHEMA + orders.SCHEMA)
    routes, placed = build(database)
    placed.deliver_always()
    web.serve(web.Service("monolith", routes, lambda: db.is_there(database)))


if __name__ == "__main__":
    main()
