use super::{
    super::{format, table},
    *,
};

#[test]
fn damaged_files_are_refused() {
    let made = Made::new();
    let file = made.export("file");
    let whole = fs::read(&file).unwrap();
    let bad = made.path("bad");
    let given = |bytes: &[u8], says: &str| {
        fs::write(&bad, bytes).unwrap();
        made.refused(&bad, says);
    };
    given(b"", "was written neither by");
    given(b"[1, 2]", "was written neither by");
    given(&whole[1..], "was written neither by");
    given(&whole[..whole.len() / 2], "is cut off after ");
    given(&whole[..whole.len() - 1], "copy it again");
    given(&[&whole[..], b"x"].concat(), "goes on behind its end");
    let changed = |place: usize| {
        let mut bytes = whole.clone();
        bytes[place] ^= 4;
        bytes
    };
    given(&changed(70), "the checksum of its table of contents is wrong");
    let mut unfinished = whole.clone();
    unfinished[16..24].fill(0);
    given(&unfinished, "was cut off while it was written");
    let mut long = whole.clone();
    long[24..28].fill(255);
    given(&long, "its table of contents is too long");
    for start in chunk_starts(&file) {
        for place in [0, 4, 12, 16, 20, 51] {
            let bytes = changed(start as usize + place);
            given(&bytes, &format!("is damaged at byte {start} "));
        }
    }
    let start = chunk_starts(&file)[1] as usize;
    given(&changed(start + 60), &format!("is damaged at byte {start} (a checksum is wrong)"));
}

/// A file with right checksums, but whatever else is wanted.
fn forged(file: &Path, table: &table::Table, chunks: &[format::Chunk]) {
    let output = File::create(file).unwrap();
    let mut writer = format::Writer::begin(output, &serde_json::to_vec(table).unwrap()).unwrap();
    for chunk in chunks {
        writer.write(chunk).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn forged_files_are_refused() {
    let made = Made::new();
    let table = gather(&made.lab, "one").unwrap().table;
    let bad = made.path("bad");
    type Change = fn(&mut table::Table);
    let tables: [(&str, Change); 6] = [
        ("has format 2", |table| table.format = 2),
        ("is no place", |table| table.files[1].path = "labfile/../../x".into()),
        ("is no place", |table| table.files[1].path = "/etc/x".into()),
        ("is no name", |table| table.lab = "../x".into()),
        ("is too long", |table| table.files[1].length = u64::MAX),
        ("is missing", |table| table.files.retain(|file| !file.path.starts_with("ssh/"))),
    ];
    for (says, change) in tables {
        let mut table = table.clone();
        change(&mut table);
        forged(&bad, &table, &[]);
        made.refused(&bad, says);
    }
    let packed = zstd::bulk::compress(&[1; 1 << 20], 3).unwrap();
    let chunk =
        |file, offset, length, packed: &[u8]| format::Chunk { file, offset, length, packed: packed.into() };
    let memory = table.files.iter().position(|file| file.path.ends_with("/memory")).unwrap() as u32;
    for (says, chunks) in [
        ("outside of its file", vec![chunk(memory, u64::MAX - 1, 1 << 20, &packed)]),
        ("outside of its file", vec![chunk(memory, 7 << 20, 1 << 20, &packed)]),
        ("outside of its file", vec![chunk(memory, 0, 2 << 20, &packed)]),
        ("outside of its file", vec![chunk(memory, 0, 0, &packed)]),
        ("outside of its file", vec![chunk(9999, 0, 1, &packed)]),
        ("a chunk is too long", vec![chunk(memory, 0, 1, &vec![0; 2 << 20])]),
        // It would like to be longer, and shorter.
        ("cannot be unpacked", vec![chunk(memory, 0, 4096, &packed)]),
        ("cannot be unpacked", vec![chunk(memory, 0, (1 << 20) - 1, &packed[..packed.len() - 1])]),
        ("cannot be unpacked", vec![chunk(memory, 0, 4096, b"no zstd")]),
        ("out of order", vec![chunk(memory, 1 << 20, 1 << 20, &packed), chunk(memory, 0, 1 << 20, &packed)]),
        ("out of order", vec![chunk(memory, 0, 1 << 20, &packed), chunk(memory, 5, 1 << 20, &packed)]),
        ("more than its table", (0..7).map(|n| chunk(memory, n << 20, 1 << 20, &packed)).collect()),
    ] {
        let mut table = table.clone();
        table.data_bytes = 4 << 20;
        forged(&bad, &table, &chunks);
        made.refused(&bad, says);
    }
}

#[test]
fn snapshots_that_lead_elsewhere_are_refused() {
    let made = Made::new();
    type Change = Box<dyn Fn(&mut snapshot::Record)>;
    let node = |change: fn(&mut snapshot::SavedNode)| -> Change {
        Box::new(move |record| change(record.nodes.get_mut("a").unwrap()))
    };
    let changes: [(&str, Change); 6] = [
        ("is no node", Box::new(|record| record.state.topology.nodes[0].name = "../x".into())),
        ("is no node", Box::new(|record| record.state.topology.nodes[0].name = "b".into())),
        ("is of another lab", Box::new(|record| record.state.topology.name = "other".into())),
        ("is of another lab", Box::new(|record| record.state.fork = Some(3))),
        ("the snapshot has format 9", Box::new(|record| record.format = 9)),
        ("the layer `../aa` is missing", node(|node| node.layers = vec!["../aa".into()])),
    ];
    let gathered = |made: &Made| gather(&made.lab, "one").unwrap();
    for (number, (says, change)) in changes.iter().enumerate() {
        made.record(|_| {});
        let good = gathered(&made);
        made.record(|record| change(record));
        // As another program would write it.
        let mut bad = gather::Gathered { table: good.table.clone(), sources: Vec::new(), pieces: Vec::new() };
        bad.table.files.clear();
        bad.table.data_bytes = 0;
        for (file, source) in good.table.files.iter().zip(&good.sources) {
            bad.add(file.path.clone(), source.clone()).unwrap();
        }
        let file = made.path(&format!("bad{number}"));
        export::write(&bad, &file, &task()).unwrap();
        made.refused(&file, says);
    }
    made.record(|_| {});
    // A disk that stands on a file of this machine.
    let layer = made.lab.dirs.dir.join("layers/aa/overlay.qcow2");
    let secret = made.path("secret");
    fs::write(&secret, vec![1; 4096]).unwrap();
    fs::remove_file(&layer).unwrap();
    qcow2::create_overlay(&layer, &secret, DiskFormat::Raw, 16 << 20).unwrap();
    let file = made.export("disk");
    // Where it is unpacked, the way there is another one.
    fs::create_dir_all(made.path("refusing/labs")).unwrap();
    fs::write(made.path("refusing/labs/secret"), "").unwrap();
    let error = made.import("refusing", &file).unwrap_err().to_string();
    assert!(error.contains("secret") && !made.path("refusing/labs/demo").exists(), "{error}");
    let manifest = made.lab.pinned("tiny-0123").join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap().replace("\"root.img\"", "\"../../x\"");
    fs::write(&manifest, text).unwrap();
    let file = made.export("manifest");
    let error = made.import("refusing", &file).unwrap_err().to_string();
    assert!(error.contains("names files elsewhere"), "{error}");
}
