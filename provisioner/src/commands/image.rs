//! `lab image`: the image store.

use std::process::ExitCode;

use lab_images::{
    definition::Definition,
    store::{Image, Store},
};
use serde::Serialize;

use super::{Context, Error, end, table};
use crate::cli::ImageAction;

/// An image as `lab image ls` tells it.
#[derive(Debug, Serialize)]
struct Line {
    name: String,
    description: String,
    source: String,
    /// Size of the disk as a guest sees it, in bytes.
    root_bytes: u64,
    /// Space that it takes here, in bytes.
    space_bytes: u64,
    digest: String,
    /// What is wrong with it.
    damage: Option<String>,
}

impl Line {
    fn new(image: &Image) -> Self {
        Self {
            name: image.manifest.name.clone(),
            description: image.manifest.description.clone(),
            source: image.manifest.source.clone(),
            root_bytes: image.manifest.root_bytes,
            space_bytes: image.space_bytes(),
            digest: image.manifest.digest(),
            damage: None,
        }
    }
}

/// Lists, builds, imports, verifies or removes images.
pub fn run(context: &Context, action: ImageAction) -> Result<ExitCode, Error> {
    let store = Store::open(&context.paths.images());
    match action {
        ImageAction::Ls => return list(context, &store),
        ImageAction::Build { names, force } => {
            for name in names {
                with_progress(context, &name, "build", |say| {
                    store.build(&Definition::find(&name)?, force, say)
                })?;
            }
        }
        ImageAction::Import { name, path } => {
            let mut lacking = Vec::new();
            with_progress(context, &name, "import", |say| {
                let (image, warnings) = store.import(&name, &path, say)?;
                lacking = warnings;
                Ok(image)
            })?;
            for warning in lacking {
                context.progress.warn(&format!("{name}: {warning}"));
            }
        }
        ImageAction::Verify { name } => {
            let image = with_progress(context, &name, "verify", |_| store.verify(&name))?;
            context.print(&Line::new(&image), |line| format!("{} is whole: {}", line.name, line.digest))?;
        }
        ImageAction::Push { image, name } => return super::push::run(context, &image, name.as_deref()),
        ImageAction::Rm { names } => {
            for name in names {
                store.remove(&name)?;
                context.progress.say(&format!("removed {name}"));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn with_progress(
    context: &Context,
    name: &str,
    what: &str,
    work: impl FnOnce(&mut dyn FnMut(&str)) -> Result<Image, lab_images::store::Error>,
) -> Result<Image, Error> {
    let task = context.progress.begin(name, what);
    let image = work(&mut |step| task.detail(step));
    end(task, image)
}

fn list(context: &Context, store: &Store) -> Result<ExitCode, Error> {
    let line = |(name, image): (String, Result<Image, lab_images::store::Error>)| match image {
        Ok(image) => Line::new(&image),
        Err(error) => Line {
            name,
            description: String::new(),
            source: String::new(),
            root_bytes: 0,
            space_bytes: 0,
            digest: String::new(),
            damage: Some(error.to_string()),
        },
    };
    let lines: Vec<Line> = store.list()?.into_iter().map(line).collect();
    context.print(&lines, |lines| {
        if lines.is_empty() {
            return "no images; `lab image build debian-13` builds one".into();
        }
        let row = |line: &Line| {
            let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
            vec![
                line.name.clone(),
                mib(line.space_bytes),
                mib(line.root_bytes),
                line.digest.get(..12).unwrap_or_default().into(),
                line.damage.clone().unwrap_or_else(|| line.description.clone()),
            ]
        };
        table(&["IMAGE", "ON DISK", "DISK", "DIGEST", "WHAT"], &lines.iter().map(row).collect::<Vec<_>>())
    })?;
    Ok(ExitCode::SUCCESS)
}
