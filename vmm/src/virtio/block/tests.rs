//! What the guest writes is what QEMU's tools find in the image, and the other way round.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

use proptest::prelude::*;

use super::*;
use crate::{
    config::DiskFormat,
    qcow2::{self, tests::when_free},
    virtio::testing::{Driver, hostile},
};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn config(path: &Path, format: DiskFormat) -> DiskConfig {
    DiskConfig { path: path.to_owned(), format, read_only: false, sector_bytes: 512 }
}

fn qemu(tool: &str, arguments: &[&str]) -> String {
    let output = Command::new(tool)
        .args(arguments)
        .output()
        .unwrap_or_else(|e| panic!("{tool} (package qemu-utils) is needed by this test: {e}"));
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} {arguments:?}: {said}");
    said
}

/// A disk with a driver at work on it.
struct Guest {
    device: Block,
    driver: Driver,
}

impl Guest {
    fn new(config: &DiskConfig) -> Self {
        let device = Block::new("disk0", config).unwrap();
        let driver = Driver::new(device.queue_sizes());
        let mut guest = Self { device, driver };
        let features = guest.device.features();
        guest.device.activate(guest.driver.activation(features)).unwrap();
        guest
    }

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        header
    }

    /// Sends a request with data in pieces of `piece` bytes; returns status and what was read.
    fn request(&mut self, kind: u32, sector: u64, data: &[u8], read: usize, piece: usize) -> (u8, Vec<u8>) {
        let header = Self::header(kind, sector);
        let mut readable = vec![header.as_slice()];
        readable.extend(data.chunks(piece));
        let mut writable: Vec<usize> =
            (0..read).step_by(piece).map(|start| piece.min(read - start)).collect();
        writable.push(1);
        self.driver.send(0, &readable, &writable);
        let mut written = self.driver.wait(0);
        let status = written.pop().unwrap();
        (status, written)
    }

    fn write(&mut self, sector: u64, data: &[u8]) {
        assert_eq!(self.request(OUT, sector, data, 0, 60000), (0, vec![]));
    }

    fn read(&mut self, sector: u64, length: usize) -> Vec<u8> {
        let (status, data) = self.request(IN, sector, &[], length, 60000);
        assert_eq!((status, data.len()), (0, length));
        data
    }

    fn zeroes(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let mut data = sector.to_le_bytes().to_vec();
        data.extend(sectors.to_le_bytes());
        data.extend(flags.to_le_bytes());
        self.request(kind, 0, &data, 0, 16).0
    }
}

fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// A chain of three: a raw base, a qcow2 by QEMU on it, and one by us on that. Returns the top and its content.
fn chain(folder: &Path) -> (PathBuf, Vec<u8>) {
    let (base, middle, top) =
        (folder.join("base.raw"), folder.join("middle.qcow2"), folder.join("top.qcow2"));
    let mut content = pattern(1, 4 << 20);
    fs::write(&base, &content).unwrap();
    let path = middle.to_str().unwrap();
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", path, "6M"]);
    qemu("qemu-io", &["-f", "qcow2", "-c", "write -P 0x5a 1000k 200k", "-c", "write -P 0x77 5M 64k", path]);
    content.resize(8 << 20, 0);
    content[1000 << 10..1200 << 10].fill(0x5a);
    content[5 << 20..(5 << 20) + (64 << 10)].fill(0x77);
    qcow2::create_overlay(&top, &middle, DiskFormat::Qcow2, 8 << 20).unwrap();
    (top, content)
}

