use rustix::fs::{FallocateFlags, fallocate};

use super::{super::unpack, *};

#[test]
fn an_export_goes_on_where_it_was_cut_off() {
    let made = Made::new();
    let whole = fs::read(made.export("file")).unwrap();
    let (other, partial) = (made.path("other"), made.path("other.part"));
    let starts = chunk_starts(&made.path("file"));
    let cuts = [0, 1, 59, 60, 100, whole.len() - 1, whole.len()];
    let around = starts.iter().flat_map(|start| [*start - 1, *start, *start + 20, *start + 60]);
    for cut in cuts.into_iter().chain(around.map(|cut| (cut as usize).min(whole.len()))) {
        let mut part = whole[..cut].to_vec();
        // A length is written last.
        if cut < whole.len() && part.len() > 24 {
            part[16..24].fill(0);
        }
        fs::write(&partial, part).unwrap();
        export(&made.lab, "one", &other, &task()).unwrap();
        assert!(fs::read(&other).unwrap() == whole, "cut after {cut}");
        assert!(!partial.exists());
        fs::remove_file(&other).unwrap();
    }
    // Of the part, the damaged end alone is written again.
    let mut part = whole.clone();
    let middle = starts[starts.len() / 2] as usize + 70;
    part[middle] ^= 1;
    fs::write(&partial, &part).unwrap();
    export(&made.lab, "one", &other, &task()).unwrap();
    assert!(fs::read(&other).unwrap() == whole);
    fs::remove_file(&other).unwrap();
    // One of something else is not gone on with.
    fs::write(&partial, &whole).unwrap();
    made.record(|record| record.created_s = 6);
    export(&made.lab, "one", &other, &task()).unwrap();
    assert!(fs::read(&other).unwrap() != whole);
    made.import("third", &other).unwrap();
    fs::write(&partial, &whole).unwrap();
    let _held = crate::lock::try_lock(&partial).unwrap().unwrap();
    fs::remove_file(&other).unwrap();
    assert!(matches!(export(&made.lab, "one", &other, &task()), Err(Error::Busy(_))));
}

#[test]
fn an_import_goes_on_where_it_was_cut_off() {
    let made = Made::new();
    let file = made.export("file");
    let starts = chunk_starts(&file);
    let place = |home: &str| unpack::Place::new(made.path(home).join("labs/.demo.import"));
    for (round, _) in starts.iter().enumerate() {
        let home = format!("home{round}");
        let place = place(&home);
        crate::paths::private_dir(place.root()).unwrap();
        place.unpack(&mut Reader::open(&file).unwrap(), &task()).unwrap();
        // Back to what a kill may leave: so much is recorded, and of the rest only every second chunk is there.
        let mut reader = Reader::open(&file).unwrap();
        (0..round).for_each(|_| drop(reader.chunk().unwrap().unwrap()));
        place.record(&reader, 0).unwrap();
        let mut number = 0;
        while let Some(chunk) = reader.chunk().unwrap() {
            number += 1;
            if number % 2 == 1 {
                let path = place.file(&reader.table().files[chunk.file as usize].path);
                let file = fs::OpenOptions::new().write(true).open(path).unwrap();
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(file, flags, chunk.offset, chunk.length.into()).unwrap();
            }
        }
        made.import(&home, &file).unwrap();
        assert_imported(&made, &home);
    }
    // All unpacked, nothing in its place; or the labfile alone, a part of it begun.
    for (round, laid) in ["", "scripts/one.sh"].into_iter().enumerate() {
        let home = format!("late{round}");
        let (mut reader, place) = (Reader::open(&file).unwrap(), place(&home));
        crate::paths::private_dir(place.root()).unwrap();
        place.unpack(&mut reader, &task()).unwrap();
        if !laid.is_empty() {
            let folder = made.path(&format!("{home}-work"));
            fs::create_dir_all(folder.join("scripts")).unwrap();
            fs::copy(made.path("work").join(laid), folder.join(laid)).unwrap();
            fs::write(folder.join(".lab-import.part"), "x").unwrap();
        }
        made.import(&home, &file).unwrap();
        assert_imported(&made, &home);
    }
    // What is there of another import is dropped.
    let other = place("third");
    crate::paths::private_dir(other.root()).unwrap();
    other.unpack(&mut Reader::open(&file).unwrap(), &task()).unwrap();
    made.record(|record| record.created_s = 6);
    made.import("third", &made.export("second")).unwrap();
    assert_imported(&made, "third");
}
