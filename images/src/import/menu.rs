//! Which of an image's kernels its boot loader starts: by GRUB's configuration, by the distribution's links, by version.

use super::{boot::Kernel, filesystem::FileSystem, version};

/// The kernel among `kernels`, all of one system with this root, that it boots when nobody chooses another.
pub(super) fn default<'k, 'f>(root: &FileSystem, kernels: &[&'k Kernel<'f>]) -> Option<&'k Kernel<'f>> {
    let by_grub = || {
        let mut places = kernels.to_vec();
        places.dedup_by(|a, b| a.same_folder(b));
        places.into_iter().find_map(|place| {
            let beside: Vec<_> = kernels.iter().copied().filter(|kernel| kernel.same_folder(place)).collect();
            grub(place.system, place.folder, &beside)
        })
    };
    let by_link = || {
        let links = ["/vmlinuz", "/boot/vmlinuz"].iter().filter_map(|link| root.link(link));
        let beside = kernels.iter().filter_map(|kernel| kernel.system.link(&kernel.path("vmlinuz")));
        links.chain(beside).find_map(|name| kernels.iter().copied().find(|kernel| kernel.name == name))
    };
    let newest = || kernels.iter().copied().max_by(|a, b| version::rank(&a.release, &b.release));
    by_grub().or_else(by_link).or_else(newest)
}

/// What GRUB's menu starts: its default is an entry's id or title, the number of one, or the entry that is saved in its
/// environment (GRUB's manual, "default"; entries of the Boot Loader Specification are called by their file's name).
fn grub<'k, 'f>(system: &FileSystem, folder: &str, kernels: &[&'k Kernel<'f>]) -> Option<&'k Kernel<'f>> {
    let read = |file: &str| {
        ["grub2", "grub"].iter().find_map(|grub| system.text(&format!("{folder}/{grub}/{file}")))
    };
    let menu = read("grub.cfg")?;
    let mut chosen = menu
        .lines()
        .filter_map(|line| line.trim().strip_prefix("set default=").map(|value| value.trim_matches('"')))
        .rfind(|value| *value != "${next_entry}")?
        .to_owned();
    if chosen == "${saved_entry}" {
        let environment = read("grubenv").unwrap_or_default();
        let saved = environment.lines().find_map(|line| line.strip_prefix("saved_entry="));
        chosen = saved.unwrap_or_default().to_owned();
    }
    let entry = chosen.rsplit('>').next().unwrap_or_default();
    if !entry.is_empty() && !entry.contains('/') {
        let entry = system.text(&format!("{folder}/loader/entries/{entry}.conf"));
        if let Some(kernel) = entry.and_then(|text| named(&text, kernels)) {
            return Some(kernel);
        }
    }
    match entry {
        "0" | "" => named(&menu, kernels),
        number if number.bytes().all(|byte| byte.is_ascii_digit()) => None,
        entry => {
            let (_, below) = menu.split_once(&format!("'{entry}'"))?;
            named(below, kernels)
        }
    }
}

/// The first of the kernels that a menu's lines `linux PATH …` name.
fn named<'k, 'f>(text: &str, kernels: &[&'k Kernel<'f>]) -> Option<&'k Kernel<'f>> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let name =
            words.next().filter(|word| word.starts_with("linux")).and(words.next())?.rsplit('/').next()?;
        kernels.iter().find(|kernel| kernel.name == name).copied()
    })
}