#[test]
fn a_chain_reads_as_qemu_reads_it_and_qemu_reads_what_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let (top, mut content) = chain(folder.path());
    let mut guest = Guest::new(&config(&top, DiskFormat::Qcow2));
    let mut capacity = [0; 8];
    guest.device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), (8 << 20) / 512);
    assert_eq!(guest.read(0, 1 << 20), content[..1 << 20]);
    assert_eq!(guest.read((4 << 20) / 512 - 8, 8192), content[(4 << 20) - 4096..(4 << 20) + 4096]);

    // Partial clusters, whole ones, across clusters.
    for (sector, length) in [(3, 512), (128, 65536), (200, 100 * 1024), (16000, 512), (12000, 3 * 65536)] {
        let data = pattern(sector, length);
        guest.write(sector, &data);
        let start = sector as usize * 512;
        content[start..start + length].copy_from_slice(&data);
    }
    assert_eq!(guest.zeroes(WRITE_ZEROES, 2000, 1000, 0), 0);
    content[2000 * 512..3000 * 512].fill(0);
    assert_eq!(guest.zeroes(WRITE_ZEROES, 4000, 1000, 1), 0);
    content[4000 * 512..5000 * 512].fill(0);
    assert_eq!(guest.read(0, 4 << 20), content[..4 << 20]);

    // What was discarded reads as zero where whole clusters are, and never as the backing file's data.
    let discarded = guest.zeroes(DISCARD, 6144, 256, 0);
    assert_eq!(discarded, 0);
    content[6144 * 512..6400 * 512].fill(0);
    assert_eq!(guest.request(FLUSH, 0, &[], 0, 512).0, 0);

    assert_eq!(guest.read(0, 4 << 20), content[..4 << 20]);
    guest.device.reset();
    let counters = guest.device.counters().read();
    assert!(counters[0] > 10 && counters[1] > 8 << 20 && counters[2] > 300 << 10, "{counters:?}");
    drop(guest);
    qemu("qemu-img", &["check", top.to_str().unwrap()]);
    let flat = folder.path().join("flat.raw");
    qemu("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", top.to_str().unwrap(), flat.to_str().unwrap()]);
    assert!(fs::read(&flat).unwrap() == content, "QEMU reads something else");
}

#[test]
fn what_is_discarded_is_given_back_to_the_host() {
    use std::os::unix::fs::MetadataExt;
    let folder = tempfile::tempdir().unwrap();
    let (top, mut content) = chain(folder.path());
    let below = |path: &std::path::Path| {
        let mut files: Vec<_> =
            fs::read_dir(path.parent().unwrap()).unwrap().map(|file| file.unwrap().path()).collect();
        files.retain(|file| file != path);
        files.sort();
        files.into_iter().map(|file| fs::read(file).unwrap()).collect::<Vec<_>>()
    };
    let backing = below(&top);
    let mut guest = Guest::new(&config(&top, DiskFormat::Qcow2));
    let space = || fs::metadata(&top).unwrap().blocks() * 512;
    for (number, (kind, unmap)) in [(DISCARD, 0), (WRITE_ZEROES, 1)].into_iter().enumerate() {
        // 4 MiB over what is below, from the middle of a cluster to the middle of another.
        let (sector, length) = (2000 + 64, 4 << 20);
        let data = pattern(20 + number as u64, length);
        for (piece, data) in data.chunks(256 << 10).enumerate() {
            guest.write(sector + piece as u64 * 512, data);
        }
        assert_eq!(guest.request(FLUSH, 0, &[], 0, 512).0, 0);
        let taken = space();
        content[sector as usize * 512..sector as usize * 512 + length].copy_from_slice(&data);
        let sectors = (length / 512) as u32 - 1000;
        assert_eq!(guest.zeroes(kind, sector, sectors, unmap), 0);
        assert_eq!(guest.request(FLUSH, 0, &[], 0, 512).0, 0);
        assert!(space() + (3 << 20) < taken, "{} of {taken} bytes are taken", space());
        // Whole clusters are zero; of the others, a discard may leave what was there.
        let range = sector as usize * 512..(sector as usize + sectors as usize) * 512;
        let clusters = range.start.next_multiple_of(65536)..range.end / 65536 * 65536;
        content[if unmap == 1 { range } else { clusters }].fill(0);
        assert!(guest.read(0, 1 << 20) == content[..1 << 20]);
    }
    // What was freed is used again, and holds.
    let data = pattern(30, 300 << 10);
    guest.write(5000, &data);
    content[5000 * 512..5000 * 512 + data.len()].copy_from_slice(&data);
    assert_eq!(guest.request(FLUSH, 0, &[], 0, 512).0, 0);
    guest.device.reset();
    drop(guest);
    assert!(below(&top) == backing, "a backing file has changed");
    qemu("qemu-img", &["check", top.to_str().unwrap()]);
    let flat = folder.path().join("flat.raw");
    qemu("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", top.to_str().unwrap(), flat.to_str().unwrap()]);
    assert!(fs::read(&flat).unwrap() == content, "QEMU reads something else");
}

