//! One connection of a node to the cache: an HTTP proxy for `GET` and `HEAD` of `http://` addresses (RFC 9110, RFC 9112
//! §3.2.2). Requests are answered in their order; apt sends several at once.

use std::{
    fmt::Write as _,
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    os::unix::net::UnixStream,
    time::Duration,
};

use sha2::{Digest, Sha256};

use super::store::Store;
use crate::nat::Outside;

/// Longest head of a request or an answer, in bytes.
const MAX_HEAD: usize = 32 << 10;
/// Most fields in a head.
const MAX_FIELDS: usize = 100;
/// How long a server may take to be connected, and either side to go on.
const PATIENCE: Duration = Duration::from_secs(60);
/// What every package begins with: it is an archive of ar.
const PACKAGE: &[u8] = b"!<arch>\n";
/// Fields of one connection alone (RFC 9110 §7.6.1).
const OF_CONNECTION: [&str; 7] =
    ["connection", "proxy-connection", "keep-alive", "proxy-authorization", "te", "trailer", "upgrade"];

/// A request of a node.
#[derive(Debug, PartialEq)]
struct Request {
    /// `GET` or `HEAD`.
    method: String,
    /// `http://deb.example.org/pool/a.deb`.
    url: String,
    /// Fields for the server, each with its end of line.
    fields: String,
    /// Whether the node wants the whole, and takes it from a cache.
    plain: bool,
}

/// An answer of a server.
#[derive(Debug, PartialEq)]
struct Answer {
    status: u16,
    /// The head without the fields of one connection, and without the empty line.
    head: String,
    /// Length of the body; `None`: up to the connection's end.
    length: Option<u64>,
}

/// Serves a connection up to its end.
pub fn serve(node: UnixStream, store: &Store, outside: &Outside) -> io::Result<()> {
    node.set_read_timeout(Some(PATIENCE))?;
    node.set_write_timeout(Some(PATIENCE))?;
    let mut buffer = Vec::new();
    while let Some(head) = read_head(&mut &node, &mut buffer)? {
        let request = match parse_request(&head) {
            Ok(request) => request,
            Err(what) => return refuse(&node, "400 Bad Request", &what),
        };
        match answer(&node, &request, store, outside) {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(Failure::Node(error)) => return Err(error),
            Err(Failure::Server(what)) => return refuse(&node, "502 Bad Gateway", &what),
        }
    }
    Ok(())
}

/// Why a request was not answered.
enum Failure {
    /// The node is gone, or has half an answer.
    Node(io::Error),
    /// There is nothing to answer with yet.
    Server(String),
}

/// Answers a request; whether the connection goes on.
fn answer(node: &UnixStream, request: &Request, store: &Store, outside: &Outside) -> Result<bool, Failure> {
    if !(request.plain && Promise::of(&request.url).is_some()) {
        return fetch(node, request, None, outside);
    }
    if let Some(kept) = store.get(&request.url) {
        return from_store(node, kept).map_err(Failure::Node);
    }
    // Who waited for another may find it now. Who waited for long fetches it, too, for the node alone.
    let turn = store.turn(&request.url);
    match store.get(&request.url) {
        Some(kept) => {
            drop(turn);
            from_store(node, kept).map_err(Failure::Node)
        }
        None => fetch(node, request, turn.as_ref().map(|_| store), outside),
    }
}

fn from_store(mut node: &UnixStream, (mut file, length): (std::fs::File, u64)) -> io::Result<bool> {
    write!(
        node,
        "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nContent-Type: application/octet-stream\r\n\r\n"
    )?;
    let sent = io::copy(&mut (&mut file).take(length), &mut node)?;
    if sent < length { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(true) }
}

