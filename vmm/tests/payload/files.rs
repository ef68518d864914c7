//! Kernels and initrds that are not what they should be: one clear sentence each, and nothing runs.

use lab_vmm::{boot, memory};

use crate::{
    kernel::{Code, bzimage, cpio, elf},
    running::Bench,
};

fn kernel_error(file: &[u8]) -> String {
    let bench = Bench::new(file);
    let memory = memory::map(32, false).unwrap();
    let error = boot::load_kernel(&memory, &bench.config.kernel).unwrap_err().to_string();
    let path = bench.config.kernel.display().to_string();
    assert!(error.contains(&path), "{error} names the file");
    error.replace(&path, "K")
}

fn code() -> Code {
    Code::default().say("hello").power_off()
}

#[test]
fn broken_kernels_are_named() {
    let (elf, bzimage) = (elf(&code()), bzimage(&code()));
    let mut no_note = elf.clone();
    no_note[64 + 56] = 5;
    let mut far_entry = elf.clone();
    far_entry[64 + 112 + 16..64 + 112 + 20].copy_from_slice(&0x7000_0000u32.to_le_bytes());
    let mut huge = elf.clone();
    huge[64 + 40..64 + 48].copy_from_slice(&(1u64 << 40).to_le_bytes());
    let mut old = bzimage.clone();
    old[0x236] = 0;
    let mut narrow = elf.clone();
    narrow[4] = 1;
    narrow[18] = 3;
    let mut arm = vec![0; 4096];
    arm[0x38..0x3c].copy_from_slice(b"ARM\x64");
    for (file, says) in [
        (&b""[..], "kernel K is 0 bytes long"),
        (b"abc", "3 bytes long"),
        (&[0x5a; 4096], "neither an ELF kernel with a PVH entry point nor a bzImage"),
        (&elf[..50], "cut short or corrupt"),
        (&elf[..elf.len() - 1], "cut short or corrupt"),
        (&no_note, "CONFIG_PVH"),
        (&far_entry, "entry point 0x70000000 lies outside"),
        (&huge, "needs 1048577 MiB"),
        (&bzimage[..bzimage.len() - 16], "is cut short: 1568 bytes of 1584"),
        (&bzimage[..600], "cut short or corrupt"),
        (&old, "without a 64-bit entry point, of a 32-bit kernel"),
        (&narrow, "K is for 32-bit x86: a kernel for x86-64 is needed"),
        (&arm, "K is for ARM64: a kernel for x86-64 is needed"),
    ] {
        let error = kernel_error(file);
        assert!(
            error.contains(says) || says.starts_with("needs") && error.contains("ends at"),
            "{says:?}: {error}"
        );
        assert!(!error.contains('\n'), "{error}");
    }
    let memory = memory::map(32, false).unwrap();
    let error = boot::load_kernel(&memory, "/nonexistent/kernel".as_ref()).unwrap_err().to_string();
    assert!(error.starts_with("cannot read kernel /nonexistent/kernel: "), "{error}");
}

#[test]
fn whole_kernels_are_loaded() {
    let memory = memory::map(64, false).unwrap();
    for file in [elf(&code()), bzimage(&code())] {
        let bench = Bench::new(&file);
        boot::load_kernel(&memory, &bench.config.kernel).unwrap();
    }
}

#[test]
fn broken_initrds_are_named() {
    let bench = Bench::new(b"");
    let whole = cpio("init");
    let mut bad = whole.clone();
    bad[60] = b'!';
    let mut long = whole.clone();
    long[6 + 6 * 8..14 + 6 * 8].copy_from_slice(b"00FFFFFF");
    for (file, says) in [
        (&b""[..], "is not a cpio archive"),
        (&b"hello world"[..], "is not a cpio archive"),
        (&whole[..whole.len() / 2], "is cut short"),
        (&bad, "is corrupt"),
        (&long, "is cut short: its member at byte 0"),
    ] {
        std::fs::write(bench.path("initrd"), file).unwrap();
        let memory = memory::map(32, false).unwrap();
        let error = boot::load_initrds(&memory, &[bench.path("initrd")]).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("initrd"), "{says:?}: {error}");
    }
    std::fs::File::create(bench.path("initrd")).unwrap().set_len(1 << 40).unwrap();
    let error = boot::load_initrds(&memory::map(32, false).unwrap(), &[bench.path("initrd")]).unwrap_err();
    assert!(error.to_string().contains("give the machine more memory"), "{error}");
}

#[test]
fn initrds_are_laid_one_after_the_other() {
    use vm_memory::{Bytes, GuestAddress};
    let bench = Bench::new(b"");
    let gzip = b"\x1f\x8babcdefg";
    std::fs::write(bench.path("a"), gzip).unwrap();
    std::fs::write(bench.path("b"), cpio("x")).unwrap();
    let memory = memory::map(32, false).unwrap();
    let initrd = boot::load_initrds(&memory, &[bench.path("a"), bench.path("b")]).unwrap().unwrap();
    assert_eq!(initrd.size, 12 + cpio("x").len() as u64);
    assert_eq!(initrd.address % 4096, 0);
    assert!(initrd.address + initrd.size <= 32 << 20);
    let mut bytes = vec![0; initrd.size as usize];
    memory.read_slice(&mut bytes, GuestAddress(initrd.address)).unwrap();
    assert_eq!(bytes, [&gzip[..], &[0; 3], &cpio("x")].concat());
    assert_eq!(boot::load_initrds(&memory, &[]).unwrap(), None);
}
