//! Whole labfiles: wrong ones with the exact message that each gets (`wrong/NAME.toml`, `wrong/NAME.txt`), good ones
//! with what they mean, and arbitrary ones.
//!
//! After a deliberate change of messages, `LAB_BLESS=1 cargo test -p lab` writes the `.txt` files anew: read them.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use lab_net::config::Protocol;
use proptest::prelude::*;

use super::{
    companions, load, parse,
    topology::{Target, Topology},
};

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/labfile/tests").join(name)
}

/// The error of a labfile, without the path of the folder that it lies in.
fn message(path: &Path) -> Option<String> {
    let folder = path.parent().unwrap();
    let real = format!("{}/", folder.canonicalize().unwrap().display());
    let message = load(path).err()?.to_string();
    Some(message.replace(&format!("{}/", folder.display()), "").replace(&real, "") + "\n")
}

#[test]
fn each_wrong_labfile_gets_its_message() {
    let bless = std::env::var_os("LAB_BLESS").is_some();
    let mut seen = 0;
    let mut different = Vec::new();
    for entry in fs::read_dir(folder("wrong")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        seen += 1;
        let found = message(&path).unwrap_or_else(|| panic!("{} is right", path.display()));
        let wanted = path.with_extension("txt");
        if bless {
            fs::write(&wanted, &found).unwrap();
        } else if fs::read_to_string(&wanted).unwrap_or_default() != found {
            different.push(format!("{}:\n{found}", path.display()));
        }
    }
    assert!(seen >= 60, "only {seen} wrong labfiles");
    assert!(different.is_empty(), "other messages than in the .txt files:\n{}", different.join("\n"));
}

#[test]
fn windows_line_ends_are_line_ends() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    let text = "name = \"demo\"\n[node.a]\n[[step]]\nname = \"one\"\nrun = \"\"\"\nmkdir /srv/data\n\"\"\"\n\
                [[step]]\nname = \"two\"\nscript = \"two.sh\"\n";
    let mut loaded = Vec::new();
    for end in ["\n", "\r\n"] {
        write("lab.toml", &text.replace('\n', end));
        write("two.sh", &"mkdir /srv/more\nls\n".replace('\n', end));
        loaded.push(load(&dir.path().join("lab.toml")).unwrap());
    }
    write("lab.toml", &format!("\u{feff}{text}"));
    loaded.push(load(&dir.path().join("lab.toml")).unwrap());
    assert_eq!(
        loaded[0].steps.iter().map(|step| step.run.as_str()).collect::<Vec<_>>(),
        ["mkdir /srv/data\n", "mkdir /srv/more\nls\n"]
    );
    assert!(loaded[0] == loaded[1] && loaded[0] == loaded[2]);
}

#[test]
fn files_that_are_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lab.toml");
    assert_eq!(
        message(&path).unwrap(),
        "error: there is no such labfile\n --> lab.toml\n  = help: name another file with `-f FILE`, or make one with `lab init`\n"
    );
    fs::create_dir(&path).unwrap();
    assert!(message(&path).unwrap().starts_with("error: the labfile is not a regular file\n"));
    fs::remove_dir(&path).unwrap();
    fs::write(&path, vec![b'#'; (1 << 20) + 1]).unwrap();
    assert!(message(&path).unwrap().starts_with("error: the labfile is larger than 1 MiB\n"));
    fs::write(&path, b"name = \"x\"\n# caf\xe9\n[node.a]\n").unwrap();
    assert_eq!(
        message(&path).unwrap(),
        "error: the labfile is not UTF-8 text\n --> lab.toml:2:6\n  |\n2 | # caf\u{fffd}\n  |      ^\n  = help: save it as UTF-8, or remove what is no text\n"
    );
}

#[test]
fn errors_are_told_to_programs() {
    let wrong =
        parse("name = \"x\"\n[node.a]\ncpsu = 1\n", Path::new("lab.toml"), "/x/lab.toml".into()).unwrap_err();
    assert_eq!(
        serde_json::to_value(&wrong).unwrap(),
        serde_json::json!({"errors": [{
            "file": "lab.toml", "line": 3, "column": 1, "length": 4, "text": "cpsu = 1", "key": "node.a.cpsu",
            "message": "unknown key `cpsu` in [node.a]", "help": "did you mean `cpus`?"
        }]})
    );
}

fn good(text: &str) -> Topology {
    parse(text, Path::new("lab.toml"), folder("good").join("lab.toml"))
        .unwrap_or_else(|wrong| panic!("{wrong}"))
}