/// A killed process flushes nothing more: what the guest has flushed is there, and the image is sound.
#[test]
fn flushed_data_survives_without_a_proper_end() {
    let folder = tempfile::tempdir().unwrap();
    let (top, _) = chain(folder.path());
    let mut guest = Guest::new(&config(&top, DiskFormat::Qcow2));
    let data = pattern(9, 300 << 10);
    guest.write(1000, &data);
    assert_eq!(guest.request(FLUSH, 0, &[], 0, 512).0, 0);
    let later = pattern(10, 300 << 10);
    guest.write(9000, &later);
    // The state of the file as a SIGKILL would leave it now.
    let copy = folder.path().join("killed.qcow2");
    fs::copy(&top, &copy).unwrap();
    let path = copy.to_str().unwrap();
    // Space taken and not used is fine; references to free space (exit code 2) are not.
    let output = Command::new("qemu-img").args(["check", "--output=json", path]).output().unwrap();
    let checked: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(checked.get("corruptions").is_none(), "{checked}");
    let flat = folder.path().join("flat.raw");
    qemu("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", path, flat.to_str().unwrap()]);
    let flat = fs::read(&flat).unwrap();
    assert!(flat[1000 * 512..1000 * 512 + data.len()] == data, "flushed data is lost");
    guest.device.reset();
}

#[test]
fn a_raw_disk_is_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    let mut content = pattern(3, 2 << 20);
    fs::write(&path, &content).unwrap();
    let mut guest = Guest::new(&config(&path, DiskFormat::Raw));
    for indirect in [false, true] {
        if indirect {
            guest.driver.use_indirect();
        }
        assert_eq!(guest.read(0, 512 << 10), content[..512 << 10]);
        // Pieces that end anywhere.
        let (status, data) = guest.request(IN, 77, &[], 33 * 512, 1001);
        assert!(status == 0 && data == content[77 * 512..110 * 512]);
        let data = pattern(4 + u64::from(indirect), 41 * 512);
        assert_eq!(guest.request(OUT, 99, &data, 0, 777).0, 0);
        content[99 * 512..140 * 512].copy_from_slice(&data);
        for (sector, unmap) in [(1000, 0), (2000, 1), (3000, 0)] {
            assert_eq!(guest.zeroes(WRITE_ZEROES, sector, 100, unmap), 0);
            content[sector as usize * 512..(sector as usize + 100) * 512].fill(0);
        }
        assert_eq!(guest.request(FLUSH, 0, &[], 0, 512).0, 0);
    }
    assert_eq!(guest.zeroes(DISCARD, 1024, 1024, 0), 0);
    assert_eq!(guest.request(GET_ID, 0, &[], 20, 20), (0, b"disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec()));
    guest.device.reset();
    content[1024 * 512..2048 * 512].fill(0);
    assert!(fs::read(&path).unwrap() == content);
}

#[test]
fn the_guest_is_told_the_size_of_a_sector() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("raw");
    fs::write(&path, vec![7; 1 << 20]).unwrap();
    // Offsets in `struct virtio_blk_config`: blk_size, physical_block_exp, min_io_size, opt_io_size.
    for (sector_bytes, exponent, blocks) in [(512, 3, 8), (4096, 0, 1)] {
        let disk = DiskConfig { sector_bytes, ..config(&path, DiskFormat::Raw) };
        let device = when_free(|| Block::new("disk0", &disk));
        let mut told = [0; 36];
        device.read_config(0, &mut told);
        // Whatever a sector is, the disk's size is in units of 512 bytes.
        assert_eq!(told[..8], (1u64 << 11).to_le_bytes());
        assert_eq!(told[20..24], sector_bytes.to_le_bytes());
        assert_eq!(told[24], exponent);
        assert_eq!(told[26..28], [blocks, 0]);
        assert_eq!(told[28..32], u32::from(blocks).to_le_bytes());
    }
}

