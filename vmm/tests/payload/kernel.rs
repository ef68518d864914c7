//! Kernels of a few dozen instructions, as PVH ELF files and as bzImages.

/// First address of the serial port.
pub const COM1: u16 = 0x3f8;
/// Where the code of an ELF kernel lies.
pub const BASE: u32 = 0x10_0000;

/// Machine code for 32-bit protected mode; the instructions used are the same in 64-bit mode unless they say otherwise.
#[derive(Default, Clone)]
pub struct Code(pub Vec<u8>);

impl Code {
    fn put(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// mov dx, port; mov al, value; out dx, al
    pub fn out(self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.put(&[0x66, 0xba, low, high, 0xb0, value, 0xee])
    }

    /// Write text to the serial port.
    pub fn say(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out(COM1, byte))
    }

    /// mov eax, [address] (32-bit only)
    pub fn load(self, address: u32) -> Self {
        self.put(&[0xa1]).put(&address.to_le_bytes())
    }

    /// mov dword [address], value (32-bit only)
    pub fn store(self, address: u32, value: u32) -> Self {
        self.put(&[0xc7, 0x05]).put(&address.to_le_bytes()).put(&value.to_le_bytes())
    }

    /// Write the four bytes of eax to the serial port, the lowest first.
    pub fn say_eax(self) -> Self {
        let [low, high] = COM1.to_le_bytes();
        // mov dx, COM1; four times: out dx, al; shr eax, 8
        (0..4).fold(self.put(&[0x66, 0xba, low, high]), |code, _| code.put(&[0xee, 0xc1, 0xe8, 8]))
    }

    /// Load from `address` until a bit of `mask` is set (32-bit only).
    pub fn wait_for(self, address: u32, mask: u32) -> Self {
        // load is 5 bytes, test eax, imm32 is 5, jz rel8 is 2.
        self.load(address).put(&[0xa9]).put(&mask.to_le_bytes()).put(&[0x74, 0xf4])
    }

    /// Power off: S5 to the sleep control register.
    pub fn power_off(self) -> Self {
        self.out(0x600, 0x34).halt()
    }

    /// cli; hlt; jmp to the hlt
    pub fn halt(self) -> Self {
        self.put(&[0xfa, 0xf4, 0xeb, 0xfd])
    }

    /// jmp to itself
    pub fn spin(self) -> Self {
        self.put(&[0xeb, 0xfe])
    }

    /// Load an empty interrupt table and divide by zero.
    pub fn triple_fault(self) -> Self {
        // lidt [BASE - a zeroed place]; xor eax, eax; div eax
        self.put(&[0x0f, 0x01, 0x1d]).put(&0x9_0000u32.to_le_bytes()).put(&[0x31, 0xc0, 0xf7, 0xf0]).halt()
    }

    /// Go to real mode, at F000:FFF0, as Linux does to reboot through the BIOS.
    pub fn real_mode_reset(self) -> Self {
        // Placed at the code's present end: lgdt, then a far jump over the table into a 16-bit segment based at BASE.
        let at = self.0.len() as u32;
        let table = BASE + at + 14;
        let code = self
            .put(&[0x0f, 0x01, 0x15])
            .put(&(table + 16).to_le_bytes())
            .put(&[0xea])
            .put(&(at + 14 + 22).to_le_bytes())
            .put(&[8, 0])
            // The table: nothing, and 64 KiB of 16-bit code; then its limit and address.
            .put(&[0; 8])
            .put(&[0xff, 0xff, 0, 0, 0x10, 0x9b, 0, 0])
            .put(&15u16.to_le_bytes())
            .put(&table.to_le_bytes());
        // mov eax, cr0; and al, 0xfe; mov cr0, eax; jmp F000:FFF0
        code.put(&[0x0f, 0x20, 0xc0, 0x24, 0xfe, 0x0f, 0x22, 0xc0, 0xea, 0xf0, 0xff, 0x00, 0xf0])
    }

    /// Any other instruction.
    pub fn raw(self, bytes: &[u8]) -> Self {
        self.put(bytes)
    }
}

/// An ELF kernel with a PVH entry point, which is its first instruction.
pub fn elf(code: &Code) -> Vec<u8> {
    const HEADERS: usize = 64 + 2 * 56;
    const NOTE: usize = 20;
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // Executable for x86-64, version 1; entry; program headers at 64, no sections.
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    file.extend(u64::from(BASE).to_le_bytes());
    file.extend(64u64.to_le_bytes());
    file.extend(0u64.to_le_bytes());
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    let header = |kind: u32, offset: usize, address: u64, size: usize| {
        let mut header = Vec::new();
        header.extend(kind.to_le_bytes());
        header.extend(7u32.to_le_bytes());
        for field in [offset as u64, address, address, size as u64, size as u64, 4] {
            header.extend(field.to_le_bytes());
        }
        header
    };
    file.extend(header(1, HEADERS + NOTE, BASE.into(), code.0.len()));
    file.extend(header(4, HEADERS, 0, NOTE));
    for word in [4u32, 4, 18] {
        file.extend(word.to_le_bytes());
    }
    file.extend(b"Xen\0");
    file.extend(BASE.to_le_bytes());
    file.extend(&code.0);
    file
}

/// A bzImage whose 64-bit entry point is `code`.
pub fn bzimage(code: &Code) -> Vec<u8> {
    const SETUP: usize = 1024;
    let mut file = vec![0; SETUP + 0x200];
    file.extend(&code.0);
    file.resize(file.len().next_multiple_of(16), 0);
    let syssize = ((file.len() - SETUP) / 16) as u32;
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &syssize.to_le_bytes());
    put(0x1fe, &[0x55, 0xaa]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]);
    put(0x214, &0x10_0000u32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x236, &[1, 0]);
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes());
    file
}

/// An uncompressed cpio archive with one empty file.
pub fn cpio(name: &str) -> Vec<u8> {
    let mut archive = Vec::new();
    for name in [name, "TRAILER!!!"] {
        archive.extend(b"070701");
        for field in 0..13 {
            let value = if field == 11 { name.len() + 1 } else { 0 };
            archive.extend(format!("{value:08X}").bytes());
        }
        archive.extend(name.bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}
