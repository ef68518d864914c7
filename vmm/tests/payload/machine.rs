//! What guests do, seen from outside.

use std::{os::unix::net::UnixStream, process::Command};

use lab_vmm::{
    config::VsockConfig,
    control::{Action, Reply},
    lock::Lock,
};

use crate::{
    kernel::{Code, bzimage, elf},
    running::{Bench, kvm, stderr, wait},
};

const ECAM: u32 = 0xe000_0000;
const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;

#[test]
fn an_elf_kernel_says_hello_and_powers_off() {
    if !kvm() {
        return;
    }
    let bench = Bench::new(&elf(&Code::default().say("hello").power_off()));
    let output = bench.start().end();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!((bench.log().as_str(), stderr(&output).as_str()), ("hello", ""));
    assert!(!bench.path("control").exists(), "the socket goes with the machine");
}

#[test]
fn a_bzimage_starts_in_64_bit_mode() {
    if !kvm() {
        return;
    }
    // mov ecx, 0xc0000080; rdmsr: EFER; then the bytes of eax.
    let code = Code::default().raw(&[0xb9, 0x80, 0, 0, 0xc0, 0x0f, 0x32]).say_eax().power_off();
    let mut bench = Bench::new(&bzimage(&code));
    bench.config.memory_mib = 64;
    let output = bench.start().end();
    assert!(output.status.success(), "{}", stderr(&output));
    // Long mode enabled and active.
    assert_eq!(bench.log().as_bytes()[1] & 5, 5, "{:?}", bench.log());
}

#[test]
fn start_info_and_pci_are_where_they_should_be() {
    if !kvm() {
        return;
    }
    // ebx points at hvm_start_info: mov eax, [ebx]. Then the ids of host bridge, console, and of nothing.
    let code = Code::default().raw(&[0x8b, 0x03]).say_eax();
    let code = [0u32, 1, 9].iter().fold(code, |code, slot| code.load(ECAM + slot * 0x8000).say_eax());
    let bench = Bench::new(&elf(&code.power_off()));
    let output = bench.start().end();
    assert!(output.status.success(), "{}", stderr(&output));
    let words: Vec<u32> = bench
        .log()
        .chars()
        .map(|c| c as u8)
        .collect::<Vec<_>>()
        .chunks(4)
        .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
        .collect();
    assert_eq!(words, [0x336e_c578, 0x0008_1b36, 0x1043_1af4, u32::MAX], "{words:x?}");
}

#[test]
fn the_power_button_is_an_interrupt() {
    if !kvm() {
        return;
    }
    // Switch the local APIC on; send I/O APIC input 5 to vector 0x40; wait for it to be requested.
    let code = Code::default()
        .store(LOCAL_APIC + 0xf0, 0x1ff)
        .store(IO_APIC, 0x10 + 2 * 5 + 1)
        .store(IO_APIC + 0x10, 0)
        .store(IO_APIC, 0x10 + 2 * 5)
        .store(IO_APIC + 0x10, 0x40)
        .say("ready")
        .wait_for(LOCAL_APIC + 0x220, 1)
        .say(" pressed")
        .power_off();
    let bench = Bench::new(&elf(&code));
    let running = bench.start();
    bench.wait_for("ready");
    assert_eq!(bench.ask(Action::PowerButton), Reply::Done);
    let output = running.end();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(bench.log(), "ready pressed");
}

#[test]
fn a_second_cpu_starts() {
    if !kvm() {
        return;
    }
    // In real mode at 0x8000: mov byte [0x9000], 1; cli; hlt.
    let trampoline = u64::from_le_bytes([0xc6, 0x06, 0x00, 0x90, 0x01, 0xfa, 0xf4, 0x90]);
    let code = Code::default()
        .store(0x8000, trampoline as u32)
        .store(0x8004, (trampoline >> 32) as u32)
        .store(LOCAL_APIC + 0xf0, 0x1ff)
        // INIT to APIC id 1, then start it at page 8.
        .store(LOCAL_APIC + 0x310, 1 << 24)
        .store(LOCAL_APIC + 0x300, 0x4500)
        .store(LOCAL_APIC + 0x310, 1 << 24)
        .store(LOCAL_APIC + 0x300, 0x4608)
        .wait_for(0x9000, 1)
        .say("two")
        .power_off();
    let mut bench = Bench::new(&elf(&code));
    bench.config.cpus = 2;
    let output = bench.start().end();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(bench.log(), "two");
}

#[test]
fn a_paused_machine_stands_still() {
    if !kvm() {
        return;
    }
    // Says "." for ever: jmp back over the 7 bytes that say it. The second CPU waits to be started.
    let mut bench = Bench::new(&elf(&Code::default().say(".").raw(&[0xeb, 0xf7])));
    bench.config.cpus = 2;
    let running = bench.start();
    let exits = || match bench.ask(Action::Stats) {
        Reply::Stats(stats) => stats.exits,
        other => panic!("{other:?}"),
    };
    let paused = || matches!(bench.ask(Action::Status), Reply::Status(status) if status.paused);
    bench.wait_for(".");
    for _ in 0..20 {
        assert_eq!((bench.ask(Action::Pause), paused()), (Reply::Done, true));
        let before = exits();
        assert_eq!(bench.ask(Action::Pause), Reply::Done);
        assert_eq!(exits(), before);
        assert_eq!((bench.ask(Action::Resume), paused()), (Reply::Done, false));
        wait(|| exits() > before, || "the guest stood still".into());
    }
    assert_eq!(bench.ask(Action::Pause), Reply::Done);
    assert_eq!(bench.ask(Action::Kill), Reply::Done);
    let output = running.end();
    assert!(output.status.success(), "{}", stderr(&output));
}