#[test]
fn what_cannot_be_done_is_refused_and_the_disk_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    fs::write(&path, vec![7; 1 << 20]).unwrap();
    let mut guest = Guest::new(&config(&path, DiskFormat::Raw));
    let last = (1 << 20) / 512;
    let cases: [(u32, u64, usize, usize, u8); 8] = [
        (IN, last, 0, 512, 1),
        (IN, last - 1, 0, 1024, 1),
        (OUT, u64::MAX, 512, 0, 1),
        (OUT, u64::MAX / 512, 512, 0, 1),
        (IN, 0, 0, 511, 1),
        (OUT, 0, 100, 0, 1),
        (99, 0, 512, 0, 2),
        (DISCARD, 0, 3, 0, 1),
    ];
    for (kind, sector, written, read, expected) in cases {
        let (status, _) = guest.request(kind, sector, &vec![0; written], read, 4096);
        assert_eq!(status, expected, "request {kind} at {sector}");
    }
    assert_eq!(guest.zeroes(WRITE_ZEROES, last - 1, 2, 0), 1);
    assert_eq!(guest.zeroes(WRITE_ZEROES, 0, u32::MAX, 0), 1);
    assert_eq!(guest.zeroes(WRITE_ZEROES, 0, 1, 2), 2);
    assert_eq!(guest.zeroes(DISCARD, 0, 1, 1), 2);
    assert_eq!(guest.read(0, 4096), [7; 4096]);
    guest.device.reset();
    assert_eq!(fs::read(&path).unwrap(), vec![7; 1 << 20]);

    let mut read_only = config(&path, DiskFormat::Raw);
    read_only.read_only = true;
    drop(guest);
    let mut guest = Guest::new(&read_only);
    assert_ne!(guest.device.features() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(guest.request(OUT, 0, &[1; 512], 0, 512).0, 1);
    assert_eq!(guest.zeroes(WRITE_ZEROES, 0, 1, 0), 1);
    assert_eq!(guest.read(0, 512), [7; 512]);
    guest.device.reset();
}

/// A file that cannot grow, as on a full disk (the limit is one of this process, so it is set in a child).
#[test]
fn a_full_disk_is_an_error_to_the_guest_only() {
    const TEST: &str = "virtio::block::tests::a_full_disk_is_an_error_to_the_guest_only";
    if std::env::var_os("LAB_TEST_FULL_DISK").is_none() {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", TEST, "--nocapture"])
            .env("LAB_TEST_FULL_DISK", "1")
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    // EFBIG instead of a signal.
    // SAFETY: nothing else in this process cares for SIGXFSZ.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    qcow2::create_empty(&path, 64 << 20).unwrap();
    let mut guest = Guest::new(&config(&path, DiskFormat::Qcow2));
    guest.write(0, &[1; 4096]);
    let limit = rustix::process::Rlimit { current: Some(4 << 20), maximum: None };
    rustix::process::setrlimit(rustix::process::Resource::Fsize, limit).unwrap();
    let data = vec![2; 128 << 10];
    let refused: Vec<u64> =
        (1..200).map(|i| i * 256).filter(|s| guest.request(OUT, *s, &data, 0, 65536).0 == 1).collect();
    assert!(refused.len() > 100, "only {refused:?} were refused");
    // What was there is there, and can be written and flushed.
    assert_eq!(guest.read(0, 4096), [1; 4096]);
    guest.write(0, &[3; 4096]);
    assert_eq!(guest.request(FLUSH, 0, &[], 0, 512).0, 0);
    // With room again, all goes on.
    let limit = rustix::process::Rlimit { current: None, maximum: None };
    rustix::process::setrlimit(rustix::process::Resource::Fsize, limit).unwrap();
    for sector in refused {
        guest.write(sector, &data);
    }
    assert_eq!(guest.request(FLUSH, 0, &[], 0, 512).0, 0);
    assert_eq!(guest.read(256 * 199, 128 << 10), data);
    guest.device.reset();
    drop(guest);
    qemu("qemu-img", &["check", path.to_str().unwrap()]);
}

#[test]
fn many_requests_at_once_and_a_reset_in_between() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    qcow2::create_empty(&path, 64 << 20).unwrap();
    let mut device = Block::new("disk0", &config(&path, DiskFormat::Qcow2)).unwrap();
    for round in 0..3u64 {
        let mut driver = Driver::new(device.queue_sizes());
        device.activate(driver.activation(device.features())).unwrap();
        let mut done = 0;
        for i in 0..500u64 {
            if driver.outstanding(0) >= 80 {
                assert_eq!(driver.wait(0), [0]);
                done += 1;
            }
            let data = pattern(round * 1000 + i, 4096);
            driver.send(0, &[&Guest::header(OUT, i * 8), &data], &[1]);
        }
        if round == 1 {
            // Whatever is under way: the thread ends, and the device can be activated again.
            device.reset();
            continue;
        }
        while driver.outstanding(0) > 0 {
            assert_eq!(driver.wait(0), [0]);
            done += 1;
        }
        assert_eq!(done, 500);
        assert!(driver.rung < 500, "every request rang the bell");
        device.reset();
        for i in [0, 7, 499] {
            let chain = device.disk.as_mut().unwrap();
            let Image::Qcow2 { access, .. } = &chain.image else { panic!() };
            let mut data = vec![0; 4096];
            access.read(&mut data, i * 4096).unwrap();
            assert!(data == pattern(round * 1000 + i, 4096));
        }
    }
}

