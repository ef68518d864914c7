//! A driver that means harm: anything at all in its rings, bells at any time.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;

use super::{AVAIL, Driver, HALF, RINGS, SECOND};
use crate::virtio::worker::{BACK_END, Handler, Poll};

impl Driver {
    /// Puts what `case` holds into every queue and lets the handler work on it, here, without a thread: it must come
    /// back, with a fault or without, and not panic.
    pub fn attack(&mut self, case: &Hostile, mut handler: impl Handler) {
        for (ring, attack) in self.rings.iter().zip(&case.queues) {
            for (index, descriptor) in attack.descriptors.iter().enumerate() {
                let (address, length, flags, next) = *descriptor;
                if index < usize::from(ring.size) {
                    self.describe(ring.base, index as u16, address, length as usize, flags, next);
                }
            }
            for (index, head) in attack.heads.iter().enumerate() {
                let slot = ring.base + AVAIL + 4 + 2 * (index as u64 % u64::from(ring.size));
                self.memory.write_obj(*head, GuestAddress(slot)).unwrap();
            }
            self.memory.write_obj(attack.avail, GuestAddress(ring.base + AVAIL + 2)).unwrap();
        }
        for (address, bytes) in &case.memory {
            self.memory.write_slice(bytes, GuestAddress(*address)).unwrap();
        }
        let poll = Poll::for_tests();
        let mut outcome = handler.start(&poll);
        for token in case.bells.iter().copied() {
            if outcome.is_err() {
                break;
            }
            outcome = handler.ready(token, EventSet::IN, &poll);
        }
    }
}

/// What a hostile driver puts into memory, and when it rings.
#[derive(Debug, Clone)]
pub(crate) struct Hostile {
    queues: Vec<HostileQueue>,
    memory: Vec<(u64, Vec<u8>)>,
    bells: Vec<u64>,
    features: u64,
}

#[derive(Debug, Clone)]
struct HostileQueue {
    descriptors: Vec<(u64, u32, u16, u16)>,
    heads: Vec<u16>,
    avail: u16,
}

impl Hostile {
    /// Feature bits that were negotiated, any at all.
    pub fn features(&self) -> u64 {
        self.features
    }
}

/// Places where buffers can be, and where they can't.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => 0x10_0000u64..0x10_4000,
        // The rings themselves.
        2 => 0u64..4 * RINGS,
        2 => (HALF as u64 - 64)..(HALF as u64 + 64),
        1 => SECOND - 64..SECOND + 64,
        1 => any::<u64>(),
        1 => u64::MAX - 64..u64::MAX,
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        2 => 0u32..80,
        4 => prop_oneof![Just(1u32), Just(12), Just(16), Just(44), Just(512), Just(4096), Just(65562)],
        1 => 0u32..0x20000,
        1 => any::<u32>(),
    ]
}

/// Bytes that look like the headers of requests now and then.
fn content() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..128),
        prop::collection::vec(0u8..16, 0..128),
        // A block request: type, reserved, sector.
        (0u32..16, any::<u64>()).prop_map(|(kind, sector)| {
            let mut bytes = kind.to_le_bytes().to_vec();
            bytes.extend([0; 4]);
            bytes.extend((sector % 70000).to_le_bytes());
            bytes
        }),
        // A vsock packet from the guest (CID 3) to the host.
        (0u32..3, 0u32..3, any::<u32>(), 0u16..9, any::<u32>(), any::<[u32; 2]>()).prop_map(
            |(from, to, length, operation, flags, credit)| {
                let mut bytes = 3u64.to_le_bytes().to_vec();
                bytes.extend(2u64.to_le_bytes());
                bytes.extend(from.to_le_bytes());
                bytes.extend(to.to_le_bytes());
                bytes.extend((length % 6000).to_le_bytes());
                bytes.extend(1u16.to_le_bytes());
                bytes.extend(operation.to_le_bytes());
                bytes.extend((flags % 5).to_le_bytes());
                bytes.extend(credit[0].to_le_bytes());
                bytes.extend((credit[1] % 10000).to_le_bytes());
                bytes
            }
        ),
        // An indirect table.
        prop::collection::vec((address(), length(), 0u16..8, 0u16..8), 1..6).prop_map(|descriptors| {
            descriptors
                .iter()
                .flat_map(|(address, length, flags, next)| {
                    let mut bytes = address.to_le_bytes().to_vec();
                    bytes.extend(length.to_le_bytes());
                    bytes.extend(flags.to_le_bytes());
                    bytes.extend(next.to_le_bytes());
                    bytes
                })
                .collect()
        }),
    ]
}

/// Random rings and memory for a device of `queues` queues. PROPTEST_CASES sets how many are tried.
pub(crate) fn hostile(queues: usize) -> impl Strategy<Value = Hostile> {
    let queue = (
        prop::collection::vec(
            (address(), length(), 0u16..8, prop_oneof![8 => 0u16..8, 1 => any::<u16>()]),
            8,
        ),
        prop::collection::vec(prop_oneof![8 => 0u16..8, 1 => any::<u16>()], 8),
        prop_oneof![8 => 0u16..9, 1 => any::<u16>()],
    )
        .prop_map(|(descriptors, heads, avail)| HostileQueue { descriptors, heads, avail });
    let bell = prop_oneof![4 => 0..queues as u64, 2 => BACK_END..BACK_END + 4];
    (
        prop::collection::vec(queue, queues),
        prop::collection::vec((0x10_0000u64..0x10_4000, content()), 0..24),
        prop::collection::vec(bell, 1..12),
        any::<u64>(),
    )
        .prop_map(|(queues, memory, bells, features)| Hostile { queues, memory, bells, features })
}
