//! What a file is that is no kernel for this machine: a kernel for another processor, or a program for UEFI firmware.

/// Bytes of a file's start that [`name`] looks at.
pub const HEAD: usize = 4096;

/// Machines of ELF files (`e_machine`, the System V ABI's registry), of those that Linux runs on.
const ELF_MACHINES: [(u16, &str); 12] = [
    (2, "SPARC"),
    (3, "32-bit x86"),
    (8, "MIPS"),
    (20, "32-bit PowerPC"),
    (21, "PowerPC"),
    (22, "IBM Z"),
    (40, "32-bit ARM"),
    (43, "SPARC"),
    (62, "x86-64"),
    (183, "ARM64"),
    (243, "RISC-V"),
    (258, "LoongArch"),
];
/// Machines of PE files (`Machine`, Microsoft's PE format).
const PE_MACHINES: [(u16, &str); 7] = [
    (0x14c, "32-bit x86"),
    (0x1c2, "32-bit ARM"),
    (0x5032, "32-bit RISC-V"),
    (0x5064, "RISC-V"),
    (0x6264, "LoongArch"),
    (0x8664, "x86-64"),
    (0xaa64, "ARM64"),
];
const X86_64: &str = "x86-64";
/// Of `e_ident`: the class, 2 of which is 64-bit, and the byte order, 1 of which is little endian.
const ELF_CLASS: usize = 4;
const ELF_DATA: usize = 5;

/// What a file is that begins with `head` ([`HEAD`] bytes, fewer of a shorter file), as the end of a sentence that begins
/// with its name; nothing if it may be a kernel for x86-64. By the ELF header, the `Image` headers of ARM64 and RISC-V
/// (Documentation/arch/{arm64/booting,riscv/boot-image-header}.rst), and the PE header.
pub fn name(head: &[u8]) -> Option<String> {
    if head.starts_with(b"\x7fELF") {
        return elf(head);
    }
    // Also with a PE header in front, for firmware.
    match head.get(0x38..0x3c) {
        Some(b"ARM\x64") => return Some(of_machine("ARM64")),
        Some(b"RSC\x05") => return Some(of_machine("RISC-V")),
        _ => {}
    }
    // A bzImage may be a program for UEFI as well.
    if head.get(0x202..0x206) == Some(b"HdrS") {
        return None;
    }
    pe(head)
}

fn elf(head: &[u8]) -> Option<String> {
    let number = head.get(18..20)?;
    let number = match head.get(ELF_DATA)? {
        2 => u16::from_be_bytes(number.try_into().ok()?),
        _ => u16::from_le_bytes(number.try_into().ok()?),
    };
    let machine = ELF_MACHINES.iter().find(|(known, _)| *known == number).map(|(_, machine)| *machine);
    match machine {
        // x86-64 with pointers of 32 bits (x32): there is no such kernel.
        Some(X86_64) if head.get(ELF_CLASS) == Some(&2) => None,
        Some(X86_64) => Some(of_machine("32-bit x86")),
        Some(machine) => Some(of_machine(machine)),
        None => Some(of_machine(&format!("another processor (ELF machine {number})"))),
    }
}

fn pe(head: &[u8]) -> Option<String> {
    if !head.starts_with(b"MZ") {
        return None;
    }
    let at = u32::from_le_bytes(head.get(0x3c..0x40)?.try_into().ok()?);
    let header = head.get(usize::try_from(at).ok()?..)?;
    if !header.starts_with(b"PE\0\0") {
        return None;
    }
    let number = u16::from_le_bytes(header.get(4..6)?.try_into().ok()?);
    let machine = PE_MACHINES.iter().find(|(known, _)| *known == number).map(|(_, machine)| *machine);
    if machine != Some(X86_64) {
        return Some(of_machine(machine.unwrap_or("another processor")));
    }
    // The section that a unified kernel image has its kernel in (the UAPI group's specification UKI).
    if header.windows(8).any(|name| name == b".linux\0\0") {
        return Some(
            "is a unified kernel image (UKI), a program for UEFI: take the kernel out of it with \
             `objcopy -O binary --only-section=.linux FILE KERNEL`, the initrd with `--only-section=.initrd`"
                .into(),
        );
    }
    Some("is a program for UEFI, which lab has not: a bzImage or an ELF kernel is needed".into())
}

fn of_machine(machine: &str) -> String {
    format!("is for {machine}: a kernel for x86-64 is needed")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf(class: u8, order: u8, machine: [u8; 2]) -> Vec<u8> {
        let mut head = b"\x7fELF".to_vec();
        head.extend([class, order, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
        head.extend(machine);
        head
    }

    fn image(magic: &[u8]) -> Vec<u8> {
        let mut head = vec![0; 0x40];
        head[..2].copy_from_slice(b"MZ");
        head[0x38..0x3c].copy_from_slice(magic);
        head
    }

    fn pe(machine: u16, section: &[u8]) -> Vec<u8> {
        let mut head = vec![0; 0x300];
        head[..2].copy_from_slice(b"MZ");
        head[0x3c] = 0x80;
        head[0x80..0x84].copy_from_slice(b"PE\0\0");
        head[0x84..0x86].copy_from_slice(&machine.to_le_bytes());
        head[0x188..0x188 + section.len()].copy_from_slice(section);
        head
    }

    #[test]
    fn kernels_of_other_machines_are_named() {
        for (head, says) in [
            (elf(1, 1, [3, 0]), "is for 32-bit x86: "),
            (elf(1, 1, [62, 0]), "is for 32-bit x86: "),
            (elf(2, 1, [183, 0]), "is for ARM64: "),
            (elf(2, 2, [0, 22]), "is for IBM Z: "),
            (elf(2, 1, [0xf3, 0]), "is for RISC-V: "),
            (elf(2, 1, [0xff, 0xff]), "another processor (ELF machine 65535)"),
            (image(b"ARM\x64"), "is for ARM64: "),
            (image(b"RSC\x05"), "is for RISC-V: "),
            (pe(0xaa64, b".linux"), "is for ARM64: "),
            (pe(0x14c, b".text"), "is for 32-bit x86: "),
            (pe(0x8664, b".linux\0\0"), "is a unified kernel image (UKI)"),
            (pe(0x8664, b".text"), "is a program for UEFI"),
        ] {
            let name = name(&head).unwrap_or_default();
            assert!(name.contains(says), "{says:?}: {name:?}");
        }
    }

    #[test]
    fn what_may_be_a_kernel_has_no_other_name() {
        let mut bzimage = pe(0x8664, b".text");
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        for head in [elf(2, 1, [62, 0]), bzimage, b"\x7fELF".to_vec(), b"MZ".to_vec(), image(b"abcd"), vec![]]
        {
            assert_eq!(name(&head), None);
        }
    }
}