#[test]
fn defaults_are_filled_in() {
    let lab = good("name = \"x\"\n[node.a]\n[node.b]\n");
    assert_eq!(lab.network.subnet, Ipv4Addr::new(192, 168, 100, 0));
    assert_eq!((lab.network.prefix, lab.network.gateway), (24, Ipv4Addr::new(192, 168, 100, 1)));
    let node = &lab.nodes[0];
    assert_eq!((node.name.as_str(), node.role.as_str(), node.image.as_str()), ("a", "master", "debian-13"));
    assert_eq!((node.cpus, node.memory_mib, node.disk_bytes), (1, 1024, 10 << 30));
    assert_eq!(node.ip, Ipv4Addr::new(192, 168, 100, 10));
    assert!(node.extra_disks_bytes.is_empty() && node.forwards.is_empty());
    assert_eq!(lab.nodes[1].role, "worker");
    assert_ne!(lab.nodes[1].mac, node.mac);
}

#[test]
fn a_whole_lab() {
    let text = r#"
name = "k8s"
image = "debian-12"
[network]
subnet = "10.0.0.0/16"
gateway = "10.0.255.254"
[node.store]
role = "storage"
disks = ["10GiB", "512MiB"]
mac = "52:54:00:AA:bb:cc"
[node."w{n}"]
count = 3
ip = "10.0.1.101"
forward = ["60101:22"]
memory = "2.5GiB"
[node.cp]
role = "master"
image = "other"
[stack.docker]
source = "upstream"
[stack.own]
size = 3
fast = true
[[step]]
name = "one"
on = "worker"
run = "true"
[[step]]
name = "two"
on = "w2"
script = "hello.sh"
[[check]]
name = "three"
run = "true"
hint = "none"
"#;
    let lab = good(text);
    let names: Vec<&str> = lab.nodes.iter().map(|node| node.name.as_str()).collect();
    assert_eq!(names, ["store", "w1", "w2", "w3", "cp"]);
    let roles: Vec<&str> = lab.nodes.iter().map(|node| node.role.as_str()).collect();
    assert_eq!(roles, ["storage", "worker", "worker", "worker", "master"]);
    assert_eq!(lab.nodes[0].extra_disks_bytes, [10 << 30, 512 << 20]);
    assert_eq!(lab.nodes[0].mac, "52:54:00:aa:bb:cc");
    assert_eq!(lab.nodes[0].ip, Ipv4Addr::new(10, 0, 0, 10));
    assert_eq!(lab.nodes[3].ip, Ipv4Addr::new(10, 0, 1, 103));
    assert_eq!(lab.nodes[3].memory_mib, 2560);
    assert_eq!((lab.nodes[4].image.as_str(), lab.nodes[1].image.as_str()), ("other", "debian-12"));
    let forward = &lab.nodes[3].forwards[0];
    assert_eq!((forward.host_port, forward.guest_port, forward.guest_ip), (60103, 22, lab.nodes[3].ip));
    assert_eq!((forward.bind, forward.protocol), (Ipv4Addr::LOCALHOST, Protocol::Tcp));
    assert_eq!(lab.stacks[0].source, "upstream");
    assert_eq!(lab.stacks[0].folder, None);
    assert_eq!(lab.stacks[1].folder, Some(folder("good/stacks/own").canonicalize().unwrap()));
    let options: Vec<_> =
        lab.stacks[1].options.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(options, [("colour", "blue"), ("fast", "true"), ("size", "3")]);
    assert_eq!(lab.steps[0].on, Target::Role("worker".to_owned()));
    assert_eq!(lab.steps[1].on, Target::Node("w2".to_owned()));
    assert_eq!(lab.steps[1].run, "echo hello\n");
    assert_eq!(lab.checks[0].on, Target::All);
}

#[test]
fn a_file_that_an_option_names_is_its_text() {
    let dir = tempfile::tempdir().unwrap();
    let (file, key) = (dir.path().join("lab.toml"), dir.path().join("keys/mirror.asc"));
    fs::create_dir(dir.path().join("keys")).unwrap();
    fs::write(&key, "one\ntwo\n\n").unwrap();
    let text =
        "name = \"x\"\n[node.a]\n[stack.kubernetes]\npackages_key = \"keys/mirror.asc\"\nmirror_ca = \"\"\n";
    fs::write(&file, text).unwrap();
    let lab = load(&file).unwrap();
    assert_eq!(
        (lab.stacks[0].options["packages_key"].as_str(), lab.stacks[0].source.as_str()),
        ("one\ntwo", "auto")
    );
    // It goes where the labfile goes.
    assert_eq!(companions(&file).unwrap(), [Path::new("keys/mirror.asc")]);
    fs::write(&key, vec![b'#'; (64 << 10) + 1]).unwrap();
    assert!(message(&file).unwrap().contains("`keys/mirror.asc`: it is too long"));
}

