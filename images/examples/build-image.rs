//! Builds an image into a store: `build-image STORE NAME_OR_FILE [--force]`.

use std::path::PathBuf;

use lab_images::{definition::Definition, store::Store};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [store, name, rest @ ..] = arguments.as_slice() else {
        return Err("usage: build-image STORE NAME_OR_FILE [--force]".into());
    };
    let store = Store::open(&PathBuf::from(store));
    let force = rest.iter().any(|argument| argument == "--force");
    let image = store.build(&Definition::find(name)?, force, &mut |step| println!("{step}"))?;
    println!("{}", image.dir.display());
    Ok(())
}
