//! The transport with a device that does nothing, as a driver would set it up and as a hostile one would.

use std::sync::{
    Mutex,
    atomic::{AtomicBool, AtomicUsize},
};

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::{super::common_config::*, *};
use crate::{
    pci::{
        msix,
        wires::{Message, Recorder},
    },
    virtio::Working,
};

#[derive(Default)]
struct Probe {
    activations: AtomicUsize,
    resumes: AtomicUsize,
    resets: AtomicUsize,
    panics: AtomicBool,
    given: Mutex<Option<Activation>>,
}

struct Idle(Arc<Probe>);

impl VirtioDevice for Idle {
    fn worker(&mut self) -> Option<&mut dyn Working> {
        None
    }

    fn device_id(&self) -> u16 {
        4
    }
    fn name(&self) -> &str {
        "idle"
    }
    fn queue_sizes(&self) -> &[u16] {
        &[64, 64, 64]
    }
    fn features(&self) -> u64 {
        VERSION_1 | RING_EVENT_IDX
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn activate(&mut self, activation: Activation) -> Result<(), Error> {
        self.0.activations.fetch_add(1, Ordering::SeqCst);
        assert!(!self.0.panics.load(Ordering::SeqCst), "as asked");
        *self.0.given.lock().unwrap() = Some(activation);
        Ok(())
    }
    fn pause(&mut self) {}

    fn resume(&mut self) -> Result<(), Error> {
        assert_eq!(self.0.activations.load(Ordering::SeqCst), 0, "before it works");
        self.0.resumes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn positions(&mut self) -> Vec<Position> {
        vec![(0, 0); 3]
    }

    fn reset(&mut self) {
        self.0.resets.fetch_add(1, Ordering::SeqCst);
        self.0.given.lock().unwrap().take();
    }
}

const GSI: u32 = 24;
const BAR: u64 = 0xc000_0000;

fn transport() -> (VirtioPci, Arc<Probe>, Arc<Recorder>) {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
    let (probe, wires) = (Arc::new(Probe::default()), Arc::new(Recorder::default()));
    (VirtioPci::new(Box::new(Idle(probe.clone())), memory, wires.clone(), BAR, GSI), probe, wires)
}

fn status_of(pci: &mut VirtioPci) -> u8 {
    let mut byte = [0];
    pci.read_bar(0x14, &mut byte);
    byte[0]
}

/// Up to DRIVER_OK, with queues 0 and 2 enabled, queue 2 with its rings at `rings`.
fn drive(pci: &mut VirtioPci, rings: u64) {
    pci.write_config(4, &[6, 0]);
    pci.write_config(pci.msix_control, &msix::CONTROL_ENABLE.to_le_bytes());
    for vector in 0..4u64 {
        let message = Message { address: 0xfee0_0000, data: 0x30 + vector as u32 };
        pci.write_bar(MSIX_TABLE + vector * 16, &message.address.to_le_bytes());
        pci.write_bar(MSIX_TABLE + vector * 16 + 8, &message.data.to_le_bytes());
        pci.write_bar(MSIX_TABLE + vector * 16 + 12, &[0; 4]);
    }
    pci.write_bar(0x14, &[3]);
    pci.write_bar(0x08, &1u32.to_le_bytes());
    pci.write_bar(0x0c, &1u32.to_le_bytes());
    pci.write_bar(0x14, &[11]);
    pci.write_bar(0x10, &0u16.to_le_bytes());
    for (queue, at) in [(0u16, 0x1000), (2, rings)] {
        pci.write_bar(0x16, &queue.to_le_bytes());
        pci.write_bar(0x18, &16u16.to_le_bytes());
        pci.write_bar(0x1a, &(queue + 1).to_le_bytes());
        for (field, offset) in [(0x20, 0), (0x28, 0x400), (0x30, 0x800)] {
            pci.write_bar(field, &(at + offset).to_le_bytes()[..8]);
        }
        pci.write_bar(0x1c, &[1, 0]);
    }
    pci.write_bar(0x14, &[15]);
}

#[test]
fn a_restored_device_looks_after_its_files_before_it_works() {
    let (mut saved, ..) = transport();
    drive(&mut saved, 0x2000);
    let state = saved.save().unwrap();
    let (mut pci, probe, _) = transport();
    pci.restore(&state).unwrap();
    // It may be saved again while it stands still, its disks frozen under it.
    pci.pause();
    pci.save().unwrap();
    pci.resume().unwrap();
    let count = |what: &AtomicUsize| what.load(Ordering::SeqCst);
    assert_eq!((count(&probe.resumes), count(&probe.activations)), (1, 1));
}

#[test]
fn capabilities_lead_to_every_structure() {
    let (mut pci, ..) = transport();
    let mut ids = [0; 4];
    pci.read_config(0, &mut ids);
    assert_eq!(ids, [0xf4, 0x1a, 0x44, 0x10]);
    let mut next = [0];
    pci.read_config(0x34, &mut next);
    let mut found = Vec::new();
    while next[0] != 0 {
        let mut cap = [0; 16];
        pci.read_config(next[0].into(), &mut cap);
        assert_eq!(next[0] % 4, 0);
        found.push((cap[0], if cap[0] == 9 { cap[3] } else { 0 }));
        next = [cap[1]];
    }
    assert_eq!(found, [(9, 1), (9, 3), (9, 4), (9, 2), (9, 5), (0x11, 0)]);
}

#[test]
fn a_driver_gets_its_device() {
    let (mut pci, probe, wires) = transport();
    drive(&mut pci, 0x3000);
    assert_eq!(status_of(&mut pci), 15);
    assert_eq!(probe.activations.load(Ordering::SeqCst), 1);
    {
        let given = probe.given.lock().unwrap();
        let given = given.as_ref().unwrap();
        assert_eq!(given.features, VERSION_1);
        let ready: Vec<_> = given.queues.iter().map(|(queue, _)| (queue.ready(), queue.size())).collect();
        assert_eq!(ready, [(true, 16), (false, 64), (true, 16)]);
        // Doorbells of the enabled queues alone; both ways to ring.
        let at: Vec<_> = wires.doorbells.lock().unwrap().keys().copied().collect();
        assert_eq!(at, [BAR + 0x3000, BAR + 0x3008]);
        wires.doorbells.lock().unwrap()[&(BAR + 0x3008)].1.write(1).unwrap();
        pci.write_bar(0x3008, &2u16.to_le_bytes());
        assert_eq!(given.queues[2].1.read().unwrap(), 2);
        pci.write_bar(0x3004, &1u16.to_le_bytes());
        assert!(given.queues[1].1.read().is_err(), "not enabled: never rings");
        // Interrupts: queue 2 has vector 3, the configuration vector 0.
        given.interrupt.signal_queue(2);
        assert_eq!((wires.raised(GSI + 3), wires.raised(GSI + 1), wires.raised(GSI)), (1, 0, 0));
        given.interrupt.signal_config();
        given.interrupt.needs_reset();
        assert_eq!(wires.raised(GSI), 2);
    }
    assert_eq!(status_of(&mut pci), 15 | 64);
    pci.write_bar(0x14, &[0]);
    assert_eq!((status_of(&mut pci), probe.resets.load(Ordering::SeqCst)), (0, 1));
    assert!(wires.doorbells.lock().unwrap().is_empty());
    drive(&mut pci, 0x3000);
    assert_eq!((status_of(&mut pci), probe.activations.load(Ordering::SeqCst)), (15, 2));
}

#[test]
fn doorbells_follow_the_bar() {
    let (mut pci, _probe, wires) = transport();
    drive(&mut pci, 0x3000);
    pci.write_config(4, &[4, 0]);
    assert!(wires.doorbells.lock().unwrap().is_empty(), "memory decoding is off");
    pci.write_config(0x10, &0xd000_0000u32.to_le_bytes());
    pci.write_config(4, &[6, 0]);
    assert_eq!(wires.doorbells.lock().unwrap().keys().next(), Some(&0xd000_3000));
    assert_eq!(pci.bar(), Some(0xd000_0000));
}

#[test]
fn without_msix_the_isr_tells() {
    let (mut pci, probe, _wires) = transport();
    drive(&mut pci, 0x3000);
    pci.write_config(pci.msix_control, &[0, 0]);
    probe.given.lock().unwrap().as_ref().unwrap().interrupt.signal_queue(0);
    let mut isr = [0];
    pci.read_bar(0x1000, &mut isr);
    assert_eq!(isr, [1]);
    pci.read_bar(0x1000, &mut isr);
    assert_eq!(isr, [0], "reading clears");
}

#[test]
fn rings_outside_of_memory_need_a_reset() {
    let (mut pci, probe, _wires) = transport();
    drive(&mut pci, 0xfff0_0000);
    assert_eq!(status_of(&mut pci), 15 | 64);
    assert_eq!(probe.activations.load(Ordering::SeqCst), 0);
    pci.write_bar(0x14, &[0]);
    drive(&mut pci, 0x3000);
    assert_eq!(status_of(&mut pci), 15);
}

#[test]
fn a_panic_in_a_device_needs_a_reset() {
    let (mut pci, probe, _wires) = transport();
    probe.panics.store(true, Ordering::SeqCst);
    drive(&mut pci, 0x3000);
    assert_eq!(status_of(&mut pci), 15 | 64);
    probe.panics.store(false, Ordering::SeqCst);
    pci.write_bar(0x14, &[0]);
    drive(&mut pci, 0x3000);
    assert_eq!(status_of(&mut pci), 15);
}

#[test]
fn the_bar_is_reached_through_configuration_space() {
    let (mut pci, ..) = transport();
    let at = pci.pci_access;
    pci.write_config(at + 8, &0x12u32.to_le_bytes());
    pci.write_config(at + 12, &2u32.to_le_bytes());
    let mut queues = [0; 2];
    pci.read_config(at + 16, &mut queues);
    assert_eq!(u16::from_le_bytes(queues), 3);
    pci.write_config(at + 8, &0x14u32.to_le_bytes());
    pci.write_config(at + 12, &1u32.to_le_bytes());
    pci.write_config(at + 16, &[3]);
    assert_eq!(status_of(&mut pci), 3);
}

#[derive(Debug, Clone)]
enum Access {
    Config(u16, Vec<u8>),
    Bar(u64, Vec<u8>),
    ReadConfig(u16, usize),
    ReadBar(u64, usize),
    Interrupt(u16),
    NeedsReset,
}

fn access() -> impl Strategy<Value = Access> {
    let bytes = || prop::collection::vec(any::<u8>(), 1..=8);
    // Mostly registers that exist, so that states are reached and not only edges.
    let bar =
        || prop_oneof![4 => 0u64..0x40, 1 => 0x3000u64..0x3010, 2 => 0x4000u64..0x4050, 1 => 0..BAR_SIZE - 8];
    prop_oneof![
        2 => (prop_oneof![0u16..0xc0, 0u16..0xff8], bytes()).prop_map(|(at, data)| Access::Config(at, data)),
        6 => (bar(), bytes()).prop_map(|(at, data)| Access::Bar(at, data)),
        1 => Just(Access::Bar(0x14, vec![15])),
        1 => (0x1cu64..0x1d).prop_map(|at| Access::Bar(at, vec![1, 0])),
        1 => (0u16..0xff8, 1usize..=8).prop_map(|(at, length)| Access::ReadConfig(at, length)),
        1 => (bar(), 1usize..=8).prop_map(|(at, length)| Access::ReadBar(at, length)),
        1 => (0u16..5).prop_map(Access::Interrupt),
        1 => Just(Access::NeedsReset),
    ]
}

proptest! {
    #[test]
    fn no_access_breaks_a_device(started in any::<bool>(), accesses in prop::collection::vec(access(), 1..150)) {
        let (mut pci, probe, wires) = transport();
        if started {
            drive(&mut pci, 0x3000);
        }
        for access in accesses {
            let mut buffer = [0; 8];
            match access {
                Access::Config(at, data) => pci.write_config(at, &data),
                Access::Bar(at, data) => pci.write_bar(at, &data),
                Access::ReadConfig(at, length) => pci.read_config(at, &mut buffer[..length]),
                Access::ReadBar(at, length) => pci.read_bar(at, &mut buffer[..length]),
                Access::Interrupt(queue) => pci.shared.signal_queue(queue),
                Access::NeedsReset => pci.shared.needs_reset(),
            }
            let (activations, resets) =
                (probe.activations.load(Ordering::SeqCst), probe.resets.load(Ordering::SeqCst));
            prop_assert!(activations == resets || activations == resets + 1, "activated twice without a reset");
        }
        // Whatever it went through, a reset and a proper driver make it work.
        pci.write_config(pci.msix_control, &[0, 0]);
        pci.write_config(4, &[0, 0]);
        pci.write_config(0x10, &(BAR as u32).to_le_bytes());
        pci.write_config(0x14, &[0; 4]);
        pci.write_bar(0x14, &[0]);
        prop_assert!(wires.doorbells.lock().unwrap().is_empty());
        for select in [8, 0x16] {
            pci.write_bar(select, &[0; 2]);
        }
        drive(&mut pci, 0x3000);
        prop_assert_eq!(status_of(&mut pci), 15);
        prop_assert!(probe.given.lock().unwrap().is_some());
    }
}