#[test]
fn a_disk_is_opened_by_one_machine() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    fs::write(&path, vec![0; 4096]).unwrap();
    let first = Block::new("disk0", &config(&path, DiskFormat::Raw)).unwrap();
    let Err(error) = Block::new("disk0", &config(&path, DiskFormat::Raw)) else { panic!("opened twice") };
    assert!(error.to_string().contains("is in use by another machine"), "{error}");
    drop(first);
    when_free(|| Block::new("disk0", &config(&path, DiskFormat::Raw)));
    for (name, expected) in [("none", "cannot open it"), ("empty", "smaller than a sector")] {
        if name == "empty" {
            fs::write(folder.path().join(name), b"").unwrap();
        }
        let Err(error) = Block::new("disk0", &config(&folder.path().join(name), DiskFormat::Raw)) else {
            panic!("opened {name}")
        };
        assert!(error.to_string().contains(expected), "{error}");
    }
}

proptest! {
    #[test]
    fn hostile_queues_do_not_matter(case in hostile(1), raw: bool) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let format = if raw {
            fs::File::create(&path).unwrap().write_all_at(&[1], (1 << 20) - 1).unwrap();
            DiskFormat::Raw
        } else {
            qcow2::create_empty(&path, 32 << 20).unwrap();
            DiskFormat::Qcow2
        };
        let mut device = Block::new("disk0", &config(&path, format)).unwrap();
        let mut driver = Driver::new(&QUEUE_SIZES);
        let given = Given::new("disk0", driver.activation(case.features())).unwrap();
        driver.attack(&case, BlockHandler::new(given, device.disk.take().unwrap()));
    }

    #[test]
    fn configuration_is_read_anywhere(offset: u64, length in 0usize..100) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        fs::write(&path, [0; 4096]).unwrap();
        let mut device = Block::new("disk0", &config(&path, DiskFormat::Raw)).unwrap();
        for offset in [offset, offset % 64] {
            let mut data = vec![0xff; length];
            device.read_config(offset, &mut data);
            device.write_config(offset, &data);
            prop_assert!(offset < 60 || data.iter().all(|byte| *byte == 0));
        }
    }
}

#[test]
fn a_disk_is_frozen_under_a_guest() {
    let folder = tempfile::tempdir().unwrap();
    let (top, mut content) = chain(folder.path());
    let config = config(&top, DiskFormat::Qcow2);
    let mut guest = Guest::new(&config);
    let features = guest.device.features();
    for round in 0..4u64 {
        // Not flushed: what was written is in the frozen file all the same.
        let data = pattern(round, 128 << 10);
        guest.write(round * 512, &data);
        content[(round as usize) << 18..][..data.len()].copy_from_slice(&data);
        guest.device.pause();
        guest.device.write_out().unwrap();
        let frozen = folder.path().join(format!("frozen{round}.qcow2"));
        fs::hard_link(&top, &frozen).unwrap();
        let before = fs::read(&frozen).unwrap();
        let next = folder.path().join("next.qcow2");
        qcow2::create_overlay(&next, &frozen, DiskFormat::Qcow2, 8 << 20).unwrap();
        fs::rename(&next, &top).unwrap();
        if round % 2 == 0 {
            guest.device.resume().unwrap();
        } else {
            let positions = guest.device.positions();
            drop(guest.device);
            guest.device = when_free(|| Block::new("disk0", &config));
            guest.device.activate(guest.driver.restored(features, &positions)).unwrap();
        }
        guest.write(8192, &pattern(99, 512));
        content[8192 * 512..][..512].copy_from_slice(&pattern(99, 512));
        assert!(guest.read(0, 4 << 20) == content[..4 << 20], "round {round}");
        assert!(fs::read(&frozen).unwrap() == before, "a frozen file was changed in round {round}");
    }
    // One that lies where the disk was and is none.
    guest.device.pause();
    fs::rename(&top, folder.path().join("away")).unwrap();
    fs::write(&top, b"something else").unwrap();
    let told = guest.device.resume().unwrap_err().to_string();
    assert!(told.contains("top.qcow2"), "{told}");
    guest.device.reset();
}