/// Asks the server, and passes its answer on; keeps a whole one in the store, if there is one.
fn fetch(
    mut node: &UnixStream,
    request: &Request,
    store: Option<&Store>,
    outside: &Outside,
) -> Result<bool, Failure> {
    let failed = |error: io::Error| Failure::Server(format!("{}: {error}", request.url));
    let (host, path) = split(&request.url).ok_or_else(|| Failure::Server("no address".into()))?;
    let mut server = connect(host, outside).map_err(failed)?;
    let Request { method, fields, .. } = request;
    write!(server, "{method} {path} HTTP/1.1\r\nHost: {host}\r\n{fields}Connection: close\r\n\r\n")
        .map_err(failed)?;
    let mut buffer = Vec::new();
    let head = read_head(&mut server, &mut buffer).map_err(failed)?;
    let head = head.ok_or_else(|| Failure::Server(format!("{}: the server said nothing", request.url)))?;
    let answer = parse_answer(&head, method == "HEAD").map_err(Failure::Server)?;
    let goes_on = answer.length.is_some();
    let connection = if goes_on { "keep-alive" } else { "close" };
    let client = |error| Failure::Node(error);
    write!(node, "{}Connection: {connection}\r\n\r\n", answer.head).map_err(client)?;
    // What there is no room for is passed on all the same.
    let mut kept = match (store, answer.length, answer.status) {
        (Some(store), Some(length), 200) => {
            store.begin(&request.url, length).ok().zip(Promise::of(&request.url))
        }
        _ => None,
    };
    let mut left = answer.length.unwrap_or(u64::MAX);
    let mut body = buffer.as_slice().chain(server);
    let mut piece = vec![0; 64 << 10];
    while left > 0 {
        let room = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let read = match body.read(piece.get_mut(..room).unwrap_or_default()) {
            Ok(0) if goes_on => return Err(client(ErrorKind::UnexpectedEof.into())),
            Ok(0) => return Ok(false),
            Ok(read) => read,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(client(error)),
        };
        let bytes = piece.get(..read).unwrap_or_default();
        node.write_all(bytes).map_err(client)?;
        if let Some((writer, promise)) = &mut kept {
            promise.update(bytes);
            if writer.write_all(bytes).is_err() {
                kept = None; // the host's disk is full
            }
        }
        left = left.saturating_sub(read as u64);
    }
    if let Some((writer, promise)) = kept
        && promise.holds()
    {
        let _ = writer.keep();
    }
    Ok(goes_on)
}

fn refuse(mut node: &UnixStream, status: &str, what: &str) -> io::Result<()> {
    let text = format!("lab's cache: {what}\n");
    write!(
        node,
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n{text}",
        text.len()
    )
}