/// Counts in memory and says each number, one byte, for ever.
fn counting() -> Vec<u8> {
    let counter = 0x20_0000u32.to_le_bytes();
    // inc dword [counter]; mov al, [counter]; mov dx, COM1; out dx, al; jmp back over these 16 bytes
    let code = Code::default().raw(&[0xff, 0x05]).raw(&counter).raw(&[0xa0]).raw(&counter);
    elf(&code.raw(&[0x66, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xee]))
}

#[test]
fn a_snapshot_goes_on_where_it_was_made() {
    if !kvm() {
        return;
    }
    let mut bench = Bench::new(&counting());
    bench.config.cpus = 2;
    let mut running = bench.start();
    let log = bench.path("log");
    let numbers = || std::fs::read(&log).unwrap_or_default();
    for round in 0..5 {
        let before = numbers().len();
        wait(|| numbers().len() > before + 3, || format!("it said {} numbers", numbers().len()));
        let folder = bench.path(&format!("snapshot{round}"));
        std::fs::create_dir(&folder).unwrap();
        assert_eq!(bench.ask(Action::Pause), Reply::Done);
        assert_eq!(bench.ask(Action::Save { folder: folder.clone() }), Reply::Done);
        assert_eq!(bench.ask(Action::Kill), Reply::Done);
        assert!(running.end().status.success());
        // A copy, so that nothing depends on the machine that was.
        let copy = bench.path("copy");
        let _ = std::fs::remove_dir_all(&copy);
        std::fs::rename(&folder, &copy).unwrap();
        bench.config.restore = Some(copy);
        bench.config.paused = round % 2 == 0;
        running = bench.start();
        if bench.config.paused {
            wait(|| bench.path("control").exists(), || "there is no control socket".into());
            assert!(matches!(bench.ask(Action::Status), Reply::Status(status) if status.paused));
            assert_eq!(bench.ask(Action::Resume), Reply::Done);
        }
    }
    let before = numbers().len();
    wait(|| numbers().len() > before + 3, || "the last one says nothing".into());
    let said = numbers();
    let lost = (1usize..).zip(&said).find(|(number, byte)| number % 256 != usize::from(**byte));
    assert_eq!(lost, None, "of {} numbers, one was lost or said twice", said.len());
}

#[test]
fn a_restored_machine_that_resets_boots() {
    if !kvm() {
        return;
    }
    // Counts in memory and says each number's low byte, up to 20000; then resets.
    let counter = 0x20_0000u32.to_le_bytes();
    let count = Code::default().raw(&[0xff, 0x05]).raw(&counter).raw(&[0xa0]).raw(&counter);
    // mov dx, COM1; out dx, al; cmp dword [counter], 20000; jb back over these 28 bytes
    let count = count.raw(&[0x66, 0xba, 0xf8, 0x03, 0xee, 0x81, 0x3d]).raw(&counter);
    let count = count.raw(&20_000u32.to_le_bytes()).raw(&[0x72, 0xe4]);
    let mut bench = Bench::new(&elf(&count.out(0x602, 1).halt()));
    let log = bench.path("log");
    let numbers = || std::fs::read(&log).unwrap_or_default();
    let running = bench.start();
    wait(|| numbers().len() > 10, || "it says nothing".into());
    let folder = bench.path("snapshot");
    std::fs::create_dir(&folder).unwrap();
    assert_eq!(bench.ask(Action::Pause), Reply::Done);
    assert_eq!(bench.ask(Action::Save { folder: folder.clone() }), Reply::Done);
    assert_eq!(bench.ask(Action::Kill), Reply::Done);
    running.end();
    bench.config.restore = Some(folder);
    let _running = bench.start();
    wait(|| numbers().len() > 20_100, || format!("it said {} numbers", numbers().len()));
    let said = numbers();
    let wrong = (0..20_100usize).find(|index| (index % 20_000 + 1) as u8 != said[*index]);
    assert_eq!(wrong, None, "after the reset it did not begin at 1");
}

