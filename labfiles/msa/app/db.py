"""Databases that speak SQL, behind one operation: a transaction, in which statements run.

    with database.transaction() as run:
        rows = run("SELECT name FROM product WHERE id = ?", 1)

One connection, which requests take in turn: enough for a shop of this size. It is made when it is first needed, and again
after it was lost, so a service can start before its database and outlive it. Statements are what both databases know.
"""

import contextlib
import os
import sqlite3
import threading


class Sqlite:
    def __init__(self, path, schema):
        self.path, self.schema = path, schema
        self.lock = threading.Lock()
        self.connection = None

    @contextlib.contextmanager
    def transaction(self):
        with self.lock:
            if not self.connection:
                made = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
                made.executescript(self.schema)
                self.connection = made
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield lambda statement, *values: self.connection.execute(statement, values).fetchall()
                self.connection.execute("COMMIT")
            except BaseException:
                self.connection.execute("ROLLBACK")
                raise


class Postgres:
    def __init__(self, address, schema):
        import psycopg2  # pylint: disable=import-outside-toplevel

        self.driver, self.address, self.schema = psycopg2, address, schema
        self.lock = threading.Lock()
        self.connection = None

    @contextlib.contextmanager
    def transaction(self):
        lost = (self.driver.OperationalError, self.driver.InterfaceError)
        with self.lock:
            try:
                if not self.connection:
                    self.connection = self._connect()
                with self.connection, self.connection.cursor() as cursor:
                    yield lambda statement, *values: run(cursor, statement, values)
            except lost as error:
                # This request fails; the next one finds a new connection.
                if self.connection:
                    self.connection.close()
                self.connection = None
                raise ConnectionError(f"the database can't be reached: {str(error).strip()}") from error

    def _connect(self):
        # The password is in PGPASSWORD. A database that is gone without a word is given up after half a minute.
        made = self.driver.connect(
            self.address, connect_timeout=20, keepalives_idle=10, keepalives_interval=10, keepalives_count=2,
            tcp_user_timeout=30000,
        )
        with made, made.cursor() as cursor:
            # Copies of a service that start together make the tables one after the other.
            cursor.execute("SELECT pg_advisory_xact_lock(1)")
            cursor.execute(self.schema)
        return made


def run(cursor, statement, values):
    cursor.execute(statement.replace("?", "%s"), values)
    return cursor.fetchall() if cursor.description else []


def connect(schema):
    """The database of this service: DATABASE is postgresql://…, or the path of SQLite's file."""
    address = os.environ.get("DATABASE", ":memory:")
    return (Postgres if address.startswith("postgresql:") else Sqlite)(address, schema)


def is_there(database):
    """For a service's readiness."""
    with database.transaction() as run_:
        run_("SELECT 1")