/// Reads up to a head's empty line. What comes behind it stays in the buffer. `None` at the connection's end.
fn read_head(from: &mut impl Read, buffer: &mut Vec<u8>) -> io::Result<Option<Vec<u8>>> {
    let mut piece = [0; 4096];
    loop {
        if let Some(end) = buffer.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            return Ok(Some(buffer.drain(..end + 4).collect()));
        }
        if buffer.len() > MAX_HEAD {
            return Err(ErrorKind::InvalidData.into());
        }
        match from.read(&mut piece) {
            Ok(0) if buffer.is_empty() => return Ok(None),
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(read) => buffer.extend(piece.get(..read).unwrap_or_default()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // A connection that is kept open for more, and gets none.
            Err(error) if buffer.is_empty() && error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}

fn parse_request(head: &[u8]) -> Result<Request, String> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut parsed = httparse::Request::new(&mut fields);
    match parsed.parse(head) {
        Ok(httparse::Status::Complete(_)) => {}
        _ => return Err("this is no request of HTTP".into()),
    }
    let (method, url) = (parsed.method.unwrap_or_default(), parsed.path.unwrap_or_default());
    if !["GET", "HEAD"].contains(&method) || split(url).is_none() {
        return Err(format!("{method} {url} is not done here: this is a proxy for GET of http:// addresses"));
    }
    let mut request =
        Request { method: method.into(), url: url.into(), fields: String::new(), plain: method == "GET" };
    for field in parsed.headers.iter() {
        let name = field.name.to_ascii_lowercase();
        let Ok(value) = std::str::from_utf8(field.value) else { continue };
        match name.as_str() {
            "content-length" | "transfer-encoding" => return Err("a request has no body here".into()),
            // A part, or only what is newer than the node's own. Who wants no cache gets none.
            "range" | "if-range" | "if-modified-since" | "if-none-match" => request.plain = false,
            "cache-control" if value.contains("no-cache") || value.contains("no-store") => {
                request.plain = false
            }
            "host" => continue,
            _ => {}
        }
        if !OF_CONNECTION.contains(&name.as_str()) {
            let _ = write!(request.fields, "{}: {value}\r\n", field.name);
        }
    }
    Ok(request)
}

fn parse_answer(head: &[u8], is_head: bool) -> Result<Answer, String> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut parsed = httparse::Response::new(&mut fields);
    match parsed.parse(head) {
        Ok(httparse::Status::Complete(_)) => {}
        _ => return Err("the server does not speak HTTP".into()),
    }
    let status = parsed.code.unwrap_or_default();
    let mut answer = Answer {
        status,
        head: format!("HTTP/1.1 {status} {}\r\n", parsed.reason.unwrap_or_default()),
        length: None,
    };
    let mut chunked = false;
    for field in parsed.headers.iter() {
        let name = field.name.to_ascii_lowercase();
        let Ok(value) = std::str::from_utf8(field.value) else { continue };
        match name.as_str() {
            "transfer-encoding" => chunked = true,
            "content-length" => {
                answer.length = Some(
                    value.trim().parse().map_err(|_| "the answer has no length that is one".to_owned())?,
                );
            }
            _ => {}
        }
        if !OF_CONNECTION.contains(&name.as_str()) {
            let _ = write!(answer.head, "{}: {value}\r\n", field.name);
        }
    }
    // RFC 9112 §6.3: these have no body, and chunks come before a length.
    if is_head || status == 204 || status == 304 {
        answer.length = Some(0);
    } else if chunked {
        answer.length = None;
    }
    Ok(answer)
}

/// Host (with a port, if it has one) and path of an address.
fn split(url: &str) -> Option<(&str, &str)> {
    let rest = url.strip_prefix("http://")?;
    let (host, path) = rest.split_at(rest.find('/')?);
    let plain = |c: char| c.is_ascii_alphanumeric() || ".-_:".contains(c);
    (!host.is_empty() && host.chars().all(plain)).then_some((host, path))
}

/// What an address promises that never leads to anything else: a package has its version in its name, what is named by its
/// digest is that. A page of a network that wants a login first is neither.
enum Promise<'u> {
    /// A package, and what it begins with.
    Package(Vec<u8>),
    /// What has that SHA-256.
    Digest(&'u str, Sha256),
}

impl<'u> Promise<'u> {
    fn of(url: &'u str) -> Option<Self> {
        let (folder, name) = url.rsplit_once('/')?;
        if folder.contains('?') {
            None
        } else if name.ends_with(".deb") {
            (!name.contains('?')).then(|| Self::Package(Vec::new()))
        } else {
            folder.ends_with("/by-hash/SHA256").then(|| Self::Digest(name, Sha256::new()))
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Package(start) => {
                let room = PACKAGE.len().saturating_sub(start.len()).min(bytes.len());
                start.extend(bytes.get(..room).unwrap_or_default());
            }
            Self::Digest(_, digest) => digest.update(bytes),
        }
    }

    /// Whether all that came is what was promised.
    fn holds(self) -> bool {
        match self {
            Self::Package(start) => start == PACKAGE,
            Self::Digest(name, digest) => {
                let digest = digest.finalize();
                digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>() == name
            }
        }
    }
}

