//! A cache of packages: an HTTP proxy on the gateway, which the nodes' apt fetches through. What never changes under its
//! name is kept on the host, for all nodes of all labs of this user; all else is passed on.
//!
//! - `store`: what is kept, in files
//! - `proxy`: one connection of a node, in a thread of its own: it may wait for the world outside
//!
//! Nothing is trusted that comes from either side: apt checks what it gets against signed lists. What is kept is checked here,
//! too, as far as its address says what it is.

mod proxy;
mod store;

use std::{
    net::TcpStream,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use store::Store;

use crate::nat::Outside;

/// The gateway's port, that of apt-cacher-ng.
pub const PORT: u16 = 3142;
/// Most connections at the same time.
const MAX_CONNECTIONS: usize = 64;

/// The cache.
#[derive(Clone)]
pub struct Cache {
    store: Arc<Store>,
    outside: Outside,
    connections: Arc<AtomicUsize>,
}

impl Cache {
    /// A cache that keeps its files in a folder, which is made when the first is kept.
    pub fn new(folder: &Path, outside: Outside) -> Self {
        Self { store: Arc::new(Store::new(folder)), outside, connections: Arc::default() }
    }

    /// Begins to serve a node's connection: gives this end of it. `None` if there are too many.
    pub fn connect(&self) -> Option<OwnedFd> {
        let (ours, theirs) = UnixStream::pair().ok()?;
        ours.set_nonblocking(true).ok()?;
        self.begin(theirs).then(|| ours.into())
    }

    /// Begins to serve a connection of this machine's own network, or closes it if there are too many.
    pub fn serve(&self, connection: TcpStream) {
        // What is done with a stream is the same for both kinds of sockets.
        self.begin(OwnedFd::from(connection).into());
    }

    /// Serves a connection in a thread of its own; false if there are too many.
    fn begin(&self, connection: UnixStream) -> bool {
        if self.connections.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            self.connections.fetch_sub(1, Ordering::Relaxed);
            return false;
        }
        // Given back however the thread ends.
        let place = Place(self.connections.clone());
        let (store, outside) = (self.store.clone(), self.outside.clone());
        let serve = move || {
            let _place = place;
            // A connection that breaks is the node's to notice.
            let _ = proxy::serve(connection, &store, &outside);
        };
        std::thread::Builder::new().name("cache".into()).spawn(serve).is_ok()
    }
}

struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
