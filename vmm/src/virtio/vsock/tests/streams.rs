//! Data and ends of connections.

use std::thread;

use super::*;
use crate::virtio::vsock::{
    connection::WORTH_TELLING,
    packet::{NO_RECEIVE, NO_SEND},
};

#[test]
fn the_host_reaches_a_port_of_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(folder.path());
    let mut cid = [0; 8];
    guest.device.read_config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), CID);
    let (mut stream, port) = guest.connected(22);
    stream.write_all(b"SSH-2.0-client\r\n").unwrap();
    assert_eq!(guest.expect(operation::DATA).1, b"SSH-2.0-client\r\n");
    guest.send(22, port, operation::DATA, 0, b"SSH-2.0-server\r\n");
    assert_eq!(line(&mut stream), "SSH-2.0-server\r\n");
    // The guest closes.
    guest.send(22, port, operation::SHUTDOWN, NO_SEND | NO_RECEIVE, b"");
    guest.expect(operation::RESET);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    guest.device.reset();
}

#[test]
fn what_follows_the_greeting_is_data() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(folder.path());
    let mut stream = connect(&guest.config);
    stream.write_all(b"CONN").unwrap();
    stream.write_all(b"ECT 22\nearly").unwrap();
    let (request, _) = guest.expect(operation::REQUEST);
    guest.send(22, request.source_port, operation::RESPONSE, 0, b"");
    assert_eq!(guest.expect(operation::DATA).1, b"early");
    guest.device.reset();
    assert!(line(&mut stream).starts_with("OK "));
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "a reset ends all connections");
}

#[test]
fn greetings_that_make_no_sense_are_hung_up_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(folder.path());
    for greeting in
        ["HELLO\n", "CONNECT\n", "CONNECT x\n", "CONNECT 4294967296\n", "CONNECT -1\n", "CONNECT  22\n"]
    {
        let mut stream = connect(&guest.config);
        stream.write_all(greeting.as_bytes()).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "{greeting:?} was accepted");
    }
    let mut stream = connect(&guest.config);
    stream.write_all(&[b'x'; 100]).unwrap();
    // Unread data makes it a reset.
    assert!(!matches!(stream.read(&mut [0]), Ok(1..)));
    // Connections that come and go leave nothing behind, and are not shown to the guest.
    for _ in 0..100 {
        drop(connect(&guest.config));
    }
    guest.connected(22);
    guest.device.reset();
}

#[test]
fn a_port_where_nobody_listens_is_refused_both_ways() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(folder.path());
    let mut stream = connect(&guest.config);
    stream.write_all(b"CONNECT 22\n").unwrap();
    let (request, _) = guest.expect(operation::REQUEST);
    guest.send(22, request.source_port, operation::RESET, 0, b"");
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    guest.send(1000, 5000, operation::REQUEST, 0, b"");
    let (refused, _) = guest.expect(operation::RESET);
    assert_eq!(({ refused.source_port }, { refused.destination_port }), (5000, 1000));
    // So is all that belongs to no connection, other hosts and other types; but not a reset.
    for operation in [operation::RESPONSE, operation::DATA, operation::SHUTDOWN, operation::CREDIT_UPDATE, 77]
    {
        guest.send(1, 2, operation, 0, b"");
        guest.expect(operation::RESET);
    }
    guest.send(1, 2, operation::RESET, 0, b"");
    let listener = guest.listen(5000);
    guest.connected_to(&listener, 1000, 5000);
    guest.device.reset();
}

#[test]
fn a_megabyte_and_more_each_way_through_the_credit() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(folder.path());
    guest.driver.use_indirect();
    let listener = guest.listen(5000);
    let mut stream = guest.connected_to(&listener, 1000, 5000);
    let sent = pattern(3 << 20);

    // To the host: no more than the device says that it has room for.
    let mut reader = stream.try_clone().unwrap();
    let expected = sent.clone();
    let reading = thread::spawn(move || {
        let mut received = vec![0; expected.len()];
        reader.read_exact(&mut received).unwrap();
        assert!(received == expected);
    });
    let (mut offset, mut forwarded) = (0usize, 0u32);
    let mut updates = 0;
    while offset < sent.len() {
        let room = BUFFER - (offset - forwarded as usize);
        let part = &sent[offset..(offset + 20000.min(room)).min(sent.len())];
        if part.len() < 10000 && offset + part.len() < sent.len() {
            let (header, _) = guest.expect(operation::CREDIT_UPDATE);
            forwarded = header.forwarded;
            updates += 1;
        } else {
            guest.send(1000, 5000, operation::DATA, 0, part);
            offset += part.len();
        }
    }
    reading.join().unwrap();
    assert!(updates >= 10, "only {updates} updates");

    // To the guest: no more than it says that it has room for.
    let expected = sent.clone();
    let writing = thread::spawn(move || {
        stream.write_all(&sent).unwrap();
        stream
    });
    let (mut received, mut asked) = (Vec::new(), 0);
    while received.len() < expected.len() {
        let (header, data) = guest.receive();
        match header.operation {
            operation::DATA => received.extend(data),
            operation::CREDIT_UPDATE => {}
            operation::CREDIT_REQUEST => {
                assert_eq!(received.len() as u32 - guest.taken, guest.room, "asked while there was room");
                asked += 1;
                guest.taken = received.len() as u32;
                guest.send(1000, 5000, operation::CREDIT_UPDATE, 0, b"");
            }
            other => panic!("operation {other}"),
        }
        assert!(received.len() as u32 - guest.taken <= guest.room, "more than there was room for");
    }
    assert!(received == expected);
    assert!(asked >= (3 << 20) / 65536 - 1, "asked {asked} times");
    drop(writing.join().unwrap());
    guest.device.reset();
}