/// Connects to a server, as nodes may.
fn connect(host: &str, outside: &Outside) -> io::Result<TcpStream> {
    let with_port = if host.contains(':') { host.to_owned() } else { format!("{host}:80") };
    let mut last = io::Error::new(ErrorKind::NotFound, "it has no address that nodes reach");
    for address in with_port.to_socket_addrs()? {
        let SocketAddr::V4(mut address) = address else { continue };
        let Some(ip) = outside.resolve(*address.ip()) else { continue };
        address.set_ip(ip);
        match TcpStream::connect_timeout(&address.into(), PATIENCE) {
            Ok(server) => {
                server.set_read_timeout(Some(PATIENCE))?;
                server.set_write_timeout(Some(PATIENCE))?;
                return Ok(server);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_lose_what_is_of_one_connection() {
        let head = b"GET http://h.example/pool/a.deb HTTP/1.1\r\nHost: other\r\nUser-Agent: apt\r\nProxy-Connection: x\r\n\r\n";
        let request = parse_request(head).unwrap();
        assert_eq!(request.fields, "User-Agent: apt\r\n");
        assert!(request.plain && Promise::of(&request.url).is_some());
        for field in ["Range: bytes=5-", "If-Modified-Since: x", "Cache-Control: no-cache"] {
            let head = format!("GET http://h/a.deb HTTP/1.1\r\n{field}\r\n\r\n");
            assert!(!parse_request(head.as_bytes()).unwrap().plain, "{field}");
        }
        for bad in [
            "CONNECT h:443 HTTP/1.1\r\n\r\n",
            "GET /path HTTP/1.1\r\n\r\n",
            "GET http://h@x/ HTTP/1.1\r\n\r\n",
            "GET http:///x HTTP/1.1\r\n\r\n",
            "GET http://h/ HTTP/1.1\r\nContent-Length: 4\r\n\r\n",
            "POST http://h/ HTTP/1.1\r\n\r\n",
            "nothing\r\n\r\n",
        ] {
            assert!(parse_request(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_what_never_changes_is_kept() {
        for (url, kept) in [
            ("http://h/pool/main/a/a_1.deb", true),
            ("http://h/dists/x/by-hash/SHA256/00ff", true),
            ("http://h/dists/x/by-hash/SHA512/00ff", false),
            ("http://h/dists/x/InRelease", false),
            ("http://h/a.deb?x", false),
            ("http://h/?x/a.deb", false),
        ] {
            assert_eq!(Promise::of(url).is_some(), kept, "{url}");
        }
    }

    /// Where nothing is found, by the digest of that.
    const EMPTY: &str = "/by-hash/SHA256/e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    /// A server that counts how often it is asked, and answers by the path.
    fn server(answers: usize) -> (SocketAddr, std::thread::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let serve = move || {
            let mut asked = Vec::new();
            for _ in 0..answers {
                let (mut stream, _) = listener.accept().unwrap();
                let head = read_head(&mut stream, &mut Vec::new()).unwrap().unwrap();
                let head = String::from_utf8(head).unwrap();
                let path = head.split(' ').nth(1).unwrap().to_owned();
                let answer = match path.as_str() {
                    "/none.deb" => "HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno".into(),
                    "/chunked" => {
                        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n".into()
                    }
                    "/login.deb" | "/by-hash/SHA256/00ff" => {
                        "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\npage".into()
                    }
                    EMPTY => "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n".into(),
                    "/short.deb" => "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nab".into(),
                    path => {
                        let body =
                            if path.ends_with(".deb") { format!("!<arch>\n{path}") } else { path.into() };
                        format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nX: y\r\n\r\n{body}", body.len())
                    }
                };
                stream.write_all(answer.as_bytes()).unwrap();
                asked.push(path);
            }
            asked
        };
        (address, std::thread::spawn(serve))
    }

    /// An address outside that leads to 127.0.0.1.
    fn detour() -> Outside {
        Outside {
            detours: [([192, 0, 2, 7].into(), [127, 0, 0, 1].into())].into_iter().collect(),
            ..Outside::default()
        }
    }

    /// What a node gets that sends these requests at once.
    fn asks(store: &Store, outside: &Outside, requests: &str) -> String {
        let (mut node, ours) = UnixStream::pair().unwrap();
        node.write_all(requests.as_bytes()).unwrap();
        node.shutdown(std::net::Shutdown::Write).unwrap();
        let mut said = String::new();
        std::thread::scope(|scope| {
            scope.spawn(|| drop(serve(ours, store, outside)));
            node.read_to_string(&mut said).unwrap();
        });
        said
    }

    #[test]
    fn a_package_is_fetched_once() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let (address, served) = server(6);
        let outside = detour();
        let get =
            |path: &str| format!("GET http://192.0.2.7:{}{path} HTTP/1.1\r\nHost: h\r\n\r\n", address.port());
        let said = asks(&store, &outside, &format!("{}{}", get("/a.deb"), get("/list")));
        assert!(said.contains("X: y\r\n") && said.contains("/a.deb") && said.ends_with("/list"), "{said}");
        let said = asks(&store, &outside, &get("/a.deb").repeat(3));
        assert_eq!(said.matches("\r\n\r\n!<arch>\n/a.deb").count(), 3, "{said}");
        assert!(asks(&store, &outside, &get("/list")).ends_with("/list"));
        assert!(asks(&store, &outside, &get("/none.deb")).starts_with("HTTP/1.1 404"));
        assert!(asks(&store, &outside, &get("/chunked")).ends_with("0\r\n\r\n"));
        asks(&store, &outside, &get("/short.deb"));
        assert_eq!(
            served.join().unwrap(),
            ["/a.deb", "/list", "/list", "/none.deb", "/chunked", "/short.deb"]
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing but the whole package");
        // The server is gone, the package is not; and nodes do not get to this machine's own services.
        assert!(asks(&store, &outside, &get("/a.deb")).ends_with("/a.deb"));
        let own = format!("GET http://127.0.0.1:{}/a HTTP/1.1\r\n\r\n", address.port());
        assert!(asks(&store, &outside, &own).starts_with("HTTP/1.1 502"));
    }

    #[test]
    fn what_is_not_what_was_asked_for_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let (address, served) = server(3);
        for (path, end, kept) in [
            ("/login.deb", "page", false),
            ("/by-hash/SHA256/00ff", "page", false),
            (EMPTY, "\r\n\r\n", true),
        ] {
            let url = format!("http://192.0.2.7:{}{path}", address.port());
            let said = asks(&store, &detour(), &format!("GET {url} HTTP/1.1\r\n\r\n"));
            assert!(said.ends_with(end), "{said}");
            assert_eq!(store.get(&url).is_some(), kept, "{path}");
        }
        served.join().unwrap();
    }

    #[test]
    fn who_waited_for_long_fetches_for_itself() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::impatient(dir.path());
        let (address, served) = server(1);
        let url = format!("http://192.0.2.7:{}/a.deb", address.port());
        let _busy = store.turn(&url).unwrap();
        let said = asks(&store, &detour(), &format!("GET {url} HTTP/1.1\r\n\r\n"));
        assert!(said.ends_with("/a.deb"), "{said}");
        served.join().unwrap();
        assert!(store.get(&url).is_none(), "that is for the other to do");
    }

    proptest! {
        #[test]
        fn heads_are_never_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), text in "(GET|HEAD|PUT) http://[a-z:/?.]{0,20} HTTP/1.1\r\n([A-Za-z-]{1,10}: [ -~]{0,10}\r\n){0,4}\r\n") {
            let _ = (parse_request(&bytes), parse_answer(&bytes, false), parse_request(text.as_bytes()));
            let _ = read_head(&mut bytes.as_slice(), &mut Vec::new());
        }
    }
}