#[test]
fn snapshots_that_do_not_suit_are_refused() {
    if !kvm() {
        return;
    }
    let mut bench = Bench::new(&counting());
    let running = bench.start();
    bench.wait_for("\u{1}");
    let folder = bench.path("snapshot");
    let reply = bench.ask(Action::Save { folder: folder.clone() });
    assert!(matches!(&reply, Reply::Error(why) if why.contains("snapshot/memory")), "{reply:?}");
    std::fs::create_dir(&folder).unwrap();
    assert_eq!(bench.ask(Action::Save { folder: folder.clone() }), Reply::Done);
    assert!(matches!(bench.ask(Action::Status), Reply::Status(status) if !status.paused));
    assert_eq!(bench.ask(Action::Kill), Reply::Done);
    running.end();
    bench.config.restore = Some(folder.clone());
    let refused = |bench: &Bench, says: &str| {
        let output = bench.start().end();
        assert!(!output.status.success() && stderr(&output).contains(says), "{}", stderr(&output));
    };
    bench.config.memory_mib = 64;
    refused(&bench, "it is of a machine with 1 CPUs and 32 MiB, not with 1 and 64");
    bench.config.memory_mib = 32;
    bench.config.vsock =
        Some(VsockConfig { cid: 3, socket: bench.path("vsock"), notify_port: None, clock_port: None });
    refused(&bench, "it has 3 devices where 4 are asked for");
    bench.config.vsock = None;
    let state = std::fs::read(folder.join("state")).unwrap();
    std::fs::write(folder.join("state"), &state[..state.len() / 2]).unwrap();
    refused(&bench, "bytes long");
    std::fs::remove_file(folder.join("state")).unwrap();
    refused(&bench, "cannot read");
    std::fs::write(folder.join("state"), &state).unwrap();
    let memory = std::fs::OpenOptions::new().write(true).open(folder.join("memory")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&memory, b"?", 0x10_0000).unwrap();
    refused(&bench, "its checksum is wrong between 0 and 2 MiB: it is damaged");
}

#[test]
fn a_guest_is_looked_after_and_killed() {
    if !kvm() {
        return;
    }
    let mut bench = Bench::new(&elf(&Code::default().say("up").spin()));
    bench.config.console.socket = Some(bench.path("console"));
    let running = bench.start();
    bench.wait_for("up");
    let Reply::Status(status) = bench.ask(Action::Status) else { panic!("no status") };
    assert_eq!((status.name.as_str(), status.pid, status.cpus), ("tiny", running.pid(), 1));
    let Reply::Stats(stats) = bench.ask(Action::Stats) else { panic!("no stats") };
    assert!(stats.first_run_us > 0 && stats.exits >= 2, "{stats:?}");
    drop(UnixStream::connect(bench.path("console")).unwrap());
    let second = bench.start().end();
    assert!(!second.status.success());
    assert!(stderr(&second).contains("running already"), "{}", stderr(&second));
    assert_eq!(bench.ask(Action::Kill), Reply::Done);
    let output = running.end();
    assert!(output.status.success(), "{}", stderr(&output));
    Lock::take(&bench.path("lock"), None).unwrap();
}

#[test]
fn a_signal_ends_all_cpus() {
    if !kvm() {
        return;
    }
    let mut bench = Bench::new(&elf(&Code::default().say("up").halt()));
    bench.config.cpus = 32;
    let running = bench.start();
    bench.wait_for("up");
    assert!(Command::new("kill").arg(running.pid().to_string()).status().unwrap().success());
    let output = running.end();
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn a_reset_starts_anew_and_never_lets_go_of_the_lock() {
    if !kvm() {
        return;
    }
    let bench = Bench::new(&elf(&Code::default().say("boot ").out(0x602, 1).halt()));
    let running = bench.start();
    bench.wait_for("boot boot ");
    // As long as it resets and resets, nobody else gets the lock.
    let seen = std::cell::Cell::new(0);
    let descriptors = std::cell::Cell::new(0);
    wait(
        || {
            let boots = bench.log().matches("boot ").count();
            let taken = Lock::take(&bench.path("lock"), None).is_ok();
            seen.set(boots);
            let open = std::fs::read_dir(format!("/proc/{}/fd", running.pid())).map_or(0, Iterator::count);
            descriptors.set(descriptors.get().max(open));
            assert!(
                !taken || bench.log().matches("boot ").count() == 10,
                "the lock was free after {boots} boots"
            );
            boots == 10
        },
        || format!("{} boots", seen.get()),
    );
    assert!(descriptors.get() < 40, "{} descriptors after a few resets: they pile up", descriptors.get());
    // It gives up on a guest that does nothing else.
    let output = running.end();
    assert!(!output.status.success());
    assert!(stderr(&output).contains("reset 10 times in a row"), "{}", stderr(&output));
    assert_eq!(stderr(&output).matches("the guest resets").count(), 10);
}

#[test]
fn a_triple_fault_is_told() {
    if !kvm() {
        return;
    }
    let bench = Bench::new(&elf(&Code::default().say("x").triple_fault()));
    let output = bench.start().end();
    assert!(stderr(&output).contains("triple fault"), "{}", stderr(&output));
    assert_eq!(bench.log(), "xxxxxxxxxx");
}

#[test]
fn the_bios_entry_resets() {
    if !kvm() {
        return;
    }
    let bench = Bench::new(&elf(&Code::default().say("x").real_mode_reset()));
    let output = bench.start().end();
    assert_eq!(stderr(&output).matches("the guest resets").count(), 10, "{}", stderr(&output));
}