#[test]
fn the_same_file_means_the_same() {
    let text = "name = \"x\"\n[node.a]\n[node.\"w{n}\"]\ncount = 200\n";
    assert_eq!(good(text), good(text));
    let macs: std::collections::HashSet<_> = good(text).nodes.into_iter().map(|node| node.mac).collect();
    assert_eq!(macs.len(), 201);
}

#[test]
fn a_file_of_nothing_but_errors_is_cut_short() {
    let fill = |line: &str| line.repeat(100_000 / line.len());
    let keys: String = (0..10_000).map(|number| format!("k{number} = 1\n")).collect();
    let nodes: String = (0..10_000).map(|number| format!("[node.N{number}]\n")).collect();
    for text in [
        keys,
        nodes,
        format!("name = \"x\"\n[node.\"n{{n}}\"]\ncount = 250\nforward = [{}]\n", fill("\"x\",")),
        format!("name = \"x\"\n[node.\"n{{n}}\"]\ncount = 250\nforward = [{}]\n", "\"x\",".repeat(1000)),
        format!("name = {}", fill("[")),
        format!("name = \"x\"\n[node.a]\n{}", fill("[[step]]\n")),
        fill("= "),
        fill("=\n"),
        format!("name.{}a = 1", fill("a.")),
        format!("name = \"{}\"", fill("Ä")),
    ] {
        let wrong = parse(&text, Path::new("lab.toml"), "/nowhere/lab.toml".into()).unwrap_err();
        assert!((1..=100).contains(&wrong.errors.len()));
        assert!(wrong.to_string().len() < 100_000);
    }
}

proptest! {
    #[test]
    fn any_text_is_told_right_or_wrong(text in "\\PC{0,200}") {
        let _ = parse(&text, Path::new("lab.toml"), "/nowhere/lab.toml".into()).map_err(|wrong| wrong.to_string());
    }

    #[test]
    fn any_mixture_of_its_words_is_told_right_or_wrong(words in proptest::collection::vec(word(), 0..60)) {
        let text = words.concat();
        let outcome = parse(&text, Path::new("lab.toml"), "/nowhere/lab.toml".into());
        if let Err(wrong) = outcome {
            prop_assert!(!wrong.errors.is_empty());
            prop_assert!(!wrong.to_string().is_empty());
        }
    }

    #[test]
    fn any_value_of_any_key_is_told_right_or_wrong(key in word(), value in "[0-9a-zA-Z./:{}\\-]{0,24}") {
        for value in [format!("\"{value}\""), value.clone(), format!("[\"{value}\"]")] {
            let text = format!("name = \"x\"\n[network]\nsubnet = \"10.0.0.0/29\"\n[node.\"n{{n}}\"]\n{key} = {value}\n");
            let outcome = parse(&text, Path::new("lab.toml"), "/nowhere/lab.toml".into());
            prop_assert!(outcome.is_ok() || !outcome.unwrap_err().errors.is_empty());
        }
    }
}

/// Bits of labfiles, right and wrong ones.
fn word() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "name",
        "image",
        "subnet",
        "ip",
        "mac",
        "count",
        "cpus",
        "memory",
        "disk",
        "disks",
        "forward",
        "role",
        "run",
        "script",
        "on",
        "hint",
        "gateway",
        "source",
        "[network]\n",
        "[node.a]\n",
        "[node.\"w{n}\"]\n",
        "[stack.docker]\n",
        "[[step]]\n",
        "[[check]]\n",
        "[[link]]\n",
        " = ",
        "\n",
        "\"x\"",
        "\"10.0.0.0/8\"",
        "\"10.0.0.255\"",
        "255",
        "-1",
        "true",
        "1.5",
        "[",
        "]",
        "{",
        "}",
        ",",
        ".",
        "\"4GiB\"",
        "\"1-65535:1-65535\"",
        "\"8080:80\"",
        "'''",
        "#",
        "\u{0}",
        "ä",
        "1979-05-27",
    ])
}
