//! Kernels in every compression, whole and damaged.

use std::io::Write;

use proptest::prelude::*;

use super::*;

/// The start of an ELF file for x86-64.
const ELF: &[u8] = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0";

/// An ELF file in name only, not trivially compressible.
fn elf() -> Vec<u8> {
    let mut bytes = ELF.to_vec();
    let mut state = 1u32;
    while bytes.len() < 200_000 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bytes.extend_from_slice(&[(state >> 24) as u8, 0, 0, 0, 7, 7, 7, 7, 0xe8, 0, 0, 0]);
    }
    bytes
}

/// A bzImage around a payload.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 3 * SECTOR];
    image[0x1f1] = 1;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    image[0x248..0x24c].copy_from_slice(&(SECTOR as u32).to_le_bytes());
    image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    image.extend_from_slice(payload);
    image.extend_from_slice(&[0; 64]);
    image
}

fn with_size(mut payload: Vec<u8>, size: usize) -> Vec<u8> {
    payload.extend_from_slice(&(size as u32).to_le_bytes());
    payload
}

fn zstd(data: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Fastest)
}

fn xz(data: &[u8]) -> Vec<u8> {
    let mut options = lzma_rust2::XzOptions::with_preset(0);
    options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
    let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
    writer.write_all(data).unwrap();
    writer.finish().unwrap()
}

fn lz4(data: &[u8]) -> Vec<u8> {
    let mut out = vec![0x02, 0x21, 0x4c, 0x18];
    for block in data.chunks(LZ4_BLOCK) {
        let packed = lz4_flex::block::compress(block);
        out.extend_from_slice(&(packed.len() as u32).to_le_bytes());
        out.extend_from_slice(&packed);
    }
    out
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    writer.write_all(data).unwrap();
    writer.finish().unwrap()
}

/// A payload of every kind of compression.
fn payloads(elf: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("none", elf.to_vec()),
        ("gzip", gzip(elf)),
        ("xz", with_size(xz(elf), elf.len())),
        ("lz4", with_size(lz4(elf), elf.len())),
        ("zstd", with_size(zstd(elf), elf.len())),
    ]
}

#[test]
fn every_compression_unpacks_to_the_same_elf() {
    let elf = elf();
    for (name, payload) in payloads(&elf) {
        assert!(unpack(&bzimage(&payload)).unwrap() == elf, "{name}");
    }
    assert!(unpack(&elf).unwrap() == elf);
}

#[test]
fn lz4_has_blocks_of_8_mib() {
    let mut elf = elf();
    elf.resize(LZ4_BLOCK + 12345, 7);
    assert!(unpack(&bzimage(&with_size(lz4(&elf), elf.len()))).unwrap() == elf);
}

#[test]
fn a_truncated_file_says_where_it_should_end() {
    let image = bzimage(&gzip(ELF));
    let error = unpack(&image[..image.len() - 70]).unwrap_err();
    assert!(matches!(error, Error::Truncated { .. }), "{error}");
    assert!(error.to_string().contains("truncated"), "{error}");
    assert!(matches!(unpack(&image[..0x24a]).unwrap_err(), Error::NotAKernel));
    assert!(matches!(unpack(b"").unwrap_err(), Error::NotAKernel));
}

#[test]
fn a_cut_payload_is_corrupt() {
    for (name, payload) in payloads(&elf()).into_iter().skip(1) {
        let mut cut = payload[..payload.len() / 2].to_vec();
        cut.extend_from_slice(&payload[payload.len() - 4..]);
        let error = unpack(&bzimage(&cut)).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{name}: {error}");
    }
}

#[test]
fn an_announced_size_that_is_wrong_is_told() {
    let elf = elf();
    for (make, size) in [(zstd as fn(&[u8]) -> Vec<u8>, elf.len() - 1), (lz4, elf.len() + 1), (xz, 12)] {
        let error = unpack(&bzimage(&with_size(make(&elf), size))).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    }
    let error = unpack(&bzimage(&with_size(zstd(&elf), 0xffff_fff0))).unwrap_err();
    assert!(matches!(error, Error::TooLarge), "{error}");
}

#[test]
fn a_kernel_of_another_machine_is_refused_by_name() {
    let mut narrow = elf();
    (narrow[4], narrow[18]) = (1, 3);
    let mut arm = vec![0; 4096];
    arm[0x38..0x3c].copy_from_slice(b"ARM\x64");
    for (kernel, says) in [
        (narrow.clone(), "the kernel is for 32-bit x86: "),
        (bzimage(&gzip(&narrow)), "the kernel is for 32-bit x86: "),
        (arm, "the kernel is for ARM64: "),
    ] {
        let error = unpack(&kernel).unwrap_err().to_string();
        assert!(error.starts_with(says), "{error}");
    }
}

#[test]
fn what_is_no_kernel_is_refused() {
    assert!(matches!(unpack(&bzimage(b"BZh91AY")).unwrap_err(), Error::UnknownCompression(_)));
    assert!(matches!(unpack(&bzimage(&gzip(b"no ELF at all"))).unwrap_err(), Error::PayloadNotElf));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn damage_never_panics(kind in 1usize..5, at in 0usize..100_000, value in any::<u8>()) {
        let (_, payload) = payloads(b"\x7fELF, and some more text, text, text").remove(kind);
        let mut image = bzimage(&payload);
        let at = at % image.len();
        image[at] = value;
        let _ = unpack(&image);
    }
}
