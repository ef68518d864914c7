//! Two faults of QEMU's emulation of SVM, corrected in the running process: without this, the nodes of an emulated host, and
//! the host itself, crash every few minutes of work. Both are in 10.0.2, 10.0.13 and 11.1.2.
//!
//! **An interrupt delivered twice.** When a hypervisor enters its guest with an interrupt to deliver (AMD's manual, volume 2,
//! §15.20, EVENTINJ), QEMU's `helper_vmrun` delivers it at once, and also leaves its number in `exception_index`, which means
//! "still to be delivered". Nobody looks at that unless the emulated CPU is asked to leave its loop before the guest's next
//! exit: then the interrupt is delivered a second time, whether the guest has interrupts enabled or not. In the first
//! instructions of an interrupt handler, that is the end of its kernel. The store is one instruction, and nothing needs it on
//! this path: it is made to do nothing.
//!
//! **A flag of the first CPU lost.** Whenever a CPU loads the state of its FPU without a pending exception, so at about every
//! change of tasks, QEMU's `cpu_clear_ignne` clears a bit among the flags (`hflags2`) of the *first* CPU, by an unlocked
//! read-modify-write in the thread of whichever CPU that is. What the first CPU's thread changes there at that moment is
//! undone: that nested paging is on (its guest ends in a triple fault), or off (the host's registers are saved as its guest's,
//! which is gone), or that interrupts are held off behind VMRUN (the host's kernel runs a handler with its guest's segments).
//! The bit is only ever set by a write to port F0h, for DOS's way of FPU errors: the function is made to return at once.
//!
//! Both places are looked for in the program file, by the symbols that QEMU exports for its plugins, and changed in the memory
//! of our own child.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::Path,
};

use elf::{ElfBytes, abi::PT_LOAD, endian::LittleEndian};

/// `mov %esi, exception_index(%rbx)`, without the offset of the field.
const STORE: [u8; 2] = [0x89, 0xb3];
/// Its length in bytes, with the offset.
const STORE_LENGTH: usize = 6;
/// An instruction of the same length that does nothing (AMD's manual, volume 3, NOP).
const NOTHING: [u8; STORE_LENGTH] = [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00];
/// `movzbl %r12b, %esi`: the number of the interrupt, just before.
const NUMBER: [u8; 4] = [0x41, 0x0f, 0xb6, 0xf4];
/// `mov $1, %edx; mov %rbx, %rdi; call`: its delivery, soon after.
const DELIVER: [u8; 9] = [0xba, 0x01, 0x00, 0x00, 0x00, 0x48, 0x89, 0xdf, 0xe8];
/// Bytes between number and store, and between number and delivery, at most.
const NEAR: usize = 80;

/// The code of the function that clears: `andl $0xffffff7f, hflags2(%rax)` has this for its operand.
const CLEARED: [u8; 4] = [0x7f, 0xff, 0xff, 0xff];
/// Bytes of that function, at most.
const SMALL: usize = 128;
/// `ret`.
const RETURN: [u8; 1] = [0xc3];

/// The number of faults that there are.
pub const FAULTS: usize = 2;

/// What is to be changed in the program for one of the faults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Correction {
    /// Its address less that of the program's first byte in memory.
    offset: u64,
    /// What is there.
    bytes: Vec<u8>,
    /// What has to be there, of the same length.
    instead: Vec<u8>,
}

/// Finds what is to be corrected in a QEMU program file: fewer than [`FAULTS`] if QEMU was built in another way, or does not
/// have one of the faults any more.
pub fn find(program: &Path) -> Vec<Correction> {
    let Ok(bytes) = fs::read(program) else { return Vec::new() };
    [delivered_twice(&bytes), flag_lost(&bytes)].into_iter().flatten().collect()
}

fn delivered_twice(program: &[u8]) -> Option<Correction> {
    let (start, code) = function(program, "helper_vmrun")?;
    let (delivery, _) = function(program, "do_interrupt_x86_hardirq")?;
    let at = find_in(code, delivery.wrapping_sub(start))?;
    let bytes = code.get(at..at + STORE_LENGTH)?.to_vec();
    Some(Correction { offset: start + at as u64, bytes, instead: NOTHING.to_vec() })
}

fn flag_lost(program: &[u8]) -> Option<Correction> {
    let (offset, code) = function(program, "cpu_clear_ignne")?;
    only(code.get(..code.len().min(SMALL))?, |at| at.starts_with(&CLEARED))?;
    Some(Correction { offset, bytes: code.get(..RETURN.len())?.to_vec(), instead: RETURN.to_vec() })
}

/// A function that the program exports: its address less that of the program's first byte in memory, and its code.
fn function<'a>(program: &'a [u8], name: &str) -> Option<(u64, &'a [u8])> {
    let file = ElfBytes::<LittleEndian>::minimal_parse(program).ok()?;
    let first = file.segments()?.iter().find(|segment| segment.p_type == PT_LOAD && segment.p_offset == 0)?;
    let (symbols, names) = file.dynamic_symbol_table().ok()??;
    let symbol =
        symbols.iter().find(|symbol| names.get(symbol.st_name as usize).is_ok_and(|found| found == name))?;
    let segment = file.segments()?.iter().find(|segment| {
        segment.p_type == PT_LOAD
            && (segment.p_vaddr..segment.p_vaddr.saturating_add(segment.p_filesz)).contains(&symbol.st_value)
    })?;
    let in_file = (symbol.st_value - segment.p_vaddr).checked_add(segment.p_offset)?;
    let code = program.get(usize::try_from(in_file).ok()?..)?.get(..usize::try_from(symbol.st_size).ok()?)?;
    Some((symbol.st_value.checked_sub(first.p_vaddr)?, code))
}