#[test]
fn a_host_that_does_not_read_is_waited_for_and_a_guest_that_sends_on_is_reset() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(folder.path());
    let listener = guest.listen(5000);
    let mut stream = guest.connected_to(&listener, 1000, 5000);
    let data = pattern(20000);
    // The socket takes some, the device keeps its window, and that is all.
    let mut sent = 0;
    let mut forwarded = 0;
    loop {
        guest.send(1000, 5000, operation::CREDIT_REQUEST, 0, b"");
        while {
            let (header, _) = guest.expect(operation::CREDIT_UPDATE);
            let more = header.forwarded != forwarded;
            forwarded = header.forwarded;
            more
        } {
            guest.send(1000, 5000, operation::CREDIT_REQUEST, 0, b"");
        }
        if sent + data.len() - forwarded as usize > BUFFER {
            break;
        }
        guest.send(1000, 5000, operation::DATA, 0, &data);
        sent += data.len();
    }
    // The host reads on: it gets all, and the guest gets room.
    let mut received = vec![0; sent];
    stream.read_exact(&mut received).unwrap();
    assert!(received.chunks(data.len()).all(|chunk| chunk == data));
    let (header, _) = guest.expect(operation::CREDIT_UPDATE);
    assert!(header.forwarded - forwarded >= WORTH_TELLING);

    let mut reset = false;
    for _ in 0..100 {
        guest.send(1000, 5000, operation::DATA, 0, &data);
        while let Some((_, packet)) = guest.driver.used(0) {
            let header = *Header::from_slice(&packet[..HEADER]).unwrap();
            reset |= header.operation == operation::RESET;
        }
    }
    assert!(reset, "a guest may send more than it has credit for");
    guest.device.reset();
}

#[test]
fn each_direction_ends_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(folder.path());
    // The host first: it sends all, and still gets the answer.
    let (mut stream, port) = guest.connected(22);
    stream.write_all(b"question").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.expect(operation::DATA).1, b"question");
    assert_eq!({ guest.expect(operation::SHUTDOWN).0.flags }, NO_SEND);
    guest.send(22, port, operation::DATA, 0, b"answer\n");
    assert_eq!(line(&mut stream), "answer\n");
    guest.send(22, port, operation::SHUTDOWN, NO_SEND | NO_RECEIVE, b"");
    guest.expect(operation::RESET);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);

    // The guest first.
    let (mut stream, port) = guest.connected(22);
    guest.send(22, port, operation::DATA, 0, b"question");
    guest.send(22, port, operation::SHUTDOWN, NO_SEND, b"");
    let mut question = String::new();
    stream.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    stream.write_all(b"answer").unwrap();
    assert_eq!(guest.expect(operation::DATA).1, b"answer");
    // The host is gone altogether: the guest learns it once, after all data.
    stream.write_all(b"bye").unwrap();
    drop(stream);
    assert_eq!(guest.expect(operation::DATA).1, b"bye");
    let mut ended = 0;
    while ended != NO_SEND | NO_RECEIVE {
        ended |= guest.expect(operation::SHUTDOWN).0.flags;
    }
    guest.send(22, port, operation::RESET, 0, b"");
    // Nothing is left of it.
    guest.send(22, port, operation::CREDIT_UPDATE, 0, b"");
    guest.expect(operation::RESET);
    guest.device.reset();
}

#[test]
fn what_was_sent_before_a_reset_arrives() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(folder.path());
    let listener = guest.listen(5000);
    let mut stream = guest.connected_to(&listener, 1000, 5000);
    // More than the socket takes (208 KiB by default), not more than the credit.
    let data = pattern(16 << 10);
    let mut sent = 0;
    let mut forwarded = 0;
    while sent - forwarded as usize + data.len() <= BUFFER && sent < 4 << 20 {
        guest.send(1000, 5000, operation::DATA, 0, &data);
        sent += data.len();
        guest.send(1000, 5000, operation::CREDIT_REQUEST, 0, b"");
        forwarded = guest.expect(operation::CREDIT_UPDATE).0.forwarded;
    }
    assert!((forwarded as usize) < sent, "the socket took everything: this tests nothing");
    guest.send(1000, 5000, operation::SHUTDOWN, NO_SEND | NO_RECEIVE, b"");
    guest.send(1000, 5000, operation::RESET, 0, b"");
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), sent);
    assert!(received.chunks(data.len()).all(|chunk| chunk == data));
    guest.device.reset();
}