/// Where in the code of `helper_vmrun` the store is. `delivery` is the address of the function that delivers, less that
/// of the code.
fn find_in(code: &[u8], delivery: u64) -> Option<usize> {
    let number = only(code, |at| at.starts_with(&NUMBER))?;
    let near = code.get(number..code.len().min(number + NEAR))?;
    let call = only(near, |at| at.starts_with(&DELIVER))? + DELIVER.len();
    let displacement = i32::from_le_bytes(near.get(call..call + 4)?.try_into().ok()?);
    let target = ((number + call + 4) as u64).wrapping_add_signed(displacement.into());
    // Between the two, the fields of an interrupt are set; those of `env` lie behind %rbx, that of the CPU before it.
    let is_store = |at: &[u8]| at.starts_with(&STORE) && at.get(5).is_some_and(|sign| sign & 0x80 != 0);
    let store = only(near.get(..call)?, is_store)?;
    (target == delivery).then_some(number + store)
}

/// The only place where `found` holds.
fn only(code: &[u8], found: impl Fn(&[u8]) -> bool) -> Option<usize> {
    let mut places = (0..code.len()).filter(|at| code.get(*at..).is_some_and(&found));
    let place = places.next()?;
    places.next().is_none().then_some(place)
}

/// Corrects a running QEMU, a child of this process.
pub fn apply(pid: u32, program: &Path, corrections: &[Correction]) -> io::Result<()> {
    let program = program.canonicalize()?;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let base = base(&maps, &program).ok_or(io::ErrorKind::NotFound)?;
    let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"))?;
    for Correction { offset, bytes, instead } in corrections {
        let mut found = vec![0; bytes.len()];
        memory.read_exact_at(&mut found, base + offset)?;
        if found != *bytes {
            return Err(io::Error::other("the program in memory is not that of the file"));
        }
        memory.write_all_at(instead, base + offset)?;
    }
    Ok(())
}

/// Where the first byte of a program is in memory (proc_pid_maps(5)).
fn base(maps: &str, program: &Path) -> Option<u64> {
    maps.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let (range, offset) = (words.next()?, words.nth(1)?);
        let path = line.splitn(6, ' ').nth(5)?.trim_start();
        let is_first = u64::from_str_radix(offset, 16) == Ok(0) && Path::new(path) == program;
        is_first.then(|| u64::from_str_radix(range.split('-').next()?, 16).ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::emulated::tools;

    /// Code as GCC makes it: other instructions, the number, fields of `env`, the store, more fields, the delivery.
    fn code(store: [u8; STORE_LENGTH]) -> Vec<u8> {
        let mut code = vec![0x90; 40];
        code.extend(NUMBER);
        code.extend([0x44, 0x89, 0xab, 0xe0, 0x33, 0x00, 0x00]);
        code.extend(store);
        code.extend([0xc7, 0x83, 0xe4, 0x33, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00]);
        code.extend(DELIVER);
        code.extend(0x1000_u32.to_le_bytes());
        code.extend([0x90; 40]);
        code
    }

    #[test]
    fn the_store_is_found_where_it_is() {
        let store = [0x89, 0xb3, 0x10, 0xd7, 0xff, 0xff];
        let code = code(store);
        let target = code.len() as u64 - 40 + 0x1000;
        let place = find_in(&code, target).unwrap();
        assert_eq!(code[place..place + STORE_LENGTH], store);
        // Another function is called; two such places; none.
        assert_eq!(find_in(&code, target + 1), None);
        assert_eq!(find_in(&[code.clone(), code.clone()].concat(), target), None);
        let mut corrected = code;
        corrected[place..place + STORE_LENGTH].copy_from_slice(&NOTHING);
        assert_eq!(find_in(&corrected, target), None);
    }

    #[test]
    fn a_field_of_env_is_no_store_of_the_cpu() {
        let code = code([0x89, 0xb3, 0xe8, 0x33, 0x00, 0x00]);
        assert_eq!(find_in(&code, code.len() as u64 - 40 + 0x1000), None);
    }

    #[test]
    fn the_base_is_read_from_the_maps() {
        let maps = "55d0c0000000-55d0c0400000 r--p 00000000 fe:00 123                        /usr/bin/qemu system\n\
            55d0c0400000-55d0c0c00000 r-xp 00400000 fe:00 123                        /usr/bin/qemu system\n\
            7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \n";
        assert_eq!(base(maps, Path::new("/usr/bin/qemu system")), Some(0x55d0_c000_0000));
        assert_eq!(base(maps, Path::new("/usr/bin/qemu")), None);
    }

    /// The QEMU of this machine, where there is one, is corrected in a process that has not begun to emulate.
    #[test]
    fn a_running_qemu_is_corrected() {
        let Some(qemu) = tools::find("qemu-system-x86_64") else {
            eprintln!("SKIPPED: a_running_qemu_is_corrected: qemu-system-x86_64 is not installed");
            return;
        };
        let corrections = find(&qemu);
        assert_eq!(corrections.len(), FAULTS, "scripts/install-dependencies installs a QEMU that is known");
        let mut child = std::process::Command::new(&qemu)
            .args(["-M", "none", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // Its greeting says that the program is loaded.
        let mut greeting = String::new();
        let mut output = io::BufReader::new(child.stdout.take().unwrap());
        io::BufRead::read_line(&mut output, &mut greeting).unwrap();
        let corrected = apply(child.id(), &qemu, &corrections);
        let again = apply(child.id(), &qemu, &corrections);
        child.kill().unwrap();
        child.wait().unwrap();
        corrected.unwrap();
        again.unwrap_err();
    }
}
